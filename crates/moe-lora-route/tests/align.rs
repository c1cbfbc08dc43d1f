//! The row map against its definition: every kept pair once, sorted by (expert, slot), stable.
#![allow(clippy::unwrap_used)] // Helpers of tests are test code too.

use moe_lora_core::{LayerShape, RowMap, Segment, Shard};
use moe_lora_route::Aligner;

struct Batch {
    num_experts: usize,
    top_k: usize,
    ids: Vec<i32>,
    weights: Vec<f32>,
    slots: Vec<i32>,
}

impl Batch {
    fn new(rng: &mut fastrand::Rng, tokens: usize, top_k: usize, num_experts: usize, slots: &[i32]) -> Self {
        let pairs = tokens * top_k;
        Self {
            num_experts,
            top_k,
            ids: (0..pairs).map(|_| rng.i32(-1..num_experts as i32)).collect(),
            weights: (0..pairs).map(|_| rng.f32() * 2.0 - 1.0).collect(),
            slots: (0..tokens).map(|_| slots[rng.usize(..slots.len())]).collect(),
        }
    }

    fn align(&self, aligner: &mut Aligner, map: &mut RowMap) {
        aligner.align(&self.ids, &self.weights, &self.slots, has_lora, map).unwrap();
    }

    /// Aligns with a fresh aligner and compares every field with a plain sort.
    fn check(&self) -> RowMap {
        let mut map = RowMap::default();
        self.align(&mut Aligner::new(self.num_experts, self.top_k), &mut map);
        let slot = |pair: usize| Some(self.slots[pair / self.top_k]).filter(|&s| has_lora(s)).unwrap_or(-1);
        let mut rows: Vec<(i32, i32, usize)> =
            (0..self.ids.len()).filter(|&p| self.ids[p] >= 0).map(|p| (self.ids[p], slot(p), p)).collect();
        rows.sort_unstable();

        assert_eq!((map.num_tokens, map.top_k), (self.slots.len(), self.top_k));
        assert_eq!(map.row_pair, rows.iter().map(|r| r.2 as u32).collect::<Vec<_>>());
        assert_eq!(map.row_weight, rows.iter().map(|r| self.weights[r.2]).collect::<Vec<_>>());
        let mut pair_row = vec![-1; self.ids.len()];
        rows.iter().enumerate().for_each(|(row, r)| pair_row[r.2] = row as i32);
        assert_eq!(map.pair_row, pair_row);
        let mut segments = Vec::<Segment>::new();
        for (row, &(expert, slot, _)) in rows.iter().enumerate() {
            match segments.last_mut().filter(|s| s.expert == expert as u32 && s.slot == slot) {
                Some(segment) => segment.num_rows += 1,
                None => {
                    segments.push(Segment { expert: expert as u32, slot, first_row: row as u32, num_rows: 1 });
                }
            }
        }
        assert_eq!(map.segments, segments);
        // What the stages rely on: the segments cover the rows without gap, and experts come once.
        assert_eq!(
            map.segments.iter().flat_map(Segment::rows).collect::<Vec<_>>(),
            (0..rows.len()).collect::<Vec<_>>()
        );
        let experts: Vec<u32> = map.experts().map(|e| e.expert).collect();
        assert!(experts.is_sorted_by(|a, b| a < b));
        map
    }
}

/// Slots that end in 3 are switched off.
fn has_lora(slot: i32) -> bool {
    slot >= 0 && slot % 10 != 3
}

#[test]
fn random_batches_are_sorted_completely_and_stably() {
    let mut rng = fastrand::Rng::with_seed(1);
    let many: Vec<i32> = (-1..300).collect();
    for slots in [&[-1][..], &[4], &[3], &[-1, 0], &[0, 1, 2, 3], &[7, 256, 65_536, 1 << 24, i32::MAX, -1, 5], &many] {
        for tokens in [0, 1, 2, 3, 17, 100, 513] {
            for (top_k, num_experts) in [(1, 1), (2, 1), (1, 31), (2, 32), (4, 33), (6, 64), (8, 128), (8, 1024)] {
                Batch::new(&mut rng, tokens, top_k, num_experts, slots).check();
            }
        }
    }
}

#[test]
fn peer_grid_and_thresholds() {
    let mut rng = fastrand::Rng::with_seed(2);
    for num_slots in [2, 32] {
        let slots: Vec<i32> = (-1..num_slots).collect();
        for num_experts in [64, 128, 256, 512] {
            for tokens in [100, 200, 1024, 4096] {
                Batch::new(&mut rng, tokens, 6, num_experts, &slots).check();
            }
        }
        for num_experts in [1, 31, 32, 33, 992, 993] {
            for pairs in [511, 512, 513, 1023, 1024, 1025, 16_383, 16_384, 16_385] {
                Batch::new(&mut rng, pairs, 1, num_experts, &slots).check();
            }
        }
    }
    let slots: Vec<i32> = (-1..65).collect();
    Batch::new(&mut rng, 2000, 8, 128, &slots).check(); // 66 * 128 groups > 8191
}

#[test]
fn all_pairs_on_one_expert_and_adapter_make_one_segment() {
    let batch = Batch { num_experts: 8, top_k: 2, ids: vec![5; 200], weights: vec![0.5; 200], slots: vec![9; 100] };
    let map = batch.check();
    assert_eq!(map.segments, [Segment { expert: 5, slot: 9, first_row: 0, num_rows: 200 }]);
    assert_eq!(map.row_pair, (0..200).collect::<Vec<u32>>(), "a token's two pairs on one expert both have rows");
}

#[test]
fn switched_off_slots_join_the_base_rows_in_token_order() {
    let batch =
        Batch { num_experts: 1, top_k: 1, ids: vec![0; 5], weights: vec![1.0; 5], slots: vec![3, -1, 2, 13, 3] };
    let map = batch.check();
    assert_eq!(map.row_pair, [0, 1, 3, 4, 2]);
    assert_eq!(map.segments.iter().map(|s| (s.slot, s.num_rows)).collect::<Vec<_>>(), [(-1, 4), (2, 1)]);
}

#[test]
fn what_a_map_and_aligner_held_before_does_not_show() {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut aligner = Aligner::new(16, 4);
    let mut map = RowMap {
        num_tokens: 99,
        top_k: 99,
        row_pair: vec![u32::MAX; 1000],
        row_weight: vec![f32::NAN; 1000],
        pair_row: vec![i32::MIN; 1000],
        segments: vec![Segment { expert: 9, slot: 9, first_row: 9, num_rows: 9 }; 1000],
    };
    for tokens in [50, 200, 0, 3, 120, 1, 200] {
        let batch = Batch::new(&mut rng, tokens, 4, 16, &[-1, 2, 700, i32::MAX - 1]);
        batch.align(&mut aligner, &mut map);
        assert_eq!(map, batch.check());
    }
}

#[test]
fn permuted_tokens_give_the_permuted_map() {
    let mut rng = fastrand::Rng::with_seed(4);
    let batch = Batch::new(&mut rng, 300, 4, 16, &[-1, 0, 1, 2]);
    let mut order: Vec<usize> = (0..300).collect();
    rng.shuffle(&mut order);
    let pairs = || order.iter().flat_map(|&t| t * 4..(t + 1) * 4);
    let permuted = Batch {
        ids: pairs().map(|p| batch.ids[p]).collect(),
        weights: pairs().map(|p| batch.weights[p]).collect(),
        slots: order.iter().map(|&t| batch.slots[t]).collect(),
        ..batch
    };
    let (map, permuted) = (batch.check(), permuted.check());
    assert_eq!(map.segments, permuted.segments);
    for segment in &map.segments {
        let mut before: Vec<usize> = segment.rows().map(|row| map.row_pair[row] as usize).collect();
        let original = |row| order[permuted.row_token(row)] * 4 + permuted.row_pair[row] as usize % 4;
        let mut after: Vec<usize> = segment.rows().map(original).collect();
        before.sort_unstable();
        after.sort_unstable();
        assert_eq!(before, after);
    }
}

#[test]
fn bad_input_is_named_and_changes_nothing() {
    let mut rng = fastrand::Rng::with_seed(5);
    let batch = Batch::new(&mut rng, 10, 2, 4, &[-1, 1]);
    let mut aligner = Aligner::new(4, 2);
    let mut map = RowMap::default();
    batch.align(&mut aligner, &mut map);
    let before = map.clone();
    let mut error = |ids: &[i32], weights: &[f32], slots: &[i32]| {
        let error = aligner.align(ids, weights, slots, |_| true, &mut map).unwrap_err().to_string();
        assert_eq!(map, before);
        error
    };
    assert_eq!(
        error(&[0, 1, 2, 4], &[0.0; 4], &[-1, 0]),
        "topk_ids: found expert 4 for token 1 at place 1, expected -1 to 3"
    );
    assert!(error(&[0, -2], &[0.0; 2], &[0]).contains("expert -2 for token 0 at place 1"));
    assert!(error(&[i32::MIN, i32::MAX], &[0.0; 2], &[0]).contains("token 0 at place 0"));
    assert!(error(&[0, 1], &[0.0; 2], &[-2]).contains("token_slots: found -2 for token 0"));
    assert!(error(&[0, 1, 2], &[0.0; 4], &[0, 0]).starts_with("topk_ids: found 3 numbers"));
    assert!(error(&[0, 1], &[0.0; 3], &[0]).starts_with("topk_weights: found 3 numbers"));
    for (num_experts, top_k, name) in [(0, 1, "num_experts"), (usize::MAX, 1, "num_experts"), (4, 0, "top_k")] {
        let error = Aligner::new(num_experts, top_k).align(&[], &[], &[], |_| true, &mut map).unwrap_err();
        assert!(error.to_string().starts_with(name), "{error}");
    }
    let error = Aligner::new(4, usize::MAX).align(&[0], &[0.0], &[0, 0], |_| true, &mut map).unwrap_err();
    assert!(error.to_string().starts_with("topk_ids"), "{error}");
    assert_eq!(map, before);
}

#[test]
fn a_rank_drops_the_experts_of_others() {
    let mut rng = fastrand::Rng::with_seed(9);
    let whole = LayerShape::new(10, 3, 8, 8).unwrap();
    for shard in Shard::grid(1, 4).unwrap() {
        let share = shard.share(&whole).unwrap();
        let mut batch = Batch::new(&mut rng, 50, 3, 10, &[-1, 0, 1]);
        let (mut found, mut expected) = (RowMap::default(), RowMap::default());
        batch.align(&mut Aligner::of(&share.shape), &mut found);
        let local = |id: &i32| share.experts.clone().position(|e| e as i32 == *id).map_or(-1, |e| e as i32);
        batch.ids = batch.ids.iter().map(local).collect();
        batch.align(&mut Aligner::new(share.experts.len(), 3), &mut expected);
        assert_eq!(found, expected, "{shard:?}");
        batch.ids[7] = 10;
        let error = Aligner::of(&share.shape).align(&batch.ids, &batch.weights, &batch.slots, has_lora, &mut found);
        let expected = "topk_ids: found expert 10 for token 2 at place 1, expected -1 to 9";
        assert_eq!(error.unwrap_err().to_string(), expected);
    }
}
