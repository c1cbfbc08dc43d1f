//! Router logits: a small matrix product in f32, and the whole way from hidden vectors to experts.

use super::topk;
use crate::RouteError;
use half::{bf16, f16};
use moe_lora_core::{Element, InputError, LayerShape, MatrixRef, RouterWeights, TopK};
use rayon::prelude::*;

/// Tokens of one task: they share each widened chunk of weights.
const TOKENS: usize = 32;
/// Experts of one task.
const EXPERTS: usize = 16;
/// Experts whose sums run side by side: they share each load of a token's numbers.
const SIDE: usize = 4;
/// Independent sums of one dot product, so that it vectorises.
const LANES: usize = 8;
/// Vectors of `LANES` that are summed before they join the total, which bounds the rounding error.
const CHUNK: usize = 64;

/// Chooses experts and weights for `hidden` `[T, H]` with a layer's own router: [`router_logits`], then
/// [`topk`](crate::topk).
///
/// # Errors
/// Those of the two steps.
pub fn route<X: Element>(router: &RouterWeights, hidden: &[X], out: &mut TopK) -> Result<(), RouteError> {
    let mut logits = Vec::new();
    router_logits(router, hidden, &mut logits)?;
    topk(&logits, router.weight.rows(), &router.config, router.selection_bias.as_deref(), out)
}

/// `logits = hidden weightᵀ + bias`, `[T, E]` in f32, whatever the formats of `hidden` `[T, H]` and the weight.
///
/// Products and sums are f32; every 512 of them are summed apart. Models that run in bf16 round their logits to bf16
/// (all but DeepSeek), which this does not imitate.
///
/// # Errors
/// If the router's parts do not fit together or `hidden` has no whole number of rows. `logits` is then as it was.
pub fn router_logits<X: Element>(
    router: &RouterWeights,
    hidden: &[X],
    logits: &mut Vec<f32>,
) -> Result<(), RouteError> {
    let [num_experts, width] = router.weight.shape();
    // The intermediate size is not the router's business; any valid one does.
    router.validate(&LayerShape::new(num_experts, router.config.top_k, width, 1)?)?;
    if !hidden.len().is_multiple_of(width) {
        let found = format!("{} numbers", hidden.len());
        return Err(InputError::new(found, format!("[T, {width}]")).in_tensor("hidden").into());
    }
    let num_tokens = hidden.len() / width;
    let expert_tiles = num_experts.div_ceil(EXPERTS);
    let mut tiles = vec![0.0; num_tokens.div_ceil(TOKENS) * expert_tiles * TOKENS * EXPERTS];
    if let Some(weight) = router.weight.view::<f32>() {
        fill(weight, hidden, &mut tiles);
    } else if let Some(weight) = router.weight.view::<bf16>() {
        fill(weight, hidden, &mut tiles);
    } else if let Some(weight) = router.weight.view::<f16>() {
        fill(weight, hidden, &mut tiles);
    }
    logits.clear();
    logits.reserve(num_tokens * num_experts);
    for token in 0..num_tokens {
        let band = &tiles[token / TOKENS * expert_tiles * TOKENS * EXPERTS..];
        for (tile, first) in band.chunks_exact(TOKENS * EXPERTS).zip((0..num_experts).step_by(EXPERTS)) {
            let row = &tile[token % TOKENS * EXPERTS..];
            logits.extend_from_slice(&row[..EXPERTS.min(num_experts - first)]);
        }
    }
    if let Some(bias) = &router.bias {
        for row in logits.chunks_exact_mut(num_experts) {
            row.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
        }
    }
    Ok(())
}

/// One task a tile `[TOKENS, EXPERTS]`; tiles lie experts first.
fn fill<X: Element, W: Element>(weight: MatrixRef<'_, W>, hidden: &[X], tiles: &mut [f32]) {
    let (num_experts, width) = (weight.rows(), weight.cols());
    let expert_tiles = num_experts.div_ceil(EXPERTS);
    tiles.par_chunks_mut(TOKENS * EXPERTS).enumerate().for_each_init(Vec::new, |tokens, (task, tile)| {
        tokens.clear();
        let rows = hidden.chunks_exact(width).skip(task / expert_tiles * TOKENS).take(TOKENS);
        rows.for_each(|row| widen(row, tokens));
        let first = task % expert_tiles * EXPERTS;
        product(&weight, first..(first + EXPERTS).min(num_experts), tokens, tile);
    });
}

/// Appends a row in f32, padded with zeros to whole vectors.
fn widen<T: Element>(row: &[T], out: &mut Vec<[f32; LANES]>) {
    let start = out.len();
    out.resize(start + row.len().div_ceil(LANES), [0.0; LANES]);
    out[start..].as_flattened_mut().iter_mut().zip(row).for_each(|(lane, number)| *lane = number.to_f32());
}

/// Adds to `tile` `[TOKENS, EXPERTS]` the products of some experts' rows with the widened `tokens`.
///
/// A product's order of sums depends on nothing but the width, so a token's logits do not depend on its batch.
fn product<W: Element>(
    weight: &MatrixRef<'_, W>,
    experts: std::ops::Range<usize>,
    tokens: &[[f32; LANES]],
    tile: &mut [f32],
) {
    let width = weight.cols();
    let vectors = width.div_ceil(LANES);
    let mut sides: [Vec<[f32; LANES]>; SIDE] = Default::default();
    for (side, first) in experts.clone().step_by(SIDE).enumerate() {
        for start in (0..vectors).step_by(CHUNK) {
            let end = vectors.min(start + CHUNK);
            for (i, rows) in sides.iter_mut().enumerate() {
                rows.clear();
                // The last experts may fall short of a full side: their places repeat the last row and are not read.
                let row = weight.row((first + i).min(experts.end - 1));
                widen(&row[start * LANES..width.min(end * LANES)], rows);
            }
            for (token, sums) in tokens.chunks_exact(vectors).zip(tile.chunks_exact_mut(EXPERTS)) {
                let dots = dots(&token[start..end], &sides);
                sums[side * SIDE..].iter_mut().zip(dots).for_each(|(sum, dot)| *sum += total(dot));
            }
        }
    }
}

/// The dot products of one row with `SIDE` others of its length, `LANES` partial sums of each.
///
/// Not inlined: next to the final sums the compiler would vectorise across the rows, with a shuffle for each load.
#[inline(never)]
fn dots(x: &[[f32; LANES]], rows: &[Vec<[f32; LANES]>; SIDE]) -> [[f32; LANES]; SIDE] {
    let [a, b, c, d] = rows;
    let mut sums = [[0_f32; LANES]; SIDE];
    for ((((x, a), b), c), d) in x.iter().zip(a).zip(b).zip(c).zip(d) {
        for (sums, row) in sums.iter_mut().zip([a, b, c, d]) {
            for lane in 0..LANES {
                sums[lane] += x[lane] * row[lane];
            }
        }
    }
    sums
}

fn total([a, b, c, d, e, f, g, h]: [f32; LANES]) -> f32 {
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}
