//! One LoRA adapter in canonical form: per layer, expert and projection a pair of matrices and a scale.

use crate::{AdapterPart, InputError, LayerShape, Matrix, ModelShape};
use std::collections::{BTreeMap, HashSet};
use std::fmt;

/// A matrix of an expert that an adapter can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// `[I, H]`.
    Gate,
    /// `[I, H]`.
    Up,
    /// `[H, I]`.
    Down,
}

impl Projection {
    /// All three, in the order of use.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// `[out, in]` of the base matrix.
    #[must_use]
    pub const fn base_shape(self, shape: &LayerShape) -> [usize; 2] {
        match self {
            Self::Gate | Self::Up => [shape.intermediate_size, shape.hidden_size],
            Self::Down => [shape.hidden_size, shape.intermediate_size],
        }
    }

    /// `[out, in]` of B A: those of the base matrix, but where a rank's part of the layer has only [some](AdapterPart) of a down B.
    #[must_use]
    pub fn lora_shape(self, shape: &LayerShape) -> [usize; 2] {
        let [out, width] = self.base_shape(shape);
        [if self == Self::Down { shape.adapter_part.hidden(out).len() } else { out }, width]
    }

    /// Rows of A of a rank that are there: fewer than the rank where a part of the layer has only some of a gate or up A; then at
    /// least one, which is used or not.
    #[must_use]
    pub fn a_rows(self, shape: &LayerShape, rank: usize) -> usize {
        if self == Self::Down { rank } else { shape.adapter_part.ranks(rank).len().max(1) }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

/// The change of one matrix: `W + scale * B A`, or a rank's [part](AdapterPart) of both.
#[derive(Debug, Clone)]
pub struct Lora {
    a: Matrix,
    b: Matrix,
    scale: f32,
}

impl Lora {
    /// Pairs `a` `[rank, in]` with `b` `[out, rank]`. `scale` is `lora_alpha / rank` (or over its root with rsLoRA) and is
    /// not yet in either matrix.
    ///
    /// # Errors
    /// If the ranks or formats differ, or `scale` is not finite.
    pub fn new(a: Matrix, b: Matrix, scale: f32) -> Result<Self, InputError> {
        if a.rows() != b.cols() || a.dtype() != b.dtype() {
            return Err(InputError::new(
                format!("A {:?} {}, B {:?} {}", a.shape(), a.dtype(), b.shape(), b.dtype()),
                "A [rank, in] and B [out, rank] of one rank and format",
            ));
        }
        if !scale.is_finite() {
            return Err(InputError::new(format!("scale {scale}"), "a finite scale"));
        }
        Ok(Self { a, b, scale })
    }

    /// Some of the ranks of A beside all of B: what `part` has of a gate or up projection.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_part(a: Matrix, b: Matrix, scale: f32, part: AdapterPart) -> Result<Self, InputError> {
        let rows = part.ranks(b.cols()).len().max(1);
        if a.rows() != rows || a.dtype() != b.dtype() || !scale.is_finite() {
            let found = format!("A {:?} {}, B {:?} {}, scale {scale}", a.shape(), a.dtype(), b.shape(), b.dtype());
            return Err(InputError::new(
                found,
                format!("A [{rows}, in] and B [out, rank] of one format, a finite scale"),
            ));
        }
        Ok(Self { a, b, scale })
    }

    /// The same with copies of its matrices.
    ///
    /// # Errors
    /// If the copies have other sizes, or two formats.
    pub fn with_matrices(&self, a: Matrix, b: Matrix) -> Result<Self, InputError> {
        if (a.shape(), b.shape()) != (self.a.shape(), self.b.shape()) || a.dtype() != b.dtype() {
            let found = format!("A {:?} {}, B {:?} {}", a.shape(), a.dtype(), b.shape(), b.dtype());
            return Err(InputError::new(found, format!("A {:?} and B {:?}", self.a.shape(), self.b.shape())));
        }
        Ok(Self { a, b, scale: self.scale })
    }

    /// `[rank, in]`.
    #[must_use]
    pub const fn a(&self) -> &Matrix {
        &self.a
    }

    /// `[out, rank]`.
    #[must_use]
    pub const fn b(&self) -> &Matrix {
        &self.b
    }

    /// Factor of the product, applied in f32.
    #[must_use]
    pub const fn scale(&self) -> f32 {
        self.scale
    }

    /// Columns of B, and rows of A where it is whole.
    #[must_use]
    pub const fn rank(&self) -> usize {
        self.b.cols()
    }

    /// Columns of A.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.a.cols()
    }

    /// Rows of B.
    #[must_use]
    pub const fn out_features(&self) -> usize {
        self.b.rows()
    }
}

/// What an adapter changes in one expert; `None` is no change at all.
#[derive(Debug, Clone, Default)]
pub struct ExpertLora {
    /// On the gate projection.
    pub gate: Option<Lora>,
    /// On the up projection.
    pub up: Option<Lora>,
    /// On the down projection.
    pub down: Option<Lora>,
}

impl ExpertLora {
    /// The change of one projection.
    #[must_use]
    pub const fn get(&self, projection: Projection) -> Option<&Lora> {
        match projection {
            Projection::Gate => self.gate.as_ref(),
            Projection::Up => self.up.as_ref(),
            Projection::Down => self.down.as_ref(),
        }
    }

    /// Whether one A serves gate and up (fused `gate_up_proj` adapters).
    #[must_use]
    pub fn shares_gate_up_a(&self) -> bool {
        matches!((&self.gate, &self.up), (Some(g), Some(u)) if g.a.same_storage(&u.a))
    }

    fn loras(&self) -> impl Iterator<Item = (Projection, &Lora)> {
        Projection::ALL.into_iter().filter_map(|p| Some((p, self.get(p)?)))
    }
}

/// What an adapter changes in one layer.
///
/// What is shared is known from the storage, so that no flag can contradict it: an A that serves both gate and up, or
/// all experts ("shared outer"), is one [`Matrix`] cloned, and it is stored and computed once.
#[derive(Debug, Clone)]
pub struct AdapterLayer {
    experts: Vec<ExpertLora>,
    shared_gate_a: bool,
    shared_up_a: bool,
    shared_down_b: bool,
    max_rank: usize,
}

impl AdapterLayer {
    /// Checks one [`ExpertLora`] an expert against the layer's sizes.
    ///
    /// # Errors
    /// Names expert and projection, its sizes, and what they have to be.
    pub fn new(shape: &LayerShape, experts: Vec<ExpertLora>) -> Result<Self, InputError> {
        if experts.len() != shape.num_experts {
            return Err(InputError::new(
                format!("{} experts", experts.len()),
                format!("the layer's {}", shape.num_experts),
            ));
        }
        for (e, expert) in experts.iter().enumerate() {
            for (projection, lora) in expert.loras() {
                let found = [lora.out_features(), lora.in_features()];
                let want = projection.lora_shape(shape);
                if found != want || lora.a.rows() != projection.a_rows(shape, lora.rank()) {
                    return Err(InputError::new(
                        format!("B A of {found:?} (A {:?}, B {:?})", lora.a.shape(), lora.b.shape()),
                        format!("{want:?}"),
                    )
                    .in_tensor(format!("expert {e} {projection}")));
                }
            }
        }
        let max_rank = experts.iter().flat_map(|e| e.loras().map(|(_, l)| l.rank())).max().unwrap_or(0);
        let shared = |projection, matrix: fn(&Lora) -> &Matrix| {
            let mut all = experts.iter().map(|e| e.get(projection).map(matrix));
            let first = all.next().flatten();
            let whole = shape.adapter_part.is_whole() && experts.len() > 1;
            first.is_some_and(|first| whole && all.all(|m| m.is_some_and(|m| m.same_storage(first))))
        };
        let shared_gate_a = shared(Projection::Gate, Lora::a);
        let shared_up_a = shared(Projection::Up, Lora::a);
        let shared_down_b = shared(Projection::Down, Lora::b);
        Ok(Self { experts, shared_gate_a, shared_up_a, shared_down_b, max_rank })
    }

    /// One entry an expert.
    #[must_use]
    pub fn experts(&self) -> &[ExpertLora] {
        &self.experts
    }

    /// The largest rank of any projection; 0 for an adapter that changes nothing here.
    #[must_use]
    pub const fn max_rank(&self) -> usize {
        self.max_rank
    }

    /// Whether all experts have the same gate A (`Projection::Gate`), the same up A (`Up`) or the same down B (`Down`):
    /// the "shared outer" layout, whose shared side is computed once a token. Never of a [part](AdapterPart), whose ranks exchange
    /// what every row has.
    #[must_use]
    pub const fn shares_outer(&self, projection: Projection) -> bool {
        match projection {
            Projection::Gate => self.shared_gate_a,
            Projection::Up => self.shared_up_a,
            Projection::Down => self.shared_down_b,
        }
    }

    /// Every distinct matrix once: what has to be stored.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let mut seen = HashSet::new();
        self.experts
            .iter()
            .flat_map(|e| e.loras().flat_map(|(_, l)| [&l.a, &l.b]))
            .filter(move |m| seen.insert(m.storage_key()))
    }
}

/// A whole adapter, checked against its model.
#[derive(Debug, Clone)]
pub struct AdapterWeights {
    layers: BTreeMap<usize, AdapterLayer>,
}

impl AdapterWeights {
    /// Layers by absolute decoder index; layers that the adapter does not change may be absent.
    ///
    /// # Errors
    /// If a layer is no MoE layer of the model, or has another number of experts.
    pub fn new(shape: &ModelShape, layers: BTreeMap<usize, AdapterLayer>) -> Result<Self, InputError> {
        for (&n, layer) in &layers {
            if shape.moe_layers.binary_search(&n).is_err() {
                return Err(InputError::new(format!("layer {n}"), format!("a MoE layer of {:?}", shape.moe_layers)));
            }
            if layer.experts.len() != shape.layer.num_experts {
                return Err(InputError::new(
                    format!("{} experts", layer.experts.len()),
                    format!("the model's {}", shape.layer.num_experts),
                )
                .in_tensor(format!("layer {n}")));
            }
        }
        Ok(Self { layers })
    }

    /// The changed layers by absolute decoder index.
    #[must_use]
    pub const fn layers(&self) -> &BTreeMap<usize, AdapterLayer> {
        &self.layers
    }

    /// The largest rank anywhere.
    #[must_use]
    pub fn max_rank(&self) -> usize {
        self.layers.values().map(AdapterLayer::max_rank).max().unwrap_or(0)
    }

    /// Bytes of all distinct matrices: what a pool has to hold.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        let mut seen = HashSet::new();
        let distinct = self.layers.values().flat_map(AdapterLayer::matrices).filter(|m| seen.insert(m.storage_key()));
        distinct.map(Matrix::size_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize) -> Matrix {
        Matrix::from_vec(vec![1_f32; rows * cols], rows, cols).unwrap()
    }

    #[test]
    fn sharing_is_read_off_the_storage_and_counted_once() {
        let shape = LayerShape::new(3, 1, 8, 6).unwrap();
        let a = matrix(2, 8);
        let down_b = matrix(8, 2);
        let expert = || ExpertLora {
            gate: Some(Lora::new(a.clone(), matrix(6, 2), 1.0).unwrap()),
            up: Some(Lora::new(a.clone(), matrix(6, 2), 1.0).unwrap()),
            down: Some(Lora::new(matrix(2, 6), down_b.clone(), 1.0).unwrap()),
        };
        let layer = AdapterLayer::new(&shape, vec![expert(), expert(), expert()]).unwrap();
        assert!(Projection::ALL.into_iter().all(|p| layer.shares_outer(p)));
        assert!(layer.experts()[1].shares_gate_up_a());
        let model = ModelShape::uniform(shape, 1, crate::DType::F32);
        let adapter = AdapterWeights::new(&model, BTreeMap::from([(0, layer)])).unwrap();
        assert_eq!(adapter.size_bytes(), 4 * (16 + 16 + 3 * (12 + 12 + 12)));
    }

    #[test]
    fn the_wrong_expert_is_named() {
        let shape = LayerShape::new(2, 1, 8, 6).unwrap();
        let wrong =
            ExpertLora { down: Some(Lora::new(matrix(2, 8), matrix(6, 2), 1.0).unwrap()), ..Default::default() };
        let error = AdapterLayer::new(&shape, vec![ExpertLora::default(), wrong]).unwrap_err();
        assert_eq!(error.tensor.as_deref(), Some("expert 1 down"));
        assert!(Lora::new(matrix(2, 8), matrix(6, 3), 1.0).is_err());
        assert!(Lora::new(matrix(2, 8), matrix(6, 2), f32::NAN).is_err());
    }
}
