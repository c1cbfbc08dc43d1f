//! What the stages derive from a batch.

use super::project::even_parts;
use super::workspace::{BAND_ROWS, Band, NO_ROW};
use moe_lora_core::{AdapterTable, InputError, LayerWeights, RowMap};

/// The arguments that all stages share.
#[derive(Clone, Copy)]
pub(super) struct Batch<'a> {
    pub(super) weights: &'a LayerWeights,
    pub(super) rows: &'a RowMap,
    pub(super) adapters: &'a AdapterTable<'a>,
}

impl Batch<'_> {
    /// The rows of every expert in parts of at most [`BAND_ROWS`].
    pub(super) fn bands(&self, bands: &mut Vec<Band>) {
        bands.clear();
        for expert in self.rows.experts() {
            let first = expert.first_row as usize;
            let parts = even_parts(expert.num_rows as usize, BAND_ROWS);
            bands.extend(parts.map(|r| Band { expert: expert.expert as usize, rows: first + r.start..first + r.end }));
        }
    }

    /// Whether a row has an adapter.
    pub(super) fn any_adapter(&self) -> bool {
        self.rows.segments.iter().any(|s| self.adapters.layer(s.slot).is_some())
    }

    /// The adapter slot of every token.
    pub(super) fn token_slots(&self, slots: &mut [i32]) -> Result<(), InputError> {
        slots[..self.rows.num_tokens].fill(NO_ROW);
        for segment in &self.rows.segments {
            for row in segment.rows() {
                let token = self.rows.row_token(row);
                if slots[token] != NO_ROW && slots[token] != segment.slot {
                    let found = format!("adapter slots {} and {}", slots[token], segment.slot);
                    return Err(InputError::new(found, "one adapter a token").in_tensor(format!("token {token}")));
                }
                slots[token] = segment.slot;
            }
        }
        Ok(())
    }
}
