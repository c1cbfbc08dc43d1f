//! What a host can check of a forward before it reaches the GPU: sizes, strides, alignment, overlap, absence.

use super::{ACTIVATION_CLAMPED_SWIGLU, DTYPE_F16, DTYPE_F32, ForwardArgs};
use moe_lora_core::{AdapterPart, InputError, LayerShape};
use moe_lora_kernels::{AdapterEntry, RouteCounts};
use moe_lora_pool::CudaMemory;

/// Bytes of a number of the layer's format.
const HALF: u64 = 2;
/// The largest rank that can be asked for; the kernels' sums of it stay in 32 bits.
pub(in crate::cuda) const MOST_RANK: usize = 1 << 20;

/// Sizes that the kernels can run, whatever they are run on.
pub(in crate::cuda) fn check_sizes(shape: &LayerShape, tokens: usize, max_rank: usize) -> Result<(), InputError> {
    CudaMemory::check_shape(shape)?;
    if tokens.checked_mul(shape.top_k).is_none_or(|pairs| i32::try_from(pairs).is_err()) {
        let found = format!("{tokens} tokens of {} experts", shape.top_k);
        return Err(InputError::new(found, "fewer than 2^31 pairs").in_tensor("num_tokens"));
    }
    if max_rank > MOST_RANK {
        return Err(InputError::new(max_rank.to_string(), format!("at most {MOST_RANK}")).in_tensor("max_rank"));
    }
    Ok(())
}

impl ForwardArgs {
    /// The layer's sizes, if everything about this forward is as it has to be; the workspace's size is not looked at.
    pub(in crate::cuda) fn check(&self) -> Result<LayerShape, InputError> {
        let sizes = [self.num_experts, self.top_k, self.hidden_size, self.intermediate_size].map(|n| n as usize);
        let mut shape = LayerShape::of_rank(sizes[0], sizes[1], sizes[2], sizes[3])?;
        shape.adapter_part = AdapterPart::new(self.adapter_part as usize, self.adapter_parts.max(1) as usize)
            .map_err(|error| error.in_tensor("adapter_part"))?;
        check_sizes(&shape, self.num_tokens as usize, self.max_rank as usize)?;
        self.check_settings()?;
        if self.num_tokens > 0 {
            self.check_strides()?;
            self.check_addresses()?;
        }
        Ok(shape)
    }

    fn check_settings(&self) -> Result<(), InputError> {
        let wrong = |name, found: String, expected: &str| Err(InputError::new(found, expected).in_tensor(name));
        if self.dtype > DTYPE_F16 {
            return wrong("dtype", self.dtype.to_string(), "0 (bf16) or 1 (f16)");
        }
        if self.out_dtype != self.dtype && self.out_dtype != DTYPE_F32 {
            return wrong("out_dtype", self.out_dtype.to_string(), "dtype, or 2 (f32)");
        }
        if self.activation > ACTIVATION_CLAMPED_SWIGLU {
            return wrong("activation", self.activation.to_string(), "0 to 3");
        }
        if self.activation == ACTIVATION_CLAMPED_SWIGLU && !(self.alpha.is_finite() && self.limit >= 0.0) {
            let found = format!("alpha {} and limit {}", self.alpha, self.limit);
            return wrong("activation", found, "a finite alpha and a limit of at least 0");
        }
        if self.weigh_input > 1 {
            return wrong("weigh_input", self.weigh_input.to_string(), "0 or 1");
        }
        if !self.scaling.is_finite() {
            return wrong("scaling", self.scaling.to_string(), "a finite factor");
        }
        if self.num_slots > 0 && self.max_rank == 0 {
            return wrong("max_rank", format!("0 for {} slots", self.num_slots), "at least 1");
        }
        let (first, all) = (self.first_expert, self.all_experts);
        if (first, all) != (0, 0) && first.checked_add(self.num_experts).is_none_or(|end| end > all) {
            let found = format!("{all} with {} from {first} on", self.num_experts);
            return wrong("all_experts", found, "0, or room for these");
        }
        if i32::try_from(self.num_slots).is_err() {
            return wrong("num_slots", self.num_slots.to_string(), "fewer than 2^31");
        }
        Ok(())
    }

    fn check_strides(&self) -> Result<(), InputError> {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        for (name, rows, width, row_stride, expert_stride) in [
            ("gate_up", intermediate, hidden, self.gate_up_row_stride, self.gate_up_expert_stride),
            ("down", hidden, intermediate, self.down_row_stride, self.down_expert_stride),
        ] {
            if row_stride < width || !row_stride.is_multiple_of(8) {
                let expected = format!("a multiple of 8, at least {width}");
                return Err(InputError::new(row_stride.to_string(), expected).in_tensor(format!("{name}_row_stride")));
            }
            let least = u64::from(rows - 1) * u64::from(row_stride) + u64::from(width);
            let fits = expert_stride >= least && expert_stride.checked_mul(2 * u64::from(self.num_experts)).is_some();
            if self.num_experts > 1 && !(fits && expert_stride.is_multiple_of(8)) {
                let expected = format!("a multiple of 8, at least {least}");
                let name = format!("{name}_expert_stride");
                return Err(InputError::new(expert_stride.to_string(), expected).in_tensor(name));
            }
        }
        Ok(())
    }

    fn check_addresses(&self) -> Result<(), InputError> {
        let (tokens, hidden) = (u64::from(self.num_tokens), u64::from(self.hidden_size));
        let (experts, pairs) = (u64::from(self.num_experts), tokens * u64::from(self.top_k));
        let slots = u64::from(self.num_slots);
        let weights = |rows: u32, width: u32, row_stride: u32, expert_stride: u64| {
            let expert = u64::from(rows - 1) * u64::from(row_stride) + u64::from(width);
            HALF * ((experts - 1) * expert_stride + expert)
        };
        let gate_up =
            weights(self.intermediate_size, self.hidden_size, self.gate_up_row_stride, self.gate_up_expert_stride);
        let down = weights(self.hidden_size, self.intermediate_size, self.down_row_stride, self.down_expert_stride);
        let inner = 4 * experts * u64::from(self.intermediate_size);
        let (table, out) = (slots * experts * 3 * size_of::<AdapterEntry>() as u64, tokens * hidden);
        // Name, address, bytes, alignment, whether it must be there.
        let inputs = [
            ("hidden", self.hidden, HALF * tokens * hidden, 16, true),
            ("topk_ids", self.topk_ids, 4 * pairs, 4, true),
            ("topk_weights", self.topk_weights, 4 * pairs, 4, true),
            ("token_slots", self.token_slots, 4 * tokens, 4, slots > 0),
            ("gate", self.gate, gate_up, 16, true),
            ("up", self.up, gate_up, 16, true),
            ("down", self.down, down, 16, true),
            ("gate_bias", self.gate_bias, inner, 4, false),
            ("up_bias", self.up_bias, inner, 4, false),
            ("down_bias", self.down_bias, 4 * experts * hidden, 4, false),
            ("adapters", self.adapters, table, 8, slots > 0),
            ("slot_active", self.slot_active, slots, 1, false),
        ];
        let out_bytes = out * if self.out_dtype == DTYPE_F32 { 4 } else { HALF };
        let outputs = [
            ("out", self.out, out_bytes, 16, true),
            ("counts", self.counts, size_of::<RouteCounts>() as u64, 8, false),
            ("workspace", self.workspace, self.workspace_bytes, 256, true),
        ];
        for (name, address, bytes, alignment, needed) in inputs.into_iter().chain(outputs) {
            if address == 0 && needed {
                return Err(InputError::new("address 0", "an address").in_tensor(name));
            }
            if !address.is_multiple_of(alignment) || address.checked_add(bytes).is_none() {
                let expected = format!("a multiple of {alignment}");
                return Err(InputError::new(format!("address {address:#x}"), expected).in_tensor(name));
            }
        }
        for (i, (name, address, bytes, ..)) in outputs.into_iter().enumerate().filter(|(_, o)| o.1 != 0) {
            for (other, at, size, ..) in inputs.into_iter().chain(outputs[..i].iter().copied()).filter(|o| o.1 != 0) {
                if address < at + size && at < address + bytes {
                    let found = format!("{bytes} bytes at {address:#x} and {size} bytes of {other} at {at:#x}");
                    return Err(InputError::new(found, "no overlap").in_tensor(name));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Five tokens of a layer of 4 experts, 2 a token, H 64 and I 32, with tensors 1 MiB apart from 1 MiB on.
    fn args() -> ForwardArgs {
        let sizes = ForwardArgs {
            num_tokens: 5,
            num_experts: 4,
            top_k: 2,
            hidden_size: 64,
            intermediate_size: 32,
            num_slots: 3,
            max_rank: 16,
            scaling: 1.0,
            ..Default::default()
        };
        let place = |n: u64| n << 20;
        ForwardArgs {
            hidden: place(1),
            topk_ids: place(2),
            topk_weights: place(3),
            token_slots: place(4),
            gate_bias: place(5),
            up_bias: place(6),
            down_bias: place(7),
            adapters: place(8),
            out: place(9),
            counts: place(10),
            workspace: place(11),
            workspace_bytes: 1 << 20,
            ..sizes.with_w13(place(12), false).with_w2(place(13))
        }
    }

    type Change = fn(&mut ForwardArgs);

    #[test]
    fn good_forwards_pass() {
        assert_eq!(args().check().unwrap(), LayerShape::new(4, 2, 64, 32).unwrap());
        let good: [Change; 9] = [
            // One rank's part of a layer.
            |a| a.top_k = 5,
            |a| *a = a.with_w13(1 << 30, true),
            |a| (a.num_tokens, a.hidden, a.out, a.gate_up_row_stride) = (0, 0, 0, 0),
            |a| (a.num_slots, a.max_rank, a.token_slots, a.adapters) = (0, 0, 0, 0),
            |a| (a.gate_bias, a.up_bias, a.down_bias, a.counts) = (0, 0, 0, 0),
            |a| (a.dtype, a.out_dtype) = (1, 2),
            |a| (a.activation, a.alpha, a.limit) = (3, 1.702, 7.0),
            |a| (a.num_experts, a.top_k, a.down_expert_stride) = (1, 1, 0),
            |a| a.out = a.hidden + 5 * 64 * 2,
        ];
        for change in good {
            let mut args = args();
            change(&mut args);
            args.check().unwrap();
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong: [(&str, Change); 30] = [
            ("num_experts: found 0", |a| a.num_experts = 0),
            ("1025 experts", |a| (a.num_experts, a.top_k) = (1025, 2)),
            ("top_k: found 0", |a| a.top_k = 0),
            ("hidden size 63", |a| a.hidden_size = 63),
            ("num_tokens: found", |a| a.num_tokens = 1 << 30),
            ("max_rank: found 0 for 3", |a| a.max_rank = 0),
            ("max_rank: found 4294967295", |a| a.max_rank = u32::MAX),
            ("num_slots: found", |a| a.num_slots = u32::MAX),
            ("dtype: found 2", |a| (a.dtype, a.out_dtype) = (2, 2)),
            ("out_dtype: found 1", |a| a.out_dtype = 1),
            ("activation: found 4", |a| a.activation = 4),
            ("activation: found alpha", |a| (a.activation, a.limit) = (3, f32::NAN)),
            ("weigh_input: found 2", |a| a.weigh_input = 2),
            ("scaling: found inf", |a| a.scaling = f32::INFINITY),
            ("gate_up_row_stride: found 68", |a| a.gate_up_row_stride = 68),
            ("gate_up_row_stride: found 56", |a| a.gate_up_row_stride = 56),
            ("down_row_stride: found 0", |a| a.down_row_stride = 0),
            ("gate_up_expert_stride: found 2040", |a| a.gate_up_expert_stride = 2040),
            ("down_expert_stride: found 18446744073709551608", |a| a.down_expert_stride = u64::MAX - 7),
            ("down_expert_stride: found 2052", |a| a.down_expert_stride = 2052),
            ("hidden: found address 0", |a| a.hidden = 0),
            ("token_slots: found address 0", |a| a.token_slots = 0),
            ("adapters: found address 0x800004", |a| a.adapters += 4),
            ("up: found address 0xc", |a| a.up += 8),
            ("workspace: found address 0xb00080", |a| a.workspace += 128),
            ("out: found address 0xfffffffffffffff0", |a| a.out = u64::MAX - 15),
            ("out: found 640 bytes at 0x100270 and 640 bytes of hidden", |a| a.out = a.hidden + 624),
            ("counts: found 32 bytes", |a| a.counts = a.down + 2 * 4 * 64 * 32 - 8),
            ("workspace: found", |a| a.workspace_bytes += 1),
            ("workspace: found", |a| a.workspace = a.out),
        ];
        for (line, change) in wrong {
            let mut args = args();
            change(&mut args);
            let error = args.check().unwrap_err().to_string();
            assert!(error.starts_with(line) || error.starts_with(&format!("found {line}")), "{line}: {error}");
        }
    }
}
