//! Hugging Face MoE checkpoints as layers.
//!
//! [`Checkpoint::open`] reads a folder's `config.json`, its index and the headers of its safetensors files, and checks every
//! MoE layer against the configuration. [`Checkpoint::layer_weights`] and [`Checkpoint::router`] then hand out one layer as
//! [`LayerWeights`](moe_lora_core::LayerWeights) and [`RouterWeights`](moe_lora_core::RouterWeights), whose matrices are
//! views of the mapped files: one layer of a 60 GB checkpoint needs that layer's pages, not 60 GB.
//!
//! Known are Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2, DeepSeek-V3 and gpt-oss ([`Family`]), with a tensor for each
//! expert or with 3-D tensors of all experts, in f32, f16 or bf16. The experts of a model must have one format; the router
//! may have another and keeps it. Shared experts are the engine's business. Quantised checkpoints are refused.
//!
//! Of Qwen3-MoE and OLMoE the rest of the model can be read too: [`Checkpoint::decoder_config`],
//! [`Checkpoint::decoder_layer`] and [`Checkpoint::decoder_ends`].
//!
//! [`synthetic`] writes small checkpoints of every family for demos and tests.
//!
//! # Example
//!
//! ```
//! use moe_lora_core::LayerShape;
//! use moe_lora_model::synthetic::{TinyModel, write_checkpoint};
//! use moe_lora_model::{Checkpoint, Family};
//!
//! let folder = tempfile::tempdir()?;
//! write_checkpoint(folder.path(), &TinyModel::new(Family::Qwen3Moe, LayerShape::new(8, 2, 32, 16)?))?;
//!
//! let checkpoint = Checkpoint::open(folder.path())?;
//! let layer = checkpoint.layer_weights(checkpoint.first_moe_layer())?;
//! assert_eq!(layer.experts().len(), 8);
//! assert_eq!(layer.experts()[7].gate.shape(), [16, 32]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod checkpoint;
mod config;
mod convert;
mod decoder;
mod error;
mod experts;
mod family;
mod index;
mod load;
mod router;
pub mod synthetic;
mod tensors;

pub use checkpoint::Checkpoint;
pub use config::ModelConfig;
pub use decoder::{Attention, DecoderConfig, DecoderEnds, DecoderLayer, DenseMlp, QkNorm};
pub use error::ModelError;
pub use family::Family;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
