//! Batches through the GPU: checked, copied there, launched, copied back.

use super::raw::{self, DTYPE_F32, ForwardArgs};
use super::weights::CudaWeights;
use crate::{Batch, Limits, RunnerError};
use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};
use moe_lora_core::{DType, Element, InputError, LayerShape};
use moe_lora_cuda::{DeviceBuffer, Gpu, Layout, PinnedBuffer, Stream};
use moe_lora_pool::DeviceTable;

/// Runs layers of one shape on one GPU: [`MoeRunner`](crate::MoeRunner)'s other half.
#[derive(Debug)]
pub struct CudaRunner {
    gpu: Gpu,
    stream: Stream,
    shape: LayerShape,
    limits: Limits,
    /// The inputs and the output of a batch.
    tensors: DeviceBuffer,
    workspace: DeviceBuffer,
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
            workspace: gpu.alloc(workspace)?,
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
        batch.check(&self.shape, weights.shape(), out.len())?;
        self.check(weights, batch.adapters)?;
        check_ids(batch, &self.shape)?;
        batch.adapters.wait_on(&self.stream)?;
        let (width, top_k, piece) = (self.shape.hidden_size, self.shape.top_k, self.limits.max_tokens);
        let tokens = batch.token_slots.chunks(piece);
        let hidden = batch.hidden.chunks(piece * width).zip(out.chunks_mut(piece * width));
        let routing = batch.topk_ids.chunks(piece * top_k).zip(batch.topk_weights.chunks(piece * top_k));
        for ((token_slots, (hidden, out)), (topk_ids, topk_weights)) in tokens.zip(hidden).zip(routing) {
            let piece = Batch { hidden, topk_ids, topk_weights, token_slots, adapters: batch.adapters };
            self.piece(weights, &piece, out)?;
        }
        Ok(())
    }

    fn piece<X: Element, Y: Element>(
        &mut self,
        weights: &CudaWeights,
        batch: &Batch<'_, X, &DeviceTable<'_>>,
        out: &mut [Y],
    ) -> Result<(), RunnerError> {
        let table = batch.adapters.address();
        let num_slots = if changes(batch)? { table.slots } else { 0 };
        let tokens = Tensors::new(batch.token_slots.len(), self.shape.top_k, self.shape.hidden_size);
        let inputs = &mut self.inputs.as_mut_slice()[..tokens.inputs];
        write_hidden(&mut inputs[tokens.hidden..], batch.hidden, weights.dtype());
        put(&mut inputs[tokens.topk_ids..], batch.topk_ids);
        put(&mut inputs[tokens.topk_weights..], batch.topk_weights);
        put(&mut inputs[tokens.token_slots..], batch.token_slots);
        self.stream.upload(&self.tensors, 0, inputs)?;

        let out_f32 = Y::DTYPE != weights.dtype();
        let at = |offset: usize| self.tensors.address() + offset as u64;
        let args = ForwardArgs {
            stream: self.stream.handle(),
            hidden: at(tokens.hidden),
            topk_ids: at(tokens.topk_ids),
            topk_weights: at(tokens.topk_weights),
            token_slots: at(tokens.token_slots),
            adapters: table.entries,
            slot_active: table.active,
            out: at(tokens.out),
            workspace: self.workspace.address(),
            workspace_bytes: self.workspace.bytes() as u64,
            num_tokens: batch.token_slots.len() as u32,
            num_slots,
            max_rank: self.limits.max_rank as u32,
            out_dtype: if out_f32 { DTYPE_F32 } else { ForwardArgs::dtype_code(weights.dtype()) },
            ..weights.args()
        };
        #[allow(unsafe_code, reason = "the one place where the safe door meets the raw one")]
        // SAFETY: tensors and workspace are this runner's own, filled above in the sizes and the format that `check` found
        // weights and adapters to have. Ids were checked by `check_ids`, slots by `changes`; the stream has waited for what
        // these slots of the table say, and weights and lease are borrowed until the download below has waited for it.
        unsafe {
            raw::forward(&self.gpu, &args)?;
        }
        if !out_f32 || Y::DTYPE == DType::F32 {
            self.stream.download(&self.tensors, tokens.out, out)?;
        } else {
            let mut wide = vec![0.0_f32; out.len()];
            self.stream.download(&self.tensors, tokens.out, &mut wide)?;
            out.iter_mut().zip(wide).for_each(|(to, from)| *to = Y::from_f32(from));
        }
        Ok(())
    }

    /// Weights and adapters must be on this GPU, for this layer, in one format.
    fn check(&self, weights: &CudaWeights, adapters: &DeviceTable<'_>) -> Result<(), InputError> {
        let ordinal = self.gpu.info().ordinal;
        for (name, found) in [("layer weights", weights.ordinal), ("adapters", adapters.ordinal())] {
            if found != ordinal {
                return Err(InputError::new(format!("cuda:{found}"), format!("cuda:{ordinal}")).in_tensor(name));
            }
        }
        let (found, want) = ((adapters.shape(), adapters.dtype()), (weights.shape(), weights.dtype()));
        if found != want {
            let text = |(shape, dtype): (&LayerShape, DType)| format!("{shape:?} in {dtype}");
            return Err(InputError::new(text(found), text(want)).in_tensor("adapters"));
        }
        self.limits.check_rank(adapters.max_rank())
    }
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
fn changes<X>(batch: &Batch<'_, X, &DeviceTable<'_>>) -> Result<bool, InputError> {
    let mut slots = batch.token_slots.to_vec();
    slots.sort_unstable();
    slots.dedup();
    let rank = |slot| match slot {
        -1 => Ok(0),
        _ => batch.adapters.rank(slot).ok_or_else(|| {
            InputError::new(format!("slot {slot}"), "a slot of the table's lease, or -1").in_tensor("token_slots")
        }),
    };
    slots.into_iter().try_fold(false, |any, slot| Ok(rank(slot)? > 0 || any))
}

/// What the processor's align refuses too: the kernels would skip it and count.
fn check_ids<X, A>(batch: &Batch<'_, X, A>, shape: &LayerShape) -> Result<(), InputError> {
    let (experts, top_k) = (shape.num_experts, shape.top_k);
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
