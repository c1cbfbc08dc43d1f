//! Errors as C sees them: a number, and the words of this thread's last failure.

use moe_lora_core::InputError;
use moe_lora_cuda::GpuError;
use moe_lora_runner::RunnerError;
use std::cell::RefCell;
use std::ffi::{CString, c_char};

/// `MOE_LORA_FAILED`: the GPU or the driver.
const FAILED: i32 = 1;
/// `MOE_LORA_INVALID`: an argument.
const INVALID: i32 = 2;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// What a function returns that did not work.
pub(crate) struct Status {
    code: i32,
    words: String,
}

impl From<InputError> for Status {
    fn from(error: InputError) -> Self {
        Self { code: INVALID, words: error.to_string() }
    }
}

impl From<GpuError> for Status {
    fn from(error: GpuError) -> Self {
        Self { code: FAILED, words: error.to_string() }
    }
}

impl From<RunnerError> for Status {
    fn from(error: RunnerError) -> Self {
        let code = if error.input().is_some() { INVALID } else { FAILED };
        Self { code, words: error.to_string() }
    }
}

/// An argument that is not what it has to be.
pub(crate) fn invalid(name: &str, found: &str, expected: &str) -> Status {
    InputError::new(found, expected).in_tensor(name).into()
}

/// Runs `work`; keeps the words of its failure and returns the number.
pub(crate) fn report(work: impl FnOnce() -> Result<(), Status>) -> i32 {
    let Err(Status { code, words }) = work() else { return 0 };
    // The words are one line of text; a zero byte in them would end them.
    let words = CString::new(words.replace('\0', " ")).unwrap_or_default();
    LAST.with(|last| last.replace(words));
    code
}

/// Good until the next failure in this thread.
pub(crate) fn last() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}
