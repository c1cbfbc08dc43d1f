//! The stages in order, over one workspace, on the processor.

use crate::batch::check_whole;
use crate::{Batch, Limits, Plan, RunnerError};
use moe_lora_core::{Element, InputError, LayerShape, LayerWeights, RowMap};
use moe_lora_gemm::GemmError;
use moe_lora_gemm::cpu::{self, LayerArgs, Workspace};
use moe_lora_route::Aligner;

/// Runs layers of one shape on the processor.
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
        limits.check()?;
        Ok(Self {
            shape: *shape,
            limits,
            kernel: None,
            aligner: Aligner::of(shape),
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

    /// What it takes at once.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Computes one layer; every value of `out` `[T, H]` is written. Equal inputs give equal bits, whatever else is in the
    /// batch and however many threads run.
    ///
    /// # Errors
    /// If lengths, ids, ranks or weights do not fit; `out` is unspecified then. If adapters are parts, which need an exchange.
    pub fn forward<X: Element, Y: Element>(
        &mut self,
        weights: &LayerWeights,
        batch: &Batch<'_, X>,
        out: &mut [Y],
    ) -> Result<(), RunnerError> {
        check_whole(&self.shape)?;
        self.forward_exchanging(weights, batch, |_| Ok(()), out)
    }

    /// [`forward`](Self::forward) of a rank with parts of fully sharded adapters: `exchange` is called twice for every piece of up to
    /// [`max_tokens`](Limits::max_tokens) tokens, and replaces the values that it is given, if any, by their sums over the ranks of
    /// the tensor-parallel group. Where adapters are whole it is not called.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and those of `exchange`.
    pub fn forward_exchanging<X: Element, Y: Element, E: From<RunnerError>>(
        &mut self,
        weights: &LayerWeights,
        batch: &Batch<'_, X>,
        mut exchange: impl FnMut(&mut [f32]) -> Result<(), E>,
        out: &mut [Y],
    ) -> Result<(), E> {
        batch.check(&self.shape, weights.shape(), out.len()).map_err(RunnerError::from)?;
        self.limits.check_rank(batch.adapters.max_rank()).map_err(RunnerError::from)?;
        let kernel = self.kernel.unwrap_or_else(|| Plan::choose(weights.dtype(), X::DTYPE).kernel);
        let (width, top_k) = (self.shape.hidden_size, self.shape.top_k);
        let piece = self.limits.max_tokens;
        let tokens = batch.token_slots.chunks(piece);
        let hidden = batch.hidden.chunks(piece * width).zip(out.chunks_mut(piece * width));
        let routing = batch.topk_ids.chunks(piece * top_k).zip(batch.topk_weights.chunks(piece * top_k));
        for ((slots, (hidden, out)), (topk_ids, topk_weights)) in tokens.zip(hidden).zip(routing) {
            let changes = |slot| batch.adapters.layer(slot).is_some_and(|layer| layer.max_rank() > 0);
            self.aligner
                .align(topk_ids, topk_weights, slots, changes, &mut self.rows)
                .map_err(|error| E::from(error.into()))?;
            let args = LayerArgs { hidden, weights, rows: &self.rows, adapters: batch.adapters };
            let workspace = &mut self.workspace;
            cpu::gate_up_exchanging(&args, kernel, workspace, |s| exchange(s).map_err(Stop::Exchange))
                .map_err(Stop::into)?;
            cpu::down_exchanging(&args, kernel, workspace, |s| exchange(s).map_err(Stop::Exchange))
                .map_err(Stop::into)?;
            cpu::combine(&args, workspace, out).map_err(|error| E::from(error.into()))?;
        }
        Ok(())
    }
}

/// Why a stage stopped.
enum Stop<E> {
    Stage(GemmError),
    Exchange(E),
}

impl<E> From<GemmError> for Stop<E> {
    fn from(error: GemmError) -> Self {
        Self::Stage(error)
    }
}

impl<E: From<RunnerError>> Stop<E> {
    fn into(self) -> E {
        match self {
            Self::Stage(error) => RunnerError::from(error).into(),
            Self::Exchange(error) => error,
        }
    }
}
