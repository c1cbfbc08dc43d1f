//! A few tokens of a batch against the f64 reference, on the very bits that the GPU was given.

use super::layer::{Adapters, Layer, SCALE};
use anyhow::{Context, Result};
use bytemuck::{Pod, cast_slice};
use half::{bf16, f16};
use moe_lora::reference::{LayerInput, forward, metrics::relative_error};
use moe_lora::{
    Activation, AdapterLayer, AdapterTable, Element, ExpertLora, ExpertWeights, LayerShape, LayerWeights, Lora, Matrix,
    Projection,
};
use moe_lora_bench::{Routes, spread};
use moe_lora_cuda::{DeviceBuffer, Stream};
use moe_lora_kernels::Format;
use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};

/// Copies of the experts that were needed so far.
#[derive(Default)]
pub(super) struct Checker {
    experts: BTreeMap<usize, ExpertWeights>,
}

/// A batch: its first tokens' routes and slots, -1 for none.
pub(super) struct Batch<'a> {
    pub(super) routes: &'a Routes,
    pub(super) slots: &'a [i32],
}

impl Checker {
    /// Relative error of `count` tokens that are spread over the batch.
    pub(super) fn relative_error(
        &mut self,
        stream: &Stream,
        layer: &Layer,
        adapters: &Adapters,
        batch: &Batch<'_>,
        count: usize,
    ) -> Result<f64> {
        match layer.format {
            Format::Bf16 => self.typed::<bf16>(stream, layer, adapters, batch, count),
            Format::F16 => self.typed::<f16>(stream, layer, adapters, batch, count),
        }
    }

    /// Every (token, expert) pair goes through the reference as a token of its own, so that all cores have work; their sum
    /// is the token's output.
    fn typed<T: Element + Pod>(
        &mut self,
        stream: &Stream,
        layer: &Layer,
        adapters: &Adapters,
        batch: &Batch<'_>,
        count: usize,
    ) -> Result<f64> {
        let LayerShape { top_k, hidden_size, intermediate_size, .. } = layer.shape;
        let tokens = spread(batch.slots.len(), count);
        let pairs: Vec<usize> = tokens.iter().flat_map(|t| t * top_k..(t + 1) * top_k).collect();
        let expert_of = |pair: usize| batch.routes.topk_ids[pair] as usize;
        let used: Vec<usize> = BTreeSet::from_iter(pairs.iter().map(|&p| expert_of(p))).into_iter().collect();
        for &expert in &used {
            if let Entry::Vacant(place) = self.experts.entry(expert) {
                place.insert(read_expert::<T>(stream, layer, expert)?);
            }
        }
        let shape = LayerShape::new(used.len(), 1, hidden_size, intermediate_size)?;
        let weights =
            LayerWeights::new(shape, used.iter().map(|e| self.experts[e].clone()).collect(), Activation::Silu)?;

        let slots: BTreeSet<i32> = tokens.iter().map(|&t| batch.slots[t]).filter(|&s| s >= 0).collect();
        let mut layers = Vec::new();
        for &slot in &slots {
            let needed = |expert| pairs.iter().any(|&p| expert_of(p) == expert && batch.slots[p / top_k] == slot);
            let experts = used.iter().map(|&expert| match needed(expert) {
                true => read_adapter::<T>(stream, layer, adapters, slot as usize, expert),
                false => Ok(ExpertLora::default()),
            });
            layers.push(AdapterLayer::new(&shape, experts.collect::<Result<_>>()?)?);
        }
        let mut hidden = Vec::new();
        let mut found = Vec::new();
        for &token in &tokens {
            let row = 2 * token * hidden_size;
            let x: Vec<f64> = widen(&numbers::<T>(stream, &layer.hidden, row, hidden_size)?);
            (0..top_k).for_each(|_| hidden.extend_from_slice(&x));
            found.extend(widen(&numbers::<T>(stream, &layer.out, row, hidden_size)?));
        }
        let place = |slot: i32| slots.iter().position(|&s| s == slot).map_or(-1, |i| i as i32);
        let of_pairs = forward(&LayerInput {
            hidden: &hidden,
            weights: &weights,
            topk_ids: &pairs.iter().map(|&p| used.partition_point(|&e| e < expert_of(p)) as i32).collect::<Vec<_>>(),
            topk_weights: &pairs.iter().map(|&p| batch.routes.topk_weights[p]).collect::<Vec<_>>(),
            token_slots: &pairs.iter().map(|&p| place(batch.slots[p / top_k])).collect::<Vec<_>>(),
            adapters: &AdapterTable::new(layers.iter().map(Some).collect()),
        })?;
        let mut truth = vec![0.0; found.len()];
        for (pair, y) in of_pairs.chunks(hidden_size).enumerate() {
            truth[pair / top_k * hidden_size..][..hidden_size].iter_mut().zip(y).for_each(|(sum, y)| *sum += y);
        }
        Ok(relative_error(&found, &truth))
    }
}

fn read_expert<T: Element + Pod>(stream: &Stream, layer: &Layer, expert: usize) -> Result<ExpertWeights> {
    let LayerShape { hidden_size, intermediate_size, .. } = layer.shape;
    let size = hidden_size * intermediate_size;
    let w13 = numbers::<T>(stream, &layer.w13, 4 * expert * size, 2 * size)?;
    let w13 = Matrix::from_vec(w13, 2 * intermediate_size, hidden_size)?;
    let down = numbers::<T>(stream, &layer.w2, 2 * expert * size, size)?;
    Ok(ExpertWeights {
        gate: w13.select_rows(0, intermediate_size, 1)?,
        up: w13.select_rows(intermediate_size, intermediate_size, 1)?,
        down: Matrix::from_vec(down, hidden_size, intermediate_size)?,
        bias: None,
    })
}

fn read_adapter<T: Element + Pod>(
    stream: &Stream,
    layer: &Layer,
    adapters: &Adapters,
    slot: usize,
    expert: usize,
) -> Result<ExpertLora> {
    let rank = adapters.set.ranks[slot];
    let stored = rank.next_multiple_of(8);
    let read = |projection: Projection| -> Result<Option<Lora>> {
        let [out, width] = projection.base_shape(&layer.shape);
        let [a, b] = adapters.offsets(&layer.shape, slot, expert, projection).context("a slot of the set")?;
        let a = numbers::<T>(stream, &adapters.memory, a, rank * width)?;
        let b = numbers::<T>(stream, &adapters.memory, b, out * stored)?;
        let b: Vec<T> = b.chunks(stored).flat_map(|row| row[..rank].iter().copied()).collect();
        Ok(Some(Lora::new(Matrix::from_vec(a, rank, width)?, Matrix::from_vec(b, out, rank)?, SCALE)?))
    };
    Ok(ExpertLora { gate: read(Projection::Gate)?, up: read(Projection::Up)?, down: read(Projection::Down)? })
}

fn numbers<T: Pod>(stream: &Stream, from: &DeviceBuffer, offset: usize, count: usize) -> Result<Vec<T>> {
    let mut bits = vec![0_u16; count];
    stream.download(from, offset, &mut bits)?;
    Ok(cast_slice::<u16, T>(&bits).to_vec())
}

fn widen<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|v| f64::from(v.to_f32())).collect()
}
