//! The module.

use candle_core::{DType, Error, Result, Storage, Tensor, WithDType, bail};
use half::{bf16, f16};
use moe_lora::{Element, FusedMoEWithLoRA, Routing, TokenAdapters};

/// Where a token's experts come from.
#[derive(Debug, Clone, Copy)]
pub enum TensorRouting<'a> {
    /// The layer's own router.
    Router,
    /// Router logits `[T, E]`, f32; the layer's router settings decide.
    Logits(&'a Tensor),
    /// The choice was made elsewhere.
    Selected {
        /// `[T, k]`, i32, i64 or u32; -1, or `u32::MAX`, is skipped.
        topk_ids: &'a Tensor,
        /// `[T, k]`, f32, used as they are.
        topk_weights: &'a Tensor,
    },
}

/// A MoE block whose tokens each name their own adapter.
#[derive(Debug)]
pub struct MoeWithLora {
    layer: FusedMoEWithLoRA,
}

impl MoeWithLora {
    /// Wraps a layer, of a checkpoint for instance.
    #[must_use]
    pub const fn new(layer: FusedMoEWithLoRA) -> Self {
        Self { layer }
    }

    /// The layer.
    #[must_use]
    pub const fn layer(&self) -> &FusedMoEWithLoRA {
        &self.layer
    }

    /// The routed experts' output for `hidden` `[.., H]`, in its shape and format. `adapters` has one entry a token, in the
    /// order of the rows. Gradients do not flow through it.
    ///
    /// # Errors
    /// If a tensor is not on candle's CPU device, of another format or shape than said, or the layer refuses: the message
    /// says what was found and what was expected.
    pub fn forward(&self, hidden: &Tensor, routing: TensorRouting<'_>, adapters: &TokenAdapters) -> Result<Tensor> {
        self.check(hidden, &routing, adapters.ids().len())?;
        match hidden.dtype() {
            DType::F32 => self.typed::<f32>(hidden, routing, adapters),
            DType::F16 => self.typed::<f16>(hidden, routing, adapters),
            DType::BF16 => self.typed::<bf16>(hidden, routing, adapters),
            other => bail!("hidden states in {other:?}, where f32, f16 or bf16 were expected"),
        }
    }

    /// That shapes fit a number of tokens.
    fn check(&self, hidden: &Tensor, routing: &TensorRouting<'_>, tokens: usize) -> Result<()> {
        let shape = self.layer.shape();
        let width = shape.hidden_size;
        if hidden.dims().last() != Some(&width) || hidden.elem_count() != tokens * width {
            bail!("hidden states {:?} of {tokens} tokens, where [.., {width}] was expected", hidden.dims());
        }
        let rows = |name: &str, tensor: &Tensor, width: usize| {
            if tensor.dims() == [tokens, width] {
                return Ok(());
            }
            bail!("{name} {:?}, where [{tokens}, {width}] was expected", tensor.dims())
        };
        match routing {
            TensorRouting::Router => Ok(()),
            TensorRouting::Logits(logits) => rows("logits", logits, shape.num_experts),
            TensorRouting::Selected { topk_ids, topk_weights } => {
                rows("topk_ids", topk_ids, shape.top_k)?;
                rows("topk_weights", topk_weights, shape.top_k)
            }
        }
    }

    fn typed<X: Element + WithDType>(
        &self,
        hidden: &Tensor,
        routing: TensorRouting<'_>,
        adapters: &TokenAdapters,
    ) -> Result<Tensor> {
        let mut out = vec![X::from_f32(0.0); hidden.elem_count()];
        let mut run = |routing: Routing<'_>| {
            with_numbers(hidden, |x: &[X]| self.layer.forward(x, routing, adapters, &mut out).map_err(Error::wrap))
        };
        match routing {
            TensorRouting::Router => run(Routing::Router),
            TensorRouting::Logits(logits) => with_numbers(logits, |logits| run(Routing::Logits(logits))),
            TensorRouting::Selected { topk_ids, topk_weights } => {
                let topk_ids = integers(topk_ids)?;
                with_numbers(topk_weights, |topk_weights| run(Routing::Selected { topk_ids: &topk_ids, topk_weights }))
            }
        }?;
        Tensor::from_vec(out, hidden.shape(), hidden.device())
    }
}

fn integers(tensor: &Tensor) -> Result<Vec<i32>> {
    let flat = tensor.flatten_all()?;
    match flat.dtype() {
        DType::I32 => flat.to_vec1(),
        // As engines without signed integers write -1.
        DType::U32 => Ok(flat.to_vec1::<u32>()?.into_iter().map(u32::cast_signed).collect()),
        _ => flat.to_vec1::<i64>()?.into_iter().map(|id| i32::try_from(id).map_err(Error::wrap)).collect(),
    }
}

/// Calls `f` with a tensor's numbers, in place if they lie densely in order.
fn with_numbers<T: WithDType, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(cpu) = &*storage else {
        bail!("a tensor on {:?}, where one on candle's CPU device was expected", tensor.device().location())
    };
    let first = layout.start_offset();
    match cpu.as_slice::<T>()?.get(first..first + tensor.elem_count()) {
        Some(numbers) => f(numbers),
        None => bail!("a tensor outside its storage"),
    }
}
