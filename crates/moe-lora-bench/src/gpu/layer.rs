//! A layer with random weights in GPU memory, its adapters, and a batch.

use super::launch::Noise;
use anyhow::{Context, Result};
use moe_lora::{LayerShape, Projection};
use moe_lora_bench::{AdapterSet, Routes};
use moe_lora_cuda::{DeviceBuffer, Gpu, Layout, Stream};
use moe_lora_kernels::{AdapterEntry, Format};
use moe_lora_runner::raw::{self, ForwardArgs};

/// Base weights and the inputs and outputs of the largest batch. Smaller batches are its first tokens.
pub(super) struct Layer {
    pub(super) shape: LayerShape,
    pub(super) format: Format,
    pub(super) w13: DeviceBuffer,
    pub(super) w2: DeviceBuffer,
    pub(super) hidden: DeviceBuffer,
    pub(super) out: DeviceBuffer,
    topk_ids: DeviceBuffer,
    topk_weights: DeviceBuffer,
    token_slots: DeviceBuffer,
    workspace: DeviceBuffer,
}

/// The largest batch, table and rank that a layer is made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Most {
    pub(super) tokens: usize,
    pub(super) slots: usize,
    pub(super) rank: usize,
}

impl Layer {
    pub(super) fn new(gpu: &Gpu, stream: &Stream, shape: LayerShape, format: Format, most: Most) -> Result<Self> {
        let LayerShape { num_experts, top_k, hidden_size, intermediate_size, .. } = shape;
        let random = |rows: usize, width: usize, seed: u32, deviation: f32| -> Result<DeviceBuffer> {
            let count = rows * width;
            let buffer = gpu.alloc(2 * count)?;
            Noise { format, count, width, filled: width, seed, deviation }.write(gpu, stream, &buffer, 0)?;
            Ok(buffer)
        };
        let workspace = gpu.alloc(raw::workspace_bytes(gpu, &shape, most.tokens, most.slots, most.rank)?)?;
        // NaN, so that nothing can be read before it was written.
        stream.fill(&workspace, 0, workspace.bytes(), 0xff)?;
        Ok(Self {
            shape,
            format,
            w13: random(2 * num_experts * intermediate_size, hidden_size, 1, root(hidden_size))?,
            w2: random(num_experts * hidden_size, intermediate_size, 2, root(intermediate_size))?,
            hidden: random(most.tokens, hidden_size, 3, 1.0)?,
            out: gpu.alloc(2 * most.tokens * hidden_size)?,
            topk_ids: gpu.alloc(4 * most.tokens * top_k)?,
            topk_weights: gpu.alloc(4 * most.tokens * top_k)?,
            token_slots: gpu.alloc(4 * most.tokens)?,
            workspace,
        })
    }

    pub(super) const fn workspace(&self) -> &DeviceBuffer {
        &self.workspace
    }

    pub(super) fn set_routes(&self, stream: &Stream, routes: &Routes) -> Result<()> {
        stream.upload(&self.topk_ids, 0, &routes.topk_ids)?;
        Ok(stream.upload(&self.topk_weights, 0, &routes.topk_weights)?)
    }

    pub(super) fn set_slots(&self, stream: &Stream, slots: &[i32]) -> Result<()> {
        Ok(stream.upload(&self.token_slots, 0, slots)?)
    }

    /// What the raw door takes for the first `tokens` tokens and a table of `slots` slots.
    pub(super) fn args(&self, stream: &Stream, adapters: &Adapters, tokens: usize, slots: usize) -> ForwardArgs {
        let format = match self.format {
            Format::Bf16 => raw::DTYPE_BF16,
            Format::F16 => raw::DTYPE_F16,
        };
        let args = ForwardArgs {
            stream: stream.handle(),
            hidden: self.hidden.address(),
            topk_ids: self.topk_ids.address(),
            topk_weights: self.topk_weights.address(),
            token_slots: self.token_slots.address(),
            adapters: adapters.table.address(),
            out: self.out.address(),
            workspace: self.workspace.address(),
            workspace_bytes: self.workspace.bytes() as u64,
            num_tokens: tokens as u32,
            num_experts: self.shape.num_experts as u32,
            top_k: self.shape.top_k as u32,
            hidden_size: self.shape.hidden_size as u32,
            intermediate_size: self.shape.intermediate_size as u32,
            num_slots: slots as u32,
            max_rank: adapters.set.max_rank() as u32,
            dtype: format,
            out_dtype: format,
            scaling: 1.0,
            first_expert: self.shape.first_expert as u32,
            all_experts: self.shape.all_experts() as u32,
            adapter_part: self.shape.adapter_part.index() as u32,
            adapter_parts: self.shape.adapter_part.of() as u32,
            ..ForwardArgs::default()
        };
        args.with_w13(self.w13.address(), false).with_w2(self.w2.address())
    }
}

/// Adapters of all experts and projections, and the table of their places.
pub(super) struct Adapters {
    pub(super) set: AdapterSet,
    pub(super) memory: DeviceBuffer,
    table: DeviceBuffer,
    /// Byte offsets of A `[E, rank8, in]` and B `[E, out, rank8]`, by slot and projection.
    places: Vec<[[usize; 2]; 3]>,
}

impl Adapters {
    /// Draws a set; the table has `slots` slots, of which the set fills the first ones.
    pub(super) fn new(gpu: &Gpu, stream: &Stream, layer: &Layer, set: &AdapterSet, slots: usize) -> Result<Self> {
        let (shape, experts) = (&layer.shape, layer.shape.num_experts);
        let mut layout = Layout::default();
        let places: Vec<_> = set
            .ranks
            .iter()
            .map(|rank| {
                Projection::ALL.map(|projection| {
                    let [out, width] = projection.lora_shape(shape);
                    let stored = rank.next_multiple_of(8);
                    [
                        layout.add::<u16>(experts * a_rows(shape, projection, *rank) * width),
                        layout.add::<u16>(experts * out * stored),
                    ]
                })
            })
            .collect();
        let memory = gpu.alloc(layout.bytes())?;
        let mut seed = 16;
        for (slot, &rank) in places.iter().zip(&set.ranks) {
            let stored = rank.next_multiple_of(8);
            for (&[a, b], projection) in slot.iter().zip(Projection::ALL) {
                let [out, width] = projection.lora_shape(shape);
                let rows = a_rows(shape, projection, rank);
                let noise = |count, width, filled, seed, deviation| Noise {
                    format: layer.format,
                    count,
                    width,
                    filled,
                    seed,
                    deviation,
                };
                // What a rank lacks to a multiple of 8 is zero: rows of A, columns of B.
                noise(experts * rows * width, rows * width, rank.min(rows) * width, seed, root(width))
                    .write(gpu, stream, &memory, a)?;
                noise(experts * out * stored, stored, rank, seed + 1, 0.3 * root(rank))
                    .write(gpu, stream, &memory, b)?;
                seed += 2;
            }
        }
        let table = gpu.alloc(slots.max(1) * experts * 3 * size_of::<AdapterEntry>())?;
        let adapters = Self { set: set.clone(), memory, table, places };
        let mut entries = vec![AdapterEntry::default(); slots * experts * 3];
        for (i, entry) in entries.iter_mut().take(set.ranks.len() * experts * 3).enumerate() {
            let (slot, expert, projection) = (i / 3 / experts, i / 3 % experts, Projection::ALL[i % 3]);
            let [a, b] = adapters.offsets(shape, slot, expert, projection).context("a slot of the set")?;
            let at = |offset| adapters.memory.address() + offset as u64;
            *entry = AdapterEntry { a: at(a), b: at(b), rank: set.ranks[slot] as i32, scale: SCALE };
        }
        stream.upload(&adapters.table, 0, &entries)?;
        Ok(adapters)
    }

    /// Where A `[rank8, in]` and B `[out, rank8]` of one matrix begin in `memory`.
    pub(super) fn offsets(
        &self,
        shape: &LayerShape,
        slot: usize,
        expert: usize,
        projection: Projection,
    ) -> Option<[usize; 2]> {
        let [out, width] = projection.lora_shape(shape);
        let rank = *self.set.ranks.get(slot)?;
        let [a, b] = self.places.get(slot)?[projection as usize];
        Some([
            a + 2 * expert * a_rows(shape, projection, rank) * width,
            b + 2 * expert * out * rank.next_multiple_of(8),
        ])
    }
}

/// Rows of A as they are stored.
fn a_rows(shape: &LayerShape, projection: Projection, rank: usize) -> usize {
    let rows = projection.a_rows(shape, rank);
    if rows == rank { rank.next_multiple_of(8) } else { rows }
}

/// Scale of every adapter.
pub(super) const SCALE: f32 = 1.0;

fn root(n: usize) -> f32 {
    1.0 / (n.max(1) as f32).sqrt()
}
