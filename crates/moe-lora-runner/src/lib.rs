//! `MoeRunner`: one MoE layer with LoRA as a plan, four stages and a workspace.
//!
//! ```text
//! align -> gate_up -> down -> combine
//! ```
//!
//! The runner owns what the stages need between them, sized once; it knows neither routers nor pools nor files. LoRA is an
//! input of the stages and no second pipeline: a batch without adapters runs the same code with nothing to add.
//! [`MoeRunner`] runs on the processor; `CudaRunner` (feature `cuda`) is the same on an NVIDIA GPU.
//!
//! # Example
//!
//! ```
//! use moe_lora_core::{AdapterTable, LayerShape};
//! use moe_lora_reference::random::{AdapterSpec, CaseSpec};
//! use moe_lora_runner::{Batch, Limits, MoeRunner};
//!
//! let shape = LayerShape::new(4, 2, 16, 8)?;
//! let case = CaseSpec { adapters: vec![AdapterSpec::rank(4)], ..CaseSpec::new(shape, 5) }.build(1);
//! let mut runner = MoeRunner::new(&shape, Limits::default())?;
//! let mut out = vec![0.0_f32; 5 * 16];
//! let batch = Batch {
//!     hidden: &case.hidden_as::<f32>(),
//!     topk_ids: &case.topk_ids,
//!     topk_weights: &case.topk_weights,
//!     token_slots: &case.token_slots,
//!     adapters: &case.table(),
//! };
//! runner.forward(&case.weights, &batch, &mut out)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(unsafe_code)]

mod batch;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod error;
mod plan;
mod runner;

pub use batch::{Batch, Limits};
#[cfg(feature = "cuda")]
pub use cuda::{CapturedForward, CudaRunner, CudaWeights, Sum, Sums, raw, slices};
pub use device::{Backend, Device};
pub use error::RunnerError;
pub use moe_lora_gemm::cpu::Kernel;
pub use plan::Plan;
pub use runner::MoeRunner;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
