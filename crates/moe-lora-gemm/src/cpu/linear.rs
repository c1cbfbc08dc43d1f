//! Dense projections around the experts: whole ones in parallel, rows with adapters of their own; and small ones on the
//! calling thread, for attention.

use super::gate_up::convert;
use super::kernel::{Kernel, with_engine, with_f32_engine};
use super::project::{BLOCK, even_parts, project, typed};
use super::shrink;
use super::simd::{Engine, RowLora, for_each_block};
use super::workspace::{BAND_ROWS, Band, row_stride};
use crate::GemmError;
use bytemuck::cast_slice_mut;
use moe_lora_core::{Element, InputError, Lora, Matrix, MatrixRef, Slice};
use rayon::prelude::*;

/// A dense projection, `out = W x + b + s B (A x)`, whose rows each have their own adapter.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// W, `[N, K]`.
    pub weight: &'a Matrix,
    /// b, `[N]`.
    pub bias: Option<&'a [f32]>,
    /// The adapter of every row, in the format of the weight; empty if no row has one.
    pub loras: &'a [Option<&'a Lora>],
}

/// Memory of [`linear`], which grows to what the largest call needed.
#[derive(Debug, Default)]
pub struct LinearScratch {
    x: Vec<f32>,
    s: Vec<f32>,
    bands: Vec<Band>,
}

/// Computes `out` `[T, N]` of `x` `[T, K]` in the current rayon pool. Sums are f32; adapters join them before they are
/// written. With [`Kernel::Avx512Bf16`] nothing is rounded, with the others `x` and weights are widened.
///
/// # Errors
/// If lengths, shapes or formats do not fit, or `kernel` cannot run here or with these formats.
pub fn linear<X: Element>(
    args: &Linear<'_>,
    x: &[X],
    kernel: Kernel,
    scratch: &mut LinearScratch,
    out: &mut [f32],
) -> Result<(), GemmError> {
    let tokens = check(args, x.len(), out.len())?;
    let dtype = args.weight.dtype();
    kernel.check(dtype, X::DTYPE)?;
    with_engine!(kernel, dtype, engine => run(engine, args, tokens, X::wrap(x), scratch, out)).ok_or(kernel.missing())
}

/// The number of rows, if everything fits.
fn check(args: &Linear<'_>, x: usize, out: usize) -> Result<usize, InputError> {
    let [n, k] = args.weight.shape();
    let wrong = |what: &str, found: String, expected: String| InputError::new(found, expected).in_tensor(what);
    let tokens = x / k;
    if !x.is_multiple_of(k) || tokens.checked_mul(n) != Some(out) {
        return Err(wrong("linear", format!("{x} numbers to {out}"), format!("[T, {k}] to [T, {n}]")));
    }
    if args.bias.is_some_and(|b| b.len() != n) {
        return Err(wrong("bias", format!("{:?}", args.bias.map(<[f32]>::len)), format!("[{n}]")));
    }
    if !args.loras.is_empty() && args.loras.len() != tokens {
        return Err(wrong("loras", format!("{} entries", args.loras.len()), format!("one for each of {tokens} rows")));
    }
    for (row, lora) in args.loras.iter().enumerate() {
        let Some(lora) = lora else { continue };
        let found = [lora.out_features(), lora.in_features()];
        if found != [n, k] || lora.a().dtype() != args.weight.dtype() {
            let found = format!("{found:?} {}", lora.a().dtype());
            return Err(wrong(&format!("adapter of row {row}"), found, format!("[{n}, {k}] {}", args.weight.dtype())));
        }
    }
    Ok(tokens)
}

fn run<E: Engine>(
    engine: E,
    args: &Linear<'_>,
    tokens: usize,
    x: Slice<'_>,
    scratch: &mut LinearScratch,
    out: &mut [f32],
) {
    let [n, k] = args.weight.shape();
    let stride = row_stride::<E::X>(k);
    let LinearScratch { x: copy, s, bands } = scratch;
    copy.resize(copy.len().max((tokens * stride * size_of::<E::X>()).div_ceil(size_of::<f32>())), 0.0);
    let copy: &mut [E::X] = &mut cast_slice_mut(copy)[..tokens * stride];
    convert(x, k, copy, stride);
    let x = |row: usize| &copy[row * stride..][..k];

    let max_rank = args.loras.iter().flatten().map(|l| l.rank()).max().unwrap_or(0);
    s.resize(s.len().max(tokens * max_rank), 0.0);
    if max_rank > 0 {
        narrow(engine, args.loras, x, &mut s[..tokens * max_rank], max_rank);
    }
    let lora = |row: usize| {
        let lora = (*args.loras.get(row)?)?;
        Some(RowLora { b: typed(lora.b()), s: &s[row * max_rank..][..lora.rank()], scale: lora.scale() })
    };
    bands.clear();
    bands.extend(even_parts(tokens, BAND_ROWS).map(|rows| Band { expert: 0, rows }));
    let weight = typed::<E::W>(args.weight);
    for_each_block(out, [n; 2], bands, BLOCK, |Band { rows, .. }, mut block| {
        let features = block.cols();
        let mut vectors: [&[E::X]; BAND_ROWS] = [&[]; BAND_ROWS];
        let mut loras = [None; BAND_ROWS];
        for ((vector, slot), row) in vectors.iter_mut().zip(&mut loras).zip(rows.clone()) {
            *vector = x(row);
            *slot = lora(row);
        }
        let mut sums = [[0.0; BLOCK]; BAND_ROWS];
        project(engine, weight, features.clone(), &vectors[..rows.len()], &loras[..rows.len()], &mut sums);
        for (i, sums) in sums.iter().enumerate().take(rows.len()) {
            let out = block.row(i);
            out.copy_from_slice(&sums[..features.len()]);
            if let Some(bias) = args.bias {
                out.iter_mut().zip(&bias[features.clone()]).for_each(|(out, bias)| *out += bias);
            }
        }
    });
}

/// `s[row] = A x[row]` for rows with an adapter; neighbours of one adapter go together.
fn narrow<'x, E: Engine>(
    engine: E,
    loras: &[Option<&Lora>],
    x: impl Fn(usize) -> &'x [E::X] + Sync,
    s: &mut [f32],
    max_rank: usize,
) where
    E::X: 'x,
{
    const PART: usize = 24;
    s.par_chunks_mut(PART * max_rank).zip(loras.par_chunks(PART)).enumerate().for_each(|(i, (s, loras))| {
        let mut first = 0;
        for same in loras.chunk_by(|a, b| a.map(std::ptr::from_ref) == b.map(std::ptr::from_ref)) {
            if let Some(lora) = same[0] {
                let mut vectors: [&[E::X]; PART] = [&[]; PART];
                for (n, vector) in vectors.iter_mut().enumerate().take(same.len()) {
                    *vector = x(i * PART + first + n);
                }
                shrink::apply(engine, lora.a(), &vectors[..same.len()], |n, ranks, sums| {
                    let start = (first + n) * max_rank;
                    s[start + ranks.start..start + ranks.end].copy_from_slice(sums);
                });
            }
            first += same.len();
        }
    });
}

/// `out[n][r] = w[r] . x[n]` on the calling thread: rows of `x` and `out` lie `x_stride` and `out_stride` numbers apart,
/// and there are as many as `x` holds. `w` is `[rows, cols, row stride]` of `values`.
///
/// A dot product's bits do not change if zeros follow in `x`, so a row that sees less of a cache may run with one that
/// sees more of it.
///
/// # Errors
/// If the sizes do not fit, or `kernel` cannot run here. [`Kernel::Avx512Bf16`] stands for its f32 companion.
pub fn products(
    kernel: Kernel,
    values: Slice<'_>,
    w: [usize; 3],
    (x, x_stride): (&[f32], usize),
    (out, out_stride): (&mut [f32], usize),
) -> Result<(), GemmError> {
    let [rows, cols, _] = w;
    let n = if x_stride == 0 { 0 } else { x.len().div_ceil(x_stride) };
    let fits = |len: usize, width: usize, stride: usize| {
        width <= stride && n.saturating_sub(1).checked_mul(stride).is_some_and(|end| end + width <= len)
    };
    if cols == 0 || n == 0 || !fits(x.len(), cols, x_stride) || !fits(out.len(), rows, out_stride) {
        let found = format!("x {} by {x_stride}, out {} by {out_stride}", x.len(), out.len());
        return Err(InputError::new(found, format!("x [n, {cols}], out [n, {rows}]")).in_tensor("products").into());
    }
    let kernel = kernel.in_f32();
    with_f32_engine!(kernel, values.dtype(), engine => small(engine, values, w, (x, x_stride), (out, out_stride)))
        .ok_or(kernel.missing())??;
    Ok(())
}

fn small<E: Engine<X = f32>>(
    engine: E,
    values: Slice<'_>,
    [rows, cols, stride]: [usize; 3],
    (x, x_stride): (&[f32], usize),
    (out, out_stride): (&mut [f32], usize),
) -> Result<(), InputError> {
    let values = E::W::unwrap(values).unwrap_or_default();
    let w = MatrixRef::new(values, rows, cols, stride)?;
    let mut sums = [[0.0; BLOCK]; BAND_ROWS];
    for (x, out) in x.chunks(BAND_ROWS * x_stride).zip(out.chunks_mut(BAND_ROWS * out_stride)) {
        let mut vectors: [&[f32]; BAND_ROWS] = [&[]; BAND_ROWS];
        let n = x.len().div_ceil(x_stride);
        for (vector, x) in vectors.iter_mut().zip(x.chunks(x_stride)) {
            *vector = &x[..cols];
        }
        for first in (0..rows).step_by(BLOCK) {
            let features = first..(first + BLOCK).min(rows);
            project(engine, w, features.clone(), &vectors[..n], &[None; BAND_ROWS][..n], &mut sums);
            for (out, sums) in out.chunks_mut(out_stride).zip(&sums[..n]) {
                out[features.clone()].copy_from_slice(&sums[..features.len()]);
            }
        }
    }
    Ok(())
}
