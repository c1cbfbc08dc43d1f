//! Everything that a stage relies on, checked before it writes.

use super::workspace::{Done, Stage};
use super::{Batch, Workspace};
use crate::GemmError;
use moe_lora_core::{AdapterPart, InputError, LayerShape, Projection, RowMap};

fn wrong(what: &str, found: impl ToString, expected: impl ToString) -> GemmError {
    InputError::new(found.to_string(), expected.to_string()).in_tensor(what).into()
}

/// That the batch fits the layer and the workspace, and that its rows and adapters are consistent.
pub(super) fn batch(batch: &Batch<'_>, ws: &Workspace) -> Result<(), GemmError> {
    let Batch { weights, rows, .. } = *batch;
    let shape = weights.shape();
    if *shape != ws.shape {
        return Err(wrong("workspace", format!("one for {:?}", ws.shape), format!("one for {shape:?}")));
    }
    if rows.num_tokens > ws.max_tokens {
        return Err(wrong("batch", format!("{} tokens", rows.num_tokens), format!("at most {}", ws.max_tokens)));
    }
    if rows.num_rows() > ws.max_tokens * shape.top_k {
        return Err(wrong(
            "batch",
            format!("{} rows", rows.num_rows()),
            format!("at most {}", ws.max_tokens * shape.top_k),
        ));
    }
    pairs(rows)?;
    segments(batch, ws)
}

/// That adapters are whole.
pub(super) fn whole(shape: &LayerShape) -> Result<(), GemmError> {
    match shape.adapter_part {
        AdapterPart::WHOLE => Ok(()),
        part => Err(wrong("adapters", format!("{part:?}"), "whole ones, or a way to exchange what parts give")),
    }
}

/// That rows and pairs are each other's inverse.
fn pairs(rows: &RowMap) -> Result<(), GemmError> {
    let num_rows = rows.num_rows();
    let pairs = rows.num_tokens.checked_mul(rows.top_k);
    if pairs != Some(rows.pair_row.len()) {
        let expected = format!("{} tokens of {} experts", rows.num_tokens, rows.top_k);
        return Err(wrong("pair_row", format!("{} pairs", rows.pair_row.len()), expected));
    }
    if rows.row_weight.len() != num_rows {
        return Err(wrong("row_weight", format!("{} weights", rows.row_weight.len()), format!("{num_rows} rows")));
    }
    let live = rows.pair_row.iter().filter(|&&row| row != -1).count();
    let inverse = |(row, &pair): (usize, &u32)| {
        rows.pair_row.get(pair as usize).is_some_and(|&back| usize::try_from(back) == Ok(row))
    };
    if live != num_rows || !rows.row_pair.iter().enumerate().all(inverse) {
        return Err(wrong("row_pair", "rows that are not the inverse of pair_row", "each other's inverse"));
    }
    Ok(())
}

/// That the segments are in order and cover the rows, and that the adapters in them fit the layer.
fn segments(batch: &Batch<'_>, ws: &Workspace) -> Result<(), GemmError> {
    let Batch { weights, rows, adapters } = *batch;
    let shape = weights.shape();
    let (mut end, mut last) = (0, None);
    for segment in &rows.segments {
        let key = (segment.expert, segment.slot);
        let expert = segment.expert as usize;
        if segment.first_row as usize != end || segment.num_rows == 0 || last >= Some(key) {
            return Err(wrong(
                "segments",
                format!("{segment:?}"),
                format!("rows from {end}, experts and slots ascending"),
            ));
        }
        if expert >= shape.num_experts {
            return Err(wrong("segments", format!("expert {expert}"), format!("below {}", shape.num_experts)));
        }
        if let Some(layer) = adapters.layer(segment.slot)
            && layer.experts().len() != shape.num_experts
        {
            let found = format!("{} experts", layer.experts().len());
            return Err(wrong(&format!("adapter slot {}", segment.slot), found, shape.num_experts));
        }
        end += segment.num_rows as usize;
        last = Some(key);
        for projection in Projection::ALL {
            let Some(lora) = adapters.get(segment.slot, expert, projection) else { continue };
            let place = || format!("adapter slot {} expert {expert} {projection}", segment.slot);
            let found = [lora.out_features(), lora.in_features()];
            let want = projection.lora_shape(shape);
            let fits = found == want && lora.a().rows() == projection.a_rows(shape, lora.rank());
            if !fits || lora.a().dtype() != weights.dtype() {
                let found = format!("{found:?} {}", lora.a().dtype());
                return Err(wrong(&place(), found, format!("{want:?} {}", weights.dtype())));
            }
            if lora.rank() > ws.max_rank {
                return Err(wrong(&place(), format!("rank {}", lora.rank()), format!("at most {}", ws.max_rank)));
            }
        }
    }
    if end != rows.num_rows() {
        return Err(wrong("segments", format!("{end} rows"), format!("{} rows", rows.num_rows())));
    }
    Ok(())
}

/// That a slice is `[T, H]`.
pub(super) fn tokens(what: &str, length: usize, batch: &Batch<'_>) -> Result<(), GemmError> {
    let [t, h] = [batch.rows.num_tokens, batch.weights.shape().hidden_size];
    // `t` is at most the workspace's tokens, so the product was counted before.
    if length == t * h { Ok(()) } else { Err(wrong(what, format!("{length} numbers"), format!("[{t}, {h}]"))) }
}

/// That the stage before was run, and on a batch of these sizes.
pub(super) fn order(ws: &Workspace, batch: &Batch<'_>, stage: &'static str, before: Stage) -> Result<Done, GemmError> {
    let needs = if before == Stage::GateUp { "gate_up" } else { "down" };
    let same = |done: &Done| {
        // `down` keeps what `gate_up` left, so it may run again.
        (done.stage == before || before == Stage::GateUp)
            && done.tokens == batch.rows.num_tokens
            && done.rows == batch.rows.num_rows()
    };
    ws.done.filter(same).ok_or(GemmError::Order { stage, needs })
}
