//! `moe-lora demo`: the main job on files that it writes itself.

mod adapters;

use crate::args::{Demo, DeviceChoice, NamedAdapter};
use crate::{devices, load, table};
use adapters::{DemoAdapter, write_adapter};
use anyhow::{Context, Result, ensure};
use half::bf16;
use moe_lora::adapter::OpenOptions;
use moe_lora::model::Family;
use moe_lora::model::synthetic::{TinyModel, write_checkpoint};
use moe_lora::reference::metrics::{relative_error, worst_row_error};
use moe_lora::reference::random::signed;
use moe_lora::reference::{self, LayerInput};
use moe_lora::{
    AdapterPool, AdapterTable, Checkpoint, DType, Element, FusedMoEWithLoRA, InputError, LayerShape, PoolConfig,
    Routing, Shard, TokenAdapters,
};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Bound of the whole layer in bf16, `docs/numerics.md`.
const BOUND: f64 = 3e-3;
const TOKENS: usize = 24;

/// What the demo's adapters are: names, ranks, and what each is there to show.
const ADAPTERS: [DemoAdapter; 4] = [
    DemoAdapter { name: "math", rank: 16, use_rslora: false, only_down: false },
    DemoAdapter { name: "code", rank: 5, use_rslora: true, only_down: false },
    DemoAdapter { name: "poems", rank: 64, use_rslora: false, only_down: false },
    DemoAdapter { name: "terse", rank: 8, use_rslora: false, only_down: true },
];

pub(crate) fn run(args: &Demo) -> Result<()> {
    let folder = Folder::new(args.dir.as_deref())?;
    let (model_dir, named) = write_files(&folder.path)?;

    let model = Checkpoint::open(&model_dir)?;
    let n = model.first_moe_layer();
    let shape = model.shape();
    let device = devices::choose(DeviceChoice::Auto, &shape.layer)?;
    println!(
        "model    {} with {} experts, top {}, {} x {}, {} on {device}",
        model.family(),
        shape.layer.num_experts,
        shape.layer.top_k,
        shape.layer.hidden_size,
        shape.layer.intermediate_size,
        shape.dtype,
    );
    let weights = load::adapters(&named, shape, &OpenOptions::default(), &[Shard::WHOLE])?.remove(0);
    let pool = AdapterPool::new(&device, shape, PoolConfig { bytes: 64 << 20, ..Default::default() })?;
    let mut ids = Vec::new();
    for (named, weights) in named.iter().zip(&weights) {
        ids.push(pool.load(&named.name, weights.clone())?);
    }
    let layer = FusedMoEWithLoRA::new(n, model.layer_weights(n)?, &device, &pool)?.with_router(model.router(n)?)?;

    // Token t uses the base model or one of the adapters in turn, all in one batch.
    let chosen: Vec<Option<usize>> = (0..TOKENS).map(|t| (t % (ids.len() + 1)).checked_sub(1)).collect();
    let tokens: Vec<_> = chosen.iter().map(|a| a.map(|a| ids[a])).collect();
    let tokens = TokenAdapters::from_ids(&tokens);
    let mut rng = rng();
    let hidden: Vec<bf16> =
        (0..TOKENS * shape.layer.hidden_size).map(|_| bf16::from_f32(signed(&mut rng, 1.0))).collect();
    let mut out = vec![bf16::NAN; hidden.len()];
    layer.forward(&hidden, Routing::Router, &tokens, &mut out)?;
    let start = Instant::now();
    layer.forward(&hidden, Routing::Router, &tokens, &mut out)?;
    println!(
        "batch    {TOKENS} tokens, each with its own adapter or none, {:.2} ms\n",
        start.elapsed().as_secs_f64() * 1e3
    );

    let topk = layer.route(&hidden, Routing::Router)?;
    let slots: Vec<i32> = chosen.iter().map(|a| a.map_or(-1, |a| a as i32)).collect();
    let truth = |slots: &[i32]| {
        reference::forward(&LayerInput {
            hidden: &hidden.iter().map(|x| x.to_f64()).collect::<Vec<_>>(),
            weights: layer.weights(),
            topk_ids: &topk.topk_ids,
            topk_weights: &topk.topk_weights,
            token_slots: slots,
            adapters: &AdapterTable::new(weights.iter().map(|w| w.layers().get(&n)).collect()),
        })
    };
    let (mixed, base) = (truth(&slots)?, truth(&[-1; TOKENS])?);
    let out: Vec<f64> = out.iter().map(|x| f64::from(Element::to_f32(*x))).collect();
    report(&pool, &chosen, &out, &mixed, &base, shape.layer.hidden_size)?;
    if args.dir.is_some() {
        println!("\nkept in  {}", folder.path.display());
    }
    Ok(())
}

/// Prints a line for the base model and each adapter, and fails if the output is not the truth.
fn report(
    pool: &AdapterPool,
    chosen: &[Option<usize>],
    out: &[f64],
    truth: &[f64],
    base: &[f64],
    width: usize,
) -> Result<()> {
    let loaded = pool.snapshot().adapters;
    let mut rows = Vec::new();
    for who in std::iter::once(None).chain((0..ADAPTERS.len()).map(Some)) {
        let mine: Vec<usize> = (0..chosen.len()).filter(|&t| chosen[t] == who).collect();
        let pick = |all: &[f64]| mine.iter().flat_map(|&t| all[t * width..][..width].to_vec()).collect::<Vec<_>>();
        let name = who.map_or("(base)", |a| ADAPTERS[a].name);
        let held = loaded.iter().find(|a| a.name == name);
        rows.push(vec![
            name.to_owned(),
            who.map_or("-".to_owned(), |a| ADAPTERS[a].rank.to_string()),
            held.map_or("-".to_owned(), |a| table::bytes(a.bytes)),
            mine.len().to_string(),
            format!("{:.0} %", 100.0 * relative_error(&pick(base), &pick(truth))),
            format!("{:.1e}", relative_error(&pick(out), &pick(truth))),
        ]);
    }
    table::print(&["adapter", "rank", "in the pool", "tokens", "changes the output by", "error"], &rows);
    let (error, worst) = (relative_error(out, truth), worst_row_error(out, truth, width));
    println!("\nchecked  error {error:.1e} against the f64 reference (bound {BOUND:.0e}), worst token {worst:.1e}");
    ensure!(error <= BOUND, "the output is not what the reference computes: error {error:.1e}, bound {BOUND:.0e}");
    Ok(())
}

/// The checkpoint and the adapters, written as other programs would have left them.
fn write_files(folder: &Path) -> Result<(PathBuf, Vec<NamedAdapter>)> {
    let shape = LayerShape::new(16, 4, 256, 128)?;
    let model = TinyModel { dtype: DType::Bf16, ..TinyModel::new(Family::Qwen3Moe, shape) };
    let model_dir = folder.join("model");
    write_checkpoint(&model_dir, &model)?;
    let mut named = Vec::new();
    for (seed, adapter) in ADAPTERS.iter().enumerate() {
        let dir = folder.join("adapters").join(adapter.name);
        write_adapter(&dir, adapter, &model, seed as u64)
            .with_context(|| format!("{}: cannot write the adapter", dir.display()))?;
        named.push(NamedAdapter { name: adapter.name.to_owned(), dir });
    }
    Ok((model_dir, named))
}

/// The demo's folder; a temporary one goes away with this value.
struct Folder {
    path: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl Folder {
    fn new(dir: Option<&Path>) -> Result<Self> {
        let Some(dir) = dir else {
            let temporary = tempfile::tempdir().context("cannot make a temporary folder")?;
            return Ok(Self { path: temporary.path().to_owned(), _temporary: Some(temporary) });
        };
        if dir.exists() {
            return Err(InputError::new("a folder or file that exists", "a new folder").in_file(dir).into());
        }
        std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot be made", dir.display()))?;
        Ok(Self { path: dir.to_owned(), _temporary: None })
    }
}

fn rng() -> fastrand::Rng {
    fastrand::Rng::with_seed(2026)
}
