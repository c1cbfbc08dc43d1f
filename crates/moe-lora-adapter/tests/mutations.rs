//! Mutated files never panic and never allocate more than their own size asks for.
//!
//! `MOE_LORA_FUZZ_RUNS` sets the number of mutations, `MOE_LORA_FUZZ_SEED` the first one. With `MOE_LORA_WRITE_CORPUS` set
//! the seeds are written to the fuzz target's corpus.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::input::{models, split};
use common::seeds::seeds;
use moe_lora_adapter::PeftAdapter;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

/// Counts the bytes that this thread holds, and the most it ever held.
struct Counting;

thread_local! {
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(bytes: isize) {
    // Threads that end have no counter any more; they are not measured.
    HELD.try_with(|held| {
        let (now, most) = held.get();
        held.set((now + bytes, most.max(now + bytes)));
    })
    .ok();
}

// SAFETY: every call is handed on to the system's allocator as it came; the counter allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are those of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are those of `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Runs and tells the most bytes held meanwhile, beyond those of before.
fn measure<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get().0;
    HELD.set((before, before));
    let result = run();
    (result, (HELD.get().1 - before) as usize)
}

/// Opens and resolves; returns whether it worked, and the most bytes held meanwhile beyond the input itself.
fn run(input: &[u8]) -> (bool, usize) {
    let Some((model, config, file)) = split(input) else { return (false, 0) };
    let models = models();
    let file = file.to_vec();
    let (result, held) = measure(|| {
        let adapter = PeftAdapter::from_bytes(config, file)?;
        let _ = adapter.summary();
        adapter.resolve(&models[model])
    });
    if let Err(error) = &result {
        let line = error.to_string();
        assert!(error.input().is_some_and(|e| e.file.is_some()) && !line.contains('\n') && line.len() < 5000, "{line}");
    }
    (result.is_ok(), held)
}

/// What a run may hold: a few copies of the small structures, the tensors (bf16 widened to f32 is twice the file) with one
/// of them in hand, and a constant for experts and patterns.
fn allowance(input: &[u8]) -> usize {
    let Some((_, config, file)) = split(input) else { return 0 };
    let header = file.first_chunk::<8>().map_or(0, |&n| u64::from_le_bytes(n) as usize).min(file.len());
    let tensors = file.len() - header;
    4 * (header + config.len()) + 3 * tensors + (64 << 10)
}

/// Put in for other tokens of the JSON texts.
const TOKENS: &str = r#"null true false 0 4 8 -1 8.0 1e999 18446744073709551615 "" [] {} [[[[[[[[ "r" "lora_alpha" "use_rslora"
    "rank_pattern" "target_parameters" gate_up_proj down_proj w2 lora_A lora_B experts layers base_layer BF16 F64 .* ("#;

fn mutate(rng: &mut fastrand::Rng, seeds: &[(String, Vec<u8>)]) -> Vec<u8> {
    let tokens: Vec<&str> = TOKENS.split_whitespace().collect();
    let mut input = seeds[rng.usize(..seeds.len())].1.clone();
    for _ in 0..rng.usize(1..=4) {
        if input.is_empty() {
            return input;
        }
        let at = rng.usize(..input.len());
        match rng.u8(..8) {
            0 => input[at] ^= 1 << rng.u8(..8),
            1 => input[at] = rng.u8(..),
            2 => input.truncate(at),
            3 => {
                let other = &seeds[rng.usize(..seeds.len())].1;
                let from = rng.usize(..=other.len());
                input.splice(at.., other[from..].iter().copied());
            }
            4 => {
                let end = (at + rng.usize(..16)).min(input.len());
                input.drain(at..end);
            }
            5 => {
                // The length of the configuration, or of the header behind it.
                let config =
                    usize::from(u16::from_le_bytes([*input.get(1).unwrap_or(&0), *input.get(2).unwrap_or(&0)]));
                let at = if rng.bool() { 1 } else { 3 + config }.min(input.len() - 1);
                input[at] = input[at].wrapping_add(rng.u8(..));
            }
            6 => {
                // A digit, mostly one of a shape or an offset.
                let digits: Vec<usize> = (0..input.len()).filter(|&i| input[i].is_ascii_digit()).collect();
                if !digits.is_empty() {
                    input[digits[rng.usize(..digits.len())]] = b'0' + rng.u8(..10);
                }
            }
            _ => {
                // A JSON token for another, in place or beside it.
                let token = tokens[rng.usize(..tokens.len())].as_bytes();
                let start = input[..at].iter().rposition(|b| b",:{[\"".contains(b)).map_or(at, |p| p + 1);
                let end = input[at..].iter().position(|b| b",:}]\"".contains(b)).map_or(at, |p| at + p);
                let grown = token.len() as isize - (end - start) as isize;
                input.splice(start..end, token.iter().copied());
                repair_lengths(&mut input, start, grown);
            }
        }
    }
    input
}

/// Keeps the length in which `at` lies true after `grown` bytes went in, so that the mutation reaches the parser behind.
fn repair_lengths(input: &mut [u8], at: usize, grown: isize) {
    let Some(&[_, low, high]) = input.first_chunk::<3>() else { return };
    let config = usize::from(u16::from_le_bytes([low, high]));
    if at < 3 + config {
        let length = (config as isize + grown) as u16;
        input[1..3].copy_from_slice(&length.to_le_bytes());
    } else if let Some(prefix) = input.get_mut(3 + config..).and_then(|i| i.first_chunk_mut::<8>()) {
        *prefix = (u64::from_le_bytes(*prefix) as i64).wrapping_add(grown as i64).to_le_bytes();
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

/// The fuzz target's corpus, which a published package does not carry.
fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/adapter");
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

#[test]
fn seeds_end_as_their_names_say() {
    let kept = corpus().into_iter().filter(|(name, _)| name.starts_with("ok") || name.starts_with("bad"));
    for (name, input) in seeds().into_iter().chain(kept) {
        let (ok, held) = run(&input);
        assert_eq!(ok, name.starts_with("ok"), "{name}");
        assert!(held <= allowance(&input), "{name}: {held} bytes of {}", allowance(&input));
        if std::env::var_os("MOE_LORA_WRITE_CORPUS").is_some() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/adapter");
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(name), input).unwrap();
        }
    }
}

#[test]
fn large_headers_and_many_patterns_stay_cheap() {
    let names: Vec<String> = (0..20_000)
        .map(|n| match n % 2 {
            0 => format!("base_model.model.model.layers.{}.mlp.experts.{}.up_proj.lora_A.weight", n / 256, n % 256),
            _ => format!("base_model.model.model.layers.{n}.self_attn.q_proj.lora_A.weight"),
        })
        .collect();
    let bytes = common::safetensors(names.iter().map(|n| (n.as_str(), "BF16".to_owned(), vec![1, 1], vec![0; 2])));
    let header = bytes.len() - 40_000;
    let config = common::File::new(1, 1.0).config_bytes();
    let (adapter, held) = measure(|| PeftAdapter::from_bytes(&config, bytes));
    assert_eq!(adapter.unwrap().unused_keys().len(), 10_000);
    assert!(held <= 4 * header, "{held} bytes for a header of {header}");

    // The most and largest expressions that are let through, each of them tried.
    let patterns = (0..512).map(|n| (format!("x{n}[a-z_.]{{200}}|[0-9]*y"), 2.into())).collect();
    let mut file = common::File::new(2, 1.0).set("rank_pattern", serde_json::Value::Object(patterns));
    file.put(0, "mlp.experts.0.up_proj.lora_A.weight", common::Array::from_fn([2, 8], |_| 1.0));
    file.put(0, "mlp.experts.0.up_proj.lora_B.weight", common::Array::from_fn([6, 2], |_| 1.0));
    let (config, bytes) = (file.config_bytes(), file.bytes());
    let (weights, held) = measure(|| PeftAdapter::from_bytes(&config, bytes)?.resolve(&models()[0]));
    assert_eq!(weights.unwrap().max_rank(), 2);
    println!("512 expressions: {held} bytes");
    assert!(held < 64 << 20, "{held} bytes");
}

#[test]
fn mutations_end_in_an_error_or_an_adapter() {
    let (runs, first) = (number("MOE_LORA_FUZZ_RUNS", 100_000), number("MOE_LORA_FUZZ_SEED", 1));
    let seeds = seeds();
    let (mut good, mut most) = (0, 0.0_f64);
    for seed in first..first + runs {
        let input = mutate(&mut fastrand::Rng::with_seed(seed), &seeds);
        let allowance = allowance(&input);
        let (ok, held) = std::panic::catch_unwind(|| run(&input)).unwrap_or_else(|_| panic!("mutation {seed} panics"));
        assert!(held <= allowance, "mutation {seed} held {held} bytes of {allowance}");
        good += usize::from(ok);
        most = most.max(held as f64 / allowance.max(1) as f64);
    }
    println!("{runs} mutations, {good} of them good; at most {:.0} % of the memory allowance", 100.0 * most);
    assert!(runs < 1000 || (good > 0 && good < runs as usize), "mutations reach both ends");
}
