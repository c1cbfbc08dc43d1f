//! `FusedMoEWithLoRA`: base weights, a router and a view of the adapter pool, as one layer, or as one rank's part of a layer
//! that several ranks compute together ([`with_shard`](FusedMoEWithLoRA::with_shard)).
//!
//! # Example
//!
//! ```
//! use moe_lora_core::{DType, LayerShape, ModelShape, Routing, TokenAdapters};
//! use moe_lora_layer::FusedMoEWithLoRA;
//! use moe_lora_pool::{AdapterPool, PoolConfig};
//! use moe_lora_reference::random::CaseSpec;
//! use moe_lora_runner::Device;
//!
//! let shape = LayerShape::new(4, 2, 16, 8)?;
//! let case = CaseSpec::new(shape, 5).build(1);
//! let device = Device::best();
//! let pool = AdapterPool::new(&device, &ModelShape::uniform(shape, 1, DType::F32), PoolConfig::default())?;
//! let layer = FusedMoEWithLoRA::new(0, case.weights.clone(), &device, &pool)?;
//!
//! let hidden = case.hidden_as::<f32>();
//! let routing = Routing::Selected { topk_ids: &case.topk_ids, topk_weights: &case.topk_weights };
//! let mut out = vec![0.0_f32; hidden.len()];
//! layer.forward(&hidden, routing, &TokenAdapters::base(5), &mut out)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod layer;
mod ranks;
mod stages;

#[cfg(feature = "cuda")]
pub use cuda::LayerGraph;
pub use error::LayerError;
pub use layer::FusedMoEWithLoRA;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
