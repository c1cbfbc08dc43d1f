//! f32 FMA over 16 lanes, weights widened in registers; and what the bf16 kernel shares with it.
#![expect(clippy::needless_range_loop, reason = "several arrays are walked together, and unrolled")]

use super::{Engine, FEATURES, Glu, RowLora, Tile};
use moe_lora_core::{DType, Element};
use std::arch::x86_64::*;
use std::marker::PhantomData;

const LANES: usize = 16;

/// The partial sums of one activation row with all weight rows of the tile.
pub(super) type Sums = [__m512; FEATURES];

/// Proof that the CPU has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512<W>(PhantomData<W>);

pub(super) fn detected() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

impl<W> Avx512<W> {
    pub(in super::super) fn new() -> Option<Self> {
        detected().then_some(Self(PhantomData))
    }
}

impl<W: Element> Engine for Avx512<W> {
    type W = W;
    type X = f32;
    const ROWS: usize = 6;

    fn tile(self, tile: &Tile<'_, W, f32>, out: &mut [[f32; FEATURES]]) {
        let k = tile.check(out);
        // SAFETY: `self` proves the features; `check` proves that all rows are `k` long, and N is the number of rows.
        unsafe {
            match tile.x.len() {
                1 => dot::<W, 1>(tile, k, out),
                2 => dot::<W, 2>(tile, k, out),
                3 => dot::<W, 3>(tile, k, out),
                4 => dot::<W, 4>(tile, k, out),
                5 => dot::<W, 5>(tile, k, out),
                6 => dot::<W, 6>(tile, k, out),
                n => unreachable!("a tile of {n} rows"),
            }
        }
    }

    fn activate(self, glu: &Glu<'_>, gate: &mut [f32], up: &mut [f32], h: &mut [f32]) {
        // SAFETY: `self` proves the features.
        unsafe { activate(glu, gate, up, h) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn activate<X: Element>(glu: &Glu<'_>, gate: &mut [f32], up: &mut [f32], h: &mut [X]) {
    glu.apply(gate, up, h);
}

/// # Safety
/// All rows of the tile have to be `k` long, and there have to be `N` activation rows and entries of `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn dot<W: Element, const N: usize>(tile: &Tile<'_, W, f32>, k: usize, out: &mut [[f32; FEATURES]]) {
    let w = tile.w.map(<[W]>::as_ptr);
    let mut x = [std::ptr::null::<f32>(); N];
    for n in 0..N {
        x[n] = tile.x[n].as_ptr();
    }
    let mut sums = [[_mm512_setzero_ps(); FEATURES]; N];
    let mut i = 0;
    // SAFETY: every load reads `LANES` or fewer numbers of a row of `k`; a prefetch may point anywhere.
    unsafe {
        while i + LANES <= k {
            let mut wide = [_mm512_setzero_ps(); FEATURES];
            for m in 0..FEATURES {
                wide[m] = load(w[m].add(i));
                _mm_prefetch::<_MM_HINT_T1>(w[m].wrapping_add(i + tile.ahead).cast());
            }
            for n in 0..N {
                let x = _mm512_loadu_ps(x[n].add(i));
                for m in 0..FEATURES {
                    sums[n][m] = _mm512_fmadd_ps(wide[m], x, sums[n][m]);
                }
            }
            i += LANES;
        }
        if i < k {
            let mask = first(k - i);
            let mut wide = [_mm512_setzero_ps(); FEATURES];
            for m in 0..FEATURES {
                wide[m] = load_first(mask, w[m].add(i));
            }
            for n in 0..N {
                let x = _mm512_maskz_loadu_ps(mask, x[n].add(i));
                for m in 0..FEATURES {
                    sums[n][m] = _mm512_fmadd_ps(wide[m], x, sums[n][m]);
                }
            }
        }
    }
    finish(tile.lora, tile.features, sums, out);
}

/// LoRA into the lanes, then their sum.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn finish<W: Element, const N: usize>(
    lora: &[Option<RowLora<'_, W>>],
    features: [usize; FEATURES],
    sums: [Sums; N],
    out: &mut [[f32; FEATURES]],
) {
    if lora.iter().all(Option::is_none) {
        // Straight from the registers.
        for n in 0..N {
            reduce(&sums[n], &mut out[n]);
        }
        return;
    }
    for ((lora, mut sums), out) in lora.iter().zip(sums).zip(out) {
        if let Some(lora) = lora {
            expand(lora, features, &mut sums);
        }
        reduce(&sums, out);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn expand<W: Element>(lora: &RowLora<'_, W>, features: [usize; FEATURES], sums: &mut Sums) {
    let (rank, stride, b) = (lora.s.len(), lora.b.stride(), lora.b.data());
    let last = features.iter().fold(0, |a, &f| a.max(f));
    assert!(last * stride + rank <= b.len());
    let b = features.map(|f| b.as_ptr().wrapping_add(f * stride));
    let s = lora.s.as_ptr();
    let scale = _mm512_set1_ps(lora.scale);
    let mut r = 0;
    // SAFETY: every load reads within the `rank` numbers of `s` and of the rows of B, which reach as far as asserted.
    unsafe {
        while r + LANES <= rank {
            let s = _mm512_mul_ps(scale, _mm512_loadu_ps(s.add(r)));
            for m in 0..FEATURES {
                sums[m] = _mm512_fmadd_ps(load(b[m].add(r)), s, sums[m]);
            }
            r += LANES;
        }
        if r < rank {
            let mask = first(rank - r);
            let s = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, s.add(r)));
            for m in 0..FEATURES {
                sums[m] = _mm512_fmadd_ps(load_first(mask, b[m].add(r)), s, sums[m]);
            }
        }
    }
}

/// A mask of the first `n` lanes, `1 <= n <= 16`.
#[inline]
fn first(n: usize) -> __mmask16 {
    u16::MAX >> (LANES - n)
}

/// Widens 16 weights.
///
/// # Safety
/// `p` has to point to 16 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn load<W: Element>(p: *const W) -> __m512 {
    // SAFETY: by the contract; the tag says what `W` is.
    unsafe {
        match W::DTYPE {
            DType::F32 => _mm512_loadu_ps(p.cast()),
            DType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
            DType::Bf16 => widen_bf16(_mm256_loadu_si256(p.cast())),
        }
    }
}

/// Widens the weights in the mask, zero elsewhere.
///
/// # Safety
/// `p` has to point to as many numbers as the mask reaches.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn load_first<W: Element>(mask: __mmask16, p: *const W) -> __m512 {
    // SAFETY: by the contract; the tag says what `W` is, and masked lanes are not read.
    unsafe {
        match W::DTYPE {
            DType::F32 => _mm512_maskz_loadu_ps(mask, p.cast()),
            DType::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())),
            DType::Bf16 => widen_bf16(_mm256_maskz_loadu_epi16(mask, p.cast())),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widen_bf16(bits: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

/// The sum of the lanes of each of the four vectors: within quarters by transposing, then the quarters.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn reduce(s: &Sums, out: &mut [f32; FEATURES]) {
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
    let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    let quarters =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    let halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps::<1>(quarters));
    let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
    // SAFETY: `out` has room for 4 numbers.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
}
