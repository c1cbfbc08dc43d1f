//! Plain Rust over 8 lanes, for every CPU; compilers turn the lanes into vectors.
#![expect(clippy::needless_range_loop, reason = "several arrays are walked together, and unrolled")]

use super::{Engine, FEATURES, Glu, Tile};
use moe_lora_core::Element;
use std::marker::PhantomData;

const LANES: usize = 8;

/// Needs no proof.
#[derive(Clone, Copy)]
pub(in super::super) struct Portable<W>(PhantomData<W>);

impl<W> Portable<W> {
    pub(in super::super) const fn new() -> Option<Self> {
        Some(Self(PhantomData))
    }
}

impl<W: Element> Engine for Portable<W> {
    type W = W;
    type X = f32;
    const ROWS: usize = 1;

    fn tile(self, tile: &Tile<'_, W, f32>, out: &mut [[f32; FEATURES]]) {
        tile.check(out);
        for ((x, lora), out) in tile.x.iter().zip(tile.lora).zip(out) {
            for m in 0..FEATURES {
                let mut sums = [0.0; LANES];
                add_products(tile.w[m], x, 1.0, &mut sums);
                if let Some(lora) = lora {
                    add_products(lora.b.row(tile.features[m]), lora.s, lora.scale, &mut sums);
                }
                let quarters: [f32; LANES / 2] = std::array::from_fn(|i| sums[i] + sums[i + LANES / 2]);
                out[m] = (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
            }
        }
    }

    fn activate(self, glu: &Glu<'_>, gate: &mut [f32], up: &mut [f32], h: &mut [f32]) {
        glu.apply(gate, up, h);
    }
}

fn add_products<W: Element>(w: &[W], x: &[f32], scale: f32, sums: &mut [f32; LANES]) {
    let (w, w_rest) = w.as_chunks::<LANES>();
    let (x, x_rest) = x.as_chunks::<LANES>();
    for (w, x) in w.iter().zip(x) {
        for i in 0..LANES {
            sums[i] += w[i].to_f32() * (scale * x[i]);
        }
    }
    for (i, (w, x)) in w_rest.iter().zip(x_rest).enumerate() {
        sums[i] += w.to_f32() * (scale * x);
    }
}
