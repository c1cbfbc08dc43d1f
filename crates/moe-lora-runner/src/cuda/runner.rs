//! Batches through the GPU: checked, copied there, launched, copied back.

use super::launch::Call;
use super::places::Places;
use super::weights::CudaWeights;
use crate::{Batch, Limits, RunnerError};
use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};
use moe_lora_core::{DType, Element, InputError, LayerShape};
use moe_lora_cuda::{DeviceBuffer, Gpu, PinnedBuffer, Stream};
use moe_lora_pool::{CudaMemory, DeviceTable};

/// Runs layers of one shape on one GPU: [`MoeRunner`](crate::MoeRunner)'s other half.
#[derive(Debug)]
pub struct CudaRunner {
    gpu: Gpu,
    stream: Stream,
    shape: LayerShape,
    limits: Limits,
    memory: DeviceBuffer,
    barrier: DeviceBuffer,
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
        CudaMemory::check_shape(shape)?;
        let pairs = limits.max_tokens.checked_mul(shape.top_k).filter(|&n| i32::try_from(n).is_ok());
        if pairs.is_none() || limits.max_rank > 1 << 20 {
            return Err(InputError::new(format!("{limits:?}"), "fewer than 2^31 pairs and ranks up to 2^20").into());
        }
        let max_rank = limits.max_rank.next_multiple_of(8);
        // However many slots a pool has.
        let largest = Places::new(shape, gpu.info().sm_count, limits.max_tokens, i32::MAX as usize, max_rank);
        let stream = gpu.stream()?;
        let barrier = gpu.alloc(size_of::<u32>())?;
        stream.upload(&barrier, 0, &[0_u32])?;
        Ok(Self {
            memory: gpu.alloc(largest.bytes)?,
            inputs: gpu.alloc_pinned(largest.inputs)?,
            gpu: gpu.clone(),
            stream,
            shape: *shape,
            limits,
            barrier,
        })
    }

    /// Bytes of the workspace in GPU memory: a function of the shape, the limits and the GPU.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.memory.bytes() + self.barrier.bytes()
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
    /// If lengths, ids, ranks, formats or devices do not fit, or the GPU fails; `out` is unspecified then.
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
        let max_rank = max_rank(batch)?.next_multiple_of(8);
        let address = batch.adapters.address();
        let slots = if max_rank > 0 { address.slots as usize } else { 0 };
        let tokens = batch.token_slots.len();
        let places = Places::new(&self.shape, self.gpu.info().sm_count, tokens, slots, max_rank);

        let inputs = &mut self.inputs.as_mut_slice()[..places.inputs];
        write_hidden(&mut inputs[places.hidden..], batch.hidden, weights.dtype());
        put(&mut inputs[places.topk_ids..], batch.topk_ids);
        put(&mut inputs[places.topk_weights..], batch.topk_weights);
        put(&mut inputs[places.token_slots..], batch.token_slots);
        self.stream.upload(&self.memory, 0, inputs)?;
        let out_f32 = Y::DTYPE != weights.dtype();
        let call = Call {
            gpu: &self.gpu,
            stream: &self.stream,
            weights,
            places: &places,
            memory: &self.memory,
            barrier: &self.barrier,
            table: address,
            out_f32,
        };
        call.launch()?;
        if !out_f32 || Y::DTYPE == DType::F32 {
            self.stream.download(&self.memory, places.out, out)?;
        } else {
            let mut wide = vec![0.0_f32; out.len()];
            self.stream.download(&self.memory, places.out, &mut wide)?;
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

/// The largest rank that a token of the batch meets, if it leases all its slots: the table holds anything in others.
fn max_rank<X>(batch: &Batch<'_, X, &DeviceTable<'_>>) -> Result<usize, InputError> {
    let mut slots = batch.token_slots.to_vec();
    slots.sort_unstable();
    slots.dedup();
    let rank = |slot| match slot {
        -1 => Ok(0),
        _ => batch.adapters.rank(slot).ok_or_else(|| {
            InputError::new(format!("slot {slot}"), "a slot of the table's lease, or -1").in_tensor("token_slots")
        }),
    };
    slots.into_iter().try_fold(0, |most, slot| Ok(rank(slot)?.max(most)))
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
