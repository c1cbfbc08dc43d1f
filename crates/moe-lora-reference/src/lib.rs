//! The truth of moe-lora: what one MoE layer with LoRA computes, in f64 and in the plainest words.
//!
//! [`forward`] is the definition that every backend is tested against. [`forward_rounded`] is its twin with a hook at each
//! place where a backend rounds, so that a test can tell a documented rounding from a mistake. [`metrics`] measures the
//! distance between a result and the truth, and [`random`] draws cases: signed data, different for every adapter, expert
//! and projection, so that nothing can be swapped unseen.
//!
//! # Example
//!
//! ```
//! use moe_lora_core::LayerShape;
//! use moe_lora_reference::{forward, random::{AdapterSpec, CaseSpec}};
//!
//! let shape = LayerShape::new(4, 2, 16, 8)?;
//! let case = CaseSpec { adapters: vec![AdapterSpec::rank(4)], ..CaseSpec::new(shape, 5) }.build(7);
//! let truth = forward(&case.input_with(&case.table()))?;
//! assert_eq!(truth.len(), 5 * 16);
//! # Ok::<(), moe_lora_core::InputError>(())
//! ```
#![forbid(unsafe_code)]

mod layer;
pub mod metrics;
pub mod random;
mod rounding;
#[cfg(any(feature = "proptest", test))]
pub mod strategies;

pub use layer::{LayerInput, forward, forward_rounded};
pub use rounding::{Exact, GpuRounding, Rounding, RoundingPoint, to_dtype};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
