//! Align by one cluster of blocks on Hopper: how large it is, and what it keeps in shared memory.

use crate::decode::MOST_SHARED;
use crate::params::sealed;
use crate::{AlignParams, Format, Kernel, KernelParams, Launch};

/// Pairs of a block, as long as there are fewer blocks than that.
const PAIRS_OF_A_BLOCK: u32 = 256;
/// Pairs from which more blocks are worth it than every GPU with clusters surely runs together.
const PAIRS_OF_LARGE_CLUSTERS: u32 = 8192;
/// Blocks up to there.
const BLOCKS_OF_EVERY_GPU: u32 = 8;
/// Pairs of a block from which its barriers cost less than what more threads save.
const PAIRS_OF_MANY_THREADS: u32 = 4096;
/// `1 << kPairBits`.
const MOST_PAIRS: u32 = 1 << 17;
/// Slots, and one for none, are sorted in one go.
const MOST_SLOT_BINS: u32 = 1024;
/// `sizeof(Shared)` of `cluster_route.cu`.
const FIXED_BYTES: u32 = 960;

/// [`AlignParams`] for batches that fit into the shared memory of a cluster: the same lists, in less time. `order`, `table` and
/// `barrier` are not used.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ClusterAlignParams(pub AlignParams);

impl sealed::Sealed for ClusterAlignParams {}

impl KernelParams for ClusterAlignParams {
    fn kernel(_: Format) -> Kernel {
        Kernel::ClusterAlign
    }
}

impl ClusterAlignParams {
    /// `kMostBlocks`.
    pub const MOST_BLOCKS: u32 = 16;

    /// One cluster of up to `most_blocks` blocks, as many as the GPU runs together; none if the batch is too large for it.
    #[must_use]
    pub fn launch(&self, most_blocks: u32) -> Option<Launch> {
        let AlignParams { num_tokens, top_k, num_experts, num_slots, token_slots, .. } = self.0;
        let slot_bins = if token_slots == 0 { 0 } else { num_slots.checked_add(1)? };
        let pairs = num_tokens.checked_mul(top_k).filter(|pairs| *pairs <= MOST_PAIRS)?;
        if slot_bins > MOST_SLOT_BINS || num_experts > crate::launch::MOST_EXPERTS {
            return None;
        }
        let most =
            if pairs < PAIRS_OF_LARGE_CLUSTERS { BLOCKS_OF_EVERY_GPU } else { Self::MOST_BLOCKS }.min(most_blocks);
        let blocks = pairs.div_ceil(PAIRS_OF_A_BLOCK).next_power_of_two().min(most).max(2);
        let tokens_each = num_tokens.div_ceil(blocks);
        let pairs_each = tokens_each * top_k;
        let most_threads = if pairs_each < PAIRS_OF_MANY_THREADS { 512 } else { 1024 };
        let threads = pairs_each.next_multiple_of(32).clamp(128, most_threads);
        let shared = shared_bytes(tokens_each, top_k, num_experts, slot_bins, blocks, threads);
        let launch = Launch { cluster: blocks, ..Launch::new([blocks, 1, 1], threads, shared) };
        (shared <= MOST_SHARED).then_some(launch)
    }
}

/// The parts of `Places` in `cluster_route.cu`, in order.
const fn shared_bytes(tokens: u32, top_k: u32, num_experts: u32, slot_bins: u32, blocks: u32, threads: u32) -> u32 {
    let (pairs, expert_bins) = (tokens * top_k, num_experts + 2);
    let (slot_words, expert_words) = (slot_bins.next_multiple_of(4), expert_bins.next_multiple_of(4));
    let most_words = if slot_words > expert_words { slot_words } else { expert_words };
    let most_bins = if slot_bins > expert_bins { slot_bins } else { expert_bins };
    let rows_and_tokens = 8 * (pairs + tokens).next_multiple_of(2);
    let counts = 4 * blocks * (slot_words + expert_words);
    let starts = 4 * (most_words + most_words + 1) + 12 * num_experts;
    let opened = 12 * ((pairs + threads) / 32);
    let counters = (2 * (threads / 32) * most_bins).next_multiple_of(4);
    FIXED_BYTES + rows_and_tokens + counts + 4 * pairs + starts + opened + counters
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(num_tokens: u32, top_k: u32, num_experts: u32, num_slots: u32, most_blocks: u32) -> Option<Launch> {
        let params = AlignParams { num_tokens, top_k, num_experts, num_slots, token_slots: 1, ..Default::default() };
        ClusterAlignParams(params).launch(most_blocks)
    }

    #[test]
    fn clusters_grow_with_the_batch_until_it_does_not_fit() {
        let sizes = [1, 64, 65, 256, 1024, 8192];
        let launches = sizes.map(|tokens| launch(tokens, 8, 128, 8, 16).unwrap());
        assert_eq!(launches.map(|l| l.cluster), [2, 2, 4, 8, 16, 16]);
        assert_eq!(launches.map(|l| l.block), [128, 256, 160, 256, 512, 1024]);
        let small = sizes.map(|tokens| launch(tokens, 8, 128, 8, 8).unwrap());
        assert_eq!(small.map(|l| l.cluster), [2, 2, 4, 8, 8, 8]);
        for l in launches.iter().chain(&small) {
            assert!(l.grid == [l.cluster, 1, 1] && !l.cooperative && l.shared_bytes <= MOST_SHARED);
        }
        assert!(launch(8192, 8, 256, 1000, 8).is_some() && launch(1024, 8, 1024, 1023, 16).is_some());
        assert!(launch(16_384, 8, 256, 60, 16).is_some() && launch(16_385, 8, 128, 8, 16).is_none());
        assert!(launch(16_384, 8, 256, 60, 8).is_none() && launch(u32::MAX, 8, 128, 8, 16).is_none());
        assert!(launch(4, 8, 128, 1024, 16).is_none() && launch(4, 8, 128, u32::MAX, 16).is_none());
        assert!(launch(4, 8, 1025, 8, 16).is_none());
    }
}
