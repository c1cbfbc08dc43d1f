//! All kernels of all images, loaded once, and their launch.

use crate::{DeviceInfo, GpuError, Stream};
use cudarc::driver::sys::{self, CUlaunchAttributeID as Id};
use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::Ptx;
use moe_lora_kernels::{ClusterAlignParams, Family, Format, Kernel, KernelParams, Launch};
use std::ffi::c_void;
use std::sync::Arc;

/// Every kernel, loaded, with its shared memory granted: launching asks the driver for nothing else.
#[derive(Debug)]
pub struct Kernels {
    /// By [`Kernel::index`]; none for a kernel that is not for this GPU.
    functions: Vec<Option<CudaFunction>>,
    /// Whether the GPU knows programmatic launches.
    programmatic: bool,
    /// Blocks of the largest cluster that can align.
    align_cluster: u32,
}

impl Kernels {
    pub(crate) fn load(context: &Arc<CudaContext>, info: &DeviceInfo) -> Result<Self, GpuError> {
        let mut modules = Vec::new();
        for family in Family::ALL {
            if family.hopper() && (info.compute_capability != (9, 0) || family.image().is_empty()) {
                modules.push(None);
                continue;
            }
            let image = Ptx::from_binary(family.image().to_vec());
            modules.push(Some(context.load_module(image).map_err(|e| GpuError::driver("loading a kernel image", e))?));
        }
        let mut functions = Vec::new();
        for kernel in Kernel::ALL {
            let place = Family::ALL.iter().position(|&f| f == kernel.family()).unwrap_or_default();
            let Some(module) = modules.get(place).and_then(Option::as_ref) else {
                functions.push(None);
                continue;
            };
            let function =
                module.load_function(kernel.symbol()).map_err(|e| GpuError::driver("finding a kernel", e))?;
            let shared = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = kernel.most_shared_bytes().min(info.shared_bytes_per_block);
            function
                .set_attribute(shared, bytes.cast_signed())
                .map_err(|e| GpuError::driver("granting shared memory", e))?;
            functions.push(Some(function));
        }
        let align = functions[Kernel::ClusterAlign.index()].as_ref();
        let align_cluster = align.map_or(0, |function| largest_cluster(function, info.shared_bytes_per_block));
        Ok(Self { functions, programmatic: info.compute_capability >= (9, 0), align_cluster })
    }

    /// Blocks of the largest cluster of [`ClusterAlignParams`] that the GPU can run; 0 if it has no such kernel.
    #[must_use]
    pub const fn align_cluster(&self) -> u32 {
        self.align_cluster
    }

    /// The handle of a kernel, for callers that launch themselves; none if it is not for this GPU.
    #[must_use]
    pub fn function(&self, kernel: Kernel) -> Option<&CudaFunction> {
        self.functions[kernel.index()].as_ref()
    }

    /// Launches the kernel that takes `P`.
    ///
    /// The kernel may begin to occupy SMs while the kernel before it on the stream still drains (programmatic launch), but
    /// reads and writes memory only when all work before it is done.
    ///
    /// # Errors
    /// If the driver refuses the launch, or the kernel is not for this GPU. What goes wrong while the kernel runs appears at a later call.
    ///
    /// # Safety
    /// Every address in `params` must be what the field's documentation says, valid on this GPU until the kernel has run, and
    /// not touched by other work meanwhile; `launch` must be what `params`' own function returned for sizes at least as
    /// large.
    pub unsafe fn launch<P: KernelParams>(
        &self,
        stream: &Stream,
        format: Format,
        params: &P,
        launch: Launch,
    ) -> Result<(), GpuError> {
        let function = self.function(P::kernel(format)).ok_or(GpuError::KernelsNotBuilt)?;
        let (mut attributes, mut count) = ([empty_attribute(); 2], 0);
        let mut set = |id, value| {
            attributes[count] = sys::CUlaunchAttribute { id, pad: [0; 4], value };
            count += 1;
        };
        if launch.cluster > 1 {
            let dimension = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 };
            let value = sys::CUlaunchAttributeValue { clusterDim: dimension };
            set(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value);
        }
        if launch.cooperative {
            set(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, sys::CUlaunchAttributeValue { cooperative: 1 });
        } else if self.programmatic {
            let value = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
            set(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value);
        }
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        stream.bind()?;
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the kernel takes one struct of type `P`, which the driver copies before it returns; what its addresses
        // point to is the caller's promise.
        let result = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        GpuError::check(P::kernel(format).symbol(), result)
    }
}

/// Lets clusters be larger than every GPU promises to run, and asks whether this one runs them. If not, 8 blocks.
fn largest_cluster(function: &CudaFunction, shared_bytes: u32) -> u32 {
    let most = ClusterAlignParams::MOST_BLOCKS;
    let allowed = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
    let dimension = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: most, y: 1, z: 1 };
    let mut cluster = sys::CUlaunchAttribute {
        id: Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { clusterDim: dimension },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: most,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: 1024,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared_bytes.min(Kernel::ClusterAlign.most_shared_bytes()),
        hStream: std::ptr::null_mut(),
        attrs: &raw mut cluster,
        numAttrs: 1,
    };
    let mut clusters = 0;
    let fits = function.set_attribute(allowed, 1).is_ok()
        // SAFETY: the function is loaded, and the driver reads the configuration and writes one number.
        && unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut clusters, function.cu_function(), &raw const config) }
            == sys::CUresult::CUDA_SUCCESS;
    if fits && clusters > 0 { most } else { 8 }
}

fn empty_attribute() -> sys::CUlaunchAttribute {
    let value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    sys::CUlaunchAttribute { id: Id::CU_LAUNCH_ATTRIBUTE_IGNORE, pad: [0; 4], value }
}
