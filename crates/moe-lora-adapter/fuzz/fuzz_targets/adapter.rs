//! Any two files, opened and resolved against a small model: `cargo +nightly fuzz run adapter`.
//!
//! The seeds in `corpus/adapter` are written by `MOE_LORA_WRITE_CORPUS=1 cargo test -p moe-lora-adapter --test mutations`.
#![no_main]

#[path = "../../tests/common/input.rs"]
mod input;

use moe_lora_adapter::PeftAdapter;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((model, config, file)) = input::split(data) else { return };
    let result = PeftAdapter::from_bytes(config, file.to_vec()).and_then(|adapter| {
        let _ = adapter.summary();
        adapter.resolve(&input::models()[model])
    });
    if let Err(error) = result {
        assert!(!error.to_string().contains('\n'));
    }
});
