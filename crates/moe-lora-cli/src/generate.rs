//! `moe-lora generate`: whole models, many prompts, each with its own adapter, in one batch.

mod requests;
mod show;

use crate::args::Generate;
use crate::{devices, load, table};
use anyhow::{Result, bail};
use moe_lora::adapter::OpenOptions;
use moe_lora::{Checkpoint, PoolConfig};
use moe_lora_generate::{Engine, Event, Options, RequestError};
use requests::Entry;
use show::Show;
use std::time::{Duration, Instant};

pub(crate) fn run(args: &Generate) -> Result<()> {
    load::unique_names(&args.adapters)?;
    let entries = requests::entries(args)?;
    let mut show = Show::new(args, &entries)?;
    let device = devices::choose(args.device, &Checkpoint::open(&args.model)?.shape().layer)?;
    let adapters = PoolConfig { bytes: mib(args.adapter_memory), ..PoolConfig::default() };
    let open = OpenOptions { expert_layout: args.expert_layout, ..OpenOptions::default() };
    let options = Options {
        device,
        adapters,
        open,
        max_batch: args.max_batch,
        cache_bytes: mib(args.cache_memory),
        ..Options::default()
    };
    let bar = load::progress(0);
    bar.set_message(format!("loading {}", args.model.display()));
    let mut engine = Engine::open(&args.model, options, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    for adapter in &args.adapters {
        engine.register(&adapter.name, &adapter.dir);
    }

    show.begin(&entries)?;
    let start = Instant::now();
    // Requests are numbered as they are submitted, so an id is an index.
    for Entry { request, .. } in &entries {
        engine.submit(request.clone());
    }
    let mut failed = 0;
    while !engine.is_idle() {
        for event in engine.step()? {
            failed += usize::from(matches!(event, Event::Failed { .. }));
            show.take(&entries, event)?;
        }
    }
    summary(&engine, entries.len() - failed, start.elapsed());
    match failed {
        0 => Ok(()),
        _ => bail!("{failed} of {} requests failed", entries.len()),
    }
}

fn mib(count: usize) -> usize {
    count.saturating_mul(1 << 20)
}

fn summary(engine: &Engine, texts: usize, took: Duration) {
    let done = engine.statistics();
    let seconds = took.as_secs_f64();
    eprintln!(
        "{texts} texts: {} prompt tokens and {} new ones in {seconds:.3} s, {:.1} new tokens/s, {} steps",
        done.prompt_tokens,
        done.new_tokens,
        done.new_tokens as f64 / seconds,
        done.steps,
    );
    if done.loads > 0 {
        eprintln!(
            "adapters: {} loaded, {} evicted; now {} of experts, {} of attention and dense layers",
            done.loads,
            done.evictions,
            table::bytes(done.pool_bytes),
            table::bytes(done.linear_bytes),
        );
    }
}

/// An error on one line.
fn line(error: &RequestError) -> String {
    error.to_string().replace('\n', " ")
}
