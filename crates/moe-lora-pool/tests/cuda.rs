//! What a pool in GPU memory shows and charges; what the kernels then compute with it is tested with the layer.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod common;

use common::{full, shape};
use half::bf16;
use moe_lora_core::{
    AdapterId, AdapterLayer, AdapterWeights, DType, LayerShape, ModelShape, Projection, TokenAdapters,
};
use moe_lora_cuda::{DeviceBuffer, Gpu, Graph, Stream, testing};
use moe_lora_kernels::{DeviceSegment, Format, RouteBounds, RouteCounts, ShrinkParams};
use moe_lora_pool::{AdapterPool, CudaMemory, HostMemory, Lease, PoolConfig, TableAddress};
use moe_lora_reference::random::{AdapterSpec, CaseSpec};

#[test]
fn a_host_pool_has_no_device_addresses() {
    let pool = AdapterPool::new(HostMemory, &shape(DType::F32), PoolConfig::default()).unwrap();
    let id = pool.load("host", full(1, 2).weights).unwrap();
    let lease = pool.lease(&TokenAdapters::from_ids(&[Some(id)])).unwrap();
    assert!(lease.table(1).is_ok());
    let line = lease.device_table(1).unwrap_err().to_string();
    assert_eq!(line, "found a pool on cpu, expected a pool in GPU memory");
}

/// `s = scale * A x` of the kernels for one token, expert 0 and one slot, replayed from one graph.
struct Shrink {
    stream: Stream,
    input: DeviceBuffer,
    chunks: DeviceBuffer,
    /// Read by the graph.
    _counts: DeviceBuffer,
    shrunk: DeviceBuffer,
    graph: Graph,
}

const RANK: usize = 24;

impl Shrink {
    fn new(gpu: &Gpu, layer: &LayerShape, table: TableAddress) -> Self {
        let stream = gpu.stream().unwrap();
        let buffer = |bytes: usize| gpu.alloc(bytes).unwrap();
        let (input, shrunk) = (buffer(2 * layer.hidden_size), buffer(4 * 2 * RANK));
        let (chunks, counts) = (buffer(16), buffer(32));
        let counted = RouteCounts { num_rows: 1, num_segments: 1, num_tiles: 1, num_chunks: 1, ..Default::default() };
        stream.upload(&counts, 0, &[counted]).unwrap();
        let params = ShrinkParams {
            input: input.address(),
            chunks: chunks.address(),
            counts: counts.address(),
            adapters: table.entries,
            shrunk: shrunk.address(),
            top_k: 1,
            num_experts: layer.num_experts as u32,
            width: layer.hidden_size as u32,
            num_projections: 2,
            max_rank: RANK as u32,
            shrunk_stride: 2 * RANK as u32,
            ..Default::default()
        };
        let launch = params.launch(&RouteBounds::new(1, 1, 1, 1), gpu.info().sm_count);
        // SAFETY: all addresses are of buffers that live as long as the graph; slots are leased while it runs.
        let work = || unsafe { gpu.kernels().launch(&stream, Format::Bf16, &params, launch) };
        let graph = stream.capture(work).unwrap();
        Self { stream, input, chunks, _counts: counts, shrunk, graph }
    }

    /// Gate and up part of `s`, `[2, RANK]`.
    fn run(&self, lease: &Lease, input: &[bf16]) -> Vec<f32> {
        let slot = lease.device_slots()[0];
        let chunk = DeviceSegment { expert: 0, slot, first_row: 0, end_row: 1 };
        self.stream.upload(&self.chunks, 0, &[chunk]).unwrap();
        self.stream.upload(&self.input, 0, input).unwrap();
        self.stream.fill(&self.shrunk, 0, self.shrunk.bytes(), 0xff).unwrap();
        lease.wait_on(&self.stream).unwrap();
        self.graph.launch().unwrap();
        let mut words = vec![bf16::ZERO; 4 * RANK];
        self.stream.download(&self.shrunk, 0, &mut words).unwrap();
        // Of four neighbouring ranks four first parts, then four second parts.
        let four = |w: &[bf16]| [0, 1, 2, 3].map(|n| w[n].to_f32() + w[n + 4].to_f32());
        words.chunks_exact(8).flat_map(four).collect()
    }

    fn check(&self, pool: &AdapterPool, id: AdapterId, want: &AdapterLayer, what: &str) {
        let lease = pool.lease(&TokenAdapters::from_ids(&[Some(id)])).unwrap();
        let input: Vec<bf16> = (0..self.input.bytes() / 2).map(|n| bf16::from_f32((n as f32 * 0.7).sin())).collect();
        let found = self.run(&lease, &input);
        for (projection, found) in [Projection::Gate, Projection::Up].into_iter().zip(found.chunks(RANK)) {
            let Some(lora) = want.experts()[0].get(projection) else { continue };
            for (rank, found) in found[..lora.rank()].iter().enumerate() {
                let row = |n: usize| f64::from(bf16::from_f32(lora.a().get(rank, n)).to_f32());
                let sum: f64 = input.iter().enumerate().map(|(n, x)| f64::from(x.to_f32()) * row(n)).sum();
                let want = sum * f64::from(lora.scale());
                assert!((f64::from(*found) - want).abs() <= 1e-4 * (1.0 + want.abs()), "{what}: {found} for {want}");
            }
        }
    }
}

/// One graph, captured before there was any adapter, serves all that come, go and change later.
#[test]
fn a_captured_graph_serves_adapters_that_are_loaded_and_replaced_later() {
    let Some(gpu) = testing::gpu("a graph over the pool's tables") else { return };
    let layer = LayerShape::new(4, 2, 128, 64).unwrap();
    let model = ModelShape { moe_layers: vec![2, 7], ..ModelShape::uniform(layer, 1, DType::Bf16) };
    let case = |seed: u64| {
        let ranks = [1 + seed as usize % RANK, 1 + (7 * seed) as usize % RANK, 3];
        let spec = AdapterSpec { ranks, ..AdapterSpec::rank(1) };
        CaseSpec { adapters: vec![spec], ..CaseSpec::new(layer, 1) }.build(seed).adapters[0].clone()
    };
    let weights = |seed| AdapterWeights::new(&model, [(7, case(seed)), (2, case(seed + 100))].into()).unwrap();
    let config = PoolConfig { bytes: 400 << 10, device_slots: 5, ..Default::default() };
    let pool = AdapterPool::new(CudaMemory::new(gpu.clone()), &model, config).unwrap();
    let table = pool.table_address(7).unwrap();
    assert!(pool.table_address(6).is_none() && table.slots == 5 && pool.table_address(2).unwrap() != table);
    let graph = Shrink::new(&gpu, &layer, table);
    for seed in 1..40_u64 {
        let name = (seed % 9).to_string();
        let id = match pool.find(&name) {
            Some(_) => pool.replace(&name, weights(seed)).unwrap(),
            None => pool.load(&name, weights(seed)).unwrap(),
        };
        graph.check(&pool, id, &case(seed), &format!("{seed}"));
        assert_eq!(pool.table_address(7).unwrap(), table);
    }
    assert!(pool.snapshot().evictions > 0);
}

#[test]
fn a_lease_says_what_the_kernels_need_to_know() {
    let Some(gpu) = testing::gpu("pool tables") else { return };
    let layer = LayerShape::new(4, 2, 32, 16).unwrap();
    let model = ModelShape { moe_layers: vec![5, 7], ..ModelShape::uniform(layer, 1, DType::F32) };
    let memory = CudaMemory::new(gpu);
    let pool = AdapterPool::new(memory, &model, PoolConfig { bytes: 1 << 20, ..Default::default() }).unwrap();
    let plain = AdapterSpec { ranks: [3, 8, 9], ..AdapterSpec::rank(1) };
    let shared = AdapterSpec { shared_outer: true, shared_gate_up_a: true, ..AdapterSpec::rank(5) };
    let nothing = AdapterSpec { ranks: [0; 3], ..AdapterSpec::rank(1) };
    let case = CaseSpec { adapters: vec![plain, shared, nothing], ..CaseSpec::new(layer, 1) }.build(1);
    let ids: Vec<_> = (0..3)
        .map(|n| {
            let weights = AdapterWeights::new(&model, [(7, case.adapters[n].clone())].into()).unwrap();
            pool.load(&n.to_string(), weights).unwrap()
        })
        .collect();
    // bf16, ranks in steps of 8, matrices in steps of 256 bytes: A of 32 or 16 and B of 16 or 32 numbers a rank.
    let bytes: Vec<_> = pool.snapshot().adapters.iter().map(|a| a.bytes).collect();
    assert_eq!(bytes, [4 * (8 + 8 + 16) * 48 * 2, (8 * 32 + 8 * 32 + 4 * 3 * 8 * 16) * 2, 0]);
    let tables = 2 * 64 * (4 * 3 * 24 + 1);
    assert_eq!((pool.snapshot().table_bytes, pool.snapshot().reserved_bytes), (tables, 1 << 20));

    let tokens = [Some(ids[2]), None, Some(ids[0])];
    let lease = pool.lease(&TokenAdapters::from_ids(&tokens)).unwrap();
    assert!(lease.table(7).is_err() && lease.device_table(6).is_err());
    let table = lease.device_table(7).unwrap();
    assert_eq!((table.dtype(), table.max_rank(), table.shape()), (DType::Bf16, 9, &layer));
    let slots = table.token_slots();
    assert!(slots.len() == 3 && slots[1] == -1);
    assert_eq!((table.rank(slots[0]), table.rank(slots[2]), table.rank(-1)), (Some(0), Some(9), None));
    assert_eq!(table.rank((0..3).find(|s| !slots.contains(s)).unwrap()), None, "loaded, and not in this lease");
    assert_eq!(lease.device_table(5).unwrap().max_rank(), 0);
    assert_eq!(Some(table.address()), pool.table_address(7));
}
