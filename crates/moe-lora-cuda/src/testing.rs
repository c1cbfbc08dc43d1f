//! How tests ask for a GPU: loud where there is none, and a failure where one was promised.

use crate::Gpu;
use std::io::Write;

/// Opens GPU 0 for a test. Without one, says on the real stderr, past the capture, that `test` is skipped and why, and
/// returns `None`.
///
/// # Panics
/// If there is no usable GPU and `MOE_LORA_REQUIRE_GPU` is 1.
#[must_use]
#[expect(clippy::panic, reason = "a promised GPU that is missing must fail the test")]
pub fn gpu(test: &str) -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(why) if std::env::var_os("MOE_LORA_REQUIRE_GPU").is_some_and(|v| v == "1") => {
            panic!("MOE_LORA_REQUIRE_GPU=1, but {test} has no GPU: {why}")
        }
        Err(why) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
            None
        }
    }
}
