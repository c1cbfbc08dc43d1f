//! The three doors to one layer on a GPU: the same bits through each, what they refuse, and graphs.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

mod device;
mod safe;

use device::{Number, OnDevice};
use half::{bf16, f16};
use moe_lora::raw;
use moe_lora::reference::metrics::relative_error;
use moe_lora::reference::random::{AdapterMix, AdapterSpec, CaseSpec, RoutingMix};
use moe_lora::{Activation, AdapterTable, DType, Device, LayerShape, Limits, RouterWeightPlacement};
use moe_lora_cuda::testing;
use safe::Server;

/// Six adapters of all kinds in a layer of 16 experts.
fn spec(tokens: usize, dtype: DType) -> CaseSpec {
    let shape = LayerShape::new(16, 8, 256, 192).unwrap();
    let one_sided = AdapterSpec { ranks: [0, 0, 13], ..AdapterSpec::rank(1) };
    let shared = AdapterSpec { shared_gate_up_a: true, shared_outer: true, ..AdapterSpec::rank(16) };
    let some = AdapterSpec { ranks: [40, 3, 64], some_experts: true, ..AdapterSpec::rank(1) };
    let adapters = vec![AdapterSpec::rank(8), one_sided, shared, some, AdapterSpec::rank(64), AdapterSpec::rank(5)];
    CaseSpec { adapters, ..CaseSpec::new(shape, tokens).dtype(dtype) }
}

const MAX_RANK: usize = 64;

fn agree<T: Number>(device: &Device) {
    let gpu = device.gpu().unwrap();
    // 300 tokens are more pairs than one block of align sorts.
    for (seed, tokens) in [0, 1, 7, 48, 300].into_iter().enumerate() {
        let plain = spec(tokens, T::DTYPE);
        let gpt_oss = CaseSpec {
            activation: Activation::GPT_OSS,
            bias: true,
            interleaved: true,
            routing: RoutingMix::ForeignExperts,
            routed_scaling_factor: 2.5,
            ..plain.clone()
        };
        let llama = CaseSpec { router_weight: RouterWeightPlacement::Input, mix: AdapterMix::Runs, ..plain.clone() };
        for (name, spec) in [("plain", plain), ("gpt-oss", gpt_oss), ("llama", llama)] {
            let (case, what) = (spec.build(seed as u64), format!("{name}, {tokens} tokens"));
            let mut engine = OnDevice::<T>::new(gpu, &case, 9, MAX_RANK);
            let found = engine.raw(true);
            assert!(found == engine.sliced(true).unwrap(), "raw and cudarc: {what}");
            assert!(
                found
                    == Server::new::<T>(device, &case, Limits { max_tokens: 512, max_rank: MAX_RANK })
                        .serve::<T>(&case, &case.token_slots),
                "raw and safe: {what}"
            );
            let base = engine.raw(false);
            // Without adapters slices know of no ranks, by which kernels are chosen.
            let plain = raw::ForwardArgs { max_rank: 0, ..engine.args(false) };
            assert!(engine.run(&plain, None) == engine.sliced(false).unwrap(), "raw and cudarc, base only: {what}");
            for (t, slot) in case.token_slots.iter().enumerate().filter(|(_, slot)| **slot < 0) {
                assert!(found[t * 256..][..256] == base[t * 256..][..256], "base token {t} of slot {slot}: {what}");
            }
            engine.fill_table(&[]);
            assert!(base == engine.raw(true), "empty slots: {what}");
        }
    }
}

#[test]
fn all_doors_give_the_same_bits() {
    let Some(device) = safe::device("doors") else { return };
    agree::<bf16>(&device);
    agree::<f16>(&device);
}

#[test]
fn bad_ids_on_the_gpu_are_skipped_and_counted() {
    let Some(gpu) = testing::gpu("bad ids") else { return };
    for tokens in [12, 300] {
        let mut bad = spec(tokens, DType::Bf16).build(5);
        let mut good = bad.clone();
        for (pair, id) in [(3, 16), (17, -2), (40, i32::MAX), (41, i32::MIN)] {
            (bad.topk_ids[pair], good.topk_ids[pair]) = (id, -1);
        }
        for (token, slot) in [(2, 6), (5, -9)] {
            (bad.token_slots[token], good.token_slots[token]) = (slot, -1);
        }
        let mut device = OnDevice::<bf16>::new(&gpu, &bad, 6, MAX_RANK);
        let found = device.raw(true);
        let counts = device.counts();
        assert_eq!((counts.bad_experts, counts.bad_slots), (4, 2));
        assert_eq!(counts.num_rows as usize, good.topk_ids.iter().filter(|id| **id >= 0).count());
        device.set_batch(&good);
        assert!(found == device.raw(true), "a bad id must be what -1 is");
        assert_eq!((device.counts().bad_experts, device.counts().bad_slots), (0, 0));
    }
    let mut none = OnDevice::<bf16>::new(&gpu, &spec(0, DType::Bf16).build(1), 2, MAX_RANK);
    assert!(none.raw(true).is_empty());
    assert_eq!(none.counts(), raw::RouteCounts::default(), "no token, and nothing found");
}

#[test]
fn what_does_not_fit_is_named_before_anything_runs() {
    let Some(gpu) = testing::gpu("refusals") else { return };
    let device = OnDevice::<bf16>::new(&gpu, &spec(20, DType::Bf16).build(1), 2, MAX_RANK);
    let refused = |change: fn(&mut raw::ForwardArgs)| {
        let mut args = device.args(true);
        change(&mut args);
        // SAFETY: it must not get so far.
        let error = unsafe { raw::forward(&gpu, &args) }.unwrap_err();
        assert!(error.input().is_some());
        error.to_string()
    };
    assert!(refused(|a| a.workspace_bytes -= 256).starts_with("workspace_bytes: found"));
    assert!(refused(|a| a.max_rank += 1).starts_with("workspace_bytes: found"));
    assert!(refused(|a| a.out = a.hidden).starts_with("out: found"));
    assert!(raw::workspace_bytes(&gpu, &LayerShape::new(2, 2, 12, 8).unwrap(), 1, 1, 8).is_err());
}

/// Whatever is fastest, every path can be asked for, and computes the layer.
#[test]
fn every_path_computes_the_layer_or_is_refused() {
    let Some(gpu) = testing::gpu("paths") else { return };
    for (tokens, activation) in
        [(9, Activation::Silu), (48, Activation::Silu), (300, Activation::Silu), (20, Activation::Gelu)]
    {
        let case = CaseSpec { activation, ..spec(tokens, DType::Bf16) }.build(tokens as u64);
        let table = case.table();
        let truth = moe_lora::reference::forward(&case.input_with(&table)).unwrap();
        let mut device = OnDevice::<bf16>::new(&gpu, &case, 6, MAX_RANK);
        let fastest = raw::path(&gpu, &device.args(true), None).unwrap();
        let found = device.raw(true);
        for path in [raw::Path::Layer, raw::Path::Decode, raw::Path::Portable, raw::Path::Prefill] {
            let args = device.args(true);
            if let Err(error) = raw::path(&gpu, &args, Some(path)) {
                // SAFETY: nothing is launched.
                let refused = unsafe { raw::forward_on(&gpu, &args, Some(path)) }.unwrap_err();
                assert!(refused.to_string() == error.to_string() && error.to_string().starts_with("path: found"));
                assert!(path != raw::Path::Portable && path != fastest, "{path}");
                continue;
            }
            let out = device.run(&args, Some(path));
            assert!(path != fastest || out == found, "{path} is the fastest");
            let values: Vec<f64> = out.iter().map(|v| v.to_f64()).collect();
            let error = relative_error(&values, &truth);
            assert!(error <= 3.3e-3, "{path}, {tokens} tokens: {error:e}");
        }
        let runs = |path| raw::path(&gpu, &device.args(true), Some(path)).is_ok();
        assert!(!(runs(raw::Path::Layer) && tokens > 16));
        assert!(!(runs(raw::Path::Decode) && tokens > 256));
        assert!(!(runs(raw::Path::Prefill) && activation == Activation::Gelu));
    }
}

/// One captured forward against eager ones: other tokens, routing and adapters at the same addresses, NaN in everything that
/// is written, and another stream that keeps memory and SMs busy.
#[test]
fn fifty_replays_keep_their_bits_under_noise() {
    let Some(gpu) = testing::gpu("graph replays") else { return };
    let noise = OnDevice::<bf16>::new(&gpu, &spec(300, DType::Bf16).build(99), 6, MAX_RANK);
    let traffic = gpu.alloc(128 << 20).unwrap();
    for tokens in [1, 40, 300] {
        let first = spec(tokens, DType::Bf16).build(7);
        let mut device = OnDevice::<bf16>::new(&gpu, &first, 4, MAX_RANK);
        let graph = device.capture(true);
        let mixes = [AdapterMix::Mixed, AdapterMix::AllBase, AdapterMix::RoundRobin, AdapterMix::Runs];
        let routings = [RoutingMix::Uniform, RoutingMix::AllOnOne, RoutingMix::Skewed, RoutingMix::ForeignExperts];
        let tables = [[Some(0), Some(1), None, Some(3)], [Some(4), Some(2), Some(5), Some(0)], [None; 4]];
        let batches: Vec<_> = (0..8)
            .map(|n| {
                let (mix, routing) = (mixes[n % 4], routings[(n + n / 4) % 4]);
                CaseSpec { mix, routing, ..spec(tokens, DType::Bf16) }.build(100 + n as u64)
            })
            .collect();
        for replay in 0..50 {
            let mut batch = batches[replay % 8].clone();
            batch.token_slots.iter_mut().for_each(|slot| *slot = (*slot).min(3));
            let table = tables[replay / 3 % 3];
            device.set_batch(&batch);
            device.fill_table(&table);
            let eager = device.raw(true);
            device.poison();
            for _ in 0..2 {
                noise.stream.fill(&traffic, 0, traffic.bytes(), replay as u8).unwrap();
                noise.launch(true);
            }
            graph.launch().unwrap();
            assert!(device.output() == eager, "replay {replay} of {tokens} tokens");

            if replay % 10 == 0 && tokens > 1 {
                // The layer and its adapters are the first case's, the batch is this one's.
                let slots = AdapterTable::new(table.iter().map(|n| n.map(|n| &first.adapters[n])).collect());
                let mut input = batch.input_with(&slots);
                input.weights = &first.weights;
                let truth = moe_lora::reference::forward(&input).unwrap();
                let eager: Vec<f64> = eager.iter().map(|v| v.to_f64()).collect();
                let error = relative_error(&eager, &truth);
                assert!(error <= 3e-3, "replay {replay}, {tokens} tokens: {error:e}");
            }
        }
    }
}
