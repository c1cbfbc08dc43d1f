//! A rank's layer with its all-reduce by NCCL, as a group of one: through the layer, and as one captured graph behind the raw
//! door, as an engine has it.
#![cfg(feature = "cuda")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test that cannot go on may panic and speak"
)]

use half::bf16;
use moe_lora_collective::{GpuCommunicator, NcclCommunicator};
use moe_lora_core::{AdapterWeights, DType, LayerShape, ModelShape, Routing, Shard, TokenAdapters};
use moe_lora_cuda::{Gpu, GpuError, NcclError, NcclId, testing};
use moe_lora_layer::FusedMoEWithLoRA;
use moe_lora_pool::{AdapterPool, PoolConfig};
use moe_lora_reference::metrics::relative_error;
use moe_lora_reference::random::{AdapterSpec, Case, CaseSpec};
use moe_lora_runner::raw::{self, DTYPE_F32, ForwardArgs};
use moe_lora_runner::{CudaWeights, Device};
use std::sync::Arc;
use std::time::Duration;

/// GPU 0 and a group of one; `None` after a loud word.
fn start(test: &str) -> Option<(Gpu, NcclCommunicator)> {
    let gpu = testing::gpu(test)?;
    let id = match NcclId::new() {
        Ok(id) => id,
        Err(why @ NcclError::NotFound { .. }) => {
            assert!(std::env::var_os("MOE_LORA_NCCL").is_none(), "{test}: {why}");
            eprintln!("SKIPPED {test}: {why}");
            return None;
        }
        Err(why) => panic!("{test}: {why}"),
    };
    let alone = NcclCommunicator::join(&gpu, 0, 1, id, Duration::from_secs(20)).unwrap();
    Some((gpu, alone))
}

fn case(seed: u64) -> Case {
    let shape = LayerShape::new(8, 2, 512, 256).unwrap();
    let adapters = vec![AdapterSpec::rank(16), AdapterSpec::rank(8)];
    CaseSpec { adapters, ..CaseSpec::new(shape, 23).dtype(DType::Bf16) }.build(seed)
}

fn pool(device: &Device, case: &Case) -> (AdapterPool, TokenAdapters) {
    let model = ModelShape::uniform(case.spec.shape, 1, DType::Bf16);
    let pool = AdapterPool::new(device, &model, PoolConfig::default()).unwrap();
    let load = |(n, layer): (usize, &moe_lora_core::AdapterLayer)| {
        pool.load(&n.to_string(), AdapterWeights::new(&model, [(0, layer.clone())].into()).unwrap()).unwrap()
    };
    let ids: Vec<_> = case.adapters.iter().enumerate().map(load).collect();
    let tokens: Vec<_> =
        case.token_slots.iter().map(|&slot| usize::try_from(slot).ok().map(|slot| ids[slot])).collect();
    (pool, TokenAdapters::from_ids(&tokens))
}

#[test]
fn a_layer_sums_on_the_gpu() {
    let Some((_, alone)) = start("a layer with NCCL") else { return };
    let (device, case) = (Device::cuda(0).unwrap(), case(1));
    let (pool, tokens) = pool(&device, &case);
    let layer = FusedMoEWithLoRA::new(0, case.weights.clone(), &device, &pool).unwrap();
    let layer = layer.with_shard(&case.spec.shape, &Shard::WHOLE, Some(Arc::new(alone))).unwrap();
    let routing = Routing::Selected { topk_ids: &case.topk_ids, topk_weights: &case.topk_weights };
    let mut out = vec![f32::NAN; case.hidden.len()];
    layer.forward(&case.hidden_as::<bf16>(), routing, &tokens, &mut out).unwrap();
    let wide: Vec<f64> = out.iter().map(|&v| v.into()).collect();
    let error = relative_error(&wide, &case.truth().unwrap());
    assert!(error <= 3e-3, "{error:.2e}");
    let mut narrow = vec![bf16::NAN; out.len()];
    layer.forward(&case.hidden_as::<bf16>(), routing, &tokens, &mut narrow).unwrap();
    assert!(
        narrow.iter().zip(&out).all(|(narrow, out)| *narrow == bf16::from_f32(*out)),
        "rounded once, after the sum"
    );
}

#[test]
fn a_graph_holds_the_layer_and_its_all_reduce() {
    let Some((gpu, alone)) = start("a layer and NCCL in a graph") else { return };
    let (device, drawn) = (Device::cuda(0).unwrap(), case(2));
    let shape = drawn.spec.shape;
    let (pool, tokens) = pool(&device, &drawn);
    let weights = CudaWeights::upload(&gpu, &drawn.weights).unwrap();
    let lease = pool.lease(&tokens).unwrap();
    let table = lease.device_table(0).unwrap().address();
    let (stream, tokens) = (gpu.stream().unwrap(), drawn.token_slots.len());
    lease.wait_on(&stream).unwrap();
    // Of the case's slots, those in the table.
    let mut rows = [-1; 2];
    drawn.token_slots.iter().zip(lease.device_slots()).filter(|(slot, _)| **slot >= 0).for_each(|(slot, row)| {
        rows[*slot as usize] = *row;
    });
    let in_table = |slots: &[i32]| -> Vec<i32> {
        slots.iter().map(|&slot| usize::try_from(slot).map_or(-1, |slot| rows[slot])).collect()
    };
    let upload = |bytes: &[u8]| {
        let buffer = gpu.alloc(bytes.len()).unwrap();
        stream.upload(&buffer, 0, bytes).unwrap();
        buffer
    };
    let hidden = upload(bytemuck::cast_slice(&drawn.hidden_as::<bf16>()));
    let (ids, topk_weights) =
        (upload(bytemuck::cast_slice(&drawn.topk_ids)), upload(bytemuck::cast_slice(&drawn.topk_weights)));
    let slots = upload(bytemuck::cast_slice(lease.device_slots()));
    let out = gpu.alloc(4 * tokens * shape.hidden_size).unwrap();
    let workspace = gpu.alloc(raw::workspace_bytes(&gpu, &shape, tokens, table.slots as usize, 16).unwrap()).unwrap();
    let args = ForwardArgs {
        stream: stream.handle(),
        hidden: hidden.address(),
        topk_ids: ids.address(),
        topk_weights: topk_weights.address(),
        token_slots: slots.address(),
        adapters: table.entries,
        slot_active: table.active,
        out: out.address(),
        workspace: workspace.address(),
        workspace_bytes: workspace.bytes() as u64,
        num_tokens: tokens as u32,
        num_slots: table.slots,
        max_rank: 16,
        out_dtype: DTYPE_F32,
        ..weights.args()
    };
    let graph = stream.capture(|| {
        // SAFETY: everything above is as large as its field asks for and lives to the end of this test.
        unsafe { raw::forward(&gpu, &args) }.unwrap();
        alone.all_reduce_on(&stream, &out, 0, tokens * shape.hidden_size).unwrap();
        Ok::<(), GpuError>(())
    });
    let graph = graph.unwrap();
    let mut first = Vec::new();
    for seed in [2, 3, 2] {
        // The graph reads what its addresses hold: other tokens, other routing, other adapters.
        let now = Case { weights: drawn.weights.clone(), adapters: drawn.adapters.clone(), ..case(seed) };
        stream.upload(&hidden, 0, &now.hidden_as::<bf16>()).unwrap();
        stream.upload(&ids, 0, &now.topk_ids).unwrap();
        stream.upload(&topk_weights, 0, &now.topk_weights).unwrap();
        stream.upload(&slots, 0, &in_table(&now.token_slots)).unwrap();
        stream.fill(&out, 0, out.bytes(), 0xff).unwrap();
        graph.launch().unwrap();
        alone.wait(&stream).unwrap();
        let mut found = vec![0_f32; tokens * shape.hidden_size];
        stream.download(&out, 0, &mut found).unwrap();
        let wide: Vec<f64> = found.iter().map(|&v| v.into()).collect();
        let error = relative_error(&wide, &now.truth().unwrap());
        assert!(error <= 3e-3, "seed {seed}: {error:.2e}");
        if first.is_empty() {
            first = found;
        } else {
            assert_eq!(first == found, seed == 2, "the same bits for the same inputs");
        }
    }
}
