//! The header against the Rust side, and the functions as C calls them.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests may fail loudly and speak")]

use super::*;
use moe_lora_runner::raw::RouteCounts;
use std::ffi::CStr;
use std::fmt::Write as _;
use std::process::Command;
use std::ptr;

const HEADER: &str = include_str!("../include/moe_lora.h");

/// C that compiles only if `$name` in the header is the Rust struct: every field (the pattern forgets none), its offset and
/// size, and the size of all.
macro_rules! same {
    ($code:ident, $type:ty, $name:literal, { $($field:ident),* $(,)? }) => {{
        let all = <$type>::default();
        #[allow(clippy::unneeded_field_pattern, reason = "a new field must be an error here")]
        let same = |value: &$type| {
            use $type as This;
            let This { $($field: _),* } = value;
        };
        same(&all);
        $(
            let (field, offset) = (stringify!($field), std::mem::offset_of!($type, $field));
            let bytes = size_of_val(&all.$field);
            writeln!($code, "_Static_assert(offsetof({0}, {field}) == {offset} && sizeof((({0} *)0)->{field}) == {bytes}, \"{field}\");", $name).unwrap();
        )*
        writeln!($code, "_Static_assert(sizeof({}) == {}, \"{}\");", $name, size_of::<$type>(), $name).unwrap();
    }};
}

#[test]
fn the_header_has_the_same_structs_and_functions() {
    let mut code = String::from("#include \"moe_lora.h\"\n#include <stddef.h>\n");
    same!(code, ForwardArgs, "moe_lora_forward_args", {
        stream, hidden, topk_ids, topk_weights, token_slots, gate, up, down, gate_bias, up_bias, down_bias, adapters,
        slot_active, out, counts, workspace, workspace_bytes, gate_up_expert_stride, down_expert_stride,
        gate_up_row_stride, down_row_stride, num_tokens, num_experts, top_k, hidden_size, intermediate_size, num_slots,
        max_rank, dtype, out_dtype, activation, weigh_input, alpha, limit, scaling, first_expert,
        all_experts, adapter_part, adapter_parts,
    });
    same!(code, AdapterEntry, "moe_lora_adapter_entry", { a, b, rank, scale });
    same!(code, RouteCounts, "moe_lora_counts", {
        num_rows, num_segments, num_tiles, num_chunks, bad_experts, bad_slots, reserved,
    });
    same!(code, CSlotBuffers, "moe_lora_slot_buffers", { gate_up_a, gate_up_b, down_a, down_b, rank, shared_outer });
    for (name, value) in [
        ("MOE_LORA_BF16", raw::DTYPE_BF16),
        ("MOE_LORA_F16", raw::DTYPE_F16),
        ("MOE_LORA_F32", raw::DTYPE_F32),
        ("MOE_LORA_SILU", raw::ACTIVATION_SILU),
        ("MOE_LORA_GELU", raw::ACTIVATION_GELU),
        ("MOE_LORA_GELU_TANH", raw::ACTIVATION_GELU_TANH),
        ("MOE_LORA_CLAMPED_SWIGLU", raw::ACTIVATION_CLAMPED_SWIGLU),
    ] {
        writeln!(code, "_Static_assert({name} == {value}, \"{name}\");").unwrap();
    }
    let mut functions = 0;
    for line in include_str!("lib.rs").lines().filter(|l| l.contains("extern \"C\" fn ")) {
        let name = line.split("fn ").nth(1).unwrap().split('(').next().unwrap();
        writeln!(code, "void *use_{name}(void) {{ return (void *){name}; }}").unwrap();
        functions += 1;
    }
    let returns = ["int32_t moe_lora_", "uint64_t moe_lora_", "void moe_lora_", "const char *moe_lora_"];
    assert_eq!(functions, HEADER.lines().filter(|l| returns.iter().any(|r| l.starts_with(r))).count());

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("moe_lora.h"), HEADER).unwrap();
    std::fs::write(folder.path().join("same.c"), &code).unwrap();
    let mut compiler = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    compiler.args(["-std=c11", "-Wall", "-Werror", "-fsyntax-only", "same.c"]).current_dir(&folder);
    match compiler.output() {
        Ok(done) => assert!(done.status.success(), "{}\n{code}", String::from_utf8_lossy(&done.stderr)),
        Err(why) => eprintln!("SKIPPED the C compiler's view of the header: {why}"),
    }
}

fn last() -> String {
    // SAFETY: the pointer is good until the next failure of this thread.
    unsafe { CStr::from_ptr(moe_lora_last_error()) }.to_str().unwrap().to_owned()
}

#[test]
fn bad_arguments_are_numbers_and_words() {
    assert_eq!(last(), "");
    // SAFETY: null is allowed everywhere, and everything else is valid.
    unsafe {
        assert_eq!(moe_lora_open(0, ptr::null_mut()), 2);
        assert_eq!(last(), "context: found a null pointer, expected a place for the result");
        assert_eq!(moe_lora_forward(ptr::null(), &raw const *Box::new(ForwardArgs::default())), 2);
        assert_eq!(last(), "context: found a null pointer, expected a pointer");
        let mut context = ptr::null_mut();
        assert_eq!(moe_lora_open(u32::MAX, &raw mut context), 1);
        assert!(context.is_null() && !last().is_empty());
        moe_lora_close(context);
    }
}

#[test]
fn a_table_is_filled_in_place() {
    let buffers = CSlotBuffers { gate_up_a: 1 << 12, gate_up_b: 1 << 16, rank: 8, ..Default::default() };
    let mut entries = [AdapterEntry { rank: -1, ..Default::default() }; 2 * 3 + 1];
    let fill = |buffers: &CSlotBuffers, entries: &mut [AdapterEntry]| {
        let (ranks, scales) = ([8_u32], [0.5_f32]);
        // SAFETY: one slot, two experts, and room for them.
        unsafe { moe_lora_slot_entries(buffers, 2, 64, 32, 1, ranks.as_ptr(), scales.as_ptr(), entries.as_mut_ptr()) }
    };
    assert_eq!(fill(&buffers, &mut entries), 0);
    assert_eq!(entries.map(|e| e.rank), [8, 8, 0, 8, 8, 0, -1]);
    assert_eq!(fill(&CSlotBuffers { rank: 12, ..buffers }, &mut entries), 2);
    assert!(last().contains("multiple of 8"), "{}", last());
}
