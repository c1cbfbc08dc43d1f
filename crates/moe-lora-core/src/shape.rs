//! Sizes of layers and models.

use crate::{DType, InputError};
use std::ops::Range;

/// Sizes of one MoE layer, checked to be non-zero and consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct LayerShape {
    /// Experts, E.
    pub num_experts: usize,
    /// Experts a token uses, k. At most [`num_experts`](Self::num_experts), but for a rank's [`Share`](crate::Share).
    pub top_k: usize,
    /// Width of a token, H.
    pub hidden_size: usize,
    /// Width inside an expert, I.
    pub intermediate_size: usize,
    /// Experts on the ranks before this one: the id of its first.
    pub first_expert: usize,
    /// Experts on all other ranks, whose ids are skipped here.
    pub other_experts: usize,
    /// Which part of every adapter is here, if they are fully sharded.
    pub adapter_part: AdapterPart,
}

/// Which part of fully sharded adapters a rank holds: of gate and up A some of the ranks, of down B some of H. What of them is
/// cut along I is cut with the base weights, fully sharded or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AdapterPart {
    index: usize,
    of: usize,
}

impl AdapterPart {
    /// Everything.
    pub const WHOLE: Self = Self { index: 0, of: 1 };

    /// The `index`-th of `of` parts.
    ///
    /// # Errors
    /// If there is no such part.
    pub fn new(index: usize, of: usize) -> Result<Self, InputError> {
        if index >= of {
            return Err(InputError::new(format!("part {index} of {of}"), "a part below their number"));
        }
        Ok(Self { index, of })
    }

    /// Its number, from 0.
    #[must_use]
    pub const fn index(self) -> usize {
        self.index
    }

    /// How many parts there are.
    #[must_use]
    pub const fn of(self) -> usize {
        self.of
    }

    /// Whether it is everything.
    #[must_use]
    pub const fn is_whole(self) -> bool {
        self.of == 1
    }

    /// The rows of a gate or up A of `rank` that are here: none on the last parts, if the rank is below their number.
    #[must_use]
    pub fn ranks(self, rank: usize) -> Range<usize> {
        part(rank, self.index, self.of)
    }

    /// The rows of a down B `[H, rank]` that are here, cut as [`Shard::share`](crate::Shard::share) cuts I.
    #[must_use]
    pub fn hidden(self, hidden_size: usize) -> Range<usize> {
        cut(hidden_size, self.index, self.of)
    }
}

impl Default for AdapterPart {
    fn default() -> Self {
        Self::WHOLE
    }
}

/// What widths are cut in multiples of where they allow it: rows of 16 bytes, which GPUs ask for.
const STEP: usize = 8;

/// The `rank`-th of `size` parts of `0..n`; the first ones are longer by one where they are not equal.
pub(crate) fn part(n: usize, rank: usize, size: usize) -> Range<usize> {
    let first = |rank: usize| rank * (n / size) + rank.min(n % size);
    first(rank)..first(rank + 1)
}

/// The same in steps of 8, if `n` is a multiple of 8 with a step for every part.
pub(crate) fn cut(n: usize, rank: usize, size: usize) -> Range<usize> {
    let step = if n.is_multiple_of(STEP) && n / STEP >= size { STEP } else { 1 };
    let steps = part(n / step, rank, size);
    steps.start * step..steps.end * step
}

impl LayerShape {
    /// Checks the sizes: all non-zero, `top_k <= num_experts`, and every weight countable in 63 bits.
    ///
    /// # Errors
    /// Names the size that is wrong.
    pub fn new(
        num_experts: usize,
        top_k: usize,
        hidden_size: usize,
        intermediate_size: usize,
    ) -> Result<Self, InputError> {
        let shape = Self::of_rank(num_experts, top_k, hidden_size, intermediate_size)?;
        if top_k > num_experts {
            return Err(InputError::new(
                format!("{top_k} experts a token"),
                format!("at most the layer's {num_experts}"),
            )
            .in_tensor("top_k"));
        }
        Ok(shape)
    }

    /// As [`new`](Self::new), for a layer that may hold fewer experts than a token uses, numbered from 0. A rank's part of a
    /// layer, with its place in it, is a [`Share`](crate::Share)'s.
    ///
    /// # Errors
    /// Names the size that is wrong.
    pub fn of_rank(
        num_experts: usize,
        top_k: usize,
        hidden_size: usize,
        intermediate_size: usize,
    ) -> Result<Self, InputError> {
        const MOST: usize = 1 << 20;
        for (name, size) in [
            ("num_experts", num_experts),
            ("top_k", top_k),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
        ] {
            if size == 0 || size > MOST {
                return Err(InputError::new(size.to_string(), format!("1 to {MOST}")).in_tensor(name));
            }
        }
        Ok(Self {
            num_experts,
            top_k,
            hidden_size,
            intermediate_size,
            first_expert: 0,
            other_experts: 0,
            adapter_part: AdapterPart::WHOLE,
        })
    }

    /// Experts of all ranks: ids are below.
    #[must_use]
    pub const fn all_experts(&self) -> usize {
        self.num_experts + self.other_experts
    }

    /// Numbers in the expert weights: `3 * E * H * I`.
    #[must_use]
    pub const fn weight_count(&self) -> usize {
        3 * self.num_experts * self.hidden_size * self.intermediate_size
    }
}

/// How a model's own code stores its expert parameters; adapter files mirror it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExpertStorage {
    /// 3-D parameters are `[E, in, out]` (gpt-oss, Llama-4) and not `[E, out, in]`.
    pub transposed: bool,
    /// Rows of `gate_up_proj` alternate gate, up (gpt-oss) and are not gate rows first.
    pub interleaved: bool,
}

/// What an adapter has to know of the model it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelShape {
    /// Sizes of every MoE layer.
    pub layer: LayerShape,
    /// Absolute decoder indices of the MoE layers, ascending.
    pub moe_layers: Vec<usize>,
    /// Format the layers compute in; adapters are converted to it.
    pub dtype: DType,
    /// How the model's code stores experts.
    pub storage: ExpertStorage,
}

impl ModelShape {
    /// A model of identical MoE layers `0..num_layers` with `[E, out, in]` storage.
    #[must_use]
    pub fn uniform(layer: LayerShape, num_layers: usize, dtype: DType) -> Self {
        Self { layer, moe_layers: (0..num_layers).collect(), dtype, storage: ExpertStorage::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_sizes_are_named() {
        assert!(LayerShape::new(8, 2, 64, 32).is_ok());
        assert_eq!(LayerShape::new(8, 9, 64, 32).unwrap_err().tensor.as_deref(), Some("top_k"));
        assert_eq!(LayerShape::new(8, 2, 0, 32).unwrap_err().tensor.as_deref(), Some("hidden_size"));
        assert!(LayerShape::new(usize::MAX, 2, 64, 32).is_err());
        assert!(LayerShape::of_rank(1, 8, 64, 32).is_ok() && LayerShape::of_rank(1, 8, 64, 0).is_err());
    }
}
