//! The inner kernels: dot products of a few weight rows with a few activation rows.
//!
//! All kernels share one plan. An output element has one vector of f32 partial sums; it walks along K in order, takes
//! the LoRA product into the same lanes, and one fixed tree adds the lanes. What else is in the tile only decides which
//! other elements are computed at the same time, so the bits of an element depend on its own row's data and on K alone.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod blocks;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512_bf16::Avx512Bf16;
pub(super) use blocks::for_each_block;
pub(super) use portable::Portable;

use super::activate::Glu;
use moe_lora_core::{Element, MatrixRef};

/// Weight rows of a tile.
pub(super) const FEATURES: usize = 4;

/// Most activation rows of a tile.
pub(super) const TILE_ROWS: usize = 6;

/// What a row's adapter adds to one projection: `B (scale * s)`.
#[derive(Clone, Copy)]
pub(super) struct RowLora<'a, W> {
    /// B, `[out, rank]`.
    pub(super) b: MatrixRef<'a, W>,
    /// `A x` of the row, unscaled, `[rank]`.
    pub(super) s: &'a [f32],
    /// The adapter's scale.
    pub(super) scale: f32,
}

/// A tile of weight rows and activation rows.
pub(super) struct Tile<'a, W, X> {
    /// Weight rows, `K` long.
    pub(super) w: [&'a [W]; FEATURES],
    /// Which rows of the projection (and of B) they are.
    pub(super) features: [usize; FEATURES],
    /// Numbers from a weight row to the one to prefetch meanwhile; 0 for none.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "portable kernels do not prefetch"))]
    pub(super) ahead: usize,
    /// Activation rows, `K` long, at most [`TILE_ROWS`].
    pub(super) x: &'a [&'a [X]],
    /// The adapter of every activation row.
    pub(super) lora: &'a [Option<RowLora<'a, W>>],
}

impl<W, X> Tile<'_, W, X> {
    /// What the unsafe kernels rely on, and the number of columns.
    fn check(&self, out: &[[f32; FEATURES]]) -> usize {
        let k = self.w[0].len();
        assert!(self.w.iter().all(|w| w.len() == k) && self.x.iter().all(|x| x.len() == k));
        assert!(self.x.len() == out.len() && self.x.len() == self.lora.len());
        k
    }
}

/// One family of kernels for weights `W` and activations `X`. A value proves that the CPU can run it.
pub(super) trait Engine: Copy + Send + Sync {
    /// Format of weights and adapters.
    type W: Element;
    /// Format of the activations that the kernels read.
    type X: Element;
    /// Activation rows that a tile of this engine holds in registers, at most [`TILE_ROWS`].
    const ROWS: usize;

    /// `out[n][m] = w[m] . x[n] + B[features[m]] . (scale * s)[n]`
    fn tile(self, tile: &Tile<'_, Self::W, Self::X>, out: &mut [[f32; FEATURES]]);

    /// Bias and activation of one row: see [`Glu::apply`].
    fn activate(self, glu: &Glu<'_>, gate: &mut [f32], up: &mut [f32], h: &mut [Self::X]);
}
