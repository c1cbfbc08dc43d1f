//! How a command ends: what is printed, and the exit code that tells bad input from a failed run.

use moe_lora::{AdapterError, InputError, LayerError, ModelError, PoolError, RunnerError};
use moe_lora_generate::GenerateError;
use std::process::ExitCode;

/// Prints an error on one line and gives it its exit code.
pub(crate) fn exit_code(done: anyhow::Result<()>) -> ExitCode {
    let Err(error) = done else { return ExitCode::SUCCESS };
    eprintln!("error: {error:#}");
    ExitCode::from(if is_bad_input(&error) { 2 } else { 1 })
}

/// Whether what the user handed in is at fault.
fn is_bad_input(error: &anyhow::Error) -> bool {
    error.downcast_ref::<InputError>().is_some()
        || error.downcast_ref::<AdapterError>().is_some_and(|e| e.input().is_some())
        || error.downcast_ref::<ModelError>().is_some_and(|e| e.input().is_some())
        || error.downcast_ref::<PoolError>().is_some_and(|e| e.input().is_some())
        || error.downcast_ref::<LayerError>().is_some_and(|e| e.input().is_some())
        || error.downcast_ref::<RunnerError>().is_some_and(|e| e.input().is_some())
        || error.downcast_ref::<GenerateError>().is_some_and(|e| e.input().is_some())
}
