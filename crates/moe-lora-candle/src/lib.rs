//! [`FusedMoEWithLoRA`](moe_lora::FusedMoEWithLoRA) as a candle module: tensors in, tensors out, every token with its own
//! LoRA adapter or none.
//!
//! [`MoeWithLora`] stands where a candle model has its MoE block. It is made of a layer of a checkpoint
//! ([`MoeWithLora::new`]) or of a candle `VarBuilder` ([`MoeWithLora::from_var_builder`]); adapters live in a
//! [`moe_lora::AdapterPool`] beside it. Tensors are on candle's CPU device, in f32, f16 or bf16; inputs are read where they
//! lie. The layer itself may be on a GPU of [`moe_lora::Device`], which copies in and out.
//!
//! # Example
//!
//! See `README.md` for a whole program.
#![forbid(unsafe_code)]

mod module;
mod var_builder;

pub use module::{MoeWithLora, TensorRouting};
pub use var_builder::BlockConfig;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
