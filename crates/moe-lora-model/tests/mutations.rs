//! Checkpoints with random damage: no panic, no large allocation, every refusal a line of bad input.
//!
//! `MOE_LORA_FUZZ_RUNS` sets how many. The same cases feed the coverage-guided target in `fuzz/`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

#[path = "common/case.rs"]
mod case;

use case::{Case, fast_folder, open};
use moe_lora_core::{DType, LayerShape};
use moe_lora_model::synthetic::{ExpertForm, TinyModel, write_checkpoint};
use moe_lora_model::{Checkpoint, Family};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

/// Bytes this thread may hold while it opens and reads a damaged checkpoint of a few kilobytes.
const MOST: usize = 1 << 20;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

fn count(bytes: isize) {
    let live = LIVE.get() + bytes;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

// SAFETY: every call goes to the system's allocator unchanged; the counters are plain thread-local cells.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that `run` held at once on this thread, and its result.
fn peak<T>(run: impl FnOnce() -> T) -> (usize, T) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = run();
    (usize::try_from(PEAK.get() - before).unwrap(), result)
}

/// One sound checkpoint a family and form, some with an index.
fn seeds() -> Vec<(String, Case)> {
    let mut seeds = Vec::new();
    for family in Family::ALL {
        for form in [ExpertForm::Each, ExpertForm::Fused] {
            let shape = LayerShape::new(2, 1, 2, 2).unwrap();
            let dtype = if form == ExpertForm::Each { DType::Bf16 } else { DType::F32 };
            let shard_bytes = (form == ExpertForm::Each).then_some(usize::MAX);
            let model = TinyModel { num_layers: 1, form, dtype, shard_bytes, ..TinyModel::new(family, shape) };
            let folder = tempfile::tempdir_in(fast_folder()).unwrap();
            write_checkpoint(folder.path(), &model).unwrap();
            let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap_or_default();
            let shard = "model-00001-of-00001.safetensors";
            let index =
                String::from_utf8(read("model.safetensors.index.json")).unwrap().replace(shard, "a.safetensors");
            let shard = if index.is_empty() { read("model.safetensors") } else { read(shard) };
            let case = Case { parts: [read("config.json"), index.into_bytes(), shard] };
            seeds.push((format!("{}_{form:?}", family.model_type()).to_lowercase(), case));
        }
    }
    seeds
}

const TOKENS: [&str; 18] = [
    "-1",
    "0",
    "1",
    "3",
    "1048576",
    "10000",
    "18446744073709551615",
    "1e308",
    "null",
    "[]",
    "{}",
    "\"a\"",
    "true",
    "[[[[",
    "\\u0000",
    "../a.safetensors",
    "\"F8_E4M3\"",
    "\"F64\"",
];

fn mutate(rng: &mut fastrand::Rng, part: &mut Vec<u8>) {
    let place = rng.usize(..=part.len());
    match rng.u8(..6) {
        0 if place < part.len() => part[place] ^= 1 << rng.u8(..8),
        1 => part.truncate(place),
        2 => drop(part.splice(place..place, rng.choice(TOKENS).unwrap().bytes())),
        3 => {
            let end = rng.usize(place..=part.len().min(place + 24));
            part.drain(place..end);
        }
        4 => {
            let end = rng.usize(place..=part.len().min(place + 60));
            let again = part[place..end].to_vec();
            drop(part.splice(place..place, again));
        }
        // A value of the JSON, replaced by another.
        _ => {
            let colons: Vec<usize> = (0..part.len()).filter(|&i| part[i] == b':').collect();
            if let Some(&colon) = rng.choice(&colons) {
                let end = (colon + 1..part.len()).find(|&i| matches!(part[i], b',' | b'}')).unwrap_or(part.len());
                drop(part.splice(colon + 1..end, rng.choice(TOKENS).unwrap().bytes()));
            }
        }
    }
}

#[test]
fn damaged_checkpoints_are_refused_or_read() {
    let runs = std::env::var("MOE_LORA_FUZZ_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(5_000_u64);
    let seeds = seeds();
    let folder = tempfile::tempdir_in(fast_folder()).unwrap();
    let (mut opened, mut refused) = (0_u64, 0_u64);
    for run in 0..runs {
        let mut rng = fastrand::Rng::with_seed(run);
        let mut case = rng.choice(&seeds).unwrap().1.clone();
        for _ in 0..rng.usize(1..=3) {
            let part = rng.usize(..3);
            mutate(&mut rng, &mut case.parts[part]);
        }
        case.write(folder.path());
        let (bytes, result) = peak(|| open(folder.path()));
        assert!(bytes <= MOST, "run {run} held {bytes} bytes: {result:?}");
        if result.is_ok() { opened += 1 } else { refused += 1 }
    }
    assert!(
        opened > runs / 50 && refused > runs / 5,
        "{opened} of {runs} opened: the damage is too small or too large"
    );
}

#[test]
fn sound_checkpoints_survive_the_fuzz_format() {
    let folder = tempfile::tempdir_in(fast_folder()).unwrap();
    for (name, case) in seeds() {
        Case::decode(&case.encode()).write(folder.path());
        assert_eq!(open(folder.path()).unwrap().layer.num_experts, 2, "{name}");
    }
}

/// Settings that promise far more than the files hold.
#[test]
fn absurd_sizes_cost_nothing() {
    let folder = tempfile::tempdir_in(fast_folder()).unwrap();
    for (_, mut case) in seeds() {
        let config = String::from_utf8(case.parts[0].clone()).unwrap();
        let huge = config
            .replace("experts\": 2", "experts\": 1048576")
            .replace("size\": 2", "size\": 1048576")
            .replace("layers\": 1", "layers\": 10000");
        assert_ne!(config, huge);
        case.parts[0] = huge.into_bytes();
        case.write(folder.path());
        let (bytes, result) = peak(|| open(folder.path()));
        assert!(result.is_err() && bytes <= MOST, "{bytes} bytes");
    }
}

/// Opening and handing out a layer of a mapped checkpoint costs bookkeeping, not weights.
#[test]
fn a_layer_costs_no_copy_of_its_weights() {
    let shape = LayerShape::new(8, 2, 256, 256).unwrap();
    for form in [ExpertForm::Each, ExpertForm::Fused] {
        let folder = tempfile::tempdir_in(fast_folder()).unwrap();
        let model = TinyModel { form, dtype: DType::F32, ..TinyModel::new(Family::Mixtral, shape) };
        write_checkpoint(folder.path(), &model).unwrap();
        let used = |path: &Path| {
            let checkpoint = Checkpoint::open(path).unwrap();
            (checkpoint.layer_weights(1).unwrap(), checkpoint.router(1).unwrap())
        };
        let (bytes, _kept) = peak(|| used(folder.path()));
        assert!(bytes < 64 << 10, "{bytes} bytes for a layer of {}", 4 * shape.weight_count());
    }
}

#[test]
#[ignore = "writes the corpus of the fuzz target"]
fn write_fuzz_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/checkpoint");
    for (name, case) in seeds() {
        std::fs::write(corpus.join(name), case.encode()).unwrap();
    }
}
