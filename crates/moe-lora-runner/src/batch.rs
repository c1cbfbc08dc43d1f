//! What goes into a forward, and how much of it at once.

use moe_lora_core::{AdapterTable, InputError, LayerShape};

/// What the workspace is sized for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens that run at once; larger batches run in pieces.
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

impl Limits {
    pub(crate) fn check(&self) -> Result<(), InputError> {
        if self.max_tokens == 0 || self.max_rank == 0 {
            return Err(InputError::new(format!("{self:?}"), "limits of at least 1"));
        }
        Ok(())
    }

    pub(crate) fn check_rank(&self, rank: usize) -> Result<(), InputError> {
        if rank > self.max_rank {
            return Err(
                InputError::new(format!("rank {rank}"), format!("at most {}", self.max_rank)).in_tensor("adapters")
            );
        }
        Ok(())
    }
}

/// One batch: hidden states, the experts and the adapter of every token. `A` is the kind of table that the runner reads.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a, X, A = &'a AdapterTable<'a>> {
    /// `[T, H]`.
    pub hidden: &'a [X],
    /// `[T, k]`: experts of all ranks; those of other ranks are skipped, as is -1.
    pub topk_ids: &'a [i32],
    /// `[T, k]`.
    pub topk_weights: &'a [f32],
    /// Adapter slot of every token, -1 for the base model, `[T]`.
    pub token_slots: &'a [i32],
    /// The slots' adapters in this layer.
    pub adapters: A,
}

impl<'a, X, A> Batch<'a, X, A> {
    /// The same tokens with another kind of table.
    pub const fn with_adapters<B: Copy>(&self, adapters: B) -> Batch<'a, X, B> {
        let Self { hidden, topk_ids, topk_weights, token_slots, .. } = *self;
        Batch { hidden, topk_ids, topk_weights, token_slots, adapters }
    }

    /// Whether the batch is one for layers of `weights` shape on a runner for `shape`, with room for the output.
    pub(crate) fn check(&self, shape: &LayerShape, weights: &LayerShape, out: usize) -> Result<(), InputError> {
        if weights != shape {
            return Err(InputError::new(format!("{weights:?}"), format!("{shape:?}")).in_tensor("layer weights"));
        }
        let tokens = self.token_slots.len();
        for (name, found, width) in [
            ("hidden", self.hidden.len(), shape.hidden_size),
            ("topk_ids", self.topk_ids.len(), shape.top_k),
            ("topk_weights", self.topk_weights.len(), shape.top_k),
            ("out", out, shape.hidden_size),
        ] {
            if found != tokens * width {
                return Err(InputError::new(format!("{found} values"), format!("[{tokens}, {width}]")).in_tensor(name));
            }
        }
        Ok(())
    }
}

/// Parts of adapters give nothing useful alone.
pub(crate) fn check_whole(shape: &LayerShape) -> Result<(), InputError> {
    if shape.adapter_part.is_whole() {
        return Ok(());
    }
    let found = format!("{:?}", shape.adapter_part);
    Err(InputError::new(found, "whole adapters, or a way to exchange what parts give").in_tensor("adapters"))
}
