//! One forward, captured once and replayed for any batch of its size.

use super::raw::{self, ForwardArgs};
use super::runner::{CudaRunner, changes, check_format};
use super::slices::{CudaSlice, CudaStream, CudaView, CudaViewMut, Number, on};
use super::weights::CudaWeights;
use crate::RunnerError;
use moe_lora_core::InputError;
use moe_lora_cuda::cudarc::driver::{DevicePtr, DevicePtrMut};
use moe_lora_cuda::{DeviceBuffer, GpuError, Graph, Stream};
use moe_lora_pool::{DeviceTable, TableAddress};
use std::sync::Arc;

/// A forward of a fixed number of tokens as a CUDA graph, with the tensors that it reads and writes.
///
/// Between replays any tokens, experts and adapters may change, also to adapters that were loaded after the capture, or to
/// none: fill the inputs, and [replay](CudaRunner::replay). A smaller batch is one whose last tokens have expert ids of -1.
#[derive(Debug)]
pub struct CapturedForward<X, Y> {
    graph: Graph,
    stream: Stream,
    table: TableAddress,
    hidden: CudaSlice<X>,
    topk_ids: CudaSlice<i32>,
    topk_weights: CudaSlice<f32>,
    token_slots: CudaSlice<i32>,
    out: CudaSlice<Y>,
    /// What the graph reads beside the tensors stays where it is.
    _weights: Arc<CudaWeights>,
    _workspace: Arc<DeviceBuffer>,
}

impl<X, Y> CapturedForward<X, Y> {
    /// Tokens of every replay, T.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.token_slots.len()
    }

    /// `[T, H]`, to write before a replay.
    pub fn hidden_mut(&mut self) -> CudaViewMut<'_, X> {
        self.hidden.as_view_mut()
    }

    /// `[T, k]`, to write before a replay. -1 is skipped, as is any id that is no expert.
    pub fn topk_ids_mut(&mut self) -> CudaViewMut<'_, i32> {
        self.topk_ids.as_view_mut()
    }

    /// `[T, k]`, to write before a replay.
    pub fn topk_weights_mut(&mut self) -> CudaViewMut<'_, f32> {
        self.topk_weights.as_view_mut()
    }

    /// `[T, H]`, what the last replay wrote.
    #[must_use]
    pub fn out(&self) -> CudaView<'_, Y> {
        self.out.as_view()
    }
}

impl CudaRunner {
    /// Captures a forward of `tokens` tokens on `stream`, on which it then runs. Its tensors are new, and begin as zeros.
    ///
    /// # Errors
    /// If there are no tokens or more than the limit, `stream` is the default stream, which cannot be captured, formats or
    /// devices do not fit, or the GPU fails.
    pub fn capture<X: Number, Y: Number>(
        &mut self,
        stream: &Arc<CudaStream>,
        weights: &Arc<CudaWeights>,
        adapters: &DeviceTable<'_>,
        tokens: usize,
    ) -> Result<CapturedForward<X, Y>, RunnerError> {
        self.check(weights, adapters)?;
        check_format::<X, Y>(weights)?;
        if tokens == 0 || tokens > self.limits.max_tokens {
            let expected = format!("1 to {}", self.limits.max_tokens);
            return Err(InputError::new(format!("{tokens} tokens"), expected).into());
        }
        on(&self.gpu, stream, "stream")?;
        if stream.cu_stream().is_null() {
            return Err(InputError::new("the default stream", "a stream that can be captured").into());
        }
        let failed = |error| GpuError::driver("allocating a graph's tensors", error);
        let (width, top_k) = (self.shape().hidden_size, self.shape().top_k);
        let hidden = stream.alloc_zeros::<X>(tokens * width).map_err(failed)?;
        let topk_ids = stream.alloc_zeros::<i32>(tokens * top_k).map_err(failed)?;
        let topk_weights = stream.alloc_zeros::<f32>(tokens * top_k).map_err(failed)?;
        let token_slots = stream.alloc_zeros::<i32>(tokens).map_err(failed)?;
        let out = stream.alloc_zeros::<Y>(tokens * width).map_err(failed)?;
        let own = Stream::from(Arc::clone(stream));
        let args = ForwardArgs {
            stream: own.handle(),
            hidden: hidden.device_ptr(stream).0,
            topk_ids: topk_ids.device_ptr(stream).0,
            topk_weights: topk_weights.device_ptr(stream).0,
            token_slots: token_slots.device_ptr(stream).0,
            out: out.device_ptr(stream).0,
            num_tokens: tokens as u32,
            out_dtype: ForwardArgs::dtype_code(Y::DTYPE),
            ..self.args(weights, adapters)
        };
        let graph = own.capture(|| {
            #[allow(unsafe_code, reason = "meets the raw door")]
            // SAFETY: nothing runs yet. Tensors, weights and workspace live as long as the graph; what a replay reads beside
            // them, and when, is what `replay` checks and orders.
            unsafe {
                raw::forward(&self.gpu, &args)
            }
        })?;
        let table = adapters.address();
        let (_weights, _workspace) = (Arc::clone(weights), Arc::clone(&self.workspace));
        Ok(CapturedForward {
            graph,
            stream: own,
            table,
            hidden,
            topk_ids,
            topk_weights,
            token_slots,
            out,
            _weights,
            _workspace,
        })
    }

    /// Gives a captured forward to its stream, for the tokens' adapters of the table's lease, which may drop when this returns.
    ///
    /// # Errors
    /// If the runner or the table is not the one of the capture, the table is for another number of tokens, or the GPU fails.
    pub fn replay<X, Y>(
        &mut self,
        captured: &mut CapturedForward<X, Y>,
        adapters: &DeviceTable<'_>,
    ) -> Result<(), RunnerError> {
        let slots = adapters.token_slots();
        if slots.len() != captured.tokens() {
            let found = format!("adapters for {} tokens", slots.len());
            return Err(InputError::new(found, format!("for {}", captured.tokens())).in_tensor("adapters").into());
        }
        if adapters.address() != captured.table || !Arc::ptr_eq(&captured._workspace, &self.workspace) {
            return Err(InputError::new("another pool, layer or runner", "those of the capture").into());
        }
        self.limits.check_rank(adapters.max_rank())?;
        changes(slots, adapters)?;
        let stream = captured.stream.clone();
        adapters.wait_on(&stream)?;
        self.begin(&stream)?;
        let launched = {
            let CapturedForward { graph, hidden, topk_ids, topk_weights, token_slots, out, .. } = captured;
            let queue = stream.cudarc();
            // The stream waits for who wrote the inputs or still reads the output; who comes next waits for the stream.
            let _inputs = (hidden.device_ptr(queue), topk_ids.device_ptr(queue), topk_weights.device_ptr(queue));
            let (_out, (token_slots, _slots)) = (out.device_ptr_mut(queue), token_slots.device_ptr_mut(queue));
            #[allow(unsafe_code, reason = "writes to a slice of the graph's own")]
            // SAFETY: as many slots as tokens, in stream order behind the last replay.
            let slots = unsafe { stream.upload_address(token_slots, slots) };
            slots.and_then(|()| graph.launch())
        };
        self.end(stream)?;
        Ok(launched?)
    }
}
