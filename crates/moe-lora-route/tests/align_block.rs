//! The reference system's block format: its test grid, with the checks its tests lack, on the CPU and the GPU.
#![allow(clippy::unwrap_used)] // Helpers of tests are test code too.

use moe_lora_route::{AlignBlockInput, AlignBlockOutput, RouteError, max_num_tokens_padded, moe_lora_align_block_size};

/// What the outputs hold before the call.
const POISON: i32 = -77_777;

#[derive(Clone)]
struct Case {
    ids: Vec<i32>,
    top_k: usize,
    num_experts: usize,
    block_size: usize,
    max_loras: usize,
    seg_indptr: Vec<i32>,
    req_to_lora: Vec<i32>,
    lora_ids: Vec<i32>,
    adapter_enabled: Vec<i32>,
    expert_map: Option<Vec<i32>>,
}

#[derive(Debug, PartialEq)]
struct Blocks {
    sorted_token_ids: Vec<i32>,
    expert_ids: Vec<i32>,
    num_tokens_post_pad: Vec<i32>,
}

impl Case {
    /// Distinct experts, segments of up to 32 tokens with a random adapter or none, all slots enabled.
    fn new(rng: &mut fastrand::Rng, tokens: usize, top_k: usize, num_experts: usize, max_loras: usize) -> Self {
        let ids = (0..tokens).flat_map(|_| rng.choose_multiple(0..num_experts as i32, top_k)).collect();
        let mut seg_indptr = vec![0];
        let mut req_to_lora = Vec::new();
        while seg_indptr[req_to_lora.len()] < tokens as i32 {
            let end = (seg_indptr[req_to_lora.len()] + rng.i32(1..=32)).min(tokens as i32);
            seg_indptr.push(end);
            req_to_lora.push(rng.i32(-1..max_loras as i32));
        }
        Self {
            ids,
            top_k,
            num_experts,
            block_size: 16,
            max_loras,
            seg_indptr,
            req_to_lora,
            lora_ids: (0..max_loras as i32).collect(),
            adapter_enabled: vec![1; max_loras],
            expert_map: None,
        }
    }

    fn input(&self) -> AlignBlockInput<'_> {
        AlignBlockInput {
            topk_ids: &self.ids,
            top_k: self.top_k,
            num_experts: self.num_experts,
            block_size: self.block_size,
            max_loras: self.max_loras,
            seg_indptr: &self.seg_indptr,
            req_to_lora: &self.req_to_lora,
            lora_ids: &self.lora_ids,
            adapter_enabled: &self.adapter_enabled,
            expert_map: self.expert_map.as_deref(),
        }
    }

    fn entries(&self) -> usize {
        max_num_tokens_padded(self.ids.len(), self.num_experts, self.block_size).unwrap()
    }

    fn run(&self) -> Result<Blocks, RouteError> {
        let entries = self.entries();
        let mut blocks = Blocks {
            sorted_token_ids: vec![POISON; self.max_loras * entries],
            expert_ids: vec![POISON; self.max_loras * entries / self.block_size],
            num_tokens_post_pad: vec![POISON; self.max_loras],
        };
        let result = moe_lora_align_block_size(self.input(), blocks.output());
        #[cfg(feature = "cuda")]
        gpu::same_on_the_gpu(self.input(), entries, result.as_ref().map(|()| &blocks));
        if result.is_err() {
            assert!(blocks.sorted_token_ids.iter().chain(&blocks.expert_ids).all(|&n| n == POISON));
            assert!(blocks.num_tokens_post_pad.iter().all(|&n| n == POISON));
        }
        result.map(|()| blocks)
    }

    /// Runs and compares every entry with the definition, written slot by slot.
    fn check(&self) -> Blocks {
        let blocks = self.run().unwrap();
        let (entries, sentinel) = (self.entries(), self.ids.len() as i32);
        let token_slot = |token: usize| {
            let at = |s: &usize| (self.seg_indptr[*s]..self.seg_indptr[s + 1]).contains(&(token as i32));
            (0..self.req_to_lora.len()).find(at).map_or(-1, |s| self.req_to_lora[s])
        };
        let slots: Vec<i32> = (0..self.ids.len() / self.top_k).map(token_slot).collect();
        let expert = |pair: usize| match self.ids[pair] {
            id if id < 0 || id >= self.num_experts as i32 => -1,
            id => self.expert_map.as_ref().map_or(id, |map| map[id as usize]),
        };
        for slot in 0..self.max_loras {
            let sorted = &blocks.sorted_token_ids[slot * entries..(slot + 1) * entries];
            let expert_ids =
                &blocks.expert_ids[slot * entries / self.block_size..(slot + 1) * entries / self.block_size];
            if !self.lora_ids.contains(&(slot as i32)) || self.adapter_enabled[slot] == 0 {
                assert!(sorted.iter().chain(expert_ids).all(|&n| n == POISON), "slot {slot} stays unwritten");
                assert_eq!(blocks.num_tokens_post_pad[slot], POISON);
                continue;
            }
            let of_slot = (0..self.ids.len()).filter(|&p| slots[p / self.top_k] == slot as i32 && expert(p) >= 0);
            let mut pairs: Vec<(i32, i32)> = of_slot.map(|p| (expert(p), p as i32)).collect();
            pairs.sort_unstable();
            let (mut want_sorted, mut want_experts) = (Vec::new(), Vec::new());
            for share in pairs.chunk_by(|a, b| a.0 == b.0) {
                want_sorted.extend(share.iter().map(|pair| pair.1));
                want_sorted.resize(want_sorted.len().next_multiple_of(self.block_size), sentinel);
                want_experts.resize(want_sorted.len() / self.block_size, share[0].0);
            }
            assert_eq!(blocks.num_tokens_post_pad[slot], want_sorted.len() as i32);
            want_sorted.resize(entries, sentinel);
            want_experts.resize(expert_ids.len(), -1);
            assert_eq!(sorted, want_sorted, "slot {slot}");
            assert_eq!(expert_ids, want_experts, "slot {slot}");
        }
        assert_eq!(self.run().unwrap(), blocks, "a second run gives the same");
        blocks
    }
}

impl Blocks {
    fn output(&mut self) -> AlignBlockOutput<'_> {
        AlignBlockOutput {
            sorted_token_ids: &mut self.sorted_token_ids,
            expert_ids: &mut self.expert_ids,
            num_tokens_post_pad: &mut self.num_tokens_post_pad,
        }
    }
}

#[test]
fn peer_grid() {
    let mut rng = fastrand::Rng::with_seed(1);
    for max_loras in [2, 32] {
        for num_experts in [64, 128, 256, 512] {
            for tokens in [100, 200, 1024, 4096] {
                let drawn = Case::new(&mut rng, tokens, 6, num_experts, max_loras);
                // SGLang draws segments, vLLM an adapter for every token.
                let per_token = Case {
                    seg_indptr: (0..=tokens as i32).collect(),
                    req_to_lora: (0..tokens).map(|_| rng.i32(0..max_loras as i32)).collect(),
                    ..drawn.clone()
                };
                for mut case in [drawn, per_token] {
                    case.check();
                    // What neither draws: -1, ids past the end, duplicates, disabled and unlisted slots, slots out of
                    // order, tokens outside all segments.
                    case.ids.iter_mut().for_each(|id| *id = rng.i32(-1..num_experts as i32 + 3));
                    case.adapter_enabled.iter_mut().for_each(|enabled| *enabled = rng.i32(0..3));
                    rng.shuffle(&mut case.lora_ids);
                    case.lora_ids[1] = -1;
                    case.seg_indptr.pop();
                    case.req_to_lora.pop();
                    case.check();
                }
            }
        }
    }
}

#[test]
fn thresholds_of_the_peers() {
    let mut rng = fastrand::Rng::with_seed(2);
    for num_experts in [1, 31, 32, 33, 64, 65, 992, 993] {
        for pairs in [0, 1, 511, 512, 513, 1023, 1024, 1025, 16_383, 16_384, 16_385] {
            Case::new(&mut rng, pairs, 1, num_experts, 4).check();
        }
    }
    Case::new(&mut rng, 300, 8, 128, 65).check(); // L * E > 8191
}

#[test]
fn one_expert_empty_segments_and_idle_adapters() {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut case = Case::new(&mut rng, 20, 2, 8, 4);
    case.ids.fill(5);
    case.seg_indptr = vec![0, 7, 7, 7, 20, 20];
    case.req_to_lora = vec![2, 1, 0, 2, 3];
    let blocks = case.check();
    assert_eq!(blocks.num_tokens_post_pad, [0, 0, 48, 0]);
    case.seg_indptr = vec![0];
    case.req_to_lora.clear();
    assert_eq!(case.check().num_tokens_post_pad, [0; 4]);
}

#[test]
fn an_expert_map_gives_local_experts() {
    let mut rng = fastrand::Rng::with_seed(4);
    let mut case = Case::new(&mut rng, 150, 4, 16, 3);
    case.expert_map = Some((0..16).map(|e| if (4..8).contains(&e) { 7 - e } else { -1 }).collect());
    let blocks = case.check();
    assert!(blocks.expert_ids.iter().all(|&e| (-1..4).contains(&e)));
    assert!(blocks.expert_ids.contains(&3));
}

#[test]
fn block_sizes_and_i64_ids() {
    let mut rng = fastrand::Rng::with_seed(5);
    for block_size in [1, 2, 7, 16, 64, 128] {
        let case = Case { block_size, ..Case::new(&mut rng, 130, 3, 10, 3) };
        let blocks = case.check();
        let wide: Vec<i64> = case.ids.iter().map(|&id| id.into()).collect();
        let mut again = Blocks {
            sorted_token_ids: vec![POISON; blocks.sorted_token_ids.len()],
            expert_ids: vec![POISON; blocks.expert_ids.len()],
            num_tokens_post_pad: vec![POISON; 3],
        };
        let input = case.input();
        let input = AlignBlockInput {
            topk_ids: &wide,
            top_k: input.top_k,
            num_experts: input.num_experts,
            block_size,
            max_loras: input.max_loras,
            seg_indptr: input.seg_indptr,
            req_to_lora: input.req_to_lora,
            lora_ids: input.lora_ids,
            adapter_enabled: input.adapter_enabled,
            expert_map: None,
        };
        moe_lora_align_block_size(input, again.output()).unwrap();
        assert_eq!(again, blocks);
        #[cfg(feature = "cuda")]
        gpu::same_on_the_gpu(input, case.entries(), Ok(&blocks));
    }
}

#[test]
fn permuted_segments_give_the_same_blocks_up_to_the_permutation() {
    let mut rng = fastrand::Rng::with_seed(6);
    let mut case = Case::new(&mut rng, 96, 4, 8, 2);
    case.seg_indptr = vec![0, 32, 64, 96];
    case.req_to_lora = vec![1, 0, 1];
    // The same tokens in the order of segments 2, 0, 1.
    let moved = Case { ids: [&case.ids[256..], &case.ids[..256]].concat(), req_to_lora: vec![1, 1, 0], ..case.clone() };
    let (before, after) = (case.check(), moved.check());
    assert_eq!(before.expert_ids, after.expert_ids);
    assert_eq!(before.num_tokens_post_pad, after.num_tokens_post_pad);
    let sentinel = case.ids.len() as i32;
    for slot in 0..2 {
        for expert in 0..8 {
            let share = |blocks: &Blocks, back: i32| {
                let of_expert = |(_, e): &(_, &i32)| **e == expert;
                let entries = blocks.sorted_token_ids.chunks(16).zip(&blocks.expert_ids);
                let per_slot = blocks.expert_ids.len() / 2;
                let mut pairs: Vec<i32> = entries
                    .skip(slot * per_slot)
                    .take(per_slot)
                    .filter(of_expert)
                    .flat_map(|(entries, _)| entries.iter().copied())
                    .filter(|&pair| pair != sentinel)
                    .map(|pair| (pair + back) % sentinel)
                    .collect();
                pairs.sort_unstable();
                pairs
            };
            assert_eq!(share(&before, 0), share(&after, 256));
        }
    }
}

#[test]
fn bad_sizes_are_named() {
    let mut rng = fastrand::Rng::with_seed(7);
    let good = Case::new(&mut rng, 40, 2, 8, 3);
    good.check();
    let refused = |name: &str, change: &dyn Fn(&mut Case)| {
        let mut case = good.clone();
        change(&mut case);
        let error = case.run().unwrap_err().to_string();
        assert!(error.starts_with(name), "{name}: {error}");
    };
    refused("topk_ids", &|c| c.ids.truncate(79));
    refused("topk_ids: found expert -2 for token 3 at place 1", &|c| c.ids[7] = -2);
    refused("lora_ids", &|c| c.lora_ids.push(0));
    refused("lora_ids: found 3 at 1", &|c| c.lora_ids[1] = 3);
    refused("lora_ids: found -2 at 0", &|c| c.lora_ids[0] = -2);
    refused("adapter_enabled", &|c| c.adapter_enabled.truncate(2));
    refused("req_to_lora", &|c| c.req_to_lora.push(0));
    refused("req_to_lora: found 3 at 0", &|c| c.req_to_lora[0] = 3);
    refused("req_to_lora", &|c| c.seg_indptr.clear());
    refused("seg_indptr: found 41 at 1", &|c| c.seg_indptr[1] = 41);
    refused("seg_indptr: found -1 at 0", &|c| c.seg_indptr[0] = -1);
    refused("seg_indptr: found 0 at 1", &|c| {
        c.seg_indptr = vec![1, 0];
        c.req_to_lora = vec![0];
    });
    refused("expert_map", &|c| c.expert_map = Some(vec![0; 7]));
    refused("expert_map: found 8 at 2", &|c| c.expert_map = Some(vec![0, 1, 8, -1, -1, -1, -1, -1]));

    let refused_sizes = |name: &str, input: AlignBlockInput<'_>, sizes: [usize; 3]| {
        let [mut sorted, mut experts, mut post_pad] = sizes.map(|n| vec![POISON; n]);
        let output = AlignBlockOutput {
            sorted_token_ids: &mut sorted,
            expert_ids: &mut experts,
            num_tokens_post_pad: &mut post_pad,
        };
        let error = moe_lora_align_block_size(input, output).unwrap_err().to_string();
        assert!(error.starts_with(name), "{name}: {error}");
    };
    let p = good.entries();
    refused_sizes("sorted_token_ids", good.input(), [3 * p - 1, 3 * p / 16, 3]);
    refused_sizes("sorted_token_ids", good.input(), [3 * (p + 1), 3 * p / 16, 3]);
    refused_sizes("sorted_token_ids", good.input(), [3 * 64, 3 * 64 / 16, 3]);
    refused_sizes("sorted_token_ids", good.input(), [0, 0, 3]);
    refused_sizes("expert_ids", good.input(), [3 * p, 3 * p / 16 + 1, 3]);
    refused_sizes("num_tokens_post_pad", good.input(), [3 * p, 3 * p / 16, 2]);
    refused_sizes("block_size", AlignBlockInput { block_size: 0, ..good.input() }, [0, 0, 3]);
    refused_sizes("block_size", AlignBlockInput { block_size: usize::MAX, ..good.input() }, [0, 0, 3]);
    refused_sizes("top_k", AlignBlockInput { top_k: 0, ..good.input() }, [3 * p, 3 * p / 16, 3]);
    refused_sizes("num_experts", AlignBlockInput { num_experts: usize::MAX, ..good.input() }, [3 * p, 3 * p / 16, 3]);
    refused_sizes("num_experts", AlignBlockInput { num_experts: 0, ..good.input() }, [3 * p, 3 * p / 16, 3]);
}

#[test]
fn padded_sizes() {
    assert_eq!(max_num_tokens_padded(80, 8, 16).unwrap(), 208);
    assert_eq!(max_num_tokens_padded(0, 8, 1).unwrap(), 0);
    assert!(max_num_tokens_padded(1, 1, 0).is_err());
    assert!(max_num_tokens_padded(usize::MAX, 1, 2).is_err());
    assert!(max_num_tokens_padded(1, usize::MAX, 16).is_err());
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::{Blocks, Case, POISON};
    use moe_lora_cuda::{DeviceBuffer, Gpu, testing};
    use moe_lora_route::{AlignBlockAddresses, AlignBlockInput, AlignBlockLimits, CudaAlignBlock, RouteError};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn gpu() -> Option<&'static Gpu> {
        static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
        GPU.get_or_init(|| testing::gpu("the block format")).as_ref()
    }

    impl Blocks {
        fn poisoned(max_loras: usize, entries: usize, block_size: usize) -> Self {
            Self {
                sorted_token_ids: vec![POISON; max_loras * entries],
                expert_ids: vec![POISON; max_loras * entries / block_size],
                num_tokens_post_pad: vec![POISON; max_loras],
            }
        }
    }

    /// The GPU gives what the CPU gave, twice with one workspace, or refuses with the same words.
    pub(crate) fn same_on_the_gpu<I: Copy + Into<i64> + bytemuck::NoUninit>(
        input: AlignBlockInput<'_, I>,
        entries: usize,
        want: Result<&Blocks, &RouteError>,
    ) {
        // Sanitizers are slow: `MOE_LORA_CASES` limits the number of cases.
        static CASES: AtomicUsize = AtomicUsize::new(0);
        let most = std::env::var("MOE_LORA_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
        let Some(gpu) = gpu().filter(|_| CASES.fetch_add(1, Ordering::Relaxed) < most) else { return };
        let AlignBlockInput { top_k, num_experts, max_loras, block_size, .. } = input;
        let limits = AlignBlockLimits { tokens: input.topk_ids.len().div_ceil(top_k), top_k, num_experts, max_loras };
        let mut aligner = CudaAlignBlock::new(gpu, limits).unwrap();
        for _ in 0..2 {
            let mut blocks = Blocks::poisoned(max_loras, entries, block_size);
            let result = aligner.align(input, blocks.output());
            match want {
                Ok(want) => assert!(result.is_ok() && &blocks == want, "{result:?}"),
                Err(want) => assert_eq!(&result.unwrap_err(), want),
            }
        }
    }

    /// A million pairs; more slots than a sort's digit has bins; a workspace larger than the batch.
    #[test]
    fn large_batches() {
        let mut rng = fastrand::Rng::with_seed(8);
        for (tokens, top_k, experts, slots) in [(131_072, 8, 256, 8), (4096, 8, 1024, 3), (3000, 2, 4, 3000)] {
            Case::new(&mut rng, tokens, top_k, experts, slots).run().unwrap();
        }
        let Some(gpu) = gpu() else { return };
        let limits = AlignBlockLimits { tokens: 5000, top_k: 6, num_experts: 64, max_loras: 4 };
        let mut aligner = CudaAlignBlock::new(gpu, limits).unwrap();
        for tokens in [5000, 1, 300, 0] {
            let case = Case::new(&mut rng, tokens, 6, 64, 4);
            let want = case.run().unwrap();
            let mut found = Blocks::poisoned(4, case.entries(), 16);
            aligner.align(case.input(), found.output()).unwrap();
            assert_eq!(found, want, "{tokens}");
        }
        let case = Case::new(&mut rng, 5001, 6, 64, 4);
        let mut found = Blocks::poisoned(4, case.entries(), 16);
        assert!(aligner.align(case.input(), found.output()).is_err());
        let error = aligner.align(Case::new(&mut rng, 9, 5, 64, 4).input(), found.output()).unwrap_err();
        assert!(error.to_string().contains("sorted_token_ids") || error.to_string().contains("k, E, L"), "{error}");
    }

    /// Numbers that no check on the host has seen: every one that makes sense is placed, nothing is written elsewhere.
    #[test]
    fn nonsense_on_the_gpu_is_skipped() {
        let Some(gpu) = gpu() else { return };
        let stream = gpu.stream().unwrap();
        let mut rng = fastrand::Rng::with_seed(9);
        let (top_k, num_experts, max_loras, block_size) = (4, 8, 3, 16);
        for round in 0..40 {
            let tokens = [1, 50, 2000][round % 3];
            let mut case = Case { block_size, ..Case::new(&mut rng, tokens, top_k, num_experts, max_loras) };
            let wild = |rng: &mut fastrand::Rng, values: &mut [i32]| {
                for value in values {
                    if rng.u8(0..4) == 0 {
                        *value = [i32::MIN, -2, i32::MAX, 1000, rng.i32(..)][rng.usize(0..5)];
                    }
                }
            };
            wild(&mut rng, &mut case.ids);
            wild(&mut rng, &mut case.req_to_lora);
            wild(&mut rng, &mut case.lora_ids);
            if round % 2 == 1 {
                wild(&mut rng, &mut case.seg_indptr);
                case.expert_map = Some((0..8).map(|e| [e, -1, 8, i32::MAX, i32::MIN][rng.usize(0..5)]).collect());
            }
            // Too small for some of these batches, too.
            let entries = if round % 4 == 0 { 2 * block_size } else { case.entries() };
            let guard = 64;
            let upload = |values: &[i32]| -> DeviceBuffer {
                let buffer = gpu.alloc(size_of_val(values)).unwrap();
                stream.upload(&buffer, 0, values).unwrap();
                buffer
            };
            let sizes = [max_loras * entries, max_loras * entries / block_size, max_loras];
            let outputs = sizes.map(|n| upload(&vec![POISON; n + 2 * guard]));
            let [ids, starts, slots, listed, enabled] =
                [&case.ids, &case.seg_indptr, &case.req_to_lora, &case.lora_ids, &case.adapter_enabled]
                    .map(|v| upload(v));
            let map = case.expert_map.as_ref().map(|map| upload(map));
            let at = |n: usize| outputs[n].address() + 4 * guard as u64;
            let limits = AlignBlockLimits { tokens, top_k, num_experts, max_loras };
            let aligner = CudaAlignBlock::new(gpu, limits).unwrap();
            let batch = AlignBlockAddresses {
                topk_ids: ids.address(),
                ids_are_i64: false,
                seg_indptr: starts.address(),
                req_to_lora: slots.address(),
                lora_ids: listed.address(),
                adapter_enabled: enabled.address(),
                expert_map: map.as_ref().map_or(0, DeviceBuffer::address),
                sorted_token_ids: at(0),
                expert_ids: at(1),
                num_tokens_post_pad: at(2),
                num_tokens: tokens,
                num_segments: case.req_to_lora.len(),
                block_size,
                slot_entries: entries,
            };
            // SAFETY: all arrays are buffers above, of these sizes, and live until the downloads have waited.
            unsafe { aligner.launch(&stream, &batch) }.unwrap();
            let found = [0, 1, 2].map(|n| {
                let mut all = vec![0; sizes[n] + 2 * guard];
                stream.download(&outputs[n], 0, &mut all).unwrap();
                let outside = all[..guard].iter().chain(&all[guard + sizes[n]..]);
                assert!(outside.copied().all(|v| v == POISON), "round {round}: output {n}");
                all[guard..guard + sizes[n]].to_vec()
            });
            let mut seen = vec![false; case.ids.len()];
            for (at, &pair) in found[0].iter().enumerate().filter(|&(_, &v)| v != POISON && v != case.ids.len() as i32)
            {
                assert!(!std::mem::replace(&mut seen[pair as usize], true), "round {round}: pair {pair} twice");
                let expert = case.ids[pair as usize];
                assert!((0..8).contains(&expert), "round {round}");
                let local = case.expert_map.as_ref().map_or(expert, |map| map[expert as usize]);
                assert_eq!(found[1][at / block_size], local, "round {round}");
            }
        }
    }
}
