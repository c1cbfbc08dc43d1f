//! Batches through the GPU: checked, copied there, launched, copied back.

use super::raw::{self, DTYPE_F32, ForwardArgs};
use super::slices::{BatchSlices, CudaStream, CudaViewMut, Uses, check_formats};
use super::weights::CudaWeights;
use crate::batch::check_whole;
use crate::{Batch, Limits, RunnerError};
use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};
use moe_lora_core::{DType, Element, InputError, LayerShape};
use moe_lora_cuda::{DeviceBuffer, Event, Gpu, GpuError, Layout, PinnedBuffer, Stream};
use moe_lora_pool::DeviceTable;
use std::sync::Arc;

/// Runs layers of one shape on one GPU: [`MoeRunner`](crate::MoeRunner)'s other half.
#[derive(Debug)]
pub struct CudaRunner {
    pub(super) gpu: Gpu,
    /// What forwards from host memory run on.
    stream: Stream,
    shape: LayerShape,
    pub(super) limits: Limits,
    /// The inputs and the output of a batch in host memory.
    tensors: DeviceBuffer,
    /// Captured forwards hold it too.
    pub(super) workspace: Arc<DeviceBuffer>,
    /// The stream that used the workspace last, and when it is done; `None` if it is.
    last: Option<(Stream, Event)>,
    /// What a batch's inputs are gathered in, so that one copy brings them all.
    inputs: PinnedBuffer,
}

impl CudaRunner {
    /// Allocates all that [`forward`](Self::forward) needs.
    ///
    /// # Errors
    /// If the GPU's kernels cannot run layers of these sizes, a limit is zero or beyond 2³¹ pairs, or the memory does not
    /// suffice.
    pub fn new(gpu: &Gpu, shape: &LayerShape, limits: Limits) -> Result<Self, RunnerError> {
        limits.check()?;
        let LayerShape { top_k, hidden_size, .. } = *shape;
        let Limits { max_tokens, max_rank } = limits;
        // However many slots a pool has.
        let workspace = raw::workspace_bytes(gpu, shape, max_tokens, i32::MAX as usize, max_rank)?;
        let tensors = Tensors::new(max_tokens, top_k, hidden_size);
        Ok(Self {
            stream: gpu.stream()?,
            tensors: gpu.alloc(tensors.bytes)?,
            workspace: Arc::new(gpu.alloc(workspace)?),
            last: None,
            inputs: gpu.alloc_pinned(tensors.inputs)?,
            gpu: gpu.clone(),
            shape: *shape,
            limits,
        })
    }

    /// Bytes of the workspace in GPU memory: a function of the shape, the limits and the GPU.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.tensors.bytes() + self.workspace.bytes()
    }

    /// Sizes of the layers that this runner runs.
    #[must_use]
    pub const fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// What it takes at once.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The GPU.
    #[must_use]
    pub const fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Computes one layer and waits for it; every value of `out` `[T, H]` is written. Hidden states of another format than
    /// the weights' are rounded to it. Slots are those of the table's lease.
    ///
    /// # Errors
    /// If lengths, ids, slots, ranks, formats or devices do not fit, or the GPU fails; `out` is unspecified then.
    pub fn forward<X: Element, Y: Element>(
        &mut self,
        weights: &CudaWeights,
        batch: &Batch<'_, X, &DeviceTable<'_>>,
        out: &mut [Y],
    ) -> Result<(), RunnerError> {
        check_whole(&self.shape)?;
        self.forward_together(weights, batch, Sums { adapters: None, out: None }, out)
    }

    /// [`forward`](Self::forward) of one of several ranks, which add up what [`Sums`] says.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and those of the sums.
    pub fn forward_together<X: Element, Y: Element, E: From<RunnerError>>(
        &mut self,
        weights: &CudaWeights,
        batch: &Batch<'_, X, &DeviceTable<'_>>,
        mut sums: Sums<'_, E>,
        out: &mut [Y],
    ) -> Result<(), E> {
        batch.check(&self.shape, weights.shape(), out.len()).map_err(RunnerError::from)?;
        self.check(weights, batch.adapters).map_err(RunnerError::from)?;
        check_ids(batch, &self.shape).map_err(RunnerError::from)?;
        batch.adapters.wait_on(&self.stream).map_err(RunnerError::from)?;
        self.begin(&self.stream)?;
        let (width, top_k, piece) = (self.shape.hidden_size, self.shape.top_k, self.limits.max_tokens);
        let tokens = batch.token_slots.chunks(piece);
        let hidden = batch.hidden.chunks(piece * width).zip(out.chunks_mut(piece * width));
        let routing = batch.topk_ids.chunks(piece * top_k).zip(batch.topk_weights.chunks(piece * top_k));
        for ((token_slots, (hidden, out)), (topk_ids, topk_weights)) in tokens.zip(hidden).zip(routing) {
            let piece = Batch { hidden, topk_ids, topk_weights, token_slots, adapters: batch.adapters };
            let out_f32 = sums.out.is_some() || Y::DTYPE != weights.dtype();
            let launched = self.launch(weights, &piece, out_f32, &mut sums.adapters);
            let launched = launched.and_then(|place| match &mut sums.out {
                Some(sum) => sum(&self.stream, &self.tensors, place, out.len()).map(|()| place),
                None => Ok(place),
            });
            let place = match launched {
                Ok(place) => place,
                Err(error) => {
                    // The layer still reads what the caller lends.
                    let _ = self.stream.synchronize();
                    return Err(error);
                }
            };
            self.download(place, out_f32, out).map_err(RunnerError::from)?;
            // The stream was waited for, and had waited for whoever came before.
            self.last = None;
        }
        Ok(())
    }

    /// Gives one layer to `stream` on tensors that are in GPU memory; every value of `out` `[T, H]` is written. `X` is the
    /// weights' format, `Y` that or f32. The adapters of all tokens are those of the table's lease, which may drop when this
    /// returns. Ids that are no expert are skipped.
    ///
    /// # Errors
    /// If lengths, ranks, formats or devices do not fit, or the GPU fails; `out` is unspecified then.
    pub fn forward_on<X: Element, Y: Element>(
        &mut self,
        stream: &Arc<CudaStream>,
        weights: &CudaWeights,
        batch: &BatchSlices<'_, X>,
        adapters: &DeviceTable<'_>,
        out: &mut CudaViewMut<'_, Y>,
    ) -> Result<(), RunnerError> {
        self.check(weights, adapters)?;
        check_format::<X, Y>(weights)?;
        let (gpu, own) = (self.gpu.clone(), Stream::from(Arc::clone(stream)));
        let mut uses = Uses::new(&gpu, stream)?;
        let mut whole = ForwardArgs { out_dtype: ForwardArgs::dtype_code(Y::DTYPE), ..Default::default() };
        let (shape, slots) = (self.shape, adapters.token_slots());
        let tokens = uses.batch(&mut whole, &shape, batch)?;
        whole.out = uses.write("out", out, &[tokens, shape.hidden_size])?;
        if tokens != slots.len() {
            let found = format!("adapters for {} tokens", slots.len());
            return Err(InputError::new(found, format!("for {tokens}")).in_tensor("adapters").into());
        }
        adapters.wait_on(&own)?;
        self.begin(&own)?;
        let launched = self.pieces_on(&own, weights, adapters, &whole, [size_of::<X>(), size_of::<Y>()]);
        self.end(own)?;
        launched
    }

    /// The pieces of a batch whose addresses are in `whole`, of numbers of `bytes` in and out.
    fn pieces_on(
        &self,
        stream: &Stream,
        weights: &CudaWeights,
        adapters: &DeviceTable<'_>,
        whole: &ForwardArgs,
        bytes: [usize; 2],
    ) -> Result<(), RunnerError> {
        let LayerShape { top_k, hidden_size, .. } = self.shape;
        for (n, slots) in adapters.token_slots().chunks(self.limits.max_tokens).enumerate() {
            let first = n * self.limits.max_tokens;
            let places = Tensors::new(slots.len(), top_k, hidden_size);
            let token_slots = self.tensors.address() + places.token_slots as u64;
            let at = |address: u64, width: usize, bytes: usize| address + (first * width * bytes) as u64;
            let args = ForwardArgs {
                stream: stream.handle(),
                hidden: at(whole.hidden, hidden_size, bytes[0]),
                topk_ids: at(whole.topk_ids, top_k, size_of::<i32>()),
                topk_weights: at(whole.topk_weights, top_k, size_of::<f32>()),
                token_slots,
                out: at(whole.out, hidden_size, bytes[1]),
                num_tokens: slots.len() as u32,
                num_slots: if changes(slots, adapters)? { adapters.address().slots } else { 0 },
                out_dtype: whole.out_dtype,
                ..self.args(weights, adapters)
            };
            #[allow(unsafe_code, reason = "meets the raw door")]
            // SAFETY: `forward_on` has measured the slices, and its guards order other uses behind this one; the slots' place
            // is the runner's own, which `begin` and `end` keep to one stream at a time; the table's slots are leased, the
            // stream has waited for them, and the lease records an event on the stream when it drops. Weights and runner free
            // their memory only when the GPU is done.
            unsafe {
                stream.upload_address(token_slots, slots)?;
                raw::forward(&self.gpu, &args)?;
            }
        }
        Ok(())
    }

    /// Makes `stream` wait for whoever used the workspace before.
    pub(super) fn begin(&self, stream: &Stream) -> Result<(), RunnerError> {
        match &self.last {
            Some((other, done)) if other != stream => Ok(stream.wait(done)?),
            _ => Ok(()),
        }
    }

    /// Marks the end of what was given to `stream`.
    pub(super) fn end(&mut self, stream: Stream) -> Result<(), RunnerError> {
        let done = stream.record(false)?;
        self.last = Some((stream, done));
        Ok(())
    }

    /// All that does not change from batch to batch. Weights and adapters must have passed [`check`](Self::check).
    pub(super) fn args(&self, weights: &CudaWeights, adapters: &DeviceTable<'_>) -> ForwardArgs {
        let table = adapters.address();
        ForwardArgs {
            adapters: table.entries,
            slot_active: table.active,
            num_slots: table.slots,
            max_rank: self.limits.max_rank as u32,
            workspace: self.workspace.address(),
            workspace_bytes: self.workspace.bytes() as u64,
            ..weights.args()
        }
    }

    /// Copies a piece's inputs to the GPU and gives the layer to the stream; returns where in `tensors` the output will be.
    fn launch<X: Element, E: From<RunnerError>>(
        &mut self,
        weights: &CudaWeights,
        batch: &Batch<'_, X, &DeviceTable<'_>>,
        out_f32: bool,
        exchange: &mut Option<Sum<'_, E>>,
    ) -> Result<usize, E> {
        let tokens = Tensors::new(batch.token_slots.len(), self.shape.top_k, self.shape.hidden_size);
        let inputs = &mut self.inputs.as_mut_slice()[..tokens.inputs];
        write_hidden(&mut inputs[tokens.hidden..], batch.hidden, weights.dtype());
        put(&mut inputs[tokens.topk_ids..], batch.topk_ids);
        put(&mut inputs[tokens.topk_weights..], batch.topk_weights);
        put(&mut inputs[tokens.token_slots..], batch.token_slots);
        self.stream.upload(&self.tensors, 0, inputs).map_err(RunnerError::from)?;

        let changes = changes(batch.token_slots, batch.adapters).map_err(RunnerError::from)?;
        let at = |offset: usize| self.tensors.address() + offset as u64;
        let args = ForwardArgs {
            stream: self.stream.handle(),
            hidden: at(tokens.hidden),
            topk_ids: at(tokens.topk_ids),
            topk_weights: at(tokens.topk_weights),
            token_slots: at(tokens.token_slots),
            out: at(tokens.out),
            num_tokens: batch.token_slots.len() as u32,
            num_slots: if changes { batch.adapters.address().slots } else { 0 },
            out_dtype: if out_f32 { DTYPE_F32 } else { ForwardArgs::dtype_code(weights.dtype()) },
            ..self.args(weights, batch.adapters)
        };
        #[allow(unsafe_code, reason = "meets the raw door")]
        // SAFETY: tensors and workspace are this runner's own, filled above in the sizes and the format that `check` found
        // weights and adapters to have. Ids were checked by `check_ids`, slots by `changes`; the stream has waited for what
        // these slots of the table say, and `forward_with`, which borrows weights and lease, waits for it.
        unsafe {
            raw::forward_exchanging(&self.gpu, &args, |offset, count| match exchange {
                Some(sum) => sum(&self.stream, &self.workspace, offset, count),
                None => Ok(()),
            })?;
        }
        Ok(tokens.out)
    }

    fn download<Y: Element>(&self, place: usize, out_f32: bool, out: &mut [Y]) -> Result<(), GpuError> {
        if !out_f32 || Y::DTYPE == DType::F32 {
            return self.stream.download(&self.tensors, place, out);
        }
        let mut wide = vec![0.0_f32; out.len()];
        self.stream.download(&self.tensors, place, &mut wide)?;
        out.iter_mut().zip(wide).for_each(|(to, from)| *to = Y::from_f32(from));
        Ok(())
    }

    /// Weights and adapters must be on this GPU, for this layer, in one format.
    pub(super) fn check(&self, weights: &CudaWeights, adapters: &DeviceTable<'_>) -> Result<(), InputError> {
        let ordinal = self.gpu.info().ordinal;
        for (name, found) in [("layer weights", weights.ordinal), ("adapters", adapters.ordinal())] {
            if found != ordinal {
                return Err(InputError::new(format!("cuda:{found}"), format!("cuda:{ordinal}")).in_tensor(name));
            }
        }
        if *weights.shape() != self.shape {
            let (found, want) = (format!("{:?}", weights.shape()), format!("{:?}", self.shape));
            return Err(InputError::new(found, want).in_tensor("layer weights"));
        }
        let (found, want) = ((adapters.shape(), adapters.dtype()), (weights.shape(), weights.dtype()));
        if found != want {
            let text = |(shape, dtype): (&LayerShape, DType)| format!("{shape:?} in {dtype}");
            return Err(InputError::new(text(found), text(want)).in_tensor("adapters"));
        }
        self.limits.check_rank(adapters.max_rank())
    }
}

/// Gives a stream what replaces f32 values by their sums over ranks: from which byte of the buffer on, and how many.
pub type Sum<'a, E> = &'a mut dyn FnMut(&Stream, &DeviceBuffer, usize, usize) -> Result<(), E>;

/// What ranks add up in a forward, for every piece of up to [`max_tokens`](Limits::max_tokens) tokens.
#[allow(missing_debug_implementations, reason = "holds closures")]
pub struct Sums<'a, E> {
    /// What lies between A and B of fully sharded adapters, over the ranks of the tensor-parallel group: called twice, also for
    /// no values. Not called where adapters are whole.
    pub adapters: Option<Sum<'a, E>>,
    /// The output, as f32, over all ranks: called once, before the output is read. `None`: the output is this rank's part.
    pub out: Option<Sum<'a, E>>,
}

/// Places of a batch's tensors in one allocation, inputs first.
struct Tensors {
    hidden: usize,
    topk_ids: usize,
    topk_weights: usize,
    token_slots: usize,
    /// Bytes of all inputs.
    inputs: usize,
    out: usize,
    bytes: usize,
}

impl Tensors {
    fn new(tokens: usize, top_k: usize, hidden_size: usize) -> Self {
        let mut layout = Layout::default();
        let hidden = layout.add::<u16>(tokens * hidden_size);
        let topk_ids = layout.add::<i32>(tokens * top_k);
        let topk_weights = layout.add::<f32>(tokens * top_k);
        let token_slots = layout.add::<i32>(tokens);
        let inputs = layout.bytes();
        let out = layout.add::<f32>(tokens * hidden_size);
        Self { hidden, topk_ids, topk_weights, token_slots, inputs, out, bytes: layout.bytes() }
    }
}

/// Whether an adapter of the batch changes this layer. All slots have to be leased: the table holds anything in others.
pub(super) fn changes(token_slots: &[i32], adapters: &DeviceTable<'_>) -> Result<bool, InputError> {
    let mut slots = token_slots.to_vec();
    slots.sort_unstable();
    slots.dedup();
    let rank = |slot| match slot {
        -1 => Ok(0),
        _ => adapters.rank(slot).ok_or_else(|| {
            InputError::new(format!("slot {slot}"), "a slot of the table's lease, or -1").in_tensor("token_slots")
        }),
    };
    slots.into_iter().try_fold(false, |any, slot| Ok(rank(slot)? > 0 || any))
}

/// Hidden states on the GPU are of the weights' format, which nobody rounds them to there.
pub(super) fn check_format<X: Element, Y: Element>(weights: &CudaWeights) -> Result<(), InputError> {
    check_formats::<X, Y>()?;
    if X::DTYPE != weights.dtype() {
        return Err(InputError::new(X::DTYPE.to_string(), weights.dtype().to_string()).in_tensor("hidden"));
    }
    Ok(())
}

/// What the processor's align refuses too: the kernels would skip it and count.
fn check_ids<X, A>(batch: &Batch<'_, X, A>, shape: &LayerShape) -> Result<(), InputError> {
    let (experts, top_k) = (shape.all_experts(), shape.top_k);
    let bad = |id: i32| id < -1 || usize::try_from(id).is_ok_and(|id| id >= experts);
    if let Some((pair, id)) = batch.topk_ids.iter().enumerate().find(|(_, id)| bad(**id)) {
        let found = format!("expert {id} for token {} at place {}", pair / top_k, pair % top_k);
        return Err(InputError::new(found, format!("-1 to {}", experts - 1)).in_tensor("topk_ids"));
    }
    Ok(())
}

fn put<T: bytemuck::NoUninit>(to: &mut [u8], values: &[T]) {
    let bytes: &[u8] = cast_slice(values);
    to[..bytes.len()].copy_from_slice(bytes);
}

fn write_hidden<X: Element>(to: &mut [u8], hidden: &[X], dtype: DType) {
    fn convert<X: Element, T: Element>(to: &mut [u8], hidden: &[X]) {
        let to = cast_slice_mut::<u8, T>(&mut to[..size_of::<T>() * hidden.len()]);
        to.iter_mut().zip(hidden).for_each(|(to, x)| *to = T::from_f32(x.to_f32()));
    }
    match dtype {
        _ if X::DTYPE == dtype => put(to, hidden),
        DType::F16 => convert::<X, f16>(to, hidden),
        _ => convert::<X, bf16>(to, hidden),
    }
}
