//! What a name costs that nobody asks for.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use moe_lora_core::{DType, LayerShape, ModelShape};
use moe_lora_pool::{AdapterLibrary, AdapterPool, HostMemory, LibraryConfig, PoolConfig, Source};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

const NAMES: usize = 10_000;
const MOST: usize = 10_000_000;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; the counters are plain thread-local cells.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.set(LIVE.get().wrapping_add(layout.size()));
        PEAK.set(PEAK.get().max(LIVE.get()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().wrapping_sub(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn ten_thousand_registered_adapters_take_less_than_ten_megabytes() {
    let model = ModelShape::uniform(LayerShape::new(128, 8, 2048, 768).unwrap(), 48, DType::Bf16);
    let pool = AdapterPool::new(HostMemory, &model, PoolConfig::default()).unwrap();
    let library = AdapterLibrary::new(pool, LibraryConfig { loaders: 0, ..Default::default() }).unwrap();
    let before = LIVE.get();
    PEAK.set(before);
    for n in 0..NAMES {
        let folder = format!("/srv/models/qwen3-30b-a3b/adapters/tenant-{n:05}/checkpoint-1000");
        library.register(&format!("tenant-{n:05}"), Source::folder(folder)).unwrap();
    }
    let (live, peak) = (LIVE.get() - before, PEAK.get() - before);
    println!("{live} bytes for {NAMES} adapters, {peak} at most on the way");
    assert!(live > NAMES * 64, "the allocator does not count: {live} bytes");
    assert!(peak < MOST, "{peak} bytes");
}
