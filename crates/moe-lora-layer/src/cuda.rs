//! Forwards of tensors that are in GPU memory already, and forwards as CUDA graphs.

use crate::stages::lock;
use crate::{FusedMoEWithLoRA, LayerError};
use moe_lora_core::{Element, InputError, TokenAdapters};
use moe_lora_pool::AdapterPool;
use moe_lora_runner::slices::{BatchSlices, CudaStream, CudaViewMut, Number};
use moe_lora_runner::{CapturedForward, CudaRunner};
use std::sync::{Arc, Mutex};

impl FusedMoEWithLoRA {
    /// Gives `out [T, H]` of a batch in GPU memory to a stream, and returns without waiting for it. `X` is the layer's format,
    /// `Y` that or f32. Ids that are no expert are skipped; nothing else of the batch is looked at on the host.
    ///
    /// # Errors
    /// If the layer is on the CPU, lengths, formats or GPUs do not fit, or an adapter was unloaded or evicted. If it is a
    /// [rank's part](Self::with_shard) that sums: engines sum the output of a part without a communicator.
    pub fn forward_on<X: Element, Y: Element>(
        &self,
        stream: &Arc<CudaStream>,
        batch: &BatchSlices<'_, X>,
        tokens: &TokenAdapters,
        out: &mut CudaViewMut<'_, Y>,
    ) -> Result<(), LayerError> {
        self.check_on_gpu()?;
        let (weights, runner) = self.stages.cuda()?;
        let lease = self.pool.lease(tokens)?;
        Ok(lock(runner).forward_on(stream, weights, batch, &lease.device_table(self.index)?, out)?)
    }

    /// Captures a forward of `tokens` tokens as a graph that runs on `stream`, which may not be the default stream. `X` is the
    /// layer's format, `Y` that or f32. It shares the layer's workspace.
    ///
    /// # Errors
    /// If the layer is on the CPU, there are no tokens or more than the layer's limit, formats or GPUs do not fit, or memory
    /// does not suffice. If it is a part that [`forward_on`](Self::forward_on) refuses.
    pub fn capture<X: Number, Y: Number>(
        &self,
        stream: &Arc<CudaStream>,
        tokens: usize,
    ) -> Result<LayerGraph<X, Y>, LayerError> {
        self.check_on_gpu()?;
        let (weights, runner) = self.stages.cuda()?;
        let lease = self.pool.lease(&TokenAdapters::base(tokens))?;
        let captured = lock(runner).capture(stream, weights, &lease.device_table(self.index)?, tokens)?;
        Ok(LayerGraph { captured, runner: Arc::clone(runner), pool: self.pool.clone(), index: self.index })
    }

    /// A caller's output cannot be summed here.
    fn check_on_gpu(&self) -> Result<(), InputError> {
        match &self.ranks {
            Some(ranks) if ranks.sums() => {
                let expected = "a layer whose output is not summed";
                Err(InputError::new("a rank's part", expected).in_tensor("layer"))
            }
            _ => Ok(()),
        }
    }
}

/// A captured forward of one layer, good for any tokens, experts and adapters.
#[derive(Debug)]
pub struct LayerGraph<X, Y> {
    captured: CapturedForward<X, Y>,
    runner: Arc<Mutex<CudaRunner>>,
    pool: AdapterPool,
    index: usize,
}

impl<X, Y> LayerGraph<X, Y> {
    /// What to write before a replay, and what to read after it.
    pub const fn tensors(&mut self) -> &mut CapturedForward<X, Y> {
        &mut self.captured
    }

    /// Gives the graph to its stream, and returns without waiting for it.
    ///
    /// # Errors
    /// If `tokens` is for another number of tokens, or an adapter was unloaded or evicted.
    pub fn replay(&mut self, tokens: &TokenAdapters) -> Result<(), LayerError> {
        let lease = self.pool.lease(tokens)?;
        Ok(lock(&self.runner).replay(&mut self.captured, &lease.device_table(self.index)?)?)
    }
}
