//! Which part of every layer one rank of a parallel group holds.

use crate::shape::{cut, part};
use crate::{
    AdapterLayer, AdapterPart, AdapterWeights, ExpertBias, ExpertLora, ExpertWeights, InputError, LayerShape,
    LayerWeights, Lora, Matrix, ModelShape,
};
use std::ops::Range;

/// A rank's place in a grid of `ep_size` expert-parallel groups of `tp_size` tensor-parallel ranks each.
///
/// Expert parallelism gives every group a range of the experts, tensor parallelism every rank of a group a range of the
/// intermediate size I: gate and up are cut along their rows and down along its columns. What each rank computes is a part of
/// the output's sum, so one all-reduce over all ranks finishes a layer. Of adapters, gate and up B are cut along their rows
/// and down A along its columns; gate and up A and down B are whole on every rank that has the expert, unless adapters are
/// [fully sharded](Self::with_fully_sharded_adapters).
///
/// Ranks are numbered `ep_rank * tp_size + tp_rank`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    tp_rank: usize,
    tp_size: usize,
    ep_rank: usize,
    ep_size: usize,
    fully_sharded: bool,
}

/// What a [`Shard`] holds of layers of one shape.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Share {
    /// Its experts.
    pub experts: Range<usize>,
    /// Its part of the intermediate size.
    pub intermediate: Range<usize>,
    /// Sizes of what it holds, and which experts. `top_k` stays the model's and may exceed the number of experts here.
    pub shape: LayerShape,
    /// Whether it adds the biases of the down projection, which must enter the sum once.
    pub adds_down_bias: bool,
}

impl Shard {
    /// The only rank, which holds everything.
    pub const WHOLE: Self = Self { tp_rank: 0, tp_size: 1, ep_rank: 0, ep_size: 1, fully_sharded: false };

    /// A place in the grid.
    ///
    /// # Errors
    /// If a size is zero or a rank is not below its size.
    pub fn new(tp_rank: usize, tp_size: usize, ep_rank: usize, ep_size: usize) -> Result<Self, InputError> {
        for (name, rank, size) in [("tensor", tp_rank, tp_size), ("expert", ep_rank, ep_size)] {
            if rank >= size {
                let found = format!("{name}-parallel rank {rank} of {size}");
                return Err(InputError::new(found, "a rank below its size"));
            }
        }
        Ok(Self { tp_rank, tp_size, ep_rank, ep_size, fully_sharded: false })
    }

    /// Cuts gate and up A along their ranks and down B along H too, so that a rank holds a part of all six matrices. The ranks of
    /// a tensor-parallel group then exchange what lies between A and B, twice a layer.
    #[must_use]
    pub const fn with_fully_sharded_adapters(mut self) -> Self {
        self.fully_sharded = true;
        self
    }

    /// All ranks of a grid in order.
    ///
    /// # Errors
    /// If a size is zero, or there are more than 65536 ranks.
    pub fn grid(tp_size: usize, ep_size: usize) -> Result<Vec<Self>, InputError> {
        const MOST: usize = 1 << 16;
        match tp_size.checked_mul(ep_size) {
            Some(1..=MOST) => (0..ep_size).flat_map(|ep| (0..tp_size).map(move |tp| (tp, ep))),
            _ => {
                let found = format!("{tp_size} tensor-parallel by {ep_size} expert-parallel ranks");
                return Err(InputError::new(found, format!("1 to {MOST} ranks in all")));
            }
        }
        .map(|(tp, ep)| Self::new(tp, tp_size, ep, ep_size))
        .collect()
    }

    /// Place in the tensor-parallel group.
    #[must_use]
    pub const fn tp_rank(&self) -> usize {
        self.tp_rank
    }

    /// Ranks that share the intermediate size.
    #[must_use]
    pub const fn tp_size(&self) -> usize {
        self.tp_size
    }

    /// Place among the ranges of experts.
    #[must_use]
    pub const fn ep_rank(&self) -> usize {
        self.ep_rank
    }

    /// Ranges of experts.
    #[must_use]
    pub const fn ep_size(&self) -> usize {
        self.ep_size
    }

    /// Place among all ranks.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.ep_rank * self.tp_size + self.tp_rank
    }

    /// All ranks.
    #[must_use]
    pub const fn world_size(&self) -> usize {
        self.tp_size * self.ep_size
    }

    /// What this rank holds of layers of a shape.
    ///
    /// Experts are dealt as evenly as they come. I is cut into equal parts if these are multiples of 8; else in steps of 8,
    /// as evenly as they come (I 2880 over 16 ranks: eight parts of 184 and eight of 176); and in single steps only if I is
    /// no multiple of 8 or too small, which GPUs refuse.
    ///
    /// # Errors
    /// If there are fewer experts than expert-parallel ranks, or a rank would have no part of I.
    pub fn share(&self, shape: &LayerShape) -> Result<Share, InputError> {
        let LayerShape { num_experts, intermediate_size, .. } = *shape;
        if num_experts < self.ep_size {
            let found = format!("{num_experts} experts");
            return Err(InputError::new(found, format!("at least one for each of {} ranks", self.ep_size)));
        }
        if intermediate_size < self.tp_size {
            let found = format!("intermediate size {intermediate_size}");
            return Err(InputError::new(found, format!("at least one for each of {} ranks", self.tp_size)));
        }
        let fully_sharded = self.fully_sharded && self.tp_size > 1;
        if fully_sharded && shape.hidden_size < self.tp_size {
            let found = format!("hidden size {}", shape.hidden_size);
            return Err(InputError::new(found, format!("at least one for each of {} ranks", self.tp_size)));
        }
        let experts = part(num_experts, self.ep_rank, self.ep_size);
        let intermediate = cut(intermediate_size, self.tp_rank, self.tp_size);
        let shape = LayerShape {
            num_experts: experts.len(),
            intermediate_size: intermediate.len(),
            first_expert: experts.start,
            other_experts: num_experts - experts.len(),
            adapter_part: if fully_sharded {
                AdapterPart::new(self.tp_rank, self.tp_size)?
            } else {
                shape.adapter_part
            },
            ..*shape
        };
        Ok(Share { experts, intermediate, shape, adds_down_bias: self.tp_rank == 0 })
    }
}

impl Default for Shard {
    fn default() -> Self {
        Self::WHOLE
    }
}

impl Share {
    /// One expert's part.
    ///
    /// # Errors
    /// If the expert's matrices are not those of the whole layer.
    pub fn of_expert(&self, expert: &ExpertWeights) -> Result<ExpertWeights, InputError> {
        Ok(ExpertWeights {
            gate: self.rows(&expert.gate)?,
            up: self.rows(&expert.up)?,
            down: self.cols(&expert.down)?,
            bias: expert.bias.as_ref().map(|bias| self.of_bias(bias)).transpose()?,
        })
    }

    /// One expert's biases: the down bias is zero but on one rank.
    ///
    /// # Errors
    /// If they are not those of the whole layer.
    pub fn of_bias(&self, bias: &ExpertBias) -> Result<ExpertBias, InputError> {
        let cut = |values: &[f32]| {
            let wrong = || InputError::new(format!("a bias of {}", values.len()), format!("{}", self.intermediate.end));
            Ok::<_, InputError>(values.get(self.intermediate.clone()).ok_or_else(wrong)?.to_vec())
        };
        let down = if self.adds_down_bias { bias.down.clone() } else { vec![0.0; bias.down.len()] };
        Ok(ExpertBias { gate: cut(&bias.gate)?, up: cut(&bias.up)?, down })
    }

    fn rows(&self, matrix: &Matrix) -> Result<Matrix, InputError> {
        matrix.select_rows(self.intermediate.start, self.intermediate.len(), 1)
    }

    fn cols(&self, matrix: &Matrix) -> Result<Matrix, InputError> {
        matrix.select_cols(self.intermediate.start, self.intermediate.len())
    }

    fn of_lora(&self, lora: &ExpertLora) -> Result<ExpertLora, InputError> {
        let part = self.shape.adapter_part;
        let b_rows = |lora: &Lora| {
            let ranks = part.ranks(lora.rank());
            // A rank without a part holds one row, which it does not use.
            let (first, count) = (ranks.start.min(lora.rank() - 1), ranks.len().max(1));
            let a = if part.is_whole() { lora.a().clone() } else { lora.a().select_rows(first, count, 1)? };
            Lora::of_part(a, self.rows(lora.b())?, lora.scale(), part)
        };
        let a_cols = |lora: &Lora| {
            let (a, b, rows) = (self.cols(lora.a())?, lora.b(), part.hidden(lora.out_features()));
            let b = if part.is_whole() { b.clone() } else { b.select_rows(rows.start, rows.len(), 1)? };
            Lora::new(a, b, lora.scale())
        };
        Ok(ExpertLora {
            gate: lora.gate.as_ref().map(b_rows).transpose()?,
            up: lora.up.as_ref().map(b_rows).transpose()?,
            down: lora.down.as_ref().map(a_cols).transpose()?,
        })
    }
}

impl ModelShape {
    /// The shape of a rank's part of the model: what its pool and layers are made for.
    ///
    /// # Errors
    /// As [`Shard::share`].
    pub fn shard(&self, shard: &Shard) -> Result<Self, InputError> {
        Ok(Self { layer: shard.share(&self.layer)?.shape, ..self.clone() })
    }
}

impl LayerWeights {
    /// A rank's part, as views of the same bytes.
    ///
    /// # Errors
    /// As [`Shard::share`].
    pub fn shard(&self, shard: &Shard) -> Result<Self, InputError> {
        let share = shard.share(self.shape())?;
        let mine = &self.experts()[share.experts.clone()];
        let experts = mine.iter().map(|expert| share.of_expert(expert)).collect::<Result<_, _>>()?;
        Ok(Self::new(share.shape, experts, self.activation())?
            .with_router_weight(self.router_weight())
            .with_routed_scaling_factor(self.routed_scaling_factor()))
    }
}

impl AdapterLayer {
    /// A rank's part, as views of the same bytes; `shape` is the whole layer's.
    ///
    /// # Errors
    /// As [`Shard::share`], and if the adapter is not one for the whole layer.
    pub fn shard(&self, shape: &LayerShape, shard: &Shard) -> Result<Self, InputError> {
        let share = shard.share(shape)?;
        let wrong = || InputError::new(format!("{} experts", self.experts().len()), format!("{}", shape.num_experts));
        let mine = self.experts().get(share.experts.clone()).ok_or_else(wrong)?;
        let experts = mine.iter().map(|expert| share.of_lora(expert)).collect::<Result<_, _>>()?;
        Self::new(&share.shape, experts)
    }
}

impl AdapterWeights {
    /// A rank's part, as views of the same bytes; `model` is the whole model's shape.
    ///
    /// # Errors
    /// As [`AdapterLayer::shard`].
    pub fn shard(&self, model: &ModelShape, shard: &Shard) -> Result<Self, InputError> {
        let part = |(&n, layer): (&usize, &AdapterLayer)| Ok::<_, InputError>((n, layer.shard(&model.layer, shard)?));
        Self::new(&model.shard(shard)?, self.layers().iter().map(part).collect::<Result<_, _>>()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Activation;

    fn shares(shape: &LayerShape, tp: usize, ep: usize) -> Vec<Share> {
        Shard::grid(tp, ep).unwrap().iter().map(|s| s.share(shape).unwrap()).collect()
    }

    #[test]
    fn parts_cover_everything_once_and_stay_multiples_of_eight() {
        for (experts, inner) in [(8, 64), (60, 2880), (7, 1408), (256, 2048)] {
            let shape = LayerShape::new(experts, 4, 16, inner).unwrap();
            for (tp, ep) in [(1, 1), (2, 4), (8, 1), (4, 7), (8, 3)] {
                let mut seen = vec![0; experts * inner];
                for share in shares(&shape, tp, ep) {
                    assert_eq!(share.intermediate.len() % 8, 0, "{share:?}");
                    assert_eq!(share.shape.intermediate_size, share.intermediate.len());
                    for e in share.experts.clone() {
                        seen[e * inner..][share.intermediate.clone()].iter_mut().for_each(|n| *n += 1);
                    }
                }
                assert!(seen.iter().all(|&n| n == 1), "E {experts}, I {inner}, {tp} x {ep}");
            }
        }
    }

    #[test]
    fn uneven_sizes_are_cut_in_steps_or_refused_with_the_numbers() {
        let sizes = |inner, tp| -> Vec<usize> {
            let shape = LayerShape::new(4, 2, 16, inner).unwrap();
            shares(&shape, tp, 1).iter().map(|s| s.intermediate.len()).collect()
        };
        assert_eq!(sizes(2880, 16), [[184; 8], [176; 8]].concat());
        assert_eq!(sizes(24, 2), [16, 8]);
        assert_eq!(sizes(10, 4), [3, 3, 2, 2]);
        assert_eq!(sizes(16, 4), [4; 4]);
        let shape = LayerShape::new(4, 2, 16, 3).unwrap();
        let error = Shard::new(0, 4, 0, 1).unwrap().share(&shape).unwrap_err();
        assert_eq!(error.to_string(), "found intermediate size 3, expected at least one for each of 4 ranks");
        let error = Shard::new(0, 1, 1, 8).unwrap().share(&shape).unwrap_err();
        assert_eq!(error.to_string(), "found 4 experts, expected at least one for each of 8 ranks");
        assert!(Shard::new(2, 2, 0, 1).is_err() && Shard::grid(0, 2).is_err() && Shard::grid(usize::MAX, 2).is_err());
    }

    #[test]
    fn ranks_are_numbered_group_by_group() {
        let grid = Shard::grid(2, 3).unwrap();
        assert!(grid.iter().enumerate().all(|(n, shard)| shard.rank() == n && shard.world_size() == 6));
        assert_eq!((grid[3].tp_rank(), grid[3].ep_rank()), (1, 1));
    }

    #[test]
    fn weights_are_views_and_the_down_bias_is_there_once() {
        let shape = LayerShape::new(2, 2, 4, 6).unwrap();
        let numbers = |rows: usize, cols| Matrix::from_vec((0..rows * cols).map(|n| n as f32).collect(), rows, cols);
        let bias = ExpertBias { gate: (0..6).map(|n| n as f32).collect(), up: vec![1.0; 6], down: vec![2.0; 4] };
        let expert = || ExpertWeights {
            gate: numbers(6, 4).unwrap(),
            up: numbers(6, 4).unwrap(),
            down: numbers(4, 6).unwrap(),
            bias: Some(bias.clone()),
        };
        let whole = LayerWeights::new(shape, vec![expert(), expert()], Activation::Silu).unwrap();
        let part = whole.shard(&Shard::new(1, 2, 1, 2).unwrap()).unwrap();
        let (mine, all) = (&part.experts()[0], &whole.experts()[1]);
        assert_eq!((part.experts().len(), mine.gate.shape(), mine.down.shape()), (1, [3, 4], [4, 3]));
        assert_eq!((mine.gate.get(0, 1), mine.down.get(2, 0)), (all.gate.get(3, 1), all.down.get(2, 3)));
        assert!(mine.gate.same_storage(&all.gate.select_rows(3, 3, 1).unwrap()), "nothing is copied");
        let bias = mine.bias.as_ref().unwrap();
        assert_eq!((&bias.gate[..], &bias.down[..]), (&[3.0, 4.0, 5.0][..], &[0.0; 4][..]));
    }

    #[test]
    fn adapters_keep_what_they_share() {
        let shape = LayerShape::new(4, 2, 8, 6).unwrap();
        let matrix = |rows: usize, cols| Matrix::from_vec(vec![1_f32; rows * cols], rows, cols).unwrap();
        let (a, down_b) = (matrix(2, 8), matrix(8, 2));
        let expert = || ExpertLora {
            gate: Some(Lora::new(a.clone(), matrix(6, 2), 1.0).unwrap()),
            up: Some(Lora::new(a.clone(), matrix(6, 2), 1.0).unwrap()),
            down: Some(Lora::new(matrix(2, 6), down_b.clone(), 1.0).unwrap()),
        };
        let model = ModelShape::uniform(shape, 1, crate::DType::F32);
        let layer = AdapterLayer::new(&shape, (0..4).map(|_| expert()).collect()).unwrap();
        let adapter = AdapterWeights::new(&model, [(0, layer)].into()).unwrap();
        let shard = Shard::new(0, 2, 1, 2).unwrap();
        let part = adapter.shard(&model, &shard).unwrap();
        let layer = &part.layers()[&0];
        assert!(crate::Projection::ALL.into_iter().all(|p| layer.shares_outer(p)));
        assert!(layer.experts()[0].shares_gate_up_a());
        assert_eq!(part.size_bytes(), 4 * (16 + 16 + 2 * 3 * (3 * 2)), "A and down B whole, two experts, half of I");
        assert_eq!(model.shard(&shard).unwrap().layer.num_experts, 2);
    }
}
