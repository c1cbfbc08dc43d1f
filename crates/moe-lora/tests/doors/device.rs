//! A random case in GPU memory as an engine would hold it, with NaN behind every tensor, and its forward through each door.

use half::{bf16, f16};
use moe_lora::raw::{self, AdapterEntry, ForwardArgs, RouteCounts};
use moe_lora::reference::random::Case;
use moe_lora::slices::{self, AdapterSlices, BatchSlices, LayerSlices};
use moe_lora::{AdapterLayer, Element, Lora, RouterWeightPlacement, RunnerError};
use moe_lora_cuda::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DeviceRepr};
use moe_lora_cuda::{Gpu, Graph, Stream};
use std::sync::Arc;

/// bf16 or f16 as both cudarc and the reference know it.
pub(crate) trait Number: Element + DeviceRepr + Unpin {}
impl Number for bf16 {}
impl Number for f16 {}

/// Bytes of NaN behind every tensor.
const PAD: usize = 512;

/// A tensor at the front of an allocation that is NaN behind it.
pub(crate) struct Tensor<T> {
    memory: CudaSlice<T>,
    len: usize,
}

impl<T: DeviceRepr + bytemuck::Pod> Tensor<T> {
    fn new(stream: &Stream, values: &[T]) -> Self {
        let mut padded = values.to_vec();
        padded
            .resize(values.len() + PAD / size_of::<T>(), bytemuck::pod_read_unaligned(&[0xff_u8; 4][..size_of::<T>()]));
        Self { memory: stream.cudarc().clone_htod(&padded).unwrap(), len: values.len() }
    }

    pub(crate) fn view(&self) -> CudaView<'_, T> {
        self.memory.slice(0..self.len)
    }

    pub(crate) fn address(&self, stream: &Stream) -> u64 {
        self.memory.device_ptr(stream.cudarc()).0
    }

    fn set(&mut self, stream: &Stream, values: &[T]) {
        assert_eq!(values.len(), self.len);
        stream.cudarc().memcpy_htod(values, &mut self.memory).unwrap();
    }

    /// All of it, and the pad if it is one that nobody may write.
    fn read(&self, stream: &Stream) -> Vec<T> {
        let mut all = stream.cudarc().clone_dtoh(&self.memory).unwrap();
        let pad = all.split_off(self.len);
        assert!(bytemuck::cast_slice::<T, u8>(&pad).iter().all(|byte| *byte == 0xff), "written behind the end");
        all
    }

    fn poison(&mut self, stream: &Stream) {
        let bytes = size_of::<T>() * self.len;
        // SAFETY: inside the allocation, and this stream is the only one that uses it.
        unsafe { stream.fill_address(self.address(stream), bytes, 0xff) }.unwrap();
    }
}

/// A layer, adapters that lie somewhere, a table of some of them, and a batch.
pub(crate) struct OnDevice<T> {
    pub(crate) gpu: Gpu,
    pub(crate) stream: Stream,
    pub(crate) max_rank: usize,
    case: Case,
    w13: Tensor<T>,
    w2: Tensor<T>,
    bias: Option<[Tensor<f32>; 3]>,
    /// Keeps what the entries point to.
    _matrices: Tensor<T>,
    /// `[E, 3]` of each of the case's adapters.
    entries: Vec<Vec<AdapterEntry>>,
    table: Tensor<u8>,
    hidden: Tensor<T>,
    topk_ids: Tensor<i32>,
    topk_weights: Tensor<f32>,
    token_slots: Tensor<i32>,
    out: Tensor<T>,
    counts: Tensor<u32>,
    workspace: Tensor<u8>,
}

impl<T: Number> OnDevice<T> {
    /// With a table of `slots` slots that hold the case's adapters in order.
    pub(crate) fn new(gpu: &Gpu, case: &Case, slots: usize, max_rank: usize) -> Self {
        let (stream, shape) = (gpu.stream().unwrap(), case.spec.shape);
        let (mut w13, mut w2): (Vec<T>, Vec<T>) = Default::default();
        for expert in case.weights.experts() {
            let (gate, up) = (expert.gate.to_vec::<T>(), expert.up.to_vec::<T>());
            if case.spec.interleaved {
                let rows = gate.chunks(shape.hidden_size).zip(up.chunks(shape.hidden_size));
                rows.for_each(|(gate, up)| w13.extend(gate.iter().chain(up)));
            } else {
                w13.extend(gate.iter().chain(&up));
            }
            w2.extend(expert.down.to_vec::<T>());
        }
        let bias = case.spec.bias.then(|| {
            let all = |pick: fn(&moe_lora::ExpertBias) -> &Vec<f32>| -> Vec<f32> {
                case.weights.experts().iter().flat_map(|e| e.bias.iter().flat_map(|b| pick(b).clone())).collect()
            };
            [all(|b| &b.gate), all(|b| &b.up), all(|b| &b.down)].map(|values| Tensor::new(&stream, &values))
        });

        let mut matrices = Vec::new();
        let mut entries: Vec<Vec<_>> = case.adapters.iter().map(|a| pack(a, &mut matrices)).collect();
        let matrices = Tensor::new(&stream, &matrices);
        for entry in entries.iter_mut().flatten().filter(|entry| entry.rank > 0) {
            entry.a += matrices.address(&stream);
            entry.b += matrices.address(&stream);
        }
        let tokens = case.spec.tokens;
        let bytes = raw::workspace_bytes(gpu, &shape, tokens, slots, max_rank).unwrap();
        let table = vec![0; slots * shape.num_experts * 3 * size_of::<AdapterEntry>()];
        let mut this = Self {
            gpu: gpu.clone(),
            max_rank,
            case: case.clone(),
            w13: Tensor::new(&stream, &w13),
            w2: Tensor::new(&stream, &w2),
            bias,
            _matrices: matrices,
            entries,
            table: Tensor::new(&stream, &table),
            hidden: Tensor::new(&stream, &case.hidden_as::<T>()),
            topk_ids: Tensor::new(&stream, &case.topk_ids),
            topk_weights: Tensor::new(&stream, &case.topk_weights),
            token_slots: Tensor::new(&stream, &case.token_slots),
            out: Tensor::new(&stream, &case.hidden_as::<T>()),
            counts: Tensor::new(&stream, &[u32::MAX; 8]),
            workspace: Tensor::new(&stream, &vec![0xff; bytes]),
            stream,
        };
        let all: Vec<_> = (0..case.adapters.len()).map(Some).collect();
        this.fill_table(&all);
        this
    }

    /// Another batch of the same size at the same addresses.
    pub(crate) fn set_batch(&mut self, case: &Case) {
        self.hidden.set(&self.stream, &case.hidden_as::<T>());
        self.topk_ids.set(&self.stream, &case.topk_ids);
        self.topk_weights.set(&self.stream, &case.topk_weights);
        self.token_slots.set(&self.stream, &case.token_slots);
    }

    /// Other adapters at the same address: the case's adapter of each slot. Slots behind them are empty.
    pub(crate) fn fill_table(&mut self, slots: &[Option<usize>]) {
        let row = self.case.spec.shape.num_experts * 3;
        let mut table = vec![AdapterEntry::default(); self.table.len / size_of::<AdapterEntry>()];
        for (to, from) in table.chunks_mut(row).zip(slots) {
            from.iter().for_each(|&adapter| to.copy_from_slice(&self.entries[adapter]));
        }
        self.table.set(&self.stream, bytemuck::cast_slice(&table));
    }

    /// NaN in all that a forward writes.
    pub(crate) fn poison(&mut self) {
        self.workspace.poison(&self.stream);
        self.out.poison(&self.stream);
        self.counts.poison(&self.stream);
    }

    pub(crate) fn args(&self, lora: bool) -> ForwardArgs {
        let (shape, spec, stream) = (self.case.spec.shape, &self.case.spec, &self.stream);
        let dtype = ForwardArgs::dtype_code(T::DTYPE);
        let bias = |n: usize| self.bias.as_ref().map_or(0, |bias| bias[n].address(stream));
        let slots = self.table.len / (shape.num_experts * 3 * size_of::<AdapterEntry>());
        ForwardArgs {
            stream: stream.handle(),
            hidden: self.hidden.address(stream),
            topk_ids: self.topk_ids.address(stream),
            topk_weights: self.topk_weights.address(stream),
            token_slots: self.token_slots.address(stream),
            gate_bias: bias(0),
            up_bias: bias(1),
            down_bias: bias(2),
            adapters: self.table.address(stream),
            out: self.out.address(stream),
            counts: self.counts.address(stream),
            workspace: self.workspace.address(stream),
            workspace_bytes: self.workspace.len as u64,
            num_tokens: spec.tokens as u32,
            num_experts: shape.num_experts as u32,
            top_k: shape.top_k as u32,
            hidden_size: shape.hidden_size as u32,
            intermediate_size: shape.intermediate_size as u32,
            num_slots: if lora { slots as u32 } else { 0 },
            max_rank: self.max_rank as u32,
            dtype,
            out_dtype: dtype,
            weigh_input: u32::from(spec.router_weight == RouterWeightPlacement::Input),
            scaling: spec.routed_scaling_factor,
            ..Default::default()
        }
        .with_w13(self.w13.address(stream), spec.interleaved)
        .with_w2(self.w2.address(stream))
        .with_activation(spec.activation)
    }

    /// Through the raw door; it is on its way when this returns.
    pub(crate) fn launch(&self, lora: bool) {
        // SAFETY: all addresses are `self`'s own, in the sizes of its case, and used on `self`'s stream alone.
        unsafe { raw::forward(&self.gpu, &self.args(lora)) }.unwrap();
    }

    /// The same for other arguments, on a path or the fastest, into NaN.
    pub(crate) fn run(&mut self, args: &ForwardArgs, path: Option<raw::Path>) -> Vec<T> {
        self.poison();
        // SAFETY: as above.
        unsafe { raw::forward_on(&self.gpu, args, path) }.unwrap();
        self.output()
    }

    /// The same as a graph.
    pub(crate) fn capture(&self, lora: bool) -> Graph {
        // Before the capture: asking cudarc for an address makes the stream wait for what wrote there.
        let args = self.args(lora);
        // SAFETY: as above.
        self.stream.capture(|| unsafe { raw::forward(&self.gpu, &args) }).unwrap()
    }

    /// Through the raw door, into NaN.
    pub(crate) fn raw(&mut self, lora: bool) -> Vec<T> {
        self.poison();
        self.launch(lora);
        self.output()
    }

    pub(crate) fn output(&self) -> Vec<T> {
        self.workspace.read(&self.stream);
        self.out.read(&self.stream)
    }

    pub(crate) fn counts(&self) -> RouteCounts {
        bytemuck::cast_slice(&self.counts.read(&self.stream))[0]
    }

    /// Through the cudarc door, into NaN.
    pub(crate) fn sliced(&mut self, lora: bool) -> Result<Vec<T>, RunnerError> {
        self.poison();
        let spec = &self.case.spec;
        let layer = LayerSlices {
            shape: spec.shape,
            w13: self.w13.view(),
            interleaved: spec.interleaved,
            w2: self.w2.view(),
            bias: self.bias.as_ref().map(|bias| [bias[0].view(), bias[1].view(), bias[2].view()]),
            activation: spec.activation,
            router_weight: spec.router_weight,
            routed_scaling_factor: spec.routed_scaling_factor,
        };
        // SAFETY: the entries are those of `self`'s adapters.
        let adapters = unsafe { AdapterSlices::new(self.token_slots.view(), self.table.view(), self.max_rank) };
        let batch = BatchSlices {
            hidden: self.hidden.view(),
            topk_ids: self.topk_ids.view(),
            topk_weights: self.topk_weights.view(),
        };
        let adapters = lora.then_some(&adapters);
        let mut workspace = self.workspace.memory.slice_mut(0..self.workspace.len);
        let mut out = self.out.memory.slice_mut(0..self.out.len);
        let stream = Arc::clone(self.stream.cudarc());
        slices::forward(&self.gpu, &stream, &layer, &batch, adapters, &mut workspace, &mut out)?;
        Ok(self.output())
    }
}

/// Appends an adapter's matrices, each with NaN behind it, and returns its entries with offsets for addresses.
fn pack<T: Number>(adapter: &AdapterLayer, matrices: &mut Vec<T>) -> Vec<AdapterEntry> {
    let zero = T::from_f32(0.0);
    let mut entry = |lora: &Lora| {
        let (rank8, width) = (lora.rank().next_multiple_of(8), lora.in_features());
        let a = size_of_val(&matrices[..]) as u64;
        matrices.extend(lora.a().to_vec::<T>());
        matrices.resize(matrices.len() + (rank8 - lora.rank()) * width, zero);
        matrices.resize(matrices.len() + 8, T::from_f32(f32::NAN));
        let b = size_of_val(&matrices[..]) as u64;
        for row in lora.b().to_vec::<T>().chunks(lora.rank()) {
            matrices.extend(row);
            matrices.resize(matrices.len() + rank8 - lora.rank(), zero);
        }
        matrices.resize(matrices.len() + 8, T::from_f32(f32::NAN));
        AdapterEntry { a, b, rank: lora.rank() as i32, scale: lora.scale() }
    };
    let projections = adapter.experts().iter().flat_map(|expert| [&expert.gate, &expert.up, &expert.down]);
    projections.map(|lora| lora.as_ref().map_or(AdapterEntry::default(), &mut entry)).collect()
}
