//! Adapter tables of the 4-D buffers that other systems keep.

use moe_lora_core::{InputError, LayerShape};
use moe_lora_kernels::AdapterEntry;

/// Bytes of a number of the layer's format.
const HALF: u64 = 2;

/// One layer's adapters in four buffers, as the reference system has them: slot, expert, rows, columns.
///
/// Addresses are in GPU memory, 0 for a side that no adapter changes (both buffers of gate_up, or both of down).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotBuffers {
    /// `[L, E, 2R, H]`: gate's rows, from row R on up's.
    pub gate_up_a: u64,
    /// `[L, E, 2I, R]`: gate's rows, then up's.
    pub gate_up_b: u64,
    /// `[L, E, R, I]`.
    pub down_a: u64,
    /// `[L, E, H, R]`.
    pub down_b: u64,
    /// R: a multiple of 8.
    pub rank: usize,
    /// Gate_up A and down B are one for all experts: their `E` is 1.
    pub shared_outer: bool,
}

impl SlotBuffers {
    /// The table `[L, E, 3]` of the slots' ranks and scales; upload it and give its address to a forward.
    ///
    /// A rank is 0, an empty slot, or one that R is the next multiple of 8 of: matrices of another rank would have their
    /// rows elsewhere. What R has beyond the rank must be zero.
    ///
    /// # Errors
    /// If the numbers of ranks and scales differ, a rank does not fit R, a scale is not finite, or an address is no multiple
    /// of 16 or missing.
    pub fn entries(
        &self,
        shape: &LayerShape,
        ranks: &[usize],
        scales: &[f32],
    ) -> Result<Vec<AdapterEntry>, InputError> {
        self.check(ranks, scales)?;
        let (experts, rank) = (shape.num_experts as u64, self.rank as u64);
        let (hidden, intermediate) = (shape.hidden_size as u64, shape.intermediate_size as u64);
        let mut entries = Vec::with_capacity(ranks.len() * shape.num_experts * 3);
        for (slot, (&slot_rank, &scale)) in (0..).zip(ranks.iter().zip(scales)) {
            for expert in 0..experts {
                let own = slot * experts + expert;
                let outer = if self.shared_outer { slot } else { own };
                let at = |buffer: u64, index: u64, rows: u64, width: u64| buffer + HALF * index * rows * width;
                let gate_a = at(self.gate_up_a, outer, 2 * rank, hidden);
                let gate_b = at(self.gate_up_b, own, 2 * intermediate, rank);
                let down_a = at(self.down_a, own, rank, intermediate);
                let down_b = at(self.down_b, outer, hidden, rank);
                for (there, a, b) in [
                    (self.gate_up_a, gate_a, gate_b),
                    (self.gate_up_a, gate_a + HALF * rank * hidden, gate_b + HALF * intermediate * rank),
                    (self.down_a, down_a, down_b),
                ] {
                    entries.push(match there > 0 && slot_rank > 0 {
                        true => AdapterEntry { a, b, rank: slot_rank as i32, scale },
                        false => AdapterEntry::default(),
                    });
                }
            }
        }
        Ok(entries)
    }

    fn check(&self, ranks: &[usize], scales: &[f32]) -> Result<(), InputError> {
        if ranks.len() != scales.len() {
            let found = format!("{} ranks and {} scales", ranks.len(), scales.len());
            return Err(InputError::new(found, "one of each for a slot"));
        }
        if self.rank == 0 || !self.rank.is_multiple_of(8) || self.rank > super::check::MOST_RANK {
            let expected = format!("a multiple of 8, at most {}", super::check::MOST_RANK);
            return Err(InputError::new(self.rank.to_string(), expected).in_tensor("rank"));
        }
        let fits = |rank: usize| rank == 0 || rank.next_multiple_of(8) == self.rank;
        if let Some((slot, rank)) = ranks.iter().enumerate().find(|(_, rank)| **rank > self.rank || !fits(**rank)) {
            let expected = format!("0, or {} to {}: B's rows are {} apart", self.rank - 7, self.rank, self.rank);
            return Err(InputError::new(format!("rank {rank}"), expected).in_tensor(format!("slot {slot}")));
        }
        if let Some((slot, scale)) = scales.iter().enumerate().find(|(_, scale)| !scale.is_finite()) {
            let found = format!("scale {scale}");
            return Err(InputError::new(found, "a finite scale").in_tensor(format!("slot {slot}")));
        }
        for (name, a, b) in [("gate_up", self.gate_up_a, self.gate_up_b), ("down", self.down_a, self.down_b)] {
            if !a.is_multiple_of(16) || !b.is_multiple_of(16) || (a == 0) != (b == 0) {
                let found = format!("A at {a:#x} and B at {b:#x}");
                return Err(InputError::new(found, "both at multiples of 16, or both 0").in_tensor(name));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUFFERS: SlotBuffers = SlotBuffers {
        gate_up_a: 0x1_0000,
        gate_up_b: 0x2_0000,
        down_a: 0x4_0000,
        down_b: 0x8_0000,
        rank: 16,
        shared_outer: false,
    };

    #[test]
    fn every_matrix_is_where_the_buffers_have_it() {
        let shape = LayerShape::new(3, 1, 64, 32).unwrap();
        let entries = BUFFERS.entries(&shape, &[16, 0, 9], &[0.5, 1.0, 2.0]).unwrap();
        assert_eq!(entries.len(), 3 * 3 * 3);
        assert!(entries[9..18].iter().all(|e| *e == AdapterEntry::default()), "an empty slot");
        let (slot, expert) = (2, 1);
        let at =
            |buffer: u64, rows: u64, width: u64, row: u64| buffer + 2 * (((slot * 3 + expert) * rows + row) * width);
        let found = &entries[(2 * 3 + 1) * 3..][..3];
        assert_eq!((found[0].a, found[0].b), (at(0x1_0000, 32, 64, 0), at(0x2_0000, 64, 16, 0)));
        assert_eq!((found[1].a, found[1].b), (at(0x1_0000, 32, 64, 16), at(0x2_0000, 64, 16, 32)));
        assert_eq!((found[2].a, found[2].b), (at(0x4_0000, 16, 32, 0), at(0x8_0000, 64, 16, 0)));
        assert!(found.iter().all(|e| e.rank == 9 && e.scale == 2.0));

        let shared = SlotBuffers { shared_outer: true, ..BUFFERS };
        let entries = shared.entries(&shape, &[16, 16], &[1.0; 2]).unwrap();
        let second = &entries[9..];
        assert!(second.chunks(3).all(|e| e[0].a == 0x1_0000 + 2 * 32 * 64 && e[2].b == 0x8_0000 + 2 * 64 * 16));
        assert_eq!(second[3].b - second[0].b, 2 * 64 * 16);

        let one_sided = SlotBuffers { down_a: 0, down_b: 0, ..BUFFERS };
        let entries = one_sided.entries(&shape, &[16], &[1.0]).unwrap();
        assert!(entries.chunks(3).all(|e| e[0].rank == 16 && e[1].rank == 16 && e[2] == AdapterEntry::default()));
    }

    #[test]
    fn what_the_buffers_cannot_hold_is_named() {
        let shape = LayerShape::new(3, 1, 64, 32).unwrap();
        let line = |buffers: SlotBuffers, ranks: &[usize], scales: &[f32]| {
            buffers.entries(&shape, ranks, scales).unwrap_err().to_string()
        };
        let expected = "slot 1: found rank 8, expected 0, or 9 to 16: B's rows are 16 apart";
        assert_eq!(line(BUFFERS, &[16, 8], &[1.0; 2]), expected);
        assert!(line(BUFFERS, &[17], &[1.0]).contains("rank 17"));
        assert!(line(BUFFERS, &[usize::MAX], &[1.0]).contains("slot 0"));
        assert!(line(BUFFERS, &[16], &[]).contains("0 scales"));
        assert!(line(BUFFERS, &[16], &[f32::NAN]).contains("finite"));
        assert!(line(SlotBuffers { rank: 12, ..BUFFERS }, &[], &[]).contains("multiple of 8"));
        assert!(line(SlotBuffers { down_b: 0, ..BUFFERS }, &[], &[]).starts_with("down: "));
        assert!(line(SlotBuffers { gate_up_a: 8, ..BUFFERS }, &[], &[]).starts_with("gate_up: "));
    }
}
