//! f32 FMA over 8 lanes, weights widened in registers.
#![expect(clippy::needless_range_loop, reason = "several arrays are walked together, and unrolled")]

use super::{Engine, FEATURES, Glu, RowLora, Tile};
use moe_lora_core::{DType, Element};
use std::arch::x86_64::*;
use std::marker::PhantomData;

const LANES: usize = 8;

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2<W>(PhantomData<W>);

impl<W> Avx2<W> {
    pub(in super::super) fn new() -> Option<Self> {
        let detected =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        detected.then_some(Self(PhantomData))
    }
}

impl<W: Element> Engine for Avx2<W> {
    type W = W;
    type X = f32;
    // 8 sums, 4 weights and 2 activations fill the 16 registers.
    const ROWS: usize = 2;

    fn tile(self, tile: &Tile<'_, W, f32>, out: &mut [[f32; FEATURES]]) {
        let k = tile.check(out);
        // SAFETY: `self` proves the features; `check` proves that all rows are `k` long, and N is the number of rows.
        unsafe {
            match tile.x.len() {
                1 => dot::<W, 1>(tile, k, out),
                2 => dot::<W, 2>(tile, k, out),
                n => unreachable!("a tile of {n} rows"),
            }
        }
    }

    fn activate(self, glu: &Glu<'_>, gate: &mut [f32], up: &mut [f32], h: &mut [f32]) {
        // SAFETY: `self` proves the features.
        unsafe { activate(glu, gate, up, h) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn activate(glu: &Glu<'_>, gate: &mut [f32], up: &mut [f32], h: &mut [f32]) {
    glu.apply(gate, up, h);
}

/// # Safety
/// All rows of the tile have to be `k` long, and there have to be `N` activation rows and entries of `out`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot<W: Element, const N: usize>(tile: &Tile<'_, W, f32>, k: usize, out: &mut [[f32; FEATURES]]) {
    let w = tile.w.map(<[W]>::as_ptr);
    let mut x = [std::ptr::null::<f32>(); N];
    for n in 0..N {
        x[n] = tile.x[n].as_ptr();
    }
    let mut sums = [[_mm256_setzero_ps(); FEATURES]; N];
    let mut i = 0;
    while i + LANES <= k {
        // SAFETY: `i + LANES <= k`; a prefetch may point anywhere.
        unsafe {
            let mut wide = [_mm256_setzero_ps(); FEATURES];
            for m in 0..FEATURES {
                wide[m] = load(w[m].add(i));
                _mm_prefetch::<_MM_HINT_T1>(w[m].wrapping_add(i + tile.ahead).cast());
            }
            for n in 0..N {
                let x = _mm256_loadu_ps(x[n].add(i));
                for m in 0..FEATURES {
                    sums[n][m] = _mm256_fmadd_ps(wide[m], x, sums[n][m]);
                }
            }
        }
        i += LANES;
    }
    if i < k {
        for n in 0..N {
            let x = load_first(&tile.x[n][i..]);
            for m in 0..FEATURES {
                sums[n][m] = _mm256_fmadd_ps(load_first(&tile.w[m][i..]), x, sums[n][m]);
            }
        }
    }
    for n in 0..N {
        if let Some(lora) = &tile.lora[n] {
            expand(lora, tile.features, &mut sums[n]);
        }
        // SAFETY: an entry of `out` has room for 4 numbers.
        unsafe { _mm_storeu_ps(out[n].as_mut_ptr(), reduce(&sums[n])) };
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn expand<W: Element>(lora: &RowLora<'_, W>, features: [usize; FEATURES], sums: &mut [__m256; FEATURES]) {
    let rank = lora.s.len();
    assert!(lora.b.cols() == rank);
    let scale = _mm256_set1_ps(lora.scale);
    for r in (0..rank).step_by(LANES) {
        let s = _mm256_mul_ps(scale, load_first(&lora.s[r..]));
        for m in 0..FEATURES {
            sums[m] = _mm256_fmadd_ps(load_first(&lora.b.row(features[m])[r..]), s, sums[m]);
        }
    }
}

/// Widens the first 8 weights, or all and zeros if there are fewer.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_first<W: Element>(values: &[W]) -> __m256 {
    if values.len() >= LANES {
        // SAFETY: there are 8 numbers.
        return unsafe { load(values.as_ptr()) };
    }
    let mut wide = [0_f32; LANES];
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = value.to_f32();
    }
    // SAFETY: `wide` holds 8 numbers.
    unsafe { _mm256_loadu_ps(wide.as_ptr()) }
}

/// Widens 8 weights.
///
/// # Safety
/// `p` has to point to 8 numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load<W: Element>(p: *const W) -> __m256 {
    // SAFETY: by the contract; the tag says what `W` is.
    unsafe {
        match W::DTYPE {
            DType::F32 => _mm256_loadu_ps(p.cast()),
            DType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            DType::Bf16 => {
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
            }
        }
    }
}

/// The sum of the lanes of each of the four vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn reduce(s: &[__m256; FEATURES]) -> __m128 {
    let halves = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves))
}
