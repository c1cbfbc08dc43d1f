//! bf16 dot products over 32 numbers, two an f32 lane (`vdpbf16ps`).
#![expect(clippy::needless_range_loop, reason = "several arrays are walked together, and unrolled")]

use super::avx512::{activate, detected, finish};
use super::{Engine, FEATURES, Glu, Tile};
use half::bf16;
use std::arch::x86_64::*;

const NUMBERS: usize = 32;

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and BF16.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512Bf16(());

impl Avx512Bf16 {
    pub(in super::super) fn new() -> Option<Self> {
        (detected() && is_x86_feature_detected!("avx512bf16")).then_some(Self(()))
    }
}

impl Engine for Avx512Bf16 {
    type W = bf16;
    type X = bf16;
    const ROWS: usize = 6;

    fn tile(self, tile: &Tile<'_, bf16, bf16>, out: &mut [[f32; FEATURES]]) {
        let k = tile.check(out);
        // SAFETY: `self` proves the features; `check` proves that all rows are `k` long, and N is the number of rows.
        unsafe {
            match tile.x.len() {
                1 => dot::<1>(tile, k, out),
                2 => dot::<2>(tile, k, out),
                3 => dot::<3>(tile, k, out),
                4 => dot::<4>(tile, k, out),
                5 => dot::<5>(tile, k, out),
                6 => dot::<6>(tile, k, out),
                n => unreachable!("a tile of {n} rows"),
            }
        }
    }

    fn activate(self, glu: &Glu<'_>, gate: &mut [f32], up: &mut [f32], h: &mut [bf16]) {
        // SAFETY: `self` proves the features.
        unsafe { activate(glu, gate, up, h) }
    }
}

/// # Safety
/// All rows of the tile have to be `k` long, and there have to be `N` activation rows and entries of `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn dot<const N: usize>(tile: &Tile<'_, bf16, bf16>, k: usize, out: &mut [[f32; FEATURES]]) {
    let w = tile.w.map(<[bf16]>::as_ptr);
    let mut x = [std::ptr::null::<bf16>(); N];
    for n in 0..N {
        x[n] = tile.x[n].as_ptr();
    }
    let mut sums = [[_mm512_setzero_ps(); FEATURES]; N];
    let mut i = 0;
    // SAFETY: every load reads `NUMBERS` or fewer numbers of a row of `k`; a prefetch may point anywhere.
    unsafe {
        while i + NUMBERS <= k {
            let mut wide = [_mm512_setzero_si512(); FEATURES];
            for m in 0..FEATURES {
                wide[m] = _mm512_loadu_si512(w[m].add(i).cast());
                _mm_prefetch::<_MM_HINT_T1>(w[m].wrapping_add(i + tile.ahead).cast());
            }
            for n in 0..N {
                let x = _mm512_loadu_si512(x[n].add(i).cast());
                for m in 0..FEATURES {
                    sums[n][m] = dp(sums[n][m], x, wide[m]);
                }
            }
            i += NUMBERS;
        }
        if i < k {
            let mask = u32::MAX >> (NUMBERS - (k - i));
            let mut wide = [_mm512_setzero_si512(); FEATURES];
            for m in 0..FEATURES {
                wide[m] = _mm512_maskz_loadu_epi16(mask, w[m].add(i).cast());
            }
            for n in 0..N {
                let x = _mm512_maskz_loadu_epi16(mask, x[n].add(i).cast());
                for m in 0..FEATURES {
                    sums[n][m] = dp(sums[n][m], x, wide[m]);
                }
            }
        }
    }
    finish(tile.lora, tile.features, sums, out);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dp(sum: __m512, x: __m512i, w: __m512i) -> __m512 {
    // SAFETY: the types are two names for 512 bits.
    let bf16 = |bits| unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) };
    _mm512_dpbf16_ps(sum, bf16(x), bf16(w))
}
