//! Which bytes of an address space are free: ranges of any length, joined again when their neighbours are free too.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Every range starts and ends at a multiple of this many bytes: what bulk copies on the GPU ask for.
pub(crate) const GRAIN: usize = 256;

/// The free ranges ("holes") of an address space. All lengths are multiples of [`GRAIN`].
#[derive(Debug, Default)]
pub(crate) struct Extents {
    /// Length by start.
    holes: BTreeMap<usize, usize>,
    /// The same by length and start.
    by_length: BTreeSet<(usize, usize)>,
    free: usize,
}

impl Extents {
    /// Free bytes.
    pub(crate) const fn free(&self) -> usize {
        self.free
    }

    /// Free bytes that pieces of `piece` bytes cannot use, as every piece has to lie in one hole.
    pub(crate) fn unusable(&self, piece: usize) -> usize {
        self.holes.values().map(|length| length % piece.max(GRAIN)).sum()
    }

    /// Adds a free range, which must overlap no other.
    pub(crate) fn give(&mut self, range: Range<usize>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        self.free += end - start;
        if let Some((&before, &length)) = self.holes.range(..start).next_back()
            && before + length == start
        {
            self.remove(before, length);
            start = before;
        }
        if let Some(&length) = self.holes.get(&end) {
            self.remove(end, length);
            end += length;
        }
        self.insert(start, end - start);
    }

    /// Takes a range that is free as a whole.
    pub(crate) fn claim(&mut self, range: Range<usize>) {
        let Some((&start, &length)) = self.holes.range(..=range.start).next_back() else { return };
        if range.is_empty() || start + length < range.end {
            return;
        }
        self.remove(start, length);
        self.insert(start, range.start - start);
        self.insert(range.end, start + length - range.end);
        self.free -= range.len();
    }

    /// Takes a place for every piece, or for none. Pieces lie one behind the other as far as holes allow: in the smallest
    /// hole that holds all, else in the largest ones. Where this order leaves a large piece without a hole, the largest
    /// pieces choose first.
    pub(crate) fn take(&mut self, pieces: &[usize]) -> Option<Vec<usize>> {
        let in_order: Vec<usize> = (0..pieces.len()).collect();
        self.take_in(pieces, &in_order).or_else(|| {
            let mut largest_first = in_order;
            largest_first.sort_by_key(|&n| std::cmp::Reverse(pieces[n]));
            self.take_in(pieces, &largest_first)
        })
    }

    fn take_in(&mut self, pieces: &[usize], order: &[usize]) -> Option<Vec<usize>> {
        let mut left: usize = pieces.iter().sum();
        if left > self.free {
            return None;
        }
        let mut places = vec![0; pieces.len()];
        let mut taken = Vec::new();
        let mut order = order.iter().copied().peekable();
        while left > 0 {
            let whole = self.by_length.range((left, 0)..).next();
            let (length, start) = *whole.or_else(|| self.by_length.last())?;
            let mut end = start;
            while let Some(n) = order.next_if(|&n| end + pieces[n] <= start + length) {
                places[n] = end;
                end += pieces[n];
            }
            if end == start {
                taken.into_iter().for_each(|range| self.give(range));
                return None;
            }
            self.claim(start..end);
            taken.push(start..end);
            left -= end - start;
        }
        Some(places)
    }

    fn insert(&mut self, start: usize, length: usize) {
        if length > 0 {
            self.holes.insert(start, length);
            self.by_length.insert((length, start));
        }
    }

    fn remove(&mut self, start: usize, length: usize) {
        self.holes.remove(&start);
        self.by_length.remove(&(length, start));
    }
}

/// The ranges that pieces at `places` cover, neighbours joined.
pub(crate) fn runs(pieces: &[usize], places: &[usize]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (&piece, &place) in pieces.iter().zip(places) {
        match runs.last_mut() {
            Some(last) if last.end == place => last.end += piece,
            _ => runs.push(place..place + piece),
        }
    }
    runs.retain(|run| !run.is_empty());
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(bytes: usize) -> Extents {
        let mut extents = Extents::default();
        extents.give(0..bytes);
        extents
    }

    #[test]
    fn pieces_lie_together_where_one_hole_holds_them() {
        let mut extents = space(4096);
        assert_eq!(extents.take(&[512, 256]), Some(vec![0, 512]));
        assert_eq!(extents.take(&[1024]), Some(vec![768]));
        extents.give(0..768);
        assert_eq!(extents.take(&[256, 256]), Some(vec![0, 256]), "the smallest hole that holds both");
        assert_eq!(extents.free(), 4096 - 1024 - 512);
        assert_eq!(extents.take(&[4096]), None);
        assert_eq!(extents.take(&[]), Some(vec![]));
    }

    #[test]
    fn a_request_is_spread_over_holes_and_fails_as_a_whole() {
        let mut extents = space(2048);
        extents.claim(512..768);
        extents.claim(1024..1792); // holes: 512 at 0, 256 at 768, 256 at 1792
        assert_eq!(extents.take(&[512, 512]), None);
        assert_eq!(extents.free(), 1024);
        assert_eq!(extents.take(&[256, 512, 256]), Some(vec![1792, 0, 768]), "the large piece chose first");
        assert_eq!(extents.free(), 0);
        assert_eq!(runs(&[256, 512, 256], &[768, 0, 512]), [768..1024, 0..768]);
    }

    /// Every byte is free or in exactly one tenant, whatever happens.
    #[test]
    fn bytes_are_never_lost_and_never_given_twice() {
        let mut rng = fastrand::Rng::with_seed(1);
        let bytes = 256 * 1024;
        let mut extents = space(bytes);
        let mut tenants: Vec<Vec<Range<usize>>> = Vec::new();
        for _ in 0..20_000 {
            if rng.bool() {
                let pieces: Vec<_> = (0..rng.usize(1..20)).map(|_| GRAIN * rng.usize(1..16)).collect();
                let before = extents.free();
                match extents.take(&pieces) {
                    Some(places) => tenants.push(runs(&pieces, &places)),
                    None => assert_eq!(extents.free(), before),
                }
            } else if !tenants.is_empty() {
                tenants.swap_remove(rng.usize(..tenants.len())).into_iter().for_each(|run| extents.give(run));
            }
            let held: usize = tenants.iter().flatten().map(Range::len).sum();
            assert_eq!(held + extents.free(), bytes);
        }
        let mut all: Vec<_> = tenants.into_iter().flatten().collect();
        all.extend(extents.holes.iter().map(|(&start, &length)| start..start + length));
        all.sort_by_key(|range| range.start);
        assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start), "no gap, no overlap");
        assert_eq!((all[0].start, all[all.len() - 1].end), (0, bytes));
    }

    /// Days of mixed ranks: adapters of ranks 8, 16 and 64 on some or all of 4 layers of 16 experts come and go at random,
    /// with the memory nearly full all the time.
    #[test]
    fn a_hundred_thousand_operations_leave_less_than_a_twentieth_unusable() {
        let adapter = |rng: &mut fastrand::Rng| -> Vec<usize> {
            let rank = [8, 16, 64][rng.usize(..3)];
            let bytes = |width: usize| (2 * rank * width).next_multiple_of(GRAIN);
            let expert = [2048, 768, 2048, 768, 768, 2048].map(bytes);
            (0..16 * rng.usize(1..=4)).flat_map(|_| expert).collect()
        };
        let bytes = 256 << 20;
        let mut rng = fastrand::Rng::with_seed(3);
        let mut extents = space(bytes);
        let mut tenants: Vec<Vec<Range<usize>>> = Vec::new();
        let (mut asked, mut pieces, mut refused) = (0, 0, 0);
        for _ in 0..100_000 {
            let wanted = adapter(&mut rng);
            let sum: usize = wanted.iter().sum();
            // The policy makes room in bytes; whoever is least recently used may lie anywhere.
            while extents.free() < sum {
                tenants.swap_remove(rng.usize(..tenants.len())).into_iter().for_each(|run| extents.give(run));
            }
            (asked, pieces) = (asked + sum, pieces + wanted.len());
            match extents.take(&wanted) {
                Some(places) => tenants.push(runs(&wanted, &places)),
                None => refused += 1,
            }
        }
        let unusable = extents.unusable(asked / pieces);
        assert!(unusable * 20 < bytes, "{unusable} of {bytes} bytes");
        assert!(refused * 20 < 100_000, "{refused} requests found bytes and no holes");
    }
}
