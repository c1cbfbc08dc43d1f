//! Top-k and align on the GPU against plain sorts on the host.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly and speak")]

mod support;

use fastrand::Rng;
use moe_lora_cuda::{GpuError, testing};
use moe_lora_kernels::{DeviceSegment, Format, Kernel, PrefillGateUpParams, RowTile, TopkParams};
use support::{Aligner, Batch, Sizes, upload};

fn cases() -> usize {
    std::env::var("MOE_LORA_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX)
}

struct Draw {
    sizes: Sizes,
    ids: Vec<i32>,
    weights: Vec<f32>,
    slots: Vec<i32>,
    active: Vec<u8>,
}

impl Draw {
    fn new(rng: &mut Rng, tokens: usize, top_k: usize, experts: usize, slots: usize) -> Self {
        let first_expert = if rng.bool() { 0 } else { rng.usize(0..300) };
        let all_experts = first_expert + experts + if rng.bool() { 0 } else { rng.usize(0..300) };
        let sizes = Sizes { experts, top_k, hidden: 8, intermediate: 8, slots, max_rank: 8, first_expert, all_experts };
        let (skew, wild) = (rng.bool(), rng.bool());
        let expert = |rng: &mut Rng| match rng.u8(0..20) {
            0 => -1,
            1 if wild => [i32::MIN, -2, all_experts as i32, i32::MAX][rng.usize(0..4)],
            2..=10 if skew => first_expert as i32,
            11 => rng.i32(0..all_experts as i32),
            _ => (first_expert + rng.usize(0..experts)) as i32,
        };
        let slot = |rng: &mut Rng| match rng.u8(0..20) {
            0 if wild => [i32::MIN, -2, slots as i32, i32::MAX][rng.usize(0..4)],
            _ => rng.i32(-1..slots as i32),
        };
        Self {
            ids: (0..tokens * top_k).map(|_| expert(rng)).collect(),
            weights: (0..tokens * top_k).map(|_| rng.f32()).collect(),
            slots: (0..tokens).map(|_| slot(rng)).collect(),
            active: (0..slots).map(|_| u8::from(rng.u8(0..4) > 0)).collect(),
            sizes,
        }
    }

    /// Its number on this rank.
    fn expert(&self, pair: usize) -> usize {
        self.ids[pair] as usize - self.sizes.first_expert
    }

    fn slot(&self, pair: usize) -> i32 {
        let slot = self.slots[pair / self.sizes.top_k];
        if slot >= 0 && (slot as usize) < self.sizes.slots && self.active[slot as usize] != 0 { slot } else { -1 }
    }
}

#[test]
fn align_is_a_stable_sort_and_its_lists_cover_every_row() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("align") else { return Ok(()) };
    let stream = gpu.stream()?;
    let mut rng = Rng::with_seed(11);
    // The first ones take every kernel one way or other: sanitizers are slow, `MOE_LORA_CASES` limits the number of cases.
    let mut sizes = vec![(33, 8, 128, 8), (700, 2, 64, 3), (1, 1, 1, 0), (1, 8, 128, 8), (7, 2, 3, 1)];
    sizes.extend([(2048, 8, 64, 8), (4096, 8, 1024, 64), (300, 4, 32, 2000), (131_072, 8, 256, 60)]);
    sizes.extend([(1000, 8, 1024, 1_500_000), (8192, 8, 8, 1022), (8192, 8, 8, 1023), (8192, 8, 256, 60)]);
    sizes.extend([(1500, 8, 1024, 1000), (9, 2, 8, 600), (257, 8, 128, 8), (8191, 2, 8, 8)]);
    sizes.extend((0..40).map(|_| {
        let experts = 1 + rng.usize(0..200);
        (1 + rng.usize(0..600), 1 + rng.usize(0..experts.min(8)), experts, rng.usize(0..20))
    }));
    let mut seen = [0; 3];
    for (tokens, top_k, experts, slots) in sizes.into_iter().take(cases()) {
        let draw = Draw::new(&mut rng, tokens, top_k, experts, slots);
        let name = format!("T {tokens} k {top_k} E {experts} L {slots}");
        let batch = Batch::new(&gpu, &stream, &draw.sizes, tokens)?;
        batch.set(&stream, &vec![0; tokens * 8], &draw.ids, &draw.weights, &draw.slots, &draw.active)?;
        let few = gpu.kernels().function(Kernel::DecodeAlign).is_some() && tokens <= 256 && tokens * top_k <= 2048;
        let cluster = batch.fits_cluster(&gpu, &draw.sizes);
        for (aligner, tile_rows) in [
            (Aligner::Portable, 0),
            (Aligner::Portable, 0),
            (Aligner::Portable, PrefillGateUpParams::TILE_ROWS),
            (Aligner::Cluster, 0),
            (Aligner::Cluster, PrefillGateUpParams::TILE_ROWS),
            (Aligner::Decode, 16),
            (Aligner::Decode, 64),
        ] {
            if (aligner == Aligner::Decode && !few) || (aligner == Aligner::Cluster && !cluster) {
                continue;
            }
            let name = format!("{name}, {aligner:?}");
            batch.poison(&stream)?;
            batch.align(&gpu, &stream, &draw.sizes, true, tile_rows, aligner)?;
            check(&draw, &batch, &stream, tile_rows as usize, aligner == Aligner::Decode, &name)?;
            seen[aligner as usize] += 1;
        }
    }
    let hopper = gpu.kernels().function(Kernel::ClusterAlign).is_some();
    assert!(seen.iter().all(|&cases| cases > 0) || !hopper, "every kernel has its cases: {seen:?}");
    Ok(())
}

fn check(
    draw: &Draw,
    batch: &Batch,
    stream: &moe_lora_cuda::Stream,
    tile_rows: usize,
    decode: bool,
    name: &str,
) -> Result<(), GpuError> {
    let first = draw.sizes.first_expert;
    let (experts, all) = (first as i32..(first + draw.sizes.experts) as i32, -1..draw.sizes.all_experts as i32);
    let mut pairs: Vec<usize> = (0..draw.ids.len()).filter(|&p| experts.contains(&draw.ids[p])).collect();
    pairs.sort_by_key(|&p| (draw.ids[p], draw.slot(p)));
    let counts = batch.counts(stream)?;
    assert_eq!(counts.num_rows as usize, pairs.len(), "{name}");
    let bad = draw.ids.iter().filter(|id| !all.contains(id)).count();
    assert_eq!(counts.bad_experts as usize, bad, "{name}");
    let bad = draw.slots.iter().filter(|&&s| s < -1 || s >= draw.sizes.slots as i32).count();
    assert_eq!(counts.bad_slots as usize, bad, "{name}");

    let row_pair = batch.read::<u32>(stream, batch.at.row_pair, pairs.len())?;
    assert!(row_pair.iter().map(|&p| p as usize).eq(pairs.iter().copied()), "{name}: row_pair");
    let row_weight = batch.read::<f32>(stream, batch.at.row_weight, pairs.len())?;
    assert!(row_weight.iter().zip(&pairs).all(|(&w, &p)| w == draw.weights[p]), "{name}: row_weight");
    let mut pair_row = vec![-1; draw.ids.len()];
    pairs.iter().enumerate().for_each(|(row, &p)| pair_row[p] = row as i32);
    assert_eq!(batch.read::<i32>(stream, batch.at.pair_row, pair_row.len())?, pair_row, "{name}: pair_row");

    let (mut segments, mut tiles, mut chunks) = (Vec::<DeviceSegment>::new(), Vec::<RowTile>::new(), Vec::new());
    let mut heights = vec![0_usize; draw.sizes.experts];
    pairs.iter().for_each(|&p| heights[draw.expert(p)] += 1);
    for height in &mut heights {
        *height = match (tile_rows, *height) {
            (0, _) | (_, 0) => 128,
            (most, rows) => rows.div_ceil(rows.div_ceil(most)).next_multiple_of(8),
        };
    }
    let mut expert_first = 0;
    for (row, &pair) in pairs.iter().enumerate() {
        let (expert, slot, row) = (draw.expert(pair) as u32, draw.slot(pair), row as u32);
        let last = segments.last().copied().map(|s| (s.expert, s.slot));
        let opens = last != Some((expert, slot));
        if last.is_none_or(|(e, _)| e != expert) {
            expert_first = row;
        }
        if opens {
            segments.push(DeviceSegment { expert, slot, first_row: row, end_row: row });
        }
        if ((row - expert_first) as usize).is_multiple_of(heights[expert as usize]) {
            tiles.push(RowTile { expert, first_row: row, num_rows: 0, first_segment: segments.len() as u32 - 1 });
        }
        if slot >= 0 && (opens || (row - expert_first) % if decode { 64.min(tile_rows as u32) } else { 64 } == 0) {
            chunks.push(DeviceSegment { expert, slot, first_row: row, end_row: row });
        }
        segments.last_mut().unwrap().end_row = row + 1;
        tiles.last_mut().unwrap().num_rows += 1;
        if slot >= 0 {
            chunks.last_mut().unwrap().end_row = row + 1;
        }
    }
    // The highest first, but in the order of the experts where sums follow it.
    tiles.sort_by_key(|tile| std::cmp::Reverse(if decode { 0 } else { heights[tile.expert as usize] }));
    let few = if decode { draw.ids.len() as u64 / 16 } else { 0 };
    assert!(segments.len() as u64 <= batch.bounds.segments, "{name}");
    assert!(
        tiles.len() as u64 <= batch.bounds.tiles + if decode { draw.ids.len() as u64 / 16 } else { 0 }
            && chunks.len() as u64 <= batch.bounds.chunks + few,
        "{name}"
    );
    assert_eq!(counts.num_segments as usize, segments.len(), "{name}: segments");
    assert_eq!(counts.num_tiles as usize, tiles.len(), "{name}: tiles");
    assert_eq!(counts.num_chunks as usize, chunks.len(), "{name}: chunks");
    assert_eq!(batch.read::<DeviceSegment>(stream, batch.at.segments, segments.len())?, segments, "{name}");
    assert_eq!(batch.read::<RowTile>(stream, batch.at.tiles, tiles.len())?, tiles, "{name}");
    assert_eq!(batch.read::<DeviceSegment>(stream, batch.at.chunks, chunks.len())?, chunks, "{name}");
    Ok(())
}

/// The choice of one token, by sorting.
fn choose(logits: &[f32], bias: Option<&[f32]>, p: &TopkParams) -> (Vec<i32>, Vec<f64>) {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - most).exp()).sum();
    let score = |x: f32| match p.sigmoid {
        0 => f64::from(x - most).exp() / sum,
        _ => 1.0 / (1.0 + f64::from(-x).exp()),
    };
    let scores: Vec<f64> = logits.iter().map(|&x| score(x)).collect();
    let keys: Vec<f64> = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(s, &b)| s + f64::from(b)).collect(),
        None => logits.iter().map(|&x| x.into()).collect(),
    };
    let mut open: Vec<usize> = (0..logits.len()).collect();
    if p.num_groups > 0 {
        let size = logits.len() / p.num_groups as usize;
        let group = |g: usize| {
            let mut all: Vec<f64> =
                (g * size..(g + 1) * size).map(|e| if bias.is_some() { keys[e] } else { scores[e] }).collect();
            all.sort_by(|a, b| b.total_cmp(a));
            if p.group_top_two == 1 { all[0] + all[1] } else { all[0] }
        };
        let mut groups: Vec<usize> = (0..p.num_groups as usize).collect();
        groups.sort_by(|&a, &b| group(b).total_cmp(&group(a)));
        groups.truncate(p.top_groups as usize);
        open.retain(|e| groups.contains(&(e / size)));
    }
    open.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]));
    open.truncate(p.top_k as usize);
    let total: f64 = open.iter().map(|&e| scores[e]).sum::<f64>() + f64::from(p.renormalize_epsilon);
    let weight = |e: &usize| scores[*e] / if p.renormalize == 1 { total } else { 1.0 } * f64::from(p.scaling);
    (open.iter().map(|&e| e as i32).collect(), open.iter().map(weight).collect())
}

#[test]
fn topk_chooses_as_a_sort_does() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("topk") else { return Ok(()) };
    let stream = gpu.stream()?;
    let mut rng = Rng::with_seed(5);
    for round in 0..60 {
        let groups = if round % 3 == 0 { 0 } else { 1 + rng.usize(0..8) };
        let size = if groups == 0 { 1 + rng.usize(0..1024) } else { 2 + rng.usize(0..60) };
        let experts = size * groups.max(1);
        let top_groups = if groups == 0 { 0 } else { 1 + rng.usize(0..groups) };
        let choices = if groups == 0 { experts } else { top_groups * size };
        let (tokens, top_k) = (1 + rng.usize(0..70), 1 + rng.usize(0..choices.min(10)));
        // Steps of 1/64 make ties; those of a sigmoid or softmax are ties there too.
        let logits: Vec<f32> = (0..tokens * experts).map(|_| rng.i32(-200..200) as f32 / 64.0).collect();
        let bias: Vec<f32> = (0..experts).map(|_| rng.i32(0..4) as f32).collect();
        let (memory, bias_memory) = (upload(&gpu, &stream, &logits)?, upload(&gpu, &stream, &bias)?);
        let (ids, weights) = (gpu.alloc(tokens * top_k * 4)?, gpu.alloc(tokens * top_k * 4)?);
        stream.fill(&ids, 0, ids.bytes(), 0xff)?;
        stream.fill(&weights, 0, weights.bytes(), 0xff)?;
        let biased = rng.bool();
        let params = TopkParams {
            logits: memory.address(),
            selection_bias: if biased { bias_memory.address() } else { 0 },
            topk_ids: ids.address(),
            topk_weights: weights.address(),
            num_tokens: tokens as u32,
            num_experts: experts as u32,
            top_k: top_k as u32,
            sigmoid: u32::from(rng.bool()),
            renormalize: u32::from(rng.bool()),
            num_groups: groups as u32,
            top_groups: top_groups as u32,
            group_top_two: u32::from(rng.bool()),
            renormalize_epsilon: 1e-20,
            scaling: 0.5 + rng.f32(),
        };
        // SAFETY: the buffers above are of the sizes that the fields say and live until the stream is done.
        unsafe { gpu.kernels().launch(&stream, Format::Bf16, &params, params.launch(gpu.info().sm_count)) }?;
        let (mut found_ids, mut found) = (vec![0_i32; tokens * top_k], vec![0_f32; tokens * top_k]);
        stream.download(&ids, 0, &mut found_ids)?;
        stream.download(&weights, 0, &mut found)?;
        for t in 0..tokens {
            let row = &logits[t * experts..][..experts];
            let (want_ids, want) = choose(row, biased.then_some(&bias[..]), &params);
            let pairs = t * top_k..(t + 1) * top_k;
            if !biased && (params.group_top_two == 0 || groups == 0) {
                assert_eq!(found_ids[pairs.clone()], want_ids, "{params:?} token {t}");
                let close = |(f, w): (&f32, &f64)| (f64::from(*f) - w).abs() <= 1e-5 * w.abs() + 1e-30;
                assert!(found[pairs].iter().zip(&want).all(close), "{params:?} token {t}");
            } else {
                // In f32 sums of scores and biases may tie where they do not in f64: compare what was chosen by its weight.
                let sorted = |mut v: Vec<f64>| {
                    v.sort_by(f64::total_cmp);
                    v
                };
                let found = sorted(found[pairs].iter().map(|&f| f.into()).collect());
                let close = |(f, w): (&f64, &f64)| (f - w).abs() <= 1e-4 * w.abs() + 1e-6;
                assert!(found.iter().zip(&sorted(want)).all(close), "{params:?} token {t}");
            }
        }
    }
    Ok(())
}
