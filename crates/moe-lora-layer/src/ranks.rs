//! What a layer has to know if it is one rank's part.

use crate::LayerError;
use crate::stages::{Group, Stages, lock};
use moe_lora_collective::Communicator;
use moe_lora_core::{Element, InputError, LayerShape, Shard};
use std::sync::{Arc, Mutex};

#[derive(Debug)]
pub(crate) struct Ranks {
    whole: LayerShape,
    shard: Shard,
    /// Whether adapters are parts.
    fully_sharded: bool,
    communicator: Option<Arc<dyn Communicator>>,
    /// The ranks that hold parts of the same adapters.
    adapter_group: Option<Arc<dyn Communicator>>,
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
        if let Some(communicator) = &communicator {
            check_rank(&**communicator, shard.rank(), shard.world_size(), "communicator")?;
        }
        let fully_sharded = !share.shape.adapter_part.is_whole();
        let (whole, shard, sums) = (*whole, *shard, Mutex::default());
        Ok(Self { whole, shard, fully_sharded, communicator, adapter_group: None, sums })
    }

    pub(crate) fn set_adapter_group(&mut self, group: Arc<dyn Communicator>) -> Result<(), InputError> {
        check_rank(&*group, self.shard.tp_rank(), self.shard.tp_size(), "adapter group")?;
        self.adapter_group = Some(group).filter(|_| self.fully_sharded);
        Ok(())
    }

    pub(crate) const fn whole(&self) -> &LayerShape {
        &self.whole
    }

    /// Whether the output is summed.
    #[cfg(feature = "cuda")]
    pub(crate) const fn sums(&self) -> bool {
        self.communicator.is_some()
    }

    /// Lets `run` compute this rank's sums in f32, or all ranks' with the groups that it is given; rounds them to `out`.
    /// A failure is told to those who would wait for this rank. `stages` says how often `run` meets them.
    pub(crate) fn forward<Y: Element>(
        &self,
        stages: &Stages,
        out: &mut [Y],
        run: impl FnOnce((Option<&Group<'_>>, Option<&Group<'_>>), &mut [f32]) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        if self.fully_sharded && self.adapter_group.is_none() {
            let found = "fully sharded adapters without a group";
            return Err(InputError::new(found, "a layer `with_adapter_group`").in_tensor("layer").into());
        }
        let sums = &mut *lock(&self.sums);
        sums.clear();
        sums.resize(out.len(), 0.0);
        let all = self.communicator.as_deref().map(Group::new);
        let group = self.adapter_group.as_deref().map(Group::new);
        if let Err(error) = run((all.as_ref(), group.as_ref()), sums) {
            let (pieces, outs) = stages.pieces(out.len() / self.whole.hidden_size);
            for (group, sums) in [(group, 2 * pieces), (all, outs)] {
                if let Some(group) = group {
                    group.fail(sums, &error.to_string());
                }
            }
            return Err(error);
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = Y::from_f32(*sum));
        Ok(())
    }
}

fn check_rank(group: &dyn Communicator, rank: usize, size: usize, name: &str) -> Result<(), InputError> {
    if (group.rank(), group.size()) == (rank, size) {
        return Ok(());
    }
    let found = format!("rank {} of {}", group.rank(), group.size());
    Err(InputError::new(found, format!("rank {rank} of {size}")).in_tensor(name))
}
