//! The CUDA kernels of moe-lora, as data.
//!
//! Every kernel belongs to a [`Family`], whose [`image`](Family::image) is one fatbin; it takes one `#[repr(C)]` struct of
//! [`params`], whose fields name shapes and formats; [`Launch`] says how many blocks it wants, as a function of the
//! batch's sizes alone, so that a captured graph stays valid whatever the routing is. Launching is the work of
//! `moe-lora-cuda`: this crate links nothing of CUDA. An image is empty if the crate was built without nvcc and without
//! packaged images.
//!
//! One layer is, in this order: [`AlignParams`] (after [`TopkParams`], if the experts are chosen here), [`ShrinkParams`] for
//! gate and up, [`GateUpParams`], [`ShrinkParams`] for down, [`DownParams`], [`CombineParams`]. [`ClusterAlignParams`] makes what
//! [`AlignParams`] makes, on Hopper, where the batch fits.
//!
//! # Example
//!
//! ```
//! use moe_lora_kernels::{AlignParams, Format, Kernel, KernelParams};
//!
//! let params = AlignParams { num_tokens: 64, top_k: 8, num_experts: 128, num_slots: 16, ..Default::default() };
//! assert_eq!(AlignParams::kernel(Format::Bf16), Kernel::Align);
//! assert_eq!(params.launch(132).grid, [1, 1, 1]);
//! ```

mod cluster_route;
mod decode;
mod decode_layer;
mod launch;
pub mod params;
mod records;

pub use cluster_route::ClusterAlignParams;
pub use decode::{BatchSizes, DecodeAlignParams, DecodeDownParams, DecodeGateUpParams, DecodePlan, Ring};
pub use decode_layer::{DecodeClearParams, DecodeLayerParams, LayerPlan};
pub use launch::{Launch, RouteBounds};
pub use params::{
    AlignBlockParams, AlignParams, CombineParams, DownParams, GateUpParams, KernelParams, NoiseParams, PeakParams,
    PrefillDownParams, PrefillGateUpParams, PrefillShrinkParams, ReadParams, ShrinkParams, SplitParams, TensorMap,
    TopkParams,
};
pub use records::{AdapterEntry, DeviceSegment, RouteCounts, RowTile};

/// The number format of activations and weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// bfloat16.
    Bf16,
    /// IEEE 754 binary16.
    F16,
}

/// Kernels that share a source file and an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Top-k choice and align.
    Route,
    /// The narrow half of LoRA.
    Shrink,
    /// Gate and up projections with LoRA and activation.
    GateUp,
    /// Down projection with LoRA.
    Down,
    /// Weighted sum over experts.
    Combine,
    /// What benchmarks feed a layer with, and how fast memory is read.
    Measure,
    /// How fast the tensor cores multiply.
    Peak,
    /// The narrow half of LoRA where there are many rows, on Hopper.
    PrefillShrink,
    /// Gate and up where experts have many rows, on Hopper.
    PrefillGateUp,
    /// Down likewise.
    PrefillDown,
    /// Align by one cluster of blocks, on Hopper.
    ClusterRoute,
    /// Align for few tokens, on Hopper.
    DecodeRoute,
    /// Shrink, gate and up likewise.
    DecodeGateUp,
    /// Shrink, down and the sum over experts likewise.
    DecodeDown,
    /// A whole layer for very few tokens, likewise.
    DecodeLayer,
}

impl Family {
    /// All families, in the order of use; those for Hopper alone come last.
    pub const ALL: [Self; 15] = [
        Self::Route,
        Self::Shrink,
        Self::GateUp,
        Self::Down,
        Self::Combine,
        Self::Measure,
        Self::Peak,
        Self::PrefillShrink,
        Self::PrefillGateUp,
        Self::PrefillDown,
        Self::ClusterRoute,
        Self::DecodeRoute,
        Self::DecodeGateUp,
        Self::DecodeDown,
        Self::DecodeLayer,
    ];

    /// Whether its image is for compute capability 9.0 alone.
    #[must_use]
    pub const fn hopper(self) -> bool {
        matches!(
            self,
            Self::PrefillShrink
                | Self::PrefillGateUp
                | Self::PrefillDown
                | Self::ClusterRoute
                | Self::DecodeRoute
                | Self::DecodeGateUp
                | Self::DecodeDown
                | Self::DecodeLayer
        )
    }

    /// The source file's stem.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Shrink => "shrink",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Combine => "combine",
            Self::Measure => "measure",
            Self::Peak => "peak",
            Self::PrefillShrink => "prefill_shrink",
            Self::PrefillGateUp => "prefill_gate_up",
            Self::PrefillDown => "prefill_down",
            Self::ClusterRoute => "cluster_route",
            Self::DecodeRoute => "decode_route",
            Self::DecodeGateUp => "decode_gate_up",
            Self::DecodeDown => "decode_down",
            Self::DecodeLayer => "decode_layer",
        }
    }

    /// The fatbin; empty if there is none in this build.
    #[must_use]
    pub const fn image(self) -> &'static [u8] {
        match self {
            Self::Route => include_bytes!(concat!(env!("OUT_DIR"), "/route.fatbin")),
            Self::Shrink => include_bytes!(concat!(env!("OUT_DIR"), "/shrink.fatbin")),
            Self::GateUp => include_bytes!(concat!(env!("OUT_DIR"), "/gate_up.fatbin")),
            Self::Down => include_bytes!(concat!(env!("OUT_DIR"), "/down.fatbin")),
            Self::Combine => include_bytes!(concat!(env!("OUT_DIR"), "/combine.fatbin")),
            Self::Measure => include_bytes!(concat!(env!("OUT_DIR"), "/measure.fatbin")),
            Self::Peak => include_bytes!(concat!(env!("OUT_DIR"), "/peak.fatbin")),
            Self::PrefillShrink => include_bytes!(concat!(env!("OUT_DIR"), "/prefill_shrink.fatbin")),
            Self::PrefillGateUp => include_bytes!(concat!(env!("OUT_DIR"), "/prefill_gate_up.fatbin")),
            Self::PrefillDown => include_bytes!(concat!(env!("OUT_DIR"), "/prefill_down.fatbin")),
            Self::ClusterRoute => include_bytes!(concat!(env!("OUT_DIR"), "/cluster_route.fatbin")),
            Self::DecodeRoute => include_bytes!(concat!(env!("OUT_DIR"), "/decode_route.fatbin")),
            Self::DecodeGateUp => include_bytes!(concat!(env!("OUT_DIR"), "/decode_gate_up.fatbin")),
            Self::DecodeDown => include_bytes!(concat!(env!("OUT_DIR"), "/decode_down.fatbin")),
            Self::DecodeLayer => include_bytes!(concat!(env!("OUT_DIR"), "/decode_layer.fatbin")),
        }
    }
}

/// Whether this build has images; those for Hopper may be missing where its architecture was left out.
#[must_use]
pub fn built() -> bool {
    Family::ALL.iter().all(|family| family.hopper() || !family.image().is_empty())
}

/// How the images were made, one fact a line: hash of the sources, nvcc, architectures, and of every kernel its
/// registers, shared memory, stack and spills. Empty without images.
#[must_use]
pub const fn manifest() -> &'static str {
    include_str!(concat!(env!("OUT_DIR"), "/manifest.txt"))
}

/// One entry point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// `moe_lora_topk`.
    Topk,
    /// `moe_lora_align`.
    Align,
    /// `moe_lora_shrink_*`.
    Shrink(Format),
    /// `moe_lora_gate_up_*`.
    GateUp(Format),
    /// `moe_lora_down_*`.
    Down(Format),
    /// `moe_lora_combine_*`.
    Combine(Format),
    /// `moe_lora_noise_*`.
    Noise(Format),
    /// `moe_lora_read`.
    Read,
    /// `moe_lora_peak`.
    Peak,
    /// `moe_lora_align_block`.
    AlignBlock,
    /// `moe_lora_prefill_gate_up_*`.
    PrefillGateUp(Format),
    /// `moe_lora_prefill_down_*`.
    PrefillDown(Format),
    /// `moe_lora_cluster_align`.
    ClusterAlign,
    /// `moe_lora_decode_align`.
    DecodeAlign,
    /// `moe_lora_decode_gate_up_*`.
    DecodeGateUp(Format),
    /// `moe_lora_decode_down_*`.
    DecodeDown(Format),
    /// `moe_lora_decode_layer_*`.
    DecodeLayer(Format),
    /// `moe_lora_decode_clear`.
    DecodeClear,
    /// `moe_lora_prefill_shrink_*`.
    PrefillShrink(Format),
    /// `moe_lora_split_*`.
    Split(Format),
}

impl Kernel {
    /// All entry points.
    pub const ALL: [Self; 32] = [
        Self::Topk,
        Self::Align,
        Self::Shrink(Format::Bf16),
        Self::Shrink(Format::F16),
        Self::GateUp(Format::Bf16),
        Self::GateUp(Format::F16),
        Self::Down(Format::Bf16),
        Self::Down(Format::F16),
        Self::Combine(Format::Bf16),
        Self::Combine(Format::F16),
        Self::Noise(Format::Bf16),
        Self::Noise(Format::F16),
        Self::Read,
        Self::Peak,
        Self::AlignBlock,
        Self::PrefillGateUp(Format::Bf16),
        Self::PrefillGateUp(Format::F16),
        Self::PrefillDown(Format::Bf16),
        Self::PrefillDown(Format::F16),
        Self::ClusterAlign,
        Self::DecodeAlign,
        Self::DecodeGateUp(Format::Bf16),
        Self::DecodeGateUp(Format::F16),
        Self::DecodeDown(Format::Bf16),
        Self::DecodeDown(Format::F16),
        Self::DecodeLayer(Format::Bf16),
        Self::DecodeLayer(Format::F16),
        Self::DecodeClear,
        Self::PrefillShrink(Format::Bf16),
        Self::PrefillShrink(Format::F16),
        Self::Split(Format::Bf16),
        Self::Split(Format::F16),
    ];

    /// Its place in [`ALL`](Self::ALL).
    #[must_use]
    pub const fn index(self) -> usize {
        const fn second(format: Format) -> usize {
            matches!(format, Format::F16) as usize
        }
        match self {
            Self::Topk => 0,
            Self::Align => 1,
            Self::Shrink(format) => 2 + second(format),
            Self::GateUp(format) => 4 + second(format),
            Self::Down(format) => 6 + second(format),
            Self::Combine(format) => 8 + second(format),
            Self::Noise(format) => 10 + second(format),
            Self::Read => 12,
            Self::Peak => 13,
            Self::AlignBlock => 14,
            Self::PrefillGateUp(format) => 15 + second(format),
            Self::PrefillDown(format) => 17 + second(format),
            Self::ClusterAlign => 19,
            Self::DecodeAlign => 20,
            Self::DecodeGateUp(format) => 21 + second(format),
            Self::DecodeDown(format) => 23 + second(format),
            Self::DecodeLayer(format) => 25 + second(format),
            Self::DecodeClear => 27,
            Self::PrefillShrink(format) => 28 + second(format),
            Self::Split(format) => 30 + second(format),
        }
    }

    /// The family whose image holds it.
    #[must_use]
    pub const fn family(self) -> Family {
        match self {
            Self::Topk | Self::Align | Self::AlignBlock => Family::Route,
            Self::Shrink(_) | Self::Split(_) => Family::Shrink,
            Self::GateUp(_) => Family::GateUp,
            Self::Down(_) => Family::Down,
            Self::Combine(_) => Family::Combine,
            Self::Noise(_) | Self::Read => Family::Measure,
            Self::Peak => Family::Peak,
            Self::PrefillGateUp(_) => Family::PrefillGateUp,
            Self::PrefillDown(_) => Family::PrefillDown,
            Self::ClusterAlign => Family::ClusterRoute,
            Self::DecodeAlign => Family::DecodeRoute,
            Self::DecodeGateUp(_) => Family::DecodeGateUp,
            Self::DecodeDown(_) => Family::DecodeDown,
            Self::DecodeLayer(_) | Self::DecodeClear => Family::DecodeLayer,
            Self::PrefillShrink(_) => Family::PrefillShrink,
        }
    }

    /// The symbol in the image.
    #[must_use]
    pub const fn symbol(self) -> &'static str {
        match self {
            Self::Topk => "moe_lora_topk",
            Self::Align => "moe_lora_align",
            Self::AlignBlock => "moe_lora_align_block",
            Self::Shrink(Format::Bf16) => "moe_lora_shrink_bf16",
            Self::Shrink(Format::F16) => "moe_lora_shrink_f16",
            Self::GateUp(Format::Bf16) => "moe_lora_gate_up_bf16",
            Self::GateUp(Format::F16) => "moe_lora_gate_up_f16",
            Self::Down(Format::Bf16) => "moe_lora_down_bf16",
            Self::Down(Format::F16) => "moe_lora_down_f16",
            Self::Combine(Format::Bf16) => "moe_lora_combine_bf16",
            Self::Combine(Format::F16) => "moe_lora_combine_f16",
            Self::Noise(Format::Bf16) => "moe_lora_noise_bf16",
            Self::Noise(Format::F16) => "moe_lora_noise_f16",
            Self::Read => "moe_lora_read",
            Self::Peak => "moe_lora_peak",
            Self::PrefillGateUp(Format::Bf16) => "moe_lora_prefill_gate_up_bf16",
            Self::PrefillGateUp(Format::F16) => "moe_lora_prefill_gate_up_f16",
            Self::PrefillDown(Format::Bf16) => "moe_lora_prefill_down_bf16",
            Self::PrefillDown(Format::F16) => "moe_lora_prefill_down_f16",
            Self::ClusterAlign => "moe_lora_cluster_align",
            Self::DecodeAlign => "moe_lora_decode_align",
            Self::DecodeGateUp(Format::Bf16) => "moe_lora_decode_gate_up_bf16",
            Self::DecodeGateUp(Format::F16) => "moe_lora_decode_gate_up_f16",
            Self::DecodeDown(Format::Bf16) => "moe_lora_decode_down_bf16",
            Self::DecodeDown(Format::F16) => "moe_lora_decode_down_f16",
            Self::DecodeLayer(Format::Bf16) => "moe_lora_decode_layer_bf16",
            Self::DecodeLayer(Format::F16) => "moe_lora_decode_layer_f16",
            Self::DecodeClear => "moe_lora_decode_clear",
            Self::PrefillShrink(Format::Bf16) => "moe_lora_prefill_shrink_bf16",
            Self::PrefillShrink(Format::F16) => "moe_lora_prefill_shrink_f16",
            Self::Split(Format::Bf16) => "moe_lora_split_bf16",
            Self::Split(Format::F16) => "moe_lora_split_f16",
        }
    }

    /// The most dynamic shared memory that a launch asks for, in bytes.
    #[must_use]
    pub const fn most_shared_bytes(self) -> u32 {
        match self {
            Self::Topk => launch::topk_shared(launch::MOST_EXPERTS),
            Self::Align | Self::AlignBlock => launch::align_shared(launch::MOST_EXPERTS, u32::MAX),
            Self::Shrink(_) => launch::SHRINK_SHARED,
            Self::GateUp(_) | Self::Down(_) => launch::PRODUCT_SHARED,
            Self::Combine(_) | Self::Noise(_) | Self::Read | Self::Split(_) => 0,
            Self::Peak => launch::PEAK_SHARED,
            Self::PrefillShrink(_) => launch::PIECES_SHARED,
            Self::PrefillGateUp(_) | Self::PrefillDown(_) => launch::GROUPED_SHARED,
            Self::DecodeAlign => decode::align_shared(launch::MOST_EXPERTS, 32),
            Self::ClusterAlign | Self::DecodeGateUp(_) | Self::DecodeDown(_) | Self::DecodeLayer(_) => {
                decode::MOST_SHARED
            }
            Self::DecodeClear => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_its_place() {
        for (i, kernel) in Kernel::ALL.into_iter().enumerate() {
            assert_eq!(kernel.index(), i, "{kernel:?}");
        }
    }

    #[test]
    fn the_manifest_lists_what_the_images_hold() {
        if !built() {
            assert!(manifest().is_empty());
            return;
        }
        for kernel in Kernel::ALL.into_iter().filter(|k| !k.family().image().is_empty()) {
            let entry = format!("kernel {} {} ", kernel.family().name(), kernel.symbol());
            assert!(manifest().contains(&entry), "{entry}");
        }
    }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
