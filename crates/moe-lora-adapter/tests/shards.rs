//! Adapters for the ranks of a parallel group: each rank's own numbers, dense if it is alone, and every byte read once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Array, File, PROJ, Pair, Pairs, Sizes, flat, fused, loaded, per_expert, random, stacked};
use moe_lora_adapter::PeftAdapter;
use moe_lora_core::{AdapterWeights, Matrix, Projection, Shard};
use serde_json::json;

const SIZES: Sizes = Sizes { e: 5, h: 12, i: 16 };

fn cut(array: &Array, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Array {
    Array::from_fn([rows.len(), cols.len()], |[r, c]| array.get([rows.start + r, cols.start + c]))
}

/// A rank's pairs, cut by hand.
fn part(pairs: &Pairs, shard: &Shard) -> Pairs {
    let share = shard.share(&SIZES.model(1).layer).unwrap();
    let mine = pairs.iter().filter(|((_, e, _), _)| share.experts.contains(e));
    let part = share.shape.adapter_part;
    let cut_pair = |p, Pair { a, b, scale }: &Pair| {
        let (rank, scale) = (a.shape[0], *scale);
        if p == Projection::Down {
            let (a, rows) = (cut(a, 0..rank, share.intermediate.clone()), part.hidden(b.shape[0]));
            return Pair { a, b: cut(b, rows, 0..rank), scale };
        }
        let ranks = part.ranks(rank);
        // Parts of a rank below their number hold a row that is not used.
        let ranks = if ranks.is_empty() { rank - 1..rank } else { ranks };
        Pair { a: cut(a, ranks, 0..a.shape[1]), b: cut(b, share.intermediate.clone(), 0..rank), scale }
    };
    mine.map(|(&(n, e, p), pair)| ((n, e - share.experts.start, p), cut_pair(p, pair))).collect()
}

fn numbers(weights: &AdapterWeights) -> Pairs {
    let dense = |m: &Matrix| Array { shape: m.shape().to_vec(), values: m.to_vec() };
    let mut pairs = Pairs::new();
    for (n, layer) in weights.layers() {
        for (e, expert) in layer.experts().iter().enumerate() {
            for (p, lora) in Projection::ALL.into_iter().filter_map(|p| Some((p, expert.get(p)?))) {
                pairs.insert((*n, e, p), Pair { a: dense(lora.a()), b: dense(lora.b()), scale: lora.scale() });
            }
        }
    }
    pairs
}

/// The same adapter in every layout.
fn files(pairs: &Pairs) -> Vec<File> {
    let mut all = vec![File::new(3, 6.0), File::new(3, 6.0), File::new(3, 6.0)];
    per_expert(&mut all[0], pairs, "mlp", PROJ);
    let fused = fused(pairs, false);
    for layer in 0..2 {
        let of = |n: usize| (0..SIZES.e).map(|e| &fused[&(layer, e)][n]).collect::<Vec<_>>();
        stacked(&mut all[1], layer, "mlp.experts.gate_up_proj", &of(0), false);
        stacked(&mut all[1], layer, "mlp.experts.down_proj", &of(1), false);
        flat(&mut all[2], layer, "mlp.experts.base_layer", &of(0), false);
        flat(&mut all[2], layer, "mlp.experts", &of(1), false);
    }
    all[2].config.insert("target_parameters".into(), json!(["experts.gate_up_proj", "experts.down_proj"]));
    all
}

#[test]
fn every_rank_gets_its_own_numbers_from_every_layout() {
    let pairs = random(&mut fastrand::Rng::with_seed(1), SIZES, 2, 3, 2.0, true);
    let model = SIZES.model(2);
    for file in files(&pairs) {
        let adapter = file.open().unwrap();
        for (tp, ep) in [(1, 1), (2, 1), (1, 2), (2, 2), (4, 5), (16, 1)] {
            for full in [false, true] {
                let mut grid = Shard::grid(tp, ep).unwrap();
                if full && tp <= SIZES.h {
                    grid.iter_mut().for_each(|shard| *shard = shard.with_fully_sharded_adapters());
                }
                let together = adapter.resolve_shards(&model, &grid).unwrap();
                for (shard, rank) in grid.iter().zip(&together) {
                    let want = part(&pairs, shard);
                    assert_eq!(numbers(rank), want, "{shard:?}");
                    let alone = adapter.resolve_shards(&model, &[*shard]).unwrap().remove(0);
                    // `loaded` also asserts that every matrix is dense.
                    assert_eq!(loaded(&alone), want, "{shard:?} alone");
                    assert_eq!(alone.size_bytes(), rank.size_bytes(), "what they share stays shared");
                }
            }
        }
    }
}

#[test]
fn a_grid_that_does_not_fit_is_refused() {
    let pairs = random(&mut fastrand::Rng::with_seed(2), SIZES, 2, 3, 2.0, true);
    let adapter = files(&pairs)[0].open().unwrap();
    let error = adapter.resolve_shards(&SIZES.model(2), &Shard::grid(1, 6).unwrap()).unwrap_err();
    assert!(error.to_string().contains("found 5 experts, expected at least one for each of 6 ranks"), "{error}");
}

/// What this thread read so far, as the kernel counts it.
#[cfg(target_os = "linux")]
fn bytes_read() -> u64 {
    let io = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    io.lines().find_map(|l| l.strip_prefix("rchar: ")).unwrap().trim().parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn a_host_reads_every_byte_once_for_all_its_ranks() {
    let sizes = Sizes { e: 8, h: 256, i: 128 };
    let pairs = random(&mut fastrand::Rng::with_seed(3), sizes, 2, 8, 2.0, false);
    let mut file = File::new(8, 16.0);
    per_expert(&mut file, &pairs, "mlp", PROJ);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), file.config_bytes()).unwrap();
    let bytes = file.bytes();
    std::fs::write(folder.path().join("adapter_model.safetensors"), &bytes).unwrap();

    let before = bytes_read();
    let adapter = PeftAdapter::open(folder.path()).unwrap();
    let ranks = adapter.resolve_shards(&sizes.model(2), &Shard::grid(4, 2).unwrap()).unwrap();
    let read = bytes_read() - before;
    assert_eq!(ranks.len(), 8);
    assert!(read >= bytes.len() as u64 && read < bytes.len() as u64 + 4096, "{read} of {}", bytes.len());
}
