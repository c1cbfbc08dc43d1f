//! Align: one stable pass from the chosen experts to rows sorted by expert and adapter.

use crate::RouteError;
use crate::error::check_len;
use moe_lora_core::{InputError, LayerShape, RowMap, Segment};
use std::mem::swap;

/// The most experts a layer can have, as in [`LayerShape`](moe_lora_core::LayerShape).
pub(super) const MOST_EXPERTS: usize = 1 << 20;

/// Sorts the pairs of a batch by (expert, adapter slot), stable in token order.
///
/// Tokens are sorted by slot first (a radix sort over the digits in which the slots differ), then pairs by expert (a
/// counting sort). The cost is O(T k + E), however many slots exist and however large their numbers are. An aligner
/// keeps its scratch, and the [`RowMap`] its capacity: a batch no larger than one before it allocates nothing.
#[derive(Debug, Clone)]
pub struct Aligner {
    num_experts: usize,
    /// The id of the first.
    first_expert: usize,
    /// Ids are below.
    all_experts: usize,
    top_k: usize,
    /// The slot whose adapter a token uses in this layer, `[T]`.
    slots: Vec<i32>,
    /// Tokens by slot, `[T]`, and where the sort moves them next.
    tokens: Vec<u32>,
    moved: Vec<u32>,
    /// The next free row of every expert, `[E]`.
    next_row: Vec<u32>,
    /// `[rows]`.
    row_slot: Vec<i32>,
}

impl Aligner {
    /// An aligner for layers of `num_experts` experts of which a token uses `top_k`.
    #[must_use]
    pub fn new(num_experts: usize, top_k: usize) -> Self {
        let [slots, row_slot] = [const { Vec::new() }; 2];
        let [tokens, moved, next_row] = [const { Vec::new() }; 3];
        let (first_expert, all_experts) = (0, num_experts);
        Self { num_experts, first_expert, all_experts, top_k, slots, tokens, moved, next_row, row_slot }
    }

    /// An aligner for layers of a shape. The experts of a rank's part become 0 to E - 1; those of other ranks are dropped.
    #[must_use]
    pub fn of(shape: &LayerShape) -> Self {
        let LayerShape { num_experts, top_k, first_expert, .. } = *shape;
        Self { first_expert, all_experts: shape.all_experts(), ..Self::new(num_experts, top_k) }
    }

    /// Fills `map` for one batch of T tokens.
    ///
    /// - `topk_ids` `[T, k]`: experts; -1 is dropped, as are other ranks' experts. A token may name an expert twice; both pairs get a row.
    /// - `topk_weights` `[T, k]`: carried to the rows as they are.
    /// - `token_slots` `[T]`: adapter slots, any number from 0 on, or -1 for the base model.
    /// - `has_lora(slot)`: whether the slot's adapter changes this layer. Tokens for which it does not are base tokens.
    ///
    /// # Errors
    /// If lengths do not fit, an id is neither -1 nor any rank's expert (token and place are named), a slot is below -1, or the
    /// batch has 2³¹ pairs or more. `map` is then as it was.
    pub fn align(
        &mut self,
        topk_ids: &[i32],
        topk_weights: &[f32],
        token_slots: &[i32],
        has_lora: impl Fn(i32) -> bool,
        map: &mut RowMap,
    ) -> Result<(), RouteError> {
        let (num_tokens, top_k) = (token_slots.len(), self.top_k);
        self.check_sizes(topk_ids.len(), topk_weights.len(), num_tokens)?;
        self.read_slots(token_slots, has_lora)?;
        let num_rows = self.count(topk_ids)?;
        self.sort_tokens();

        map.num_tokens = num_tokens;
        map.top_k = top_k;
        let num_pairs = topk_ids.len();
        resize(&mut map.row_pair, num_rows, num_pairs);
        resize(&mut map.row_weight, num_rows, num_pairs);
        resize(&mut map.pair_row, num_pairs, num_pairs);
        resize(&mut self.row_slot, num_rows, num_pairs);
        for &token in &self.tokens {
            let token = token as usize;
            for pair in token * top_k..(token + 1) * top_k {
                // -1 is no index, whatever the width of usize, as there are far fewer experts.
                let Some(next_row) = self.next_row.get_mut((topk_ids[pair] as usize).wrapping_sub(self.first_expert))
                else {
                    map.pair_row[pair] = -1;
                    continue;
                };
                let row = *next_row as usize;
                *next_row += 1;
                map.row_pair[row] = pair as u32;
                map.row_weight[row] = topk_weights[pair];
                map.pair_row[pair] = row as i32;
                self.row_slot[row] = self.slots[token];
            }
        }

        map.segments.clear();
        map.segments.reserve(num_pairs);
        let mut first_row = 0;
        for (expert, &end) in self.next_row.iter().enumerate() {
            for rows in self.row_slot[first_row as usize..end as usize].chunk_by(|a, b| a == b) {
                let num_rows = rows.len() as u32;
                map.segments.push(Segment { expert: expert as u32, slot: rows[0], first_row, num_rows });
                first_row += num_rows;
            }
        }
        Ok(())
    }

    fn check_sizes(&self, ids: usize, weights: usize, num_tokens: usize) -> Result<(), RouteError> {
        if self.num_experts == 0 || self.all_experts > MOST_EXPERTS {
            let found = self.all_experts.to_string();
            return Err(InputError::new(found, format!("1 to {MOST_EXPERTS}")).in_tensor("num_experts").into());
        }
        if self.top_k == 0 {
            return Err(InputError::new("0", "at least 1").in_tensor("top_k").into());
        }
        let pairs = num_tokens.checked_mul(self.top_k).filter(|&n| i32::try_from(n).is_ok());
        check_len("topk_ids", ids, pairs, "[T, k]")?;
        check_len("topk_weights", weights, pairs, "[T, k]")
    }

    fn read_slots(&mut self, token_slots: &[i32], has_lora: impl Fn(i32) -> bool) -> Result<(), RouteError> {
        self.slots.clear();
        for (token, &slot) in token_slots.iter().enumerate() {
            if slot < -1 {
                let found = format!("{slot} for token {token}");
                return Err(InputError::new(found, "a slot, or -1 for the base model").in_tensor("token_slots").into());
            }
            self.slots.push(if slot >= 0 && has_lora(slot) { slot } else { -1 });
        }
        Ok(())
    }

    /// Sets `next_row` to every expert's first row and returns the number of rows.
    fn count(&mut self, topk_ids: &[i32]) -> Result<usize, RouteError> {
        self.next_row.clear();
        self.next_row.resize(self.num_experts, 0);
        for (pair, &id) in topk_ids.iter().enumerate() {
            match self.next_row.get_mut((id as usize).wrapping_sub(self.first_expert)) {
                Some(count) => *count += 1,
                None if id == -1 || usize::try_from(id).is_ok_and(|id| id < self.all_experts) => {}
                None => {
                    let (token, place) = (pair / self.top_k, pair % self.top_k);
                    let found = format!("expert {id} for token {token} at place {place}");
                    let want = format!("-1 to {}", self.all_experts - 1);
                    return Err(InputError::new(found, want).in_tensor("topk_ids").into());
                }
            }
        }
        let mut num_rows = 0;
        for first in &mut self.next_row {
            let count = std::mem::replace(first, num_rows);
            num_rows += count;
        }
        Ok(num_rows as usize)
    }

    /// Sets `tokens` to all tokens by slot, stable: a radix sort from the lowest digit on.
    fn sort_tokens(&mut self) {
        let Self { slots, tokens, moved, .. } = self;
        tokens.clear();
        tokens.extend(0..slots.len() as u32);
        resize(moved, tokens.len(), tokens.len());
        if slots.is_sorted() {
            return;
        }
        // -1 becomes the smallest key, 0.
        let key = |slot: i32| (slot as u32).wrapping_add(1);
        let differing = slots.windows(2).fold(0, |bits, pair| bits | (key(pair[0]) ^ key(pair[1])));
        for shift in [0, 8, 16, 24] {
            let digit = |slot: i32| (key(slot) >> shift) as usize & 0xff;
            if (differing >> shift) & 0xff == 0 {
                continue;
            }
            let mut next = [0_u32; 256];
            slots.iter().for_each(|&slot| next[digit(slot)] += 1);
            let mut before = 0;
            for first in &mut next {
                before += std::mem::replace(first, before);
            }
            for &token in &*tokens {
                let place = &mut next[digit(slots[token as usize])];
                moved[*place as usize] = token;
                *place += 1;
            }
            swap(tokens, moved);
        }
    }
}

/// Sets a length, with room for `most` numbers, so that no batch of the same T has to allocate. What is kept of the old
/// numbers will be overwritten.
fn resize<T: Copy + Default>(numbers: &mut Vec<T>, len: usize, most: usize) {
    numbers.reserve(most.saturating_sub(numbers.len()));
    numbers.resize(len, T::default());
}
