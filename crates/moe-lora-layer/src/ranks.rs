//! What a layer has to know if it is one rank's part.

use crate::LayerError;
use crate::stages::lock;
use moe_lora_collective::Communicator;
use moe_lora_core::{Element, InputError, LayerShape, Shard};
use std::sync::{Arc, Mutex};

#[derive(Debug)]
pub(crate) struct Ranks {
    whole: LayerShape,
    communicator: Option<Arc<dyn Communicator>>,
    /// Kept from call to call for its memory.
    sums: Mutex<Vec<f32>>,
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
        Ok(Self { whole: *whole, communicator, sums: Mutex::default() })
    }

    pub(crate) const fn whole(&self) -> &LayerShape {
        &self.whole
    }

    /// Whether the output is summed.
    #[cfg(feature = "cuda")]
    pub(crate) const fn sums(&self) -> bool {
        self.communicator.is_some()
    }

    /// Lets `run` compute this rank's sums in f32, or all ranks' with the communicator that it is given; rounds them to `out`.
    /// A failure of this rank's own is told to the others, who would wait for it.
    pub(crate) fn forward<Y: Element>(
        &self,
        out: &mut [Y],
        run: impl FnOnce(Option<&dyn Communicator>, &mut [f32]) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        let sums = &mut *lock(&self.sums);
        sums.clear();
        sums.resize(out.len(), 0.0);
        let communicator = self.communicator.as_deref();
        match (run(communicator, sums), communicator) {
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
