//! Which expert does what: the first two steps of a Mixture-of-Experts layer that serves many LoRA adapters.
//!
//! [`route`] turns hidden vectors into the experts and weights of every token, as the models' own code in Hugging Face
//! `transformers` does; [`topk`] does so from logits. [`Aligner`] then sorts all (token, expert) pairs by expert and
//! adapter into the [`RowMap`](moe_lora_core::RowMap) that every later stage reads. Engines that work with padded
//! blocks find the format of the reference system (SGLang) in [`moe_lora_align_block_size`], and on NVIDIA GPUs in
//! `CudaAlignBlock` (feature `cuda`, on by default).
//!
//! Everything here is deterministic: equal inputs give equal bits, and a token's result does not depend on the batch
//! around it.
//!
//! # Example
//!
//! ```
//! use moe_lora_core::{RouterConfig, RowMap, TopK};
//! use moe_lora_route::{Aligner, topk};
//!
//! // Three tokens choose two of four experts.
//! let logits = [0.1, 2.0, 1.0, -1.0, /**/ 3.0, 0.0, 0.5, 2.0, /**/ 0.0, 1.0, 2.0, -2.0];
//! let mut chosen = TopK::default();
//! topk(&logits, 4, &RouterConfig::softmax(2), None, &mut chosen)?;
//! assert_eq!(chosen.topk_ids, [1, 2, 0, 3, 2, 1]);
//!
//! // Token 0 uses the base model, tokens 1 and 2 the adapter in slot 5.
//! let mut map = RowMap::default();
//! let mut aligner = Aligner::new(4, 2);
//! aligner.align(&chosen.topk_ids, &chosen.topk_weights, &[-1, 5, 5], |_slot| true, &mut map)?;
//! let segments: Vec<_> = map.segments.iter().map(|s| (s.expert, s.slot, s.rows())).collect();
//! assert_eq!(segments, [(0, 5, 0..1), (1, -1, 1..2), (1, 5, 2..3), (2, -1, 3..4), (2, 5, 4..5), (3, 5, 5..6)]);
//! # Ok::<(), moe_lora_route::RouteError>(())
//! ```
#![deny(unsafe_code)]

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod error;

pub use cpu::{
    AlignBlockInput, AlignBlockOutput, Aligner, max_num_tokens_padded, moe_lora_align_block_size, route, router_logits,
    topk,
};
#[cfg(feature = "cuda")]
pub use cuda::{AlignBlockAddresses, AlignBlockLimits, CudaAlignBlock};
pub use error::RouteError;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
