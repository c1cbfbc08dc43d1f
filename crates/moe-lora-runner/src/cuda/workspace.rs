//! How a workspace is shared out between what the kernels write for each other.

use moe_lora_core::LayerShape;
use moe_lora_cuda::Layout;
use moe_lora_kernels::{AlignParams, DeviceSegment, LayerPlan, RouteBounds, RouteCounts, RowTile};

/// Expert outputs may stay f32 until the sum as long as they take no more than this: then they stay in the GPU's cache.
const MOST_F32_ROWS: usize = 16 << 20;

/// Offsets of the parts, each a multiple of 256. No part shrinks when a size grows, so the workspace of the largest batch
/// holds that of every other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Workspace {
    pub(super) bounds: RouteBounds,
    pub(super) rows_f32: bool,
    pub(super) row_pair: usize,
    pub(super) row_weight: usize,
    pub(super) pair_row: usize,
    pub(super) segments: usize,
    pub(super) tiles: usize,
    pub(super) chunks: usize,
    pub(super) counts: usize,
    pub(super) barrier: usize,
    pub(super) order: usize,
    pub(super) sort_table: usize,
    pub(super) shrunk: usize,
    pub(super) intermediate: usize,
    pub(super) rows: usize,
    /// Of the launch that does a whole layer: flags, and S in parts.
    pub(super) flags: usize,
    pub(super) parts: usize,
    /// Bytes of everything.
    pub(super) bytes: usize,
}

impl Workspace {
    /// For `tokens` tokens and `slots` slots of adapters of ranks up to `max_rank`, a multiple of 8.
    pub(super) fn new(shape: &LayerShape, sm_count: u32, tokens: usize, slots: usize, max_rank: usize) -> Self {
        let LayerShape { num_experts, top_k, hidden_size, intermediate_size, .. } = *shape;
        let bounds = RouteBounds::new(tokens as u64, top_k as u64, num_experts as u64, slots as u64);
        let pairs = tokens * top_k;
        let wide = pairs * hidden_size * size_of::<f32>();
        // Few tokens are dealt to smaller tiles and chunks, of 16 rows or more.
        let few = pairs.min(2048) / 16;
        let mut layout = Layout::default();
        Self {
            bounds,
            rows_f32: wide <= MOST_F32_ROWS,
            row_pair: layout.add::<u32>(pairs),
            row_weight: layout.add::<f32>(pairs),
            pair_row: layout.add::<i32>(pairs),
            segments: layout.add::<DeviceSegment>(bounds.segments as usize),
            tiles: layout.add::<RowTile>(bounds.tiles as usize + few),
            chunks: layout.add::<DeviceSegment>(bounds.chunks as usize + few),
            counts: layout.add::<RouteCounts>(1),
            barrier: layout.add::<u32>(1),
            order: layout.add::<u32>(2 * tokens),
            sort_table: layout.add::<u8>(AlignParams::table_bytes(num_experts as u32, sm_count) as usize),
            shrunk: layout.add::<f32>(if slots == 0 { 0 } else { pairs * 2 * max_rank }),
            intermediate: layout.add::<u16>(pairs * intermediate_size),
            rows: layout.add::<u8>(wide.min(MOST_F32_ROWS).max(wide / 2)),
            flags: layout.add::<u32>(LayerPlan::FLAGS),
            parts: layout.add::<f32>(match slots {
                0 => 0,
                _ => LayerPlan::shrunk_numbers(pairs, hidden_size, intermediate_size, max_rank),
            }),
            bytes: layout.bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_batch_holds_every_other() {
        let shape = LayerShape::new(16, 4, 1024, 384).unwrap();
        let largest = Workspace::new(&shape, 132, 1500, 1500, 64);
        for tokens in [0, 1, 7, 256, 1023, 1024, 1025, 1499, 1500] {
            for slots in [0, 1, 9, 1500] {
                for max_rank in [8, 64] {
                    let workspace = Workspace::new(&shape, 132, tokens, slots, max_rank);
                    assert!(workspace.bytes <= largest.bytes, "{workspace:?}");
                    assert_eq!(workspace.rows_f32, tokens <= 1024, "{workspace:?}");
                }
            }
        }
    }
}
