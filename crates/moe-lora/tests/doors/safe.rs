//! The safe door: from host memory, on tensors in GPU memory, and as a graph, all with the same bits.

use super::device::Number;
use super::{MAX_RANK, spec};
use half::{bf16, f16};
use moe_lora::reference::random::{AdapterMix, Case, CaseSpec, RoutingMix};
use moe_lora::slices::{BatchSlices, CudaStream};
use moe_lora::{
    AdapterId, AdapterPool, AdapterWeights, DType, Device, FusedMoEWithLoRA, LayerGraph, LayerShape, Limits,
    ModelShape, PoolConfig, Routing, TokenAdapters,
};
use moe_lora_cuda::cudarc::driver::DevicePtr;
use moe_lora_cuda::{Stream, testing};
use std::sync::Arc;

/// GPU 0, or `None` after a loud word.
pub(crate) fn device(test: &str) -> Option<Device> {
    testing::gpu(test).map(|_| Device::cuda(0).unwrap())
}

/// A case's layer with its adapters in a pool.
pub(crate) struct Server {
    model: ModelShape,
    pool: AdapterPool,
    layer: FusedMoEWithLoRA,
    stream: Arc<CudaStream>,
    /// By the case's own slots.
    ids: Vec<AdapterId>,
}

impl Server {
    pub(crate) fn new<T: Number>(device: &Device, case: &Case, limits: Limits) -> Self {
        let model = ModelShape::uniform(case.spec.shape, 1, T::DTYPE);
        let pool = AdapterPool::new(device, &model, PoolConfig::default()).unwrap();
        let layer = FusedMoEWithLoRA::with_limits(0, case.weights.clone(), device, &pool, limits).unwrap();
        let stream = Arc::clone(device.gpu().unwrap().stream().unwrap().cudarc());
        let mut server = Self { model, pool, layer, stream, ids: Vec::new() };
        server.ids = (0..case.adapters.len()).map(|n| server.load(&n.to_string(), case, n)).collect();
        server
    }

    fn load(&self, name: &str, case: &Case, adapter: usize) -> AdapterId {
        let layers = [(0, case.adapters[adapter].clone())].into();
        self.pool.load(name, AdapterWeights::new(&self.model, layers).unwrap()).unwrap()
    }

    fn tokens(&self, slots: &[i32]) -> TokenAdapters {
        let ids: Vec<_> = slots.iter().map(|s| usize::try_from(*s).ok().map(|s| self.ids[s])).collect();
        TokenAdapters::from_ids(&ids)
    }

    /// From host memory, into NaN.
    pub(crate) fn serve<T: Number>(&self, case: &Case, slots: &[i32]) -> Vec<T> {
        let mut out = vec![T::from_f32(f32::NAN); case.hidden.len()];
        let routing = Routing::Selected { topk_ids: &case.topk_ids, topk_weights: &case.topk_weights };
        self.layer.forward(&case.hidden_as::<T>(), routing, &self.tokens(slots), &mut out).unwrap();
        out
    }

    /// On tensors in GPU memory, into NaN.
    fn resident<T: Number>(&self, stream: &Arc<CudaStream>, case: &Case, slots: &[i32]) -> Vec<T> {
        let hidden = stream.clone_htod(&case.hidden_as::<T>()).unwrap();
        let topk_ids = stream.clone_htod(&case.topk_ids).unwrap();
        let topk_weights = stream.clone_htod(&case.topk_weights).unwrap();
        let mut out = stream.clone_htod(&vec![T::from_f32(f32::NAN); case.hidden.len()]).unwrap();
        let batch = BatchSlices {
            hidden: hidden.as_view(),
            topk_ids: topk_ids.as_view(),
            topk_weights: topk_weights.as_view(),
        };
        self.layer.forward_on(stream, &batch, &self.tokens(slots), &mut out.as_view_mut()).unwrap();
        stream.clone_dtoh(&out).unwrap()
    }

    /// As a graph, into NaN.
    fn replay<T: Number>(&self, graph: &mut LayerGraph<T, T>, case: &Case, slots: &[i32]) -> Vec<T> {
        let (stream, tensors) = (&self.stream, graph.tensors());
        stream.memcpy_htod(&case.hidden_as::<T>(), &mut tensors.hidden_mut()).unwrap();
        stream.memcpy_htod(&case.topk_ids, &mut tensors.topk_ids_mut()).unwrap();
        stream.memcpy_htod(&case.topk_weights, &mut tensors.topk_weights_mut()).unwrap();
        let (address, bytes) = (tensors.out().device_ptr(stream).0, size_of::<T>() * case.hidden.len());
        // SAFETY: the graph's own output, on the stream that it runs on.
        unsafe { Stream::from(Arc::clone(stream)).fill_address(address, bytes, 0xff) }.unwrap();
        graph.replay(&self.tokens(slots)).unwrap();
        stream.clone_dtoh(&graph.tensors().out()).unwrap()
    }
}

fn on_the_gpu<T: Number>(device: &Device) {
    for tokens in [0, 1, 40, 300] {
        let case = spec(tokens, T::DTYPE).build(3);
        // The last one runs in pieces.
        for max_tokens in [512, 13] {
            let server = Server::new::<T>(device, &case, Limits { max_tokens, max_rank: MAX_RANK });
            let want = server.serve::<T>(&case, &case.token_slots);
            let other = Arc::clone(server.stream.context().new_stream().as_ref().unwrap());
            // Two streams take turns at the workspace, and with the host's forwards.
            for turn in 0..6 {
                let stream = if turn % 2 == 0 { &server.stream } else { &other };
                assert!(want == server.resident::<T>(stream, &case, &case.token_slots), "{tokens} tokens, turn {turn}");
                if turn == 3 {
                    assert!(want == server.serve::<T>(&case, &case.token_slots));
                }
            }
        }
    }
}

#[test]
fn tensors_on_the_gpu_give_the_bits_of_the_host() {
    let Some(device) = device("tensors on the GPU") else { return };
    on_the_gpu::<bf16>(&device);
    on_the_gpu::<f16>(&device);
}

/// Other tokens, experts and adapters in every replay, also adapters that are loaded, replaced or unloaded in between.
#[test]
fn a_layers_graph_serves_adapters_that_come_and_go() {
    let Some(device) = device("a layer's graph") else { return };
    for tokens in [1, 40, 300] {
        let case = spec(tokens, DType::Bf16).build(3);
        let mut server = Server::new::<bf16>(&device, &case, Limits { max_tokens: 512, max_rank: MAX_RANK });
        let stream = Arc::clone(&server.stream);
        let mut graph = server.layer.capture::<bf16, bf16>(&stream, tokens).unwrap();
        let mixes = [AdapterMix::Mixed, AdapterMix::AllBase, AdapterMix::Runs, AdapterMix::RoundRobin];
        let routings = [RoutingMix::Uniform, RoutingMix::ForeignExperts, RoutingMix::AllOnOne, RoutingMix::Skewed];
        let batches: Vec<_> = (0..8)
            .map(|n| {
                let (mix, routing) = (mixes[n % 4], routings[(n + n / 4) % 4]);
                CaseSpec { mix, routing, ..spec(tokens, DType::Bf16) }.build(100 + n as u64)
            })
            .collect();
        for turn in 0..50 {
            let batch = &batches[turn % 8];
            let slot = turn % 6;
            match turn % 5 {
                1 => {
                    server.pool.unload(server.ids[slot]).unwrap();
                    server.ids[slot] = server.load(&format!("{slot} of turn {turn}"), batch, slot);
                }
                3 => server.ids[slot] = server.load(&format!("also {slot} of turn {turn}"), batch, slot),
                _ => {}
            }
            let found = server.replay(&mut graph, batch, &batch.token_slots);
            assert!(found == server.serve::<bf16>(batch, &batch.token_slots), "turn {turn}, {tokens} tokens");
            assert!(found == server.resident::<bf16>(&stream, batch, &batch.token_slots), "turn {turn}, on the GPU");
        }
    }
}

#[test]
fn what_the_gpu_cannot_take_is_named() {
    let Some(device) = device("refusals of the safe door") else { return };
    let gpu = device.gpu().unwrap();
    let case = spec(20, DType::Bf16).build(3);
    let server = Server::new::<bf16>(&device, &case, Limits { max_tokens: 32, max_rank: MAX_RANK });
    let (stream, layer) = (&server.stream, &server.layer);
    let line = |result: Result<(), moe_lora::LayerError>| {
        let error = result.unwrap_err();
        assert!(error.input().is_some(), "{error}");
        error.to_string()
    };
    let capture = |stream, tokens| line(layer.capture::<bf16, f32>(stream, tokens).map(drop));
    assert_eq!(capture(stream, 0), "found 0 tokens, expected 1 to 32");
    assert_eq!(capture(stream, 33), "found 33 tokens, expected 1 to 32");
    assert!(capture(&gpu.context().default_stream(), 4).starts_with("found the default stream"));
    assert_eq!(line(layer.capture::<f16, f16>(stream, 4).map(drop)), "hidden: found f16, expected bf16");
    assert_eq!(line(layer.capture::<bf16, f16>(stream, 4).map(drop)), "out: found f16, expected bf16 or f32");
    let mut graph = layer.capture::<bf16, f32>(stream, 4).unwrap();
    let error = line(graph.replay(&TokenAdapters::base(5)));
    assert_eq!(error, "adapters: found adapters for 5 tokens, expected for 4");

    let hidden = stream.clone_htod(&case.hidden_as::<bf16>()).unwrap();
    let ids = stream.clone_htod(&case.topk_ids).unwrap();
    let weights = stream.clone_htod(&case.topk_weights).unwrap();
    let mut out = stream.alloc_zeros::<f32>(20 * 256).unwrap();
    let batch = |tokens: usize| BatchSlices {
        hidden: hidden.slice(0..tokens * 256),
        topk_ids: ids.as_view(),
        topk_weights: weights.as_view(),
    };
    let mut forward = |tokens, adapters| {
        layer.forward_on(stream, &batch(tokens), &TokenAdapters::base(adapters), &mut out.as_view_mut())
    };
    assert_eq!(line(forward(19, 20)), "hidden: found 4864 values, expected [20, 256]");
    assert_eq!(line(forward(20, 19)), "adapters: found adapters for 19 tokens, expected for 20");
    forward(20, 20).unwrap();

    let (cpu, shape) = (Device::cpu(), LayerShape::new(16, 8, 256, 192).unwrap());
    let pool = AdapterPool::new(&cpu, &ModelShape::uniform(shape, 1, DType::Bf16), PoolConfig::default()).unwrap();
    let on_cpu = FusedMoEWithLoRA::new(0, case.weights.clone(), &cpu, &pool).unwrap();
    let error = line(on_cpu.capture::<bf16, bf16>(stream, 4).map(drop));
    assert_eq!(error, "found a layer on the CPU, expected one on a GPU");
}
