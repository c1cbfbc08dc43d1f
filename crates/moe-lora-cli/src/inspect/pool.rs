//! What adapters take side by side in a pool: loaded into one in host memory, in their order, and dumped.

use crate::args::{Inspect, NamedAdapter};
use crate::{load, table};
use anyhow::{Context, Result};
use moe_lora::adapter::OpenOptions;
use moe_lora::{AdapterPool, Checkpoint, Device, PeftAdapter, PoolConfig};
use serde_json::json;

pub(super) fn print(args: &Inspect, model: &Checkpoint) -> Result<()> {
    load::unique_names(&args.pool)?;
    let config = PoolConfig { bytes: args.adapter_memory.saturating_mul(1 << 20), ..PoolConfig::default() };
    let pool = AdapterPool::new(&Device::cpu(), model.shape(), config)?;
    for NamedAdapter { name, dir } in &args.pool {
        let open = OpenOptions { expert_layout: args.expert_layout, ..OpenOptions::default() };
        let weights = PeftAdapter::open_with(dir, open)?.resolve(model.shape())?;
        pool.load(name, weights).with_context(|| format!("adapter {name} at {}", dir.display()))?;
    }
    let dump = pool.snapshot();
    if args.json {
        let adapter = |a: &moe_lora::pool::AdapterSnapshot| {
            json!({
                "name": a.name, "max_rank": a.max_rank, "bytes": a.bytes, "version": a.version,
                "pinned": a.pinned, "leases": a.leases,
            })
        };
        let all = json!({
            "budget_bytes": dump.budget_bytes,
            "used_bytes": dump.used_bytes,
            "draining_bytes": dump.draining_bytes,
            "loading_bytes": dump.loading_bytes,
            "loads": dump.loads,
            "evictions": dump.evictions,
            "adapters": dump.adapters.iter().map(adapter).collect::<Vec<_>>(),
        });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let (used, budget) = (table::bytes(dump.used_bytes), table::bytes(dump.budget_bytes));
    println!("{used} of {budget} used; {} loaded, {} evicted for others", dump.loads, dump.evictions);
    let row = |a: &moe_lora::pool::AdapterSnapshot| {
        vec![a.name.clone(), a.max_rank.to_string(), a.bytes.to_string(), table::bytes(a.bytes)]
    };
    table::print(&["adapter", "rank", "bytes", "size"], &dump.adapters.iter().map(row).collect::<Vec<_>>());
    Ok(())
}
