//! The stages allocate nothing.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod common;

use half::bf16;
use moe_lora_core::{DType, LayerShape};
use moe_lora_gemm::cpu::{LayerArgs, Workspace, combine, down, gate_up};
use moe_lora_reference::random::{AdapterSpec, CaseSpec};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local!(static COUNT: Cell<usize> = const { Cell::new(0) });

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|c| c.set(c.get() + 1));
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_stages_allocate_nothing() {
    let base = CaseSpec::new(LayerShape::new(6, 2, 48, 40).unwrap(), 90).dtype(DType::Bf16);
    let shared = AdapterSpec { shared_outer: true, ..AdapterSpec::rank(12) };
    let case = CaseSpec { adapters: vec![AdapterSpec::rank(16), shared], bias: true, ..base }.build(1);
    let (hidden, rows, table) = (case.hidden_as::<bf16>(), common::case_rows(&case), case.table());
    let args = LayerArgs { hidden: &hidden, weights: &case.weights, rows: &rows, adapters: &table };
    // One thread, so that all work is done, and counted, here.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        for kernel in common::kernels(&case) {
            let mut ws = Workspace::new(&case.spec.shape, 90, 16).unwrap();
            let mut out = vec![0_f32; hidden.len()];
            let before = COUNT.get();
            gate_up(&args, kernel, &mut ws).unwrap();
            down(&args, kernel, &mut ws).unwrap();
            combine(&args, &mut ws, &mut out).unwrap();
            assert_eq!(COUNT.get(), before, "{kernel}");
            assert!(out.iter().all(|x| x.is_finite()));
        }
    });
}
