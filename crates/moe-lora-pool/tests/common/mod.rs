//! Random adapters, and a bitwise comparison with what a lease shows.
#![allow(dead_code, reason = "each test file uses some of it")]

use half::{bf16, f16};
use moe_lora_core::{
    AdapterId, AdapterLayer, AdapterWeights, DType, Element, ExpertLora, LayerShape, Lora, Matrix, ModelShape,
    Projection,
};
use moe_lora_pool::Lease;
use std::collections::BTreeMap;

pub(crate) const HIDDEN: usize = 8;
pub(crate) const INTERMEDIATE: usize = 6;
pub(crate) const MAX_RANK: usize = 16;

/// Three experts; layers 1 and 3 are MoE.
pub(crate) fn shape(dtype: DType) -> ModelShape {
    let layer = LayerShape::new(3, 2, HIDDEN, INTERMEDIATE).unwrap();
    ModelShape { layer, moe_layers: vec![1, 3], dtype, storage: Default::default() }
}

/// A random adapter and how many numbers it has to store, counted while they are made.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) weights: AdapterWeights,
    pub(crate) numbers: usize,
}

pub(crate) struct Maker {
    rng: fastrand::Rng,
    numbers: usize,
}

impl Maker {
    pub(crate) fn new(seed: u64) -> Self {
        Self { rng: fastrand::Rng::with_seed(seed), numbers: 0 }
    }

    /// Signed numbers in a random format, mostly with bits that the narrower formats drop.
    pub(crate) fn matrix(&mut self, rows: usize, cols: usize, dtype: DType) -> Matrix {
        fn fill<T: Element>(rng: &mut fastrand::Rng, rows: usize, cols: usize) -> Matrix {
            let values = (0..rows * cols).map(|_| T::from_f32(rng.f32() * 2.0 - 1.0)).collect();
            Matrix::from_vec::<T>(values, rows, cols).unwrap()
        }
        self.numbers += rows * cols;
        match dtype {
            DType::F32 => fill::<f32>(&mut self.rng, rows, cols),
            DType::F16 => fill::<f16>(&mut self.rng, rows, cols),
            DType::Bf16 => fill::<bf16>(&mut self.rng, rows, cols),
        }
    }

    pub(crate) fn lora(&mut self, projection: Projection, rank: usize, dtype: DType, scale: f32) -> Lora {
        let [out, input] = projection.base_shape(&shape(dtype).layer);
        Lora::new(self.matrix(rank, input, dtype), self.matrix(out, rank, dtype), scale).unwrap()
    }

    fn layer(&mut self, ranks: std::ops::RangeInclusive<usize>, full: bool, scale: f32) -> AdapterLayer {
        let dtype = [DType::F32, DType::F16, DType::Bf16][self.rng.usize(..3)];
        let shared_outer = self.rng.u8(..4) == 0;
        let fused = self.rng.bool();
        let rank = self.rng.usize(ranks.clone());
        let (shared_a, shared_b) = match shared_outer {
            true => (Some(self.matrix(rank, HIDDEN, dtype)), Some(self.matrix(HIDDEN, rank, dtype))),
            false => (None, None),
        };
        let mut experts = Vec::new();
        for _ in 0..3 {
            let mut expert = ExpertLora::default();
            for projection in Projection::ALL {
                if !full && !shared_outer && self.rng.u8(..3) == 0 {
                    continue;
                }
                let rank = if shared_outer { rank } else { self.rng.usize(ranks.clone()) };
                let lora = match (projection, &shared_a, &shared_b) {
                    (Projection::Down, _, Some(b)) => {
                        Lora::new(self.matrix(rank, INTERMEDIATE, dtype), b.clone(), scale)
                    }
                    (_, Some(a), _) => Lora::new(a.clone(), self.matrix(INTERMEDIATE, rank, dtype), scale),
                    (Projection::Up, ..) if fused && expert.gate.is_some() => {
                        let a = expert.gate.as_ref().unwrap().a().clone();
                        let b = self.matrix(INTERMEDIATE, a.rows(), dtype);
                        Lora::new(a, b, scale)
                    }
                    _ => Ok(self.lora(projection, rank, dtype, scale)),
                };
                *match projection {
                    Projection::Gate => &mut expert.gate,
                    Projection::Up => &mut expert.up,
                    Projection::Down => &mut expert.down,
                } = Some(lora.unwrap());
            }
            experts.push(expert);
        }
        AdapterLayer::new(&shape(dtype).layer, experts).unwrap()
    }
}

/// Mixed ranks 1 to 5, absent projections and layers, fused and shared-outer matrices, all three formats. The scale of
/// layer 1, which is always there, is `seed`.
pub(crate) fn adapter(seed: u32) -> Made {
    let mut maker = Maker::new(u64::from(seed));
    let full = maker.rng.bool();
    let mut layers = BTreeMap::from([(1, maker.layer(1..=5, full, seed as f32))]);
    if maker.rng.u8(..4) > 0 {
        layers.insert(3, maker.layer(1..=5, full, -0.5 - seed as f32));
    }
    Made { weights: AdapterWeights::new(&shape(DType::F32), layers).unwrap(), numbers: maker.numbers }
}

/// Every projection at one rank.
pub(crate) fn full(seed: u32, rank: usize) -> Made {
    let mut maker = Maker::new(u64::from(seed));
    let experts = |maker: &mut Maker| {
        let expert = |maker: &mut Maker| {
            let mut lora = |projection| Some(maker.lora(projection, rank, DType::F32, seed as f32));
            ExpertLora { gate: lora(Projection::Gate), up: lora(Projection::Up), down: lora(Projection::Down) }
        };
        AdapterLayer::new(&shape(DType::F32).layer, (0..3).map(|_| expert(maker)).collect()).unwrap()
    };
    let layers = BTreeMap::from([(1, experts(&mut maker)), (3, experts(&mut maker))]);
    Made { weights: AdapterWeights::new(&shape(DType::F32), layers).unwrap(), numbers: maker.numbers }
}

/// The adapter's numbers as bits, rounded to `dtype`.
pub(crate) fn bits(matrix: &Matrix, dtype: DType) -> Vec<u32> {
    match dtype {
        DType::F32 => matrix.to_vec::<f32>().into_iter().map(f32::to_bits).collect(),
        DType::F16 => matrix.to_vec::<f16>().into_iter().map(|x| x.to_bits().into()).collect(),
        DType::Bf16 => matrix.to_vec::<bf16>().into_iter().map(|x| x.to_bits().into()).collect(),
    }
}

/// Asserts that the lease shows exactly `want` under `id`: same projections, scales, sharing and bits, in `dtype`.
pub(crate) fn assert_shows(lease: &Lease, id: AdapterId, want: &AdapterWeights, dtype: DType) {
    for n in 0..5 {
        let table = lease.table(n).unwrap();
        let (got, want) = (table.layer(id.slot as i32), want.layers().get(&n));
        assert_eq!(got.is_some(), want.is_some(), "layer {n}");
        let (Some(got), Some(want)) = (got, want) else { continue };
        assert_eq!(got.max_rank(), want.max_rank());
        for projection in Projection::ALL {
            assert_eq!(got.shares_outer(projection), want.shares_outer(projection), "layer {n} {projection}");
        }
        for (e, (got, want)) in got.experts().iter().zip(want.experts()).enumerate() {
            assert_eq!(got.shares_gate_up_a(), want.shares_gate_up_a(), "layer {n} expert {e}");
            for projection in Projection::ALL {
                let (got, want) = (got.get(projection), want.get(projection));
                assert_eq!(got.is_some(), want.is_some(), "layer {n} expert {e} {projection}");
                let (Some(got), Some(want)) = (got, want) else { continue };
                assert_eq!(got.scale().to_bits(), want.scale().to_bits());
                for (got, want) in [(got.a(), want.a()), (got.b(), want.b())] {
                    assert_eq!((got.dtype(), got.shape()), (dtype, want.shape()));
                    assert_eq!(bits(got, dtype), bits(want, dtype), "layer {n} expert {e} {projection}");
                }
            }
        }
    }
}
