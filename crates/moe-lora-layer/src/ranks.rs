//! What a layer has to know if it is one rank's part.

use crate::LayerError;
use crate::stages::lock;
use moe_lora_collective::Communicator;
use moe_lora_core::{Element, InputError, LayerShape, Shard, Share};
use std::sync::{Arc, Mutex};

#[derive(Debug)]
pub(crate) struct Ranks {
    whole: LayerShape,
    share: Share,
    communicator: Option<Arc<dyn Communicator>>,
    scratch: Mutex<Scratch>,
}

/// Kept from call to call for its memory.
#[derive(Debug, Default)]
struct Scratch {
    local_ids: Vec<i32>,
    sums: Vec<f32>,
}

impl Ranks {
    pub(crate) fn new(
        whole: &LayerShape,
        shard: &Shard,
        weights: &LayerShape,
        communicator: Option<Arc<dyn Communicator>>,
    ) -> Result<Self, InputError> {
        let share = shard.share(whole)?;
        if share.shape != *weights {
            return Err(InputError::new(format!("{weights:?}"), format!("{:?}, the share of {shard:?}", share.shape))
                .in_tensor("layer weights"));
        }
        if let Some(communicator) = &communicator
            && (communicator.rank(), communicator.size()) != (shard.rank(), shard.world_size())
        {
            let found = format!("rank {} of {}", communicator.rank(), communicator.size());
            let expected = format!("rank {} of {}", shard.rank(), shard.world_size());
            return Err(InputError::new(found, expected).in_tensor("communicator"));
        }
        Ok(Self { whole: *whole, share, communicator, scratch: Mutex::default() })
    }

    pub(crate) const fn whole(&self) -> &LayerShape {
        &self.whole
    }

    /// Whether ids need no mapping and the output no sum.
    #[cfg(feature = "cuda")]
    pub(crate) const fn is_plain(&self) -> bool {
        self.communicator.is_none() && self.share.shape.num_experts == self.whole.num_experts
    }

    /// Numbers experts as this rank does; those of other ranks become -1, like those that were -1 before.
    pub(crate) fn localize(&self, topk_ids: &[i32], local: &mut Vec<i32>) -> Result<(), InputError> {
        let (experts, top_k) = (self.whole.num_experts, self.whole.top_k);
        local.clear();
        for (pair, &id) in topk_ids.iter().enumerate() {
            local.push(match usize::try_from(id) {
                Ok(e) if self.share.experts.contains(&e) => (e - self.share.experts.start) as i32,
                Ok(e) if e < experts => -1,
                Err(_) if id == -1 => -1,
                _ => {
                    let found = format!("expert {id} for token {} at place {}", pair / top_k, pair % top_k);
                    return Err(InputError::new(found, format!("-1 to {}", experts - 1)).in_tensor("topk_ids"));
                }
            });
        }
        Ok(())
    }

    /// Lets `run` compute this rank's sums in f32, or all ranks' with the communicator that it is given; rounds them to `out`.
    /// A failure of this rank's own is told to the others, who would wait for it.
    pub(crate) fn forward<Y: Element>(
        &self,
        out: &mut [Y],
        run: impl FnOnce(Option<&dyn Communicator>, &mut Vec<i32>, &mut [f32]) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        let Scratch { local_ids, sums } = &mut *lock(&self.scratch);
        sums.clear();
        sums.resize(out.len(), 0.0);
        let communicator = self.communicator.as_deref();
        match (run(communicator, local_ids, sums), communicator) {
            (Ok(()), _) => {}
            (Err(error), Some(others)) if !matches!(error, LayerError::Collective(_)) => {
                others.fail(&error.to_string());
                return Err(error);
            }
            (Err(error), _) => return Err(error),
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = Y::from_f32(*sum));
        Ok(())
    }
}
