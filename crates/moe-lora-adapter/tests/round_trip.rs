//! Random adapters through every writer and back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{File, PROJ, Pair, Pairs, Sizes, W, assert_same, flat, fused, gpt_oss, per_expert, random, stacked};
use moe_lora_core::{DType, Projection};
use proptest::prelude::*;
use serde_json::json;

#[derive(Debug, Clone)]
struct Case {
    seed: u64,
    sizes: Sizes,
    rank: usize,
    layers: usize,
    interleaved: bool,
    dtype: DType,
    /// Parts to leave out, one bit each by turns.
    missing: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1..6_usize, 1..9_usize, 1..7_usize).prop_map(|(e, h, i)| Sizes { e, h, i });
    let dtype = prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::Bf16)];
    (any::<u64>(), sizes, 1..6_usize, 1..4_usize, any::<bool>(), dtype, any::<u64>()).prop_map(
        |(seed, sizes, rank, layers, interleaved, dtype, missing)| Case {
            seed,
            sizes,
            rank,
            layers,
            interleaved,
            dtype,
            missing,
        },
    )
}

impl Case {
    fn pairs(&self, one_a: bool) -> Pairs {
        random(&mut fastrand::Rng::with_seed(self.seed), self.sizes, self.layers, self.rank, 2.0, one_a)
    }

    fn file(&self) -> File {
        File::new(self.rank, 2.0 * self.rank as f64)
    }

    fn lacks(&self, n: usize) -> bool {
        self.missing >> (n % 64) & 1 == 1
    }

    fn check(&self, file: File, expected: &Pairs) {
        let mut shape = self.sizes.model(self.layers);
        shape.dtype = self.dtype;
        let shape = if self.interleaved { gpt_oss(shape) } else { shape };
        assert_same(&file.dtype(self.dtype).resolve(&shape).unwrap_or_else(|e| panic!("{e}")), expected);
    }

    /// The layers that are left of an adapter, each with its gate_up and its down pairs.
    fn by_layer(&self, pairs: &Pairs) -> Vec<(usize, [Vec<Pair>; 2])> {
        let fused = fused(pairs, self.interleaved);
        let of = |layer, n: usize| (0..self.sizes.e).map(|e| fused[&(layer, e)][n].clone()).collect();
        (0..self.layers).filter(|&n| !self.lacks(n)).map(|n| (n, [of(n, 0), of(n, 1)])).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn for_each_expert(case in cases(), numbered in any::<bool>()) {
        let mut pairs = case.pairs(false);
        let mut n = 0;
        pairs.retain(|_, _| { n += 1; !case.lacks(n) });
        let mut file = case.file();
        per_expert(&mut file, &pairs, "mlp", if numbered { W } else { PROJ });
        case.check(file, &pairs);
    }

    #[test]
    fn stacked_either_way(case in cases(), rank_last in any::<bool>(), without in 0..3_usize) {
        // A width equal to the rank can be read both ways, which has its own test.
        let Sizes { h, i, .. } = case.sizes;
        prop_assume!(![h, i, 2 * i].contains(&case.rank) && case.rank * 2 != h);
        let pairs = case.pairs(true);
        let mut file = case.file();
        let mut expected = Pairs::new();
        for (layer, parts) in case.by_layer(&pairs) {
            for (n, name) in ["gate_up_proj", "down_proj"].into_iter().enumerate().filter(|(n, _)| *n != without) {
                stacked(&mut file, layer, &format!("mlp.experts.{name}"), &parts[n].iter().collect::<Vec<_>>(), rank_last);
                let keep = pairs.iter().filter(|((l, _, p), _)| *l == layer && (*p == Projection::Down) == (n == 1));
                expected.extend(keep.map(|(key, pair)| (*key, pair.clone())));
            }
        }
        case.check(file, &expected);
    }

    #[test]
    fn flat_either_way(case in cases(), transposed in any::<bool>()) {
        let pairs = case.pairs(true);
        let mut file = case.file().set("target_parameters", json!(["experts.gate_up_proj", "experts.down_proj"]));
        let layers = case.by_layer(&pairs);
        for (layer, [gate_up, down]) in &layers {
            flat(&mut file, *layer, "mlp.experts.base_layer", &gate_up.iter().collect::<Vec<_>>(), transposed);
            flat(&mut file, *layer, "mlp.experts", &down.iter().collect::<Vec<_>>(), transposed);
        }
        let expected = pairs.into_iter().filter(|((l, ..), _)| layers.iter().any(|(n, _)| n == l)).collect();
        case.check(file, &expected);
    }
}
