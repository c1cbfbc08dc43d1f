//! What the stages hand to each other.

use super::Kernel;
use crate::GemmError;
use moe_lora_core::LayerShape;
use std::ops::Range;

/// Memory of the stages, allocated once for the largest batch.
///
/// One workspace serves any number of layers of one shape, one after the other. The three stages of a batch hand their
/// results on in it.
#[derive(Debug)]
pub struct Workspace {
    pub(super) shape: LayerShape,
    pub(super) max_tokens: usize,
    pub(super) max_rank: usize,
    /// What ran last.
    pub(super) done: Option<Done>,
    pub(super) bands: Vec<Band>,
    pub(super) buffers: Buffers,
}

/// The numbers; a field each, so that a stage can borrow one while it writes another.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// `[T, H]` in the kernel's activation format, rows [`row_stride`] apart; f32 here, for size and alignment.
    pub(super) hidden: Vec<f32>,
    /// `[rows, I]`, likewise.
    pub(super) h: Vec<f32>,
    /// `[rows, H]`.
    pub(super) y: Vec<f32>,
    /// `A x` of gate and of up, `[rows, 2, max rank]`; later `A h`, `[rows, max rank]`. Unscaled.
    pub(super) row_s: Vec<f32>,
    /// `A x` of gate and of up where all experts share A, `[T, 2, max rank]`; later the weighted sum of `s A h` where
    /// they share the down B.
    pub(super) token_s: Vec<f32>,
    /// Adapter slot, `[T]`; [`NO_ROW`] for tokens that have no row.
    pub(super) token_slot: Vec<i32>,
}

/// Slot of a token all of whose pairs were dropped.
pub(super) const NO_ROW: i32 = i32::MIN;

/// Rows of one expert that are computed together.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Band {
    pub(super) expert: usize,
    pub(super) rows: Range<usize>,
}

/// Most rows of a [`Band`]: their activations stay in a second-level cache.
pub(super) const BAND_ROWS: usize = 64;

/// The stage whose results the workspace holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Done {
    pub(super) stage: Stage,
    pub(super) kernel: Kernel,
    pub(super) tokens: usize,
    pub(super) rows: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Stage {
    GateUp,
    Down,
}

/// Numbers from one activation row to the next.
///
/// An odd number of cache lines: rows a power of two apart would share the same few sets of the first-level cache, where
/// a tile needs several rows at once (20 % of the speed at H = 2048).
pub(super) const fn row_stride<X>(width: usize) -> usize {
    let per_line = 64 / size_of::<X>();
    let lines = width.div_ceil(per_line);
    (lines + (11 - lines % 8) % 8) * per_line
}

struct Sizes {
    hidden: usize,
    h: usize,
    y: usize,
    row_s: usize,
    token_s: usize,
    tokens: usize,
    bands: usize,
}

impl Sizes {
    fn new(shape: &LayerShape, max_tokens: usize, max_rank: usize) -> Option<Self> {
        let rows = max_tokens.checked_mul(shape.top_k)?;
        let s = max_rank.checked_mul(2)?;
        Some(Self {
            hidden: max_tokens.checked_mul(row_stride::<f32>(shape.hidden_size))?,
            h: rows.checked_mul(row_stride::<f32>(shape.intermediate_size))?,
            y: rows.checked_mul(shape.hidden_size)?,
            row_s: rows.checked_mul(s)?,
            token_s: max_tokens.checked_mul(s)?,
            tokens: max_tokens,
            // Every expert may have one band that is not full, but no band is empty.
            bands: rows.min(rows / BAND_ROWS * 2 + shape.num_experts),
        })
    }

    fn bytes(&self) -> Option<usize> {
        let numbers = [self.h, self.y, self.row_s, self.token_s, self.tokens];
        let numbers = numbers.into_iter().try_fold(self.hidden, usize::checked_add)?;
        numbers.checked_mul(size_of::<f32>())?.checked_add(self.bands.checked_mul(size_of::<Band>())?)
    }
}

impl Workspace {
    /// Allocates for batches of up to `max_tokens` tokens with adapters of ranks up to `max_rank`, on layers of `shape`.
    ///
    /// # Errors
    /// If that does not fit into memory.
    pub fn new(shape: &LayerShape, max_tokens: usize, max_rank: usize) -> Result<Self, GemmError> {
        let too_large = || GemmError::OutOfMemory { bytes: Self::bytes_for(shape, max_tokens, max_rank) };
        let sizes = Sizes::new(shape, max_tokens, max_rank).ok_or_else(too_large)?;
        // All is reserved before anything is touched, so that a size that does not fit costs nothing.
        let reserve = |n: usize| -> Result<Vec<f32>, GemmError> {
            let mut values = Vec::new();
            values.try_reserve_exact(n).map_err(|_| too_large())?;
            Ok(values)
        };
        let mut buffers = Buffers {
            hidden: reserve(sizes.hidden)?,
            h: reserve(sizes.h)?,
            y: reserve(sizes.y)?,
            row_s: reserve(sizes.row_s)?,
            token_s: reserve(sizes.token_s)?,
            token_slot: vec![NO_ROW; sizes.tokens],
        };
        buffers.hidden.resize(sizes.hidden, 0.0);
        buffers.h.resize(sizes.h, 0.0);
        buffers.y.resize(sizes.y, 0.0);
        buffers.row_s.resize(sizes.row_s, 0.0);
        buffers.token_s.resize(sizes.token_s, 0.0);
        let bands = Vec::with_capacity(sizes.bands);
        Ok(Self { shape: *shape, max_tokens, max_rank, done: None, bands, buffers })
    }

    /// Bytes that [`new`](Self::new) would allocate; `usize::MAX` if they cannot be counted.
    #[must_use]
    pub fn bytes_for(shape: &LayerShape, max_tokens: usize, max_rank: usize) -> usize {
        Sizes::new(shape, max_tokens, max_rank).and_then(|s| s.bytes()).unwrap_or(usize::MAX)
    }

    /// Bytes allocated.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        Self::bytes_for(&self.shape, self.max_tokens, self.max_rank)
    }

    /// Fills everything that a batch has to write before it reads it with NaN, for tests.
    #[doc(hidden)]
    pub fn poison(&mut self) {
        let Buffers { hidden, h, y, row_s, token_s, token_slot } = &mut self.buffers;
        for buffer in [hidden, h, y, row_s, token_s] {
            buffer.fill(f32::NAN);
        }
        token_slot.fill(i32::MAX);
        self.done = None;
    }
}
