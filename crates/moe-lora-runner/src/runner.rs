//! The stages in order, over one workspace.

use crate::{Plan, RunnerError};
use moe_lora_core::{AdapterTable, Element, InputError, LayerShape, LayerWeights, RowMap};
use moe_lora_gemm::cpu::{self, LayerArgs, Workspace};
use moe_lora_route::Aligner;

/// What the workspace is sized for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens that run at once; larger batches run in pieces, with the same bits.
    pub max_tokens: usize,
    /// Largest rank of any adapter.
    pub max_rank: usize,
}

impl Default for Limits {
    /// 256 tokens: enough rows an expert to be bound by arithmetic in all models of the field. Rank 512, the largest that
    /// peers accept.
    fn default() -> Self {
        Self { max_tokens: 256, max_rank: 512 }
    }
}

/// One batch: hidden states, the experts and the adapter of every token.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a, X> {
    /// `[T, H]`.
    pub hidden: &'a [X],
    /// `[T, k]`; -1 is skipped.
    pub topk_ids: &'a [i32],
    /// `[T, k]`.
    pub topk_weights: &'a [f32],
    /// Adapter slot of every token, -1 for the base model, `[T]`.
    pub token_slots: &'a [i32],
    /// The slots' adapters in this layer.
    pub adapters: &'a AdapterTable<'a>,
}

/// Runs layers of one shape.
#[derive(Debug)]
pub struct MoeRunner {
    shape: LayerShape,
    limits: Limits,
    kernel: Option<cpu::Kernel>,
    aligner: Aligner,
    rows: RowMap,
    workspace: Workspace,
}

impl MoeRunner {
    /// Allocates all that [`forward`](Self::forward) needs.
    ///
    /// # Errors
    /// If a limit is zero or the workspace cannot be counted in memory.
    pub fn new(shape: &LayerShape, limits: Limits) -> Result<Self, RunnerError> {
        if limits.max_tokens == 0 || limits.max_rank == 0 {
            return Err(InputError::new(format!("{limits:?}"), "limits of at least 1").into());
        }
        Ok(Self {
            shape: *shape,
            limits,
            kernel: None,
            aligner: Aligner::new(shape.num_experts, shape.top_k),
            rows: RowMap::default(),
            workspace: Workspace::new(shape, limits.max_tokens, limits.max_rank)?,
        })
    }

    /// Forces an inner kernel, for tests and benchmarks.
    ///
    /// # Errors
    /// If this processor cannot run it.
    pub fn with_kernel(mut self, kernel: cpu::Kernel) -> Result<Self, RunnerError> {
        if !kernel.is_available() {
            let available: Vec<_> = cpu::Kernel::available().collect();
            let expected = format!("one of {available:?}");
            return Err(InputError::new(format!("{kernel:?}"), expected).in_tensor("kernel").into());
        }
        self.kernel = Some(kernel);
        Ok(self)
    }

    /// Bytes of the workspace: a function of the shape and the limits alone.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.size_bytes()
    }

    /// Sizes of the layers that this runner runs.
    #[must_use]
    pub const fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// Computes one layer; every value of `out` `[T, H]` is written. Equal inputs give equal bits, whatever else is in the
    /// batch and however many threads run.
    ///
    /// # Errors
    /// If lengths, ids, ranks or weights do not fit; `out` is unspecified then.
    pub fn forward<X: Element, Y: Element>(
        &mut self,
        weights: &LayerWeights,
        batch: &Batch<'_, X>,
        out: &mut [Y],
    ) -> Result<(), RunnerError> {
        self.validate(weights, batch, out.len())?;
        let kernel = self.kernel.unwrap_or_else(|| Plan::choose(weights.dtype(), X::DTYPE).kernel);
        let (width, top_k) = (self.shape.hidden_size, self.shape.top_k);
        let piece = self.limits.max_tokens;
        let tokens = batch.token_slots.chunks(piece);
        let hidden = batch.hidden.chunks(piece * width).zip(out.chunks_mut(piece * width));
        let routing = batch.topk_ids.chunks(piece * top_k).zip(batch.topk_weights.chunks(piece * top_k));
        for ((slots, (hidden, out)), (topk_ids, topk_weights)) in tokens.zip(hidden).zip(routing) {
            let changes = |slot| batch.adapters.layer(slot).is_some_and(|layer| layer.max_rank() > 0);
            self.aligner.align(topk_ids, topk_weights, slots, changes, &mut self.rows)?;
            let args = LayerArgs { hidden, weights, rows: &self.rows, adapters: batch.adapters };
            cpu::gate_up(&args, kernel, &mut self.workspace)?;
            cpu::down(&args, kernel, &mut self.workspace)?;
            cpu::combine(&args, &mut self.workspace, out)?;
        }
        Ok(())
    }

    fn validate<X>(&self, weights: &LayerWeights, batch: &Batch<'_, X>, out: usize) -> Result<(), InputError> {
        if *weights.shape() != self.shape {
            return Err(InputError::new(format!("{:?}", weights.shape()), format!("{:?}", self.shape))
                .in_tensor("layer weights"));
        }
        let tokens = batch.token_slots.len();
        for (name, found, width) in [
            ("hidden", batch.hidden.len(), self.shape.hidden_size),
            ("topk_ids", batch.topk_ids.len(), self.shape.top_k),
            ("topk_weights", batch.topk_weights.len(), self.shape.top_k),
            ("out", out, self.shape.hidden_size),
        ] {
            if found != tokens * width {
                return Err(InputError::new(format!("{found} values"), format!("[{tokens}, {width}]")).in_tensor(name));
            }
        }
        let rank = batch.adapters.max_rank();
        if rank > self.limits.max_rank {
            return Err(InputError::new(format!("rank {rank}"), format!("at most {}", self.limits.max_rank))
                .in_tensor("adapters"));
        }
        Ok(())
    }
}
