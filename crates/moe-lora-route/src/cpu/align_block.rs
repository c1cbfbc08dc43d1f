//! The block format of the reference system, for engines whose kernels read it.

use super::align::MOST_EXPERTS;
use crate::RouteError;
use crate::error::check_len;
use moe_lora_core::InputError;

/// What [`moe_lora_align_block_size`] reads: a batch of M tokens in S segments (requests), of which each uses one
/// adapter.
#[derive(Debug, Clone, Copy)]
pub struct AlignBlockInput<'a, I = i32> {
    /// Experts of every token, `[M, k]`, `i32` or `i64`. -1 and numbers from `num_experts` on are dropped.
    pub topk_ids: &'a [I],
    /// Experts a token uses, k.
    pub top_k: usize,
    /// Experts, E.
    pub num_experts: usize,
    /// Entries of a block.
    pub block_size: usize,
    /// Adapter slots, L.
    pub max_loras: usize,
    /// Segment `s` has the tokens `seg_indptr[s]..seg_indptr[s + 1]`, `[S + 1]`. Tokens outside all segments have no
    /// adapter.
    pub seg_indptr: &'a [i32],
    /// The slot of each segment, or -1 for none, `[S]`.
    pub req_to_lora: &'a [i32],
    /// The slots to work on, in any order, -1 for none, `[L]`.
    pub lora_ids: &'a [i32],
    /// A slot whose entry is 0 is skipped, `[L]` or longer.
    pub adapter_enabled: &'a [i32],
    /// Global to local expert, -1 for experts of other ranks, `[E]`.
    pub expert_map: Option<&'a [i32]>,
}

/// What [`moe_lora_align_block_size`] writes, with `p` entries a slot, a multiple of the block size: usually
/// [`max_num_tokens_padded`].
#[derive(Debug)]
pub struct AlignBlockOutput<'a> {
    /// Pairs `t * k + j`, or the sentinel `M * k`, `[L * p]`.
    pub sorted_token_ids: &'a mut [i32],
    /// The (local) expert of each block, -1 past the end, `[L * p / block_size]`.
    pub expert_ids: &'a mut [i32],
    /// Entries of a slot, padding included, `[L]`.
    pub num_tokens_post_pad: &'a mut [i32],
}

/// The entries a slot needs at most in the reference system: `num_pairs + num_experts * (block_size - 1)`, rounded up
/// to whole blocks.
///
/// # Errors
/// If `block_size` is 0 or the result is 2³¹ or more.
pub fn max_num_tokens_padded(num_pairs: usize, num_experts: usize, block_size: usize) -> Result<usize, RouteError> {
    let padding = block_size.checked_sub(1).and_then(|most| num_experts.checked_mul(most));
    padding
        .and_then(|padding| padding.checked_add(num_pairs)?.checked_next_multiple_of(block_size))
        .filter(|&entries| i32::try_from(entries).is_ok())
        .ok_or_else(|| {
            let found = format!("{num_pairs} pairs, {num_experts} experts, blocks of {block_size}");
            InputError::new(found, "a block size from 1 on, fewer than 2^31 entries").in_tensor("block_size").into()
        })
}

/// Sorts the pairs of each enabled slot by expert, every expert's share padded to whole blocks.
///
/// The outputs are those of SGLang's function of this name (0.5.10), except that the order within an expert is always
/// that of the pairs. Slot `l` owns the `l`-th part of each output; parts of slots that are disabled or not in
/// `lora_ids` stay as they are. Within a part: experts ascending, experts without pairs take no block, padding is the
/// sentinel `M * k`, and the block experts past the end are -1.
///
/// # Errors
/// If a length or size does not fit, `p` cannot hold the worst case, `seg_indptr` is not ascending within `0..=M`, a
/// slot is outside `-1..L`, an expert is below -1 or maps outside `-1..E`. Nothing is written then.
pub fn moe_lora_align_block_size<I: Copy + Into<i64>>(
    input: AlignBlockInput<'_, I>,
    output: AlignBlockOutput<'_>,
) -> Result<(), RouteError> {
    let entries = check(&input, &output)?;
    let AlignBlockInput { top_k, num_experts, block_size, max_loras, .. } = input;
    let num_pairs = input.topk_ids.len();
    let mut enabled = vec![false; max_loras];
    for &slot in input.lora_ids.iter().filter(|&&slot| slot >= 0) {
        enabled[slot as usize] = input.adapter_enabled[slot as usize] != 0;
    }
    let mut slot_segments = vec![Vec::new(); max_loras];
    for (segment, &slot) in input.seg_indptr.windows(2).zip(input.req_to_lora) {
        if slot >= 0 {
            slot_segments[slot as usize].push(segment[0] as usize * top_k..segment[1] as usize * top_k);
        }
    }
    let blocks = entries / block_size;
    let mut next = vec![0_usize; num_experts];
    for slot in (0..max_loras).filter(|&slot| enabled[slot]) {
        let sorted = &mut output.sorted_token_ids[slot * entries..][..entries];
        let expert_ids = &mut output.expert_ids[slot * blocks..][..blocks];
        let pairs = || slot_segments[slot].iter().cloned().flatten();
        next.fill(0);
        for expert in pairs().filter_map(|pair| input.expert(pair)) {
            next[expert] += 1;
        }
        expert_ids.fill(-1);
        let mut end = 0;
        for (expert, next) in next.iter_mut().enumerate() {
            let first = end;
            end += std::mem::replace(next, first).next_multiple_of(block_size);
            expert_ids[first / block_size..end / block_size].fill(expert as i32);
        }
        output.num_tokens_post_pad[slot] = end as i32;
        sorted.fill(num_pairs as i32);
        for pair in pairs() {
            if let Some(expert) = input.expert(pair) {
                sorted[next[expert]] = pair as i32;
                next[expert] += 1;
            }
        }
    }
    Ok(())
}

impl<I: Copy + Into<i64>> AlignBlockInput<'_, I> {
    /// The local expert of a pair, if this rank has it.
    fn expert(&self, pair: usize) -> Option<usize> {
        let expert = usize::try_from(self.topk_ids[pair].into()).ok().filter(|&expert| expert < self.num_experts)?;
        match self.expert_map {
            None => Some(expert),
            Some(map) => usize::try_from(map[expert]).ok(),
        }
    }
}

/// Checks everything and returns the entries of a slot, p.
pub(crate) fn check<I: Copy + Into<i64>>(
    input: &AlignBlockInput<'_, I>,
    output: &AlignBlockOutput<'_>,
) -> Result<usize, RouteError> {
    let wrong =
        |name: &str, found: String, expected: String| Err(InputError::new(found, expected).in_tensor(name).into());
    let &AlignBlockInput { top_k, num_experts, block_size, max_loras, .. } = input;
    const MOST: usize = i32::MAX as usize;
    for (name, size, most) in
        [("top_k", top_k, MOST), ("num_experts", num_experts, MOST_EXPERTS), ("block_size", block_size, MOST)]
    {
        if size == 0 || size > most {
            return wrong(name, size.to_string(), format!("1 to {most}"));
        }
    }
    let num_pairs = input.topk_ids.len();
    if !num_pairs.is_multiple_of(top_k) || i32::try_from(num_pairs).is_err() {
        return wrong("topk_ids", format!("{num_pairs} numbers"), format!("[M, {top_k}], fewer than 2^31"));
    }
    check_len("lora_ids", input.lora_ids.len(), Some(max_loras), "[L]")?;
    if input.adapter_enabled.len() < max_loras {
        return wrong("adapter_enabled", format!("{} numbers", input.adapter_enabled.len()), format!("[{max_loras}]"));
    }
    check_len(
        "req_to_lora",
        input.req_to_lora.len(),
        input.seg_indptr.len().checked_sub(1),
        "[S], with seg_indptr [S + 1]",
    )?;
    let num_tokens = num_pairs / top_k;
    let mut before = 0;
    for (at, &start) in input.seg_indptr.iter().enumerate() {
        if start < before || start as usize > num_tokens {
            return wrong("seg_indptr", format!("{start} at {at}"), format!("{before} to {num_tokens}"));
        }
        before = start;
    }
    for (name, slots) in [("lora_ids", input.lora_ids), ("req_to_lora", input.req_to_lora)] {
        if let Some((at, slot)) = outside(slots, max_loras) {
            return wrong(name, format!("{slot} at {at}"), format!("-1, or a slot below {max_loras}"));
        }
    }
    if let Some(map) = input.expert_map {
        check_len("expert_map", map.len(), Some(num_experts), "[E]")?;
        if let Some((at, expert)) = outside(map, num_experts) {
            return wrong("expert_map", format!("{expert} at {at}"), format!("-1, or an expert below {num_experts}"));
        }
    }
    if let Some((pair, id)) = input.topk_ids.iter().map(|&id| id.into()).enumerate().find(|&(_, id)| id < -1) {
        let found = format!("expert {id} for token {} at place {}", pair / top_k, pair % top_k);
        return wrong("topk_ids", found, "experts from -1 on".to_owned());
    }

    check_len("num_tokens_post_pad", output.num_tokens_post_pad.len(), Some(max_loras), "[L]")?;
    let total = output.sorted_token_ids.len();
    let entries = total.checked_div(max_loras).unwrap_or(0);
    // Every touched expert wastes less than a block.
    let most =
        num_pairs.min(num_experts).checked_mul(block_size - 1).and_then(|padding| padding.checked_add(num_pairs));
    let most = most.map(|most| most / block_size * block_size);
    let fits = most.is_some_and(|most| most <= entries) && i32::try_from(entries).is_ok();
    if entries * max_loras != total || (max_loras > 0 && !(fits && entries.is_multiple_of(block_size))) {
        let want =
            format!("[{max_loras} * p] with p in blocks of {block_size}, at least {}", most.unwrap_or(usize::MAX));
        return wrong("sorted_token_ids", format!("{total} numbers"), want);
    }
    check_len("expert_ids", output.expert_ids.len(), Some(entries / block_size * max_loras), "[L * p / block_size]")?;
    Ok(entries)
}

/// The first number outside `-1..end`, and its place.
fn outside(numbers: &[i32], end: usize) -> Option<(usize, i32)> {
    numbers.iter().copied().enumerate().find(|&(_, n)| n < -1 || (n >= 0 && n as usize >= end))
}
