//! The arithmetic of one Mixture-of-Experts layer with LoRA in the accumulators.
//!
//! The stages take rows that are already sorted by (expert, adapter), a [`RowMap`](moe_lora_core::RowMap), and plain
//! views of the weights; they know neither routers nor pools. [`cpu`] is the CPU backend: three functions and a
//! workspace.
//!
//! # Example
//!
//! Memory is a function of the layer's shape and of the largest batch, known before anything runs:
//!
//! ```
//! use moe_lora_core::LayerShape;
//! use moe_lora_gemm::cpu::Workspace;
//!
//! let shape = LayerShape::new(64, 8, 2048, 1024)?;
//! let (max_tokens, max_rank) = (256, 16);
//! assert!(Workspace::bytes_for(&shape, max_tokens, max_rank) < 64 << 20);
//! # Ok::<(), moe_lora_core::InputError>(())
//! ```
//!
//! The README shows a whole layer.

pub mod cpu;
mod error;

pub use error::GemmError;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
