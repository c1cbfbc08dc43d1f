//! The raw door as a C library: `include/moe_lora.h` says what each function does.
//!
//! Every function returns 0, or says by its return value whether the run (1) or the input (2) was at fault; the words for it
//! are [`moe_lora_last_error`]. Nothing here computes: it is `moe_lora_runner::raw` behind C names.
#![allow(unsafe_code, reason = "C callers hand over pointers; what they answer for is in the header")]

mod error;
#[cfg(test)]
mod tests;

use error::{Status, invalid, report};
use moe_lora_core::LayerShape;
use moe_lora_cuda::Gpu;
use moe_lora_runner::raw::{self, AdapterEntry, ForwardArgs, SlotBuffers};
use std::ffi::c_char;
use std::slice;

/// `moe_lora_context`: an opened GPU.
pub struct Context {
    gpu: Gpu,
}

/// `moe_lora_slot_buffers`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct CSlotBuffers {
    gate_up_a: u64,
    gate_up_b: u64,
    down_a: u64,
    down_b: u64,
    rank: u32,
    shared_outer: u32,
}

/// Bytes of `moe_lora_forward_args`.
#[unsafe(no_mangle)]
pub extern "C" fn moe_lora_forward_args_bytes() -> u64 {
    size_of::<ForwardArgs>() as u64
}

/// Why the last call of this thread that failed did so; never null.
#[unsafe(no_mangle)]
pub extern "C" fn moe_lora_last_error() -> *const c_char {
    error::last()
}

/// Opens a GPU.
///
/// # Safety
/// `context` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_open(ordinal: u32, context: *mut *mut Context) -> i32 {
    report(|| {
        if context.is_null() {
            return Err(invalid("context", "a null pointer", "a place for the result"));
        }
        let opened = Box::new(Context { gpu: Gpu::open(ordinal as usize)? });
        // SAFETY: not null, and the caller's promise.
        unsafe { context.write(Box::into_raw(opened)) };
        Ok(())
    })
}

/// Closes what [`moe_lora_open`] opened.
///
/// # Safety
/// `context` is null or came from [`moe_lora_open`], and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_close(context: *mut Context) {
    if !context.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(context) });
    }
}

/// How large the workspace of such a forward has to be.
///
/// # Safety
/// Each pointer is null or what its type says, `context` from [`moe_lora_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_workspace_bytes(
    context: *const Context,
    args: *const ForwardArgs,
    bytes: *mut u64,
) -> i32 {
    report(|| {
        // SAFETY: the caller's promise.
        let (context, args, bytes) = unsafe { (there(context, "context")?, there(args, "args")?, bytes.as_mut()) };
        let bytes = bytes.ok_or_else(|| invalid("bytes", "a null pointer", "a place for the result"))?;
        let shape = shape([args.num_experts, args.top_k, args.hidden_size, args.intermediate_size])?;
        let [tokens, slots, rank] = [args.num_tokens, args.num_slots, args.max_rank].map(|n| n as usize);
        *bytes = raw::workspace_bytes(&context.gpu, &shape, tokens, slots, rank)? as u64;
        Ok(())
    })
}

/// Gives one layer to a stream.
///
/// # Safety
/// Each pointer is null or what its type says, `context` from [`moe_lora_open`]; and what [`raw::forward`] asks for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_forward(context: *const Context, args: *const ForwardArgs) -> i32 {
    report(|| {
        // SAFETY: the caller's promise.
        let (context, args) = unsafe { (there(context, "context")?, there(args, "args")?) };
        // SAFETY: likewise.
        Ok(unsafe { raw::forward(&context.gpu, args) }?)
    })
}

/// The adapter table of 4-D buffers.
///
/// # Safety
/// `buffers` is null or valid; `ranks` and `scales` have `num_slots` values each, `entries` room for
/// `num_slots * num_experts * 3`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_slot_entries(
    buffers: *const CSlotBuffers,
    num_experts: u32,
    hidden_size: u32,
    intermediate_size: u32,
    num_slots: u32,
    ranks: *const u32,
    scales: *const f32,
    entries: *mut AdapterEntry,
) -> i32 {
    report(|| {
        // SAFETY: the caller's promise.
        let buffers = *unsafe { there(buffers, "buffers") }?;
        if num_slots == 0 {
            return Ok(());
        }
        if ranks.is_null() || scales.is_null() || entries.is_null() {
            return Err(invalid("ranks, scales or entries", "a null pointer", "one value for each slot"));
        }
        // SAFETY: not null, and the caller's promise.
        let (ranks, scales) = unsafe {
            (slice::from_raw_parts(ranks, num_slots as usize), slice::from_raw_parts(scales, num_slots as usize))
        };
        let ranks: Vec<_> = ranks.iter().map(|&rank| rank as usize).collect();
        let CSlotBuffers { gate_up_a, gate_up_b, down_a, down_b, rank, shared_outer } = buffers;
        let (rank, shared_outer) = (rank as usize, shared_outer != 0);
        let buffers = SlotBuffers { gate_up_a, gate_up_b, down_a, down_b, rank, shared_outer };
        let table = buffers.entries(&shape([num_experts, 1, hidden_size, intermediate_size])?, &ranks, scales)?;
        // SAFETY: the caller's promise; the table was made just now and cannot overlap.
        unsafe { entries.copy_from_nonoverlapping(table.as_ptr(), table.len()) };
        Ok(())
    })
}

fn shape([num_experts, top_k, hidden_size, intermediate_size]: [u32; 4]) -> Result<LayerShape, Status> {
    Ok(LayerShape::of_rank(num_experts as usize, top_k as usize, hidden_size as usize, intermediate_size as usize)?)
}

/// # Safety
/// `pointer` is null or valid for as long as the result is used.
unsafe fn there<'a, T>(pointer: *const T, name: &str) -> Result<&'a T, Status> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }.ok_or_else(|| invalid(name, "a null pointer", "a pointer"))
}
