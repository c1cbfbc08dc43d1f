//! A module from candle's own weights.

use crate::MoeWithLora;
use candle_core::{DType, Error, Result, Tensor, bail};
use candle_nn::VarBuilder;
use half::{bf16, f16};
use moe_lora::{
    Activation, AdapterPool, Device, Element, ExpertWeights, FusedMoEWithLoRA, LayerShape, LayerWeights, Matrix,
    RouterConfig, RouterWeights,
};

/// What a `VarBuilder` does not say about a block.
#[derive(Debug, Clone, Copy)]
pub struct BlockConfig {
    /// Absolute decoder layer, as adapters number it.
    pub layer: usize,
    /// Sizes.
    pub shape: LayerShape,
    /// How gate and up join.
    pub activation: Activation,
    /// How experts are chosen.
    pub router: RouterConfig,
}

impl MoeWithLora {
    /// Reads a block in transformers' names: `gate.weight` (the router, if it is there), and either
    /// `experts.{e}.{gate,up,down}_proj.weight` or the 3-D `experts.gate_up_proj` `[E, 2I, H]` (gate rows first) and
    /// `experts.down_proj` `[E, H, I]`. Weights are copied out of candle's storage, in their format.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape, formats are mixed or unknown, or the layer refuses.
    pub fn from_var_builder(
        weights: VarBuilder<'_>,
        config: BlockConfig,
        device: &Device,
        pool: &AdapterPool,
    ) -> Result<Self> {
        let LayerShape { num_experts, hidden_size: h, intermediate_size: i, .. } = config.shape;
        let experts = weights.pp("experts");
        let each: Vec<ExpertWeights> = if experts.contains_tensor("gate_up_proj") {
            let gate_up = matrix(&experts.get((num_experts, 2 * i, h), "gate_up_proj")?, num_experts * 2 * i, h)?;
            let down = matrix(&experts.get((num_experts, h, i), "down_proj")?, num_experts * h, i)?;
            let rows = |matrix: &Matrix, first, count| matrix.select_rows(first, count, 1).map_err(Error::wrap);
            let expert = |e: usize| {
                Ok(ExpertWeights {
                    gate: rows(&gate_up, 2 * e * i, i)?,
                    up: rows(&gate_up, (2 * e + 1) * i, i)?,
                    down: rows(&down, e * h, h)?,
                    bias: None,
                })
            };
            (0..num_experts).map(expert).collect::<Result<_>>()?
        } else {
            let expert = |e: usize| {
                let one = experts.pp(e);
                let read = |name: &str, out, inner| matrix(&one.pp(name).get((out, inner), "weight")?, out, inner);
                let (gate, up) = (read("gate_proj", i, h)?, read("up_proj", i, h)?);
                Ok(ExpertWeights { gate, up, down: read("down_proj", h, i)?, bias: None })
            };
            (0..num_experts).map(expert).collect::<Result<_>>()?
        };
        let layer_weights = LayerWeights::new(config.shape, each, config.activation).map_err(Error::wrap)?;
        let mut layer = FusedMoEWithLoRA::new(config.layer, layer_weights, device, pool).map_err(Error::wrap)?;
        let router = weights.pp("gate");
        if router.contains_tensor("weight") {
            let weight = matrix(&router.get((num_experts, h), "weight")?, num_experts, h)?;
            let router = RouterWeights { weight, bias: None, selection_bias: None, config: config.router };
            layer = layer.with_router(router).map_err(Error::wrap)?;
        }
        Ok(Self::new(layer))
    }
}

fn matrix(tensor: &Tensor, rows: usize, cols: usize) -> Result<Matrix> {
    fn copy<T: Element + candle_core::WithDType>(tensor: &Tensor, rows: usize, cols: usize) -> Result<Matrix> {
        Matrix::from_vec(tensor.flatten_all()?.to_vec1::<T>()?, rows, cols).map_err(Error::wrap)
    }
    match tensor.dtype() {
        DType::F32 => copy::<f32>(tensor, rows, cols),
        DType::F16 => copy::<f16>(tensor, rows, cols),
        DType::BF16 => copy::<bf16>(tensor, rows, cols),
        other => bail!("weights in {other:?}, where f32, f16 or bf16 were expected"),
    }
}
