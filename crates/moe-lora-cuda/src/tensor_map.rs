//! Tensor maps: how a kernel's bulk copies find boxes of a tensor in GPU memory.

use crate::GpuError;
use cudarc::driver::DriverError;
use cudarc::driver::sys::{self, CUtensorMapDataType as Type};
use moe_lora_kernels::{
    DecodeDownParams, DecodeGateUpParams, DecodeLayerParams, DecodePlan, DownParams, Format, GateUpParams, LayerPlan,
    PrefillDownParams, PrefillGateUpParams, TensorMap,
};

/// One dimension of a tensor and of the boxes that are copied from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dimension {
    /// Places in the tensor; what a box has beyond them is filled with zeros.
    pub size: u64,
    /// Numbers from place to place: 1 for the first dimension, a multiple of 8 for all others.
    pub stride: u64,
    /// Places in a box.
    pub of_box: u32,
}

/// Encodes the map of a tensor of up to five dimensions, the innermost first. In shared memory a box's rows of 128 bytes are
/// permuted as wgmma wants them. A pure function: nothing is read at `address`, and the GPU is not asked.
///
/// # Errors
/// If the driver refuses: an address or stride that is no multiple of 16 bytes, or sizes out of range.
pub fn tensor_map(format: Format, address: u64, dimensions: &[Dimension]) -> Result<TensorMap, GpuError> {
    const MOST: usize = 5;
    if dimensions.len() > MOST {
        return Err(GpuError::driver("encoding a tensor map", DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE)));
    }
    let (mut sizes, mut strides, mut of_box) = ([0; MOST], [0; MOST], [0; MOST]);
    for (i, dimension) in dimensions.iter().enumerate() {
        (sizes[i], strides[i], of_box[i]) = (dimension.size, dimension.stride * 2, dimension.of_box);
    }
    let steps = [1_u32; MOST];
    let data_type = match format {
        Format::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Format::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays hold at least as many numbers as there are dimensions (one stride less); `address` is not followed.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            data_type,
            dimensions.len() as u32,
            address as usize as *mut _,
            sizes.as_ptr(),
            strides[1..].as_ptr(),
            of_box.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    GpuError::check("encoding a tensor map", result)?;
    Ok(TensorMap { words: map.opaque })
}

/// [`GateUpParams`] with the map of gate and up, of which up must be the later one.
///
/// # Errors
/// If the driver cannot encode it.
pub fn prefill_gate_up(format: Format, gate_up: GateUpParams) -> Result<PrefillGateUpParams, GpuError> {
    Ok(PrefillGateUpParams { weights: gate_up_map(format, &gate_up, 8)?, gate_up })
}

/// [`GateUpParams`] and the list of LoRA chunks with the map of gate and up, of which up must be the later one.
///
/// # Errors
/// If the driver cannot encode it.
pub fn decode_gate_up(
    format: Format,
    gate_up: GateUpParams,
    chunks: u64,
    plan: &DecodePlan,
) -> Result<DecodeGateUpParams, GpuError> {
    Ok(DecodeGateUpParams {
        weights: gate_up_map(format, &gate_up, 4)?,
        gate_up,
        chunks,
        tile_rows: plan.tile_rows,
        stages: plan.gate_up.stages,
        stage_tiles: plan.gate_up.stage_tiles,
        reserved: [0; 3],
    })
}

/// Boxes of 64 numbers of 8 gate rows, 8 up rows and so on, `groups` times.
fn gate_up_map(format: Format, gate_up: &GateUpParams, groups: u32) -> Result<TensorMap, GpuError> {
    let row = u64::from(gate_up.row_stride);
    let dimension = |size: u32, stride, of_box| Dimension { size: size.into(), stride, of_box };
    let dimensions = [
        dimension(gate_up.hidden_size, 1, 64),
        dimension(8, row, 8),
        dimension(2, gate_up.up.saturating_sub(gate_up.gate) / 2, 2),
        dimension(gate_up.intermediate_size / 8, 8 * row, groups),
        dimension(gate_up.num_experts, of_experts(gate_up.num_experts, gate_up.expert_stride), 1),
    ];
    tensor_map(format, gate_up.gate, &dimensions)
}

/// [`DownParams`] with the map of down.
///
/// # Errors
/// If the driver cannot encode it.
pub fn prefill_down(format: Format, down: DownParams) -> Result<PrefillDownParams, GpuError> {
    Ok(PrefillDownParams { weights: down_map(format, &down, 128)?, down })
}

/// Boxes of 64 numbers of `rows` rows.
fn down_map(format: Format, down: &DownParams, rows: u32) -> Result<TensorMap, GpuError> {
    let dimension = |size: u32, stride, of_box| Dimension { size: size.into(), stride, of_box };
    let dimensions = [
        dimension(down.intermediate_size, 1, 64),
        dimension(down.hidden_size, u64::from(down.row_stride), rows),
        dimension(down.num_experts, of_experts(down.num_experts, down.expert_stride), 1),
    ];
    tensor_map(format, down.down, &dimensions)
}

/// [`DownParams`], without rows, as the launch that sums over experts too: `rest` has the lists of rows and chunks, the output, and
/// the sizes of the batch.
///
/// # Errors
/// If the driver cannot encode the map of down.
pub fn decode_down(
    format: Format,
    down: &DownParams,
    plan: &DecodePlan,
    rest: DecodeDownParams,
) -> Result<DecodeDownParams, GpuError> {
    Ok(DecodeDownParams {
        weights: down_map(format, down, 64)?,
        intermediate: down.intermediate,
        bias: down.bias,
        tiles: down.tiles,
        counts: down.counts,
        adapters: down.adapters,
        shrunk: down.shrunk,
        num_experts: down.num_experts,
        hidden_size: down.hidden_size,
        intermediate_size: down.intermediate_size,
        max_rank: down.shrunk_stride / 2,
        planes: plan.planes,
        tile_rows: plan.tile_rows,
        stages: plan.down.stages,
        stage_tiles: plan.down.stage_tiles,
        cluster: plan.cluster,
        max_tiles: plan.max_tiles,
        lora_steps: plan.lora_steps,
        ..rest
    })
}

/// [`GateUpParams`] and [`DownParams`], without lists and rows, as one launch: `rest` has what comes from neither, the batch and its
/// sizes. Up must be the later one, H and I multiples of 64.
///
/// # Errors
/// If the driver cannot encode the maps.
pub fn decode_layer(
    format: Format,
    gate_up: &GateUpParams,
    down: &DownParams,
    plan: &LayerPlan,
    rest: DecodeLayerParams,
) -> Result<DecodeLayerParams, GpuError> {
    let dimension = |size: u32, stride: u64, of_box| Dimension { size: size.into(), stride, of_box };
    let GateUpParams { num_experts, hidden_size, intermediate_size, .. } = *gate_up;
    let of_gate_up = [
        dimension(64, 1, 64),
        dimension(intermediate_size, gate_up.row_stride.into(), 16),
        dimension(hidden_size / 64, 64, 4),
        dimension(2, gate_up.up.saturating_sub(gate_up.gate) / 2, 2),
        dimension(num_experts, of_experts(num_experts, gate_up.expert_stride), 1),
    ];
    let of_down = [
        dimension(64, 1, 64),
        dimension(hidden_size, down.row_stride.into(), plan.down_features),
        dimension(intermediate_size / 64, 64, plan.down_pieces),
        dimension(num_experts, of_experts(num_experts, down.expert_stride), 1),
    ];
    let rest = DecodeLayerParams {
        gate_up: tensor_map(format, gate_up.gate, &of_gate_up)?,
        down: tensor_map(format, down.down, &of_down)?,
        hidden: gate_up.hidden,
        gate_bias: gate_up.gate_bias,
        up_bias: gate_up.up_bias,
        down_bias: down.bias,
        adapters: gate_up.adapters,
        intermediate: gate_up.intermediate,
        top_k: gate_up.top_k,
        num_experts,
        hidden_size,
        intermediate_size,
        max_rank: gate_up.max_rank,
        activation: gate_up.activation,
        weigh_input: gate_up.weigh_input,
        alpha: gate_up.alpha,
        limit: gate_up.limit,
        ..rest
    };
    Ok(rest.with_plan(plan))
}

/// The stride of one expert alone may be anything.
const fn of_experts(num_experts: u32, stride: u64) -> u64 {
    if num_experts == 1 { 8 } else { stride }
}
