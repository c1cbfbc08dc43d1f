//! Serve many LoRA adapters at once on the expert layers of Mixture-of-Experts models.
//!
//! In one batch every token names its own adapter, or none; each adapter changes every expert; the layer still runs as a
//! few fused stages. This crate re-exports the parts that a program needs; each also stands alone as its own crate.
//!
//! # Example
//!
//! ```no_run
//! use moe_lora::{AdapterPool, Checkpoint, Device, FusedMoEWithLoRA, PeftAdapter, PoolConfig, Routing, TokenAdapters};
//!
//! let device = Device::best();
//! let model = Checkpoint::open("Qwen3-30B-A3B")?;
//! let limits = PoolConfig { bytes: 8 << 30, max_rank: 64, ..Default::default() }; // low limits run faster on a GPU
//! let pool = AdapterPool::new(&device, model.shape(), limits)?;
//! let math = pool.load("math", PeftAdapter::open("adapters/math")?.resolve(model.shape())?)?;
//!
//! let n = model.first_moe_layer();
//! let layer = FusedMoEWithLoRA::new(n, model.layer_weights(n)?, &device, &pool)?.with_router(model.router(n)?)?;
//!
//! let tokens = TokenAdapters::from_ids(&[None, Some(math), Some(math)]);
//! let hidden = vec![0.1_f32; 3 * layer.shape().hidden_size];
//! let mut out = vec![0.0_f32; hidden.len()];
//! layer.forward(&hidden, Routing::Router, &tokens, &mut out)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub use moe_lora_adapter::{AdapterError, PeftAdapter};
pub use moe_lora_core::{
    Activation, AdapterId, AdapterLayer, AdapterTable, AdapterWeights, Buffer, DType, Element, ExpertBias, ExpertLora,
    ExpertWeights, InputError, LayerShape, LayerWeights, Lora, Matrix, ModelShape, Projection, RouterConfig,
    RouterWeightPlacement, RouterWeights, Routing, Shard, TokenAdapters, TopK,
};
#[cfg(feature = "cuda")]
pub use moe_lora_layer::LayerGraph;
pub use moe_lora_layer::{FusedMoEWithLoRA, LayerError};
pub use moe_lora_model::{Checkpoint, ModelError};
pub use moe_lora_pool::{
    AdapterLibrary, AdapterPool, Admission, Eviction, Held, Lease, LibraryConfig, PoolConfig, PoolError, Source, Tier,
};
pub use moe_lora_runner::{Batch, Device, Limits, MoeRunner, RunnerError};
#[cfg(feature = "cuda")]
pub use moe_lora_runner::{CapturedForward, CudaRunner, CudaWeights, raw, slices};

pub use moe_lora_adapter as adapter;
pub use moe_lora_collective as collective;
pub use moe_lora_gemm as gemm;
pub use moe_lora_model as model;
pub use moe_lora_pool as pool;
pub use moe_lora_reference as reference;
pub use moe_lora_route as route;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
