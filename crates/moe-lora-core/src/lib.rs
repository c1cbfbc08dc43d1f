//! The vocabulary of moe-lora.
//!
//! Every crate of the workspace speaks in these types: [`LayerShape`] and [`ModelShape`] for sizes, [`Matrix`] for
//! weights that own or share their bytes, [`LayerWeights`] for one MoE layer, [`AdapterWeights`] for one LoRA adapter
//! in canonical form, [`RouterConfig`] and [`Routing`] for expert choice, [`RowMap`] for the sorted work of a batch,
//! [`Shard`] for the part that a rank of a parallel group holds, and [`InputError`] for everything that can be wrong with what a user hands in.
//!
//! The crate knows no backend, opens no files and holds no `unsafe`.
//!
//! # Example
//!
//! ```
//! use moe_lora_core::{Lora, Matrix};
//!
//! let a = Matrix::from_vec(vec![0.5_f32; 2 * 8], 2, 8)?; // [rank, in]
//! let b = Matrix::from_vec(vec![0.25_f32; 4 * 2], 4, 2)?; // [out, rank]
//! let lora = Lora::new(a, b, 2.0)?;
//! assert_eq!((lora.rank(), lora.in_features(), lora.out_features()), (2, 8, 4));
//! # Ok::<(), moe_lora_core::InputError>(())
//! ```
#![forbid(unsafe_code)]

mod activation;
mod adapter;
mod dtype;
mod error;
mod matrix;
mod router;
mod row_map;
mod shape;
mod shard;
mod table;
mod weights;

pub use activation::Activation;
pub use adapter::{AdapterLayer, AdapterWeights, ExpertLora, Lora, Projection};
pub use dtype::{DType, Element, Slice};
pub use error::InputError;
pub use matrix::{Buffer, Matrix, MatrixRef};
pub use router::{GroupLimit, GroupScore, RouterConfig, RouterWeights, Routing, Scoring, TopK};
pub use row_map::{ExpertRows, RowMap, Segment};
pub use shape::{AdapterPart, ExpertStorage, LayerShape, ModelShape};
pub use shard::{Shard, Share};
pub use table::{AdapterId, AdapterTable, TokenAdapters};
pub use weights::{ExpertBias, ExpertWeights, LayerWeights, RouterWeightPlacement};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
