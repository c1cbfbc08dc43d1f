//! `config.json`, an index and a shard from the fuzzer: `cargo +nightly fuzz run checkpoint -- -malloc_limit_mb=256`.
#![no_main]

#[path = "../../tests/common/case.rs"]
mod case;

use case::{Case, fast_folder, open};
use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use tempfile::TempDir;

static FOLDER: OnceLock<TempDir> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let folder = FOLDER.get_or_init(|| tempfile::tempdir_in(fast_folder()).expect("a temporary folder"));
    Case::decode(bytes).write(folder.path());
    let _ = open(folder.path());
});
