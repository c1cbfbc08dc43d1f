//! The single kernels of a captured graph, to time or to count them.

use crate::{GpuError, Graph, Stream};
use cudarc::driver::sys;
use std::ffi::CStr;
use std::mem::MaybeUninit;

/// One kernel of a [`Graph`] as a graph of its own, with the launch attributes and the arguments that were captured.
///
/// It reads and writes the addresses that were captured, so it may run only where the whole graph may.
#[derive(Debug)]
pub struct GraphKernel {
    name: String,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    stream: Stream,
}

impl Graph {
    /// Launches that one run of this graph takes: kernels, copies and fills.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn num_launches(&self) -> Result<usize, GpuError> {
        Ok(self.nodes()?.len())
    }

    /// Its kernels, each alone, in the order of their capture.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn kernels(&self, stream: &Stream) -> Result<Vec<GraphKernel>, GpuError> {
        let mut kernels = Vec::new();
        for node in self.nodes()? {
            let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            // SAFETY: a node of a graph that lives as long as `self`.
            GpuError::check("cuGraphNodeGetType", unsafe { sys::cuGraphNodeGetType(node, &raw mut kind) })?;
            if kind == sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL {
                // SAFETY: as above, and the node is a kernel.
                kernels.push(unsafe { GraphKernel::new(node, stream) }?);
            }
        }
        Ok(kernels)
    }

    fn nodes(&self) -> Result<Vec<sys::CUgraphNode>, GpuError> {
        let mut count = 0;
        // SAFETY: without an array the driver only counts; then the array has room for as many.
        unsafe {
            let graph = self.raw();
            GpuError::check("cuGraphGetNodes", sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &raw mut count))?;
            let mut nodes = vec![std::ptr::null_mut(); count];
            GpuError::check("cuGraphGetNodes", sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &raw mut count))?;
            Ok(nodes)
        }
    }
}

impl GraphKernel {
    /// # Safety
    /// `node` must be a kernel node of a live graph.
    unsafe fn new(node: sys::CUgraphNode, stream: &Stream) -> Result<Self, GpuError> {
        stream.bind()?;
        let mut params = MaybeUninit::<sys::CUDA_KERNEL_NODE_PARAMS>::zeroed();
        // SAFETY: by the caller's promise; the driver fills the struct, whose pointers stay good as long as the node. All
        // zeros are a value of it, too.
        let params = unsafe {
            let result = sys::cuGraphKernelNodeGetParams_v2(node, params.as_mut_ptr());
            GpuError::check("cuGraphKernelNodeGetParams", result)?;
            params.assume_init()
        };
        let mut name = std::ptr::null();
        // SAFETY: the node's own function.
        GpuError::check("cuFuncGetName", unsafe { sys::cuFuncGetName(&raw mut name, params.func) })?;
        // SAFETY: the driver's string, which lives as long as the module.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        let mut alone = Self { name, graph: std::ptr::null_mut(), exec: std::ptr::null_mut(), stream: stream.clone() };
        let mut copy = std::ptr::null_mut();
        // SAFETY: a new graph, freed by `Drop`; the driver copies the parameters with the arguments that they point to.
        unsafe {
            GpuError::check("cuGraphCreate", sys::cuGraphCreate(&raw mut alone.graph, 0))?;
            GpuError::check(
                "cuGraphAddKernelNode",
                sys::cuGraphAddKernelNode_v2(&raw mut copy, alone.graph, std::ptr::null(), 0, &raw const params),
            )?;
            GpuError::check("cuGraphKernelNodeCopyAttributes", sys::cuGraphKernelNodeCopyAttributes(copy, node))?;
            GpuError::check(
                "cuGraphInstantiate",
                sys::cuGraphInstantiateWithFlags(&raw mut alone.exec, alone.graph, 0),
            )?;
        }
        Ok(alone)
    }

    /// The kernel's symbol.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs it once.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn launch(&self) -> Result<(), GpuError> {
        self.stream.bind()?;
        // SAFETY: an instance that lives as long as `self`; what it touches is what the captured graph touches.
        GpuError::check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.exec, self.stream.raw()) })
    }
}

impl Drop for GraphKernel {
    fn drop(&mut self) {
        let _ = self.stream.bind();
        // SAFETY: made in `new`, each destroyed once. A failure is an earlier kernel's, and the next call reports it.
        unsafe {
            if !self.exec.is_null() {
                let _ = sys::cuGraphExecDestroy(self.exec);
            }
            if !self.graph.is_null() {
                let _ = sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
