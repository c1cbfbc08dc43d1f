//! The gate: what has to hold before anything else may call the driver.

use crate::GpuError;
use cudarc::driver::{result, sys};
use std::error::Error;
use std::sync::OnceLock;

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability, major and minor.
    pub compute_capability: (i32, i32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Bytes of memory.
    pub memory_bytes: usize,
    /// Newest CUDA version that the driver supports, major and minor.
    pub driver_version: (i32, i32),
    /// Most bytes of shared memory a block can have.
    pub shared_bytes_per_block: u32,
}

/// Loads and starts the driver, once. cudarc panics without one, so nothing of it may be called before this is `Ok`.
pub(crate) fn gate() -> Result<(), GpuError> {
    static GATE: OnceLock<Result<(), GpuError>> = OnceLock::new();
    GATE.get_or_init(|| {
        load_driver().map_err(|reason| GpuError::NoDriver { reason })?;
        result::init().map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => GpuError::NoDevice,
            _ => GpuError::NoDriver { reason: GpuError::driver("cuInit", error).to_string() },
        })
    })
    .clone()
}

/// Whether the driver's library is there. It stays loaded, which spares a second search.
fn load_driver() -> Result<(), String> {
    let names = if cfg!(windows) { &["nvcuda.dll"][..] } else { &["libcuda.so.1", "libcuda.so"][..] };
    let mut why = String::new();
    for name in names {
        // SAFETY: NVIDIA's driver library runs no initialiser that needs anything of this process.
        match unsafe { libloading::Library::new(*name) } {
            Ok(library) => {
                std::mem::forget(library);
                return Ok(());
            }
            Err(error) if why.is_empty() => {
                why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            }
            Err(_) => {}
        }
    }
    Err(why)
}

/// All GPUs that the driver sees, whether the kernels can run on them or not.
pub(crate) fn devices() -> Result<Vec<DeviceInfo>, GpuError> {
    gate()?;
    let mut version = 0;
    // SAFETY: the gate has passed; the driver writes one number.
    GpuError::check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    let driver_version = (version / 1000, version % 1000 / 10);
    let count = result::device::get_count().map_err(|e| GpuError::driver("cuDeviceGetCount", e))?;
    if count == 0 {
        return Err(GpuError::NoDevice);
    }
    (0..count).map(|ordinal| describe(ordinal, driver_version)).collect()
}

fn describe(ordinal: i32, driver_version: (i32, i32)) -> Result<DeviceInfo, GpuError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal).map_err(|e| GpuError::driver("cuDeviceGet", e))?;
    let attribute = |attribute| {
        // SAFETY: `device` was just handed out by the driver.
        unsafe { result::device::get_attribute(device, attribute) }
            .map_err(|e| GpuError::driver("cuDeviceGetAttribute", e))
    };
    Ok(DeviceInfo {
        ordinal: ordinal as usize,
        name: result::device::get_name(device).map_err(|e| GpuError::driver("cuDeviceGetName", e))?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sm_count: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.unsigned_abs(),
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }
            .map_err(|e| GpuError::driver("cuDeviceTotalMem", e))?,
        driver_version,
        shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            .unsigned_abs(),
    })
}
