//! A warm aligner allocates nothing. A test binary of its own, because it counts every allocation of the process.
#![allow(clippy::unwrap_used)] // Helpers of tests are test code too.

use moe_lora_core::RowMap;
use moe_lora_route::Aligner;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller holds what the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from the system's allocator, through `alloc`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static GLOBAL: Counting = Counting;

#[test]
fn a_warm_aligner_does_not_allocate() {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut batch = |tokens: usize, slots: i32| {
        let ids: Vec<i32> = (0..tokens * 8).map(|_| rng.i32(-1..128)).collect();
        let weights = vec![0.125; ids.len()];
        (ids, weights, (0..tokens).map(|_| rng.i32(-1..slots)).collect::<Vec<_>>())
    };
    // The second batch has no -1, more and larger slots, and so far more segments than the first.
    let first = batch(256, 0);
    let mut second = batch(256, i32::MAX);
    second.0.iter_mut().for_each(|id| *id = id.unsigned_abs() as i32);
    let third = batch(9, 4);

    let mut aligner = Aligner::new(128, 8);
    let mut map = RowMap::default();
    let mut count = |(ids, weights, slots): &(Vec<i32>, Vec<f32>, Vec<i32>)| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        aligner.align(ids, weights, slots, |_| true, &mut map).unwrap();
        ALLOCATIONS.load(Ordering::Relaxed) - before
    };
    assert!(count(&first) > 0, "the first batch warms up");
    for batch in [&second, &third, &first, &second] {
        assert_eq!(count(batch), 0);
    }
}
