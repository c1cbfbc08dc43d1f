//! Base weights in GPU memory.

use super::raw::ForwardArgs;
use crate::RunnerError;
use half::{bf16, f16};
use moe_lora_core::{
    Activation, DType, Element, ExpertBias, ExpertWeights, LayerShape, LayerWeights, RouterWeightPlacement,
};
use moe_lora_cuda::{DeviceBuffer, Gpu, GpuError, Stream};
use moe_lora_pool::CudaMemory;

/// The base weights of one layer on a GPU, in f16 if they are f16, else in bf16: f32 weights are rounded.
#[derive(Debug)]
pub struct CudaWeights {
    pub(super) ordinal: usize,
    shape: LayerShape,
    dtype: DType,
    /// `[E, 2I, H]`, gate first.
    w13: DeviceBuffer,
    /// `[E, H, I]`.
    w2: DeviceBuffer,
    /// f32 `[E, I]`, `[E, I]` and `[E, H]`.
    bias: Option<[DeviceBuffer; 3]>,
    activation: Activation,
    router_weight: RouterWeightPlacement,
    routed_scaling_factor: f32,
}

impl CudaWeights {
    /// Copies a layer, expert by expert.
    ///
    /// # Errors
    /// If the GPU's kernels cannot run a layer of these sizes, or its memory does not suffice.
    pub fn upload(gpu: &Gpu, weights: &LayerWeights) -> Result<Self, RunnerError> {
        CudaMemory::check_shape(weights.shape())?;
        let stream = gpu.stream()?;
        let dtype = CudaMemory::dtype(weights.dtype());
        let (w13, w2) = match dtype {
            DType::F16 => matrices::<f16>(gpu, &stream, weights),
            _ => matrices::<bf16>(gpu, &stream, weights),
        }?;
        let biases = |pick: fn(&ExpertBias) -> &Vec<f32>| {
            let values: Vec<f32> =
                weights.experts().iter().filter_map(|e| e.bias.as_ref()).flat_map(pick).copied().collect();
            let buffer = gpu.alloc(size_of_val(&values[..]))?;
            stream.upload(&buffer, 0, &values)?;
            Ok::<_, GpuError>(buffer)
        };
        let bias = match weights.experts().iter().any(|e| e.bias.is_some()) {
            true => Some([biases(|b| &b.gate)?, biases(|b| &b.up)?, biases(|b| &b.down)?]),
            false => None,
        };
        Ok(Self {
            ordinal: gpu.info().ordinal,
            shape: *weights.shape(),
            dtype,
            w13,
            w2,
            bias,
            activation: weights.activation(),
            router_weight: weights.router_weight(),
            routed_scaling_factor: weights.routed_scaling_factor(),
        })
    }

    /// Sizes.
    #[must_use]
    pub const fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// The format on the GPU.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of GPU memory.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        let bias: usize = self.bias.iter().flatten().map(DeviceBuffer::bytes).sum();
        self.w13.bytes() + self.w2.bytes() + bias
    }

    /// What the raw door has to know of this layer: all but tokens, adapters, output and workspace. The addresses are good as
    /// long as `self`.
    #[must_use]
    pub fn args(&self) -> ForwardArgs {
        let LayerShape { num_experts, top_k, hidden_size, intermediate_size, first_expert, .. } = self.shape;
        let [gate_bias, up_bias, down_bias] =
            self.bias.as_ref().map_or([0; 3], |b| [b[0].address(), b[1].address(), b[2].address()]);
        let dtype = ForwardArgs::dtype_code(self.dtype);
        ForwardArgs {
            gate_bias,
            up_bias,
            down_bias,
            num_experts: num_experts as u32,
            top_k: top_k as u32,
            hidden_size: hidden_size as u32,
            intermediate_size: intermediate_size as u32,
            dtype,
            out_dtype: dtype,
            weigh_input: u32::from(self.router_weight == RouterWeightPlacement::Input),
            scaling: self.routed_scaling_factor,
            first_expert: first_expert as u32,
            all_experts: self.shape.all_experts() as u32,
            adapter_part: self.shape.adapter_part.index() as u32,
            adapter_parts: self.shape.adapter_part.of() as u32,
            ..Default::default()
        }
        .with_w13(self.w13.address(), false)
        .with_w2(self.w2.address())
        .with_activation(self.activation)
    }
}

fn matrices<T: Element>(
    gpu: &Gpu,
    stream: &Stream,
    weights: &LayerWeights,
) -> Result<(DeviceBuffer, DeviceBuffer), GpuError> {
    let LayerShape { num_experts, hidden_size, intermediate_size, .. } = *weights.shape();
    let expert_bytes = intermediate_size * hidden_size * size_of::<T>();
    let w13 = gpu.alloc(num_experts * 2 * expert_bytes)?;
    let w2 = gpu.alloc(num_experts * expert_bytes)?;
    for (e, ExpertWeights { gate, up, down, .. }) in weights.experts().iter().enumerate() {
        stream.upload(&w13, 2 * e * expert_bytes, &gate.to_vec::<T>())?;
        stream.upload(&w13, (2 * e + 1) * expert_bytes, &up.to_vec::<T>())?;
        stream.upload(&w2, e * expert_bytes, &down.to_vec::<T>())?;
    }
    Ok((w13, w2))
}
