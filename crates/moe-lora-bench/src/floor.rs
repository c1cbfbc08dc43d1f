//! The least time that a batch can take on a GPU: its bytes at the card's read bandwidth, or its operations at its peak.

use moe_lora::LayerShape;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// What a card can do at most, measured on it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Bytes read in a second, in units of 10^12.
    pub read_tb_s: f64,
    /// Operations of a bf16 product in a second, in units of 10^12.
    pub peak_tflop_s: f64,
}

/// What a batch touches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Experts.
    pub experts: usize,
    /// (expert, adapter) pairs.
    pub pairs: usize,
    /// Tokens with an adapter.
    pub lora_tokens: usize,
    /// Bytes of every touched weight once, of the inputs and of the outputs.
    pub bytes: u64,
    /// Operations, a multiplication with its addition counted as two.
    pub flops: u64,
}

impl Touched {
    /// Counts a batch of 16-bit numbers. `ranks` are those of the slots; experts of other ranks are not counted.
    #[must_use]
    pub fn count(shape: &LayerShape, topk_ids: &[i32], slots: &[i32], ranks: &[usize]) -> Self {
        let LayerShape { top_k, hidden_size, intermediate_size, .. } = *shape;
        let (hidden, intermediate) = (hidden_size as u64, intermediate_size as u64);
        let here = shape.first_expert as i32..(shape.first_expert + shape.num_experts) as i32;
        // Of fully sharded adapters as many as a mean rank has.
        let hidden_of_lora = hidden / shape.adapter_part.of() as u64;
        let (mut experts, mut pairs) = (HashSet::new(), HashSet::new());
        let mut touched = Self { bytes: 4 * slots.len() as u64 * hidden, ..Self::default() };
        for (ids, &slot) in topk_ids.chunks(top_k).zip(slots) {
            let rank = usize::try_from(slot).ok().and_then(|slot| ranks.get(slot)).copied();
            touched.lora_tokens += usize::from(rank.is_some());
            for &id in ids.iter().filter(|id| here.contains(*id)) {
                touched.flops += 6 * hidden * intermediate;
                if experts.insert(id) {
                    touched.bytes += 6 * hidden * intermediate;
                }
                if let Some(rank) = rank {
                    let size = 6 * rank as u64 * (hidden_of_lora + intermediate);
                    touched.flops += size;
                    if pairs.insert((id, slot)) {
                        touched.bytes += size;
                    }
                }
            }
        }
        Self { experts: experts.len(), pairs: pairs.len(), ..touched }
    }

    /// The least time, in microseconds.
    #[must_use]
    pub fn floor_us(&self, ceilings: &Ceilings) -> f64 {
        (self.bytes as f64 / ceilings.read_tb_s).max(self.flops as f64 / ceilings.peak_tflop_s) * 1e-6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_count_once_and_operations_for_every_pair() {
        let shape = LayerShape::new(4, 2, 16, 8).unwrap();
        let touched = Touched::count(&shape, &[0, 1, 0, 2, 0, 1], &[0, 1, -1], &[8, 16]);
        let (base, rank8) = (6 * 16 * 8, 6 * 8 * 24);
        let expected = Touched {
            experts: 3,
            pairs: 4,
            lora_tokens: 2,
            bytes: 3 * base + 2 * rank8 + 4 * rank8 + 4 * 3 * 16,
            flops: 6 * base + 2 * rank8 + 4 * rank8,
        };
        assert_eq!(touched, expected);
        let ceilings = Ceilings { read_tb_s: 2.0, peak_tflop_s: 1000.0 };
        assert_eq!(touched.floor_us(&ceilings), expected.bytes as f64 / 2e6);
    }
}
