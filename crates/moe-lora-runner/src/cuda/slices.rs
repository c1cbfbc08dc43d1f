//! The cudarc door: a forward on slices and a stream that the caller has from cudarc 0.19.
//!
//! Everything is typed and measured before it is launched. cudarc's own ordering holds: the stream waits for what wrote the
//! slices, and later uses of them wait for the stream, as long as the caller's context tracks events. Nothing is allocated
//! on the GPU and nothing waits on the host; a capture needs a context that does not track events.
#![allow(unsafe_code, reason = "hands checked slices to the raw door")]

use super::raw::{self, AdapterEntry, ForwardArgs};
use crate::RunnerError;
use moe_lora_core::{Activation, DType, Element, InputError, LayerShape, RouterWeightPlacement};
use moe_lora_cuda::cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr, DeviceSlice, SyncOnDrop, ValidAsZeroBits};
use std::sync::Arc;

pub use moe_lora_cuda::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};
pub use moe_lora_cuda::{Gpu, GpuError, cudarc};

/// A number that tensors in GPU memory are made of: f32, f16 or bf16.
pub trait Number: Element + DeviceRepr + ValidAsZeroBits {}
impl<T: Element + DeviceRepr + ValidAsZeroBits> Number for T {}

/// The base weights of a layer, wherever the caller keeps them. `X` is bf16 or f16.
#[derive(Debug)]
pub struct LayerSlices<'a, X> {
    /// Sizes.
    pub shape: LayerShape,
    /// `[E, 2I, H]`.
    pub w13: CudaView<'a, X>,
    /// Gate and up rows of an expert alternate (gpt-oss); else all gate rows come first.
    pub interleaved: bool,
    /// `[E, H, I]`.
    pub w2: CudaView<'a, X>,
    /// Of gate `[E, I]`, up `[E, I]` and down `[E, H]`.
    pub bias: Option<[CudaView<'a, f32>; 3]>,
    /// How gate and up join.
    pub activation: Activation,
    /// Where the routing weight goes.
    pub router_weight: RouterWeightPlacement,
    /// Factor of the output; 1 if `topk_weights` include it.
    pub routed_scaling_factor: f32,
}

/// One batch.
#[derive(Debug)]
pub struct BatchSlices<'a, X> {
    /// `[T, H]`.
    pub hidden: CudaView<'a, X>,
    /// `[T, k]`: experts of all ranks; those of other ranks are skipped, as is -1 and any id that is no expert.
    pub topk_ids: CudaView<'a, i32>,
    /// `[T, k]`, used as they are.
    pub topk_weights: CudaView<'a, f32>,
}

/// Which adapter every token has, and where the adapters are.
#[derive(Debug)]
pub struct AdapterSlices<'a> {
    token_slots: CudaView<'a, i32>,
    table: CudaView<'a, u8>,
    max_rank: usize,
}

impl<'a> AdapterSlices<'a> {
    /// `token_slots` `[T]` are slots of `table`, -1 for the base model, which any other number is taken for; `table` holds
    /// [`AdapterEntry`] `[slots, E, 3]` as bytes.
    ///
    /// # Safety
    /// Until every forward that uses it is done, every entry is zero or of a rank up to `max_rank`, with addresses of
    /// matrices of the layer's sizes and format that stay there and that nobody writes.
    #[must_use]
    pub const unsafe fn new(token_slots: CudaView<'a, i32>, table: CudaView<'a, u8>, max_rank: usize) -> Self {
        Self { token_slots, table, max_rank }
    }
}

/// Computes one layer on `stream`; every number of `out` `[T, H]` is written. `Y` is `X` or f32. Without `adapters` it is the
/// base model alone. The workspace is [`workspace_bytes`](raw::workspace_bytes) long, whatever it holds.
///
/// # Errors
/// Names the slice whose length, format or GPU does not fit; nothing was launched then. Or the driver's error.
pub fn forward<X: Element, Y: Element>(
    gpu: &Gpu,
    stream: &Arc<CudaStream>,
    layer: &LayerSlices<'_, X>,
    batch: &BatchSlices<'_, X>,
    adapters: Option<&AdapterSlices<'_>>,
    workspace: &mut CudaViewMut<'_, u8>,
    out: &mut CudaViewMut<'_, Y>,
) -> Result<(), RunnerError> {
    let shape = &layer.shape;
    check_formats::<X, Y>()?;
    let mut uses = Uses::new(gpu, stream)?;
    let mut args = layer.settings();
    args.out_dtype = ForwardArgs::dtype_code(Y::DTYPE);
    let [experts, inner, width] = [shape.num_experts, shape.intermediate_size, shape.hidden_size];
    args = args
        .with_w13(uses.read("w13", &layer.w13, &[experts, 2 * inner, width])?, layer.interleaved)
        .with_w2(uses.read("w2", &layer.w2, &[experts, width, inner])?);
    if let Some([gate, up, down]) = &layer.bias {
        args.gate_bias = uses.read("gate bias", gate, &[experts, inner])?;
        args.up_bias = uses.read("up bias", up, &[experts, inner])?;
        args.down_bias = uses.read("down bias", down, &[experts, width])?;
    }
    let tokens = uses.batch(&mut args, shape, batch)?;
    if let Some(adapters) = adapters {
        let row = experts * 3 * size_of::<AdapterEntry>();
        let slots = adapters.table.len() / row;
        args.num_slots = count(slots, "table")?;
        args.max_rank = count(adapters.max_rank, "max_rank")?;
        args.token_slots = uses.read("token_slots", &adapters.token_slots, &[tokens])?;
        args.adapters = uses.read("table", &adapters.table, &[slots, row])?;
    }
    args.workspace_bytes = workspace.len() as u64;
    let bytes = workspace.len();
    args.workspace = uses.write("workspace", workspace, &[bytes])?;
    args.out = uses.write("out", out, &[tokens, width])?;
    args.stream = stream.cu_stream() as u64;
    // SAFETY: every address is a slice of this GPU of the length and type that its field asks for, borrowed until here, and
    // ordered against other work by its guard, which drops behind the launches; what table entries point to is the promise
    // of `AdapterSlices::new`.
    unsafe { raw::forward(gpu, &args) }
}

impl<X: Element> LayerSlices<'_, X> {
    /// All that is no address.
    fn settings(&self) -> ForwardArgs {
        let LayerShape { num_experts, top_k, hidden_size, intermediate_size, first_expert, .. } = self.shape;
        ForwardArgs {
            num_experts: num_experts as u32,
            top_k: top_k as u32,
            hidden_size: hidden_size as u32,
            intermediate_size: intermediate_size as u32,
            dtype: ForwardArgs::dtype_code(X::DTYPE),
            weigh_input: u32::from(self.router_weight == RouterWeightPlacement::Input),
            scaling: self.routed_scaling_factor,
            first_expert: first_expert as u32,
            all_experts: self.shape.all_experts() as u32,
            adapter_part: self.shape.adapter_part.index() as u32,
            adapter_parts: self.shape.adapter_part.of() as u32,
            ..Default::default()
        }
        .with_activation(self.activation)
    }
}

/// Hidden states of format `X` can become outputs of format `Y`.
pub(super) fn check_formats<X: Element, Y: Element>() -> Result<(), InputError> {
    if X::DTYPE == DType::F32 {
        return Err(InputError::new("f32", "bf16 or f16").in_tensor("hidden"));
    }
    if Y::DTYPE != X::DTYPE && Y::DTYPE != DType::F32 {
        return Err(InputError::new(Y::DTYPE.to_string(), format!("{} or f32", X::DTYPE)).in_tensor("out"));
    }
    Ok(())
}

/// The slices of one forward: each is checked, ordered before the stream's work, and again after it when this drops.
pub(super) struct Uses<'a> {
    gpu: &'a Gpu,
    stream: &'a CudaStream,
    guards: Vec<SyncOnDrop<'a>>,
}

impl<'a> Uses<'a> {
    pub(super) fn new(gpu: &'a Gpu, stream: &'a CudaStream) -> Result<Self, InputError> {
        on(gpu, stream, "stream")?;
        Ok(Self { gpu, stream, guards: Vec::with_capacity(12) })
    }

    /// Sets a batch's addresses, and returns its number of tokens.
    pub(super) fn batch<X>(
        &mut self,
        args: &mut ForwardArgs,
        shape: &LayerShape,
        batch: &'a BatchSlices<'_, X>,
    ) -> Result<usize, InputError> {
        let tokens = batch.topk_ids.len() / shape.top_k;
        args.num_tokens = count(tokens, "topk_ids")?;
        args.hidden = self.read("hidden", &batch.hidden, &[tokens, shape.hidden_size])?;
        args.topk_ids = self.read("topk_ids", &batch.topk_ids, &[tokens, shape.top_k])?;
        args.topk_weights = self.read("topk_weights", &batch.topk_weights, &[tokens, shape.top_k])?;
        Ok(tokens)
    }

    pub(super) fn read<T>(
        &mut self,
        name: &str,
        slice: &'a CudaView<'_, T>,
        shape: &[usize],
    ) -> Result<u64, InputError> {
        self.check(name, slice, shape)?;
        let (address, guard) = slice.device_ptr(self.stream);
        self.guards.push(guard);
        Ok(address)
    }

    pub(super) fn write<T>(
        &mut self,
        name: &str,
        slice: &'a mut CudaViewMut<'_, T>,
        shape: &[usize],
    ) -> Result<u64, InputError> {
        self.check(name, slice, shape)?;
        let (address, guard) = slice.device_ptr_mut(self.stream);
        self.guards.push(guard);
        Ok(address)
    }

    fn check<T>(&self, name: &str, slice: &impl DeviceSlice<T>, shape: &[usize]) -> Result<(), InputError> {
        if Some(slice.len()) != shape.iter().try_fold(1_usize, |all, n| all.checked_mul(*n)) {
            return Err(InputError::new(format!("{} values", slice.len()), format!("{shape:?}")).in_tensor(name));
        }
        on(self.gpu, slice.stream(), name)
    }
}

pub(super) fn on(gpu: &Gpu, stream: &CudaStream, name: &str) -> Result<(), InputError> {
    let found = stream.context();
    if found != gpu.context() {
        let ordinals = [found, gpu.context()].map(|context| format!("cuda:{}", context.ordinal()));
        let [found, expected] = ordinals;
        return Err(InputError::new(found, expected).in_tensor(name));
    }
    Ok(())
}

fn count(n: usize, name: &str) -> Result<u32, InputError> {
    u32::try_from(n).map_err(|_| InputError::new(n.to_string(), "fewer than 2^32").in_tensor(name))
}
