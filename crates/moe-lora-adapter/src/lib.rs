//! PEFT LoRA adapters of Mixture-of-Experts models, read and validated into canonical form.
//!
//! [`PeftAdapter::open`] reads an adapter folder's settings and tensor names; [`PeftAdapter::resolve`] checks everything
//! against a model's sizes and returns [`AdapterWeights`](moe_lora_core::AdapterWeights): per layer, expert and projection
//! one A `[rank, in]`, one B `[out, rank]` and a scale, whatever the layout in the file. What a file lacks is no change;
//! what this crate does not understand is an [`AdapterError`], never silence. `README.md` lists the layouts.
//!
//! # Example
//!
//! ```no_run
//! use moe_lora_adapter::PeftAdapter;
//! use moe_lora_core::{DType, LayerShape, ModelShape};
//!
//! let shape = ModelShape::uniform(LayerShape::new(128, 8, 2048, 768)?, 48, DType::Bf16);
//! let adapter = PeftAdapter::open("adapters/math")?;
//! for warning in adapter.warnings() {
//!     eprintln!("{warning}");
//! }
//! let weights = adapter.resolve(&shape)?;
//! println!("rank {}, {} bytes", weights.max_rank(), weights.size_bytes());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod adapter;
mod config;
mod error;
mod fields;
mod flat;
mod fused;
mod index;
mod key;
mod layout;
mod linear;
mod load;
mod options;
mod pattern;
mod repack;
mod resolve;
mod shard;
mod stacked;
mod strict;
mod summary;

pub use adapter::PeftAdapter;
pub use config::{AdapterConfig, TargetModules};
pub use error::AdapterError;
pub use linear::LinearAdapters;
pub use options::{ExpertLayout, OpenOptions};
pub use summary::{AdapterSummary, KeyForm};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
