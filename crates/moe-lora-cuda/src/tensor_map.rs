//! Tensor maps: how a kernel's bulk copies find boxes of a tensor in GPU memory.

use crate::GpuError;
use cudarc::driver::sys::{self, CUtensorMapDataType as Type};
use moe_lora_kernels::{Format, TensorMap};

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
    let sizes: Vec<u64> = dimensions.iter().map(|d| d.size).collect();
    let strides: Vec<u64> = dimensions.iter().skip(1).map(|d| d.stride * 2).collect();
    let of_box: Vec<u32> = dimensions.iter().map(|d| d.of_box).collect();
    let steps = vec![1_u32; dimensions.len()];
    let data_type = match format {
        Format::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Format::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays hold as many numbers as there are dimensions (one stride less); `address` is not followed.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            data_type,
            dimensions.len() as u32,
            address as usize as *mut _,
            sizes.as_ptr(),
            strides.as_ptr(),
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
