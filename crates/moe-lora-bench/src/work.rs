//! The least that a batch can cost: every touched weight read once, every multiplication done once.

use moe_lora::reference::random::Case;
use moe_lora::{Matrix, Projection};
use std::collections::HashSet;

/// Bytes and operations of one forward.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Base and LoRA weights of the experts and adapters that the batch touches, read once.
    pub bytes: usize,
    /// Floating-point operations, a multiplication with its addition counted as two.
    pub flops: usize,
}

/// Counts the work of a case for the routing that was drawn.
#[must_use]
pub fn count(case: &Case) -> Work {
    let mut seen = HashSet::new();
    let mut work = Work::default();
    let mut matrix = |m: &Matrix| {
        work.flops += 2 * m.rows() * m.cols();
        if seen.insert(m.storage_key()) {
            work.bytes += m.size_bytes();
        }
    };
    let (table, top_k) = (case.table(), case.spec.shape.top_k);
    for (pair, &id) in case.topk_ids.iter().enumerate() {
        let Ok(e) = usize::try_from(id) else { continue };
        let expert = &case.weights.experts()[e];
        [&expert.gate, &expert.up, &expert.down].into_iter().for_each(&mut matrix);
        for projection in Projection::ALL {
            if let Some(lora) = table.get(case.token_slots[pair / top_k], e, projection) {
                [lora.a(), lora.b()].into_iter().for_each(&mut matrix);
            }
        }
    }
    work
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_lora::LayerShape;
    use moe_lora::reference::random::{AdapterMix, AdapterSpec, CaseSpec, RoutingMix};

    #[test]
    fn touched_weights_count_once_and_operations_for_each_pair() {
        let shape = LayerShape::new(8, 2, 16, 4).unwrap();
        let spec = CaseSpec {
            routing: RoutingMix::AllOnOne,
            adapters: vec![AdapterSpec::rank(2)],
            mix: AdapterMix::RoundRobin,
            ..CaseSpec::new(shape, 5)
        };
        let (base, lora) = (3 * 16 * 4, 3 * 2 * (16 + 4));
        assert_eq!(count(&spec.build(1)), Work { bytes: 4 * 2 * (base + lora), flops: 2 * 10 * (base + lora) });
    }
}
