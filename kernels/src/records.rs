//! Records in device memory, as `cuda/params.cuh` declares them.

use bytemuck::{Pod, Zeroable};

/// Where one projection of one (slot, expert) finds its adapter: entry `(slot * E + expert) * 3 + projection` of a table,
/// projections in the order gate, up, down.
///
/// `rank8` is the rank rounded up to a multiple of 8; matrices are row-major, their first byte at a multiple of 16, the
/// padding of A's rows and of B's columns zero. An entry of zeros is no adapter.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default, Pod, Zeroable)]
pub struct AdapterEntry {
    /// Device address of A `[rank8, in]`.
    pub a: u64,
    /// Device address of B `[out, rank8]`.
    pub b: u64,
    /// Rank; 0 is no adapter.
    pub rank: i32,
    /// Factor of the product.
    pub scale: f32,
}

/// Rows `[first_row, end_row)` of one expert and one slot.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct DeviceSegment {
    /// Expert.
    pub expert: u32,
    /// Slot, -1 for the base model.
    pub slot: i32,
    /// First row.
    pub first_row: u32,
    /// The row after the last one.
    pub end_row: u32,
}

/// At most 128 rows of one expert: the tokens of one block of the expert products.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct RowTile {
    /// Expert.
    pub expert: u32,
    /// First row.
    pub first_row: u32,
    /// Rows.
    pub num_rows: u32,
    /// Index of the segment that holds the first row.
    pub first_segment: u32,
}

/// What align found.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub struct RouteCounts {
    /// Pairs that have a row.
    pub num_rows: u32,
    /// Segments.
    pub num_segments: u32,
    /// Row tiles.
    pub num_tiles: u32,
    /// LoRA chunks.
    pub num_chunks: u32,
    /// Expert ids outside `[-1, E)`; their pairs were skipped.
    pub bad_experts: u32,
    /// Slots outside `[-1, L)`; their tokens use the base model.
    pub bad_slots: u32,
    /// Zero; while a layer runs, kernels that share out a list as they go count here.
    pub reserved: [u32; 2],
}

const _: () = {
    assert!(size_of::<AdapterEntry>() == 24 && align_of::<AdapterEntry>() == 8);
    assert!(size_of::<DeviceSegment>() == 16 && size_of::<RowTile>() == 16 && size_of::<RouteCounts>() == 32);
};
