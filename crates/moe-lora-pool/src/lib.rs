//! A byte-budgeted pool of LoRA adapters: exact ranks, LRU eviction, pins, leases and atomic replace.
//!
//! An [`AdapterPool`] owns the adapters of one model. [`load`](AdapterPool::load) checks an adapter, packs it into exactly the
//! bytes that its own ranks need, in the format the model computes in, and hands out an
//! [`AdapterId`](moe_lora_core::AdapterId). A batch takes a [`Lease`]; what it leases is neither evicted nor freed until
//! the lease drops. If the budget is full, the adapters that were not used for the longest time go, but never one that is
//! pinned or leased. A call that fails leaves the pool as it was.
//!
//! An [`AdapterLibrary`] above it knows any number of adapters by name: it reads and packs them when somebody asks, keeps
//! packed ones in host memory, admits requests in a fair order and gives adapters new versions while they are served.
//!
//! What stays and what goes is decided in one pure place that knows bytes, slots, uses, pins and leases; the [`Memory`]
//! below it only stores and frees. The memory is the host's ([`HostMemory`]) or, with the feature `cuda`, a GPU's
//! (`CudaMemory`).
//!
//! # Example
//!
//! ```
//! use moe_lora_core::{
//!     AdapterLayer, AdapterWeights, DType, ExpertLora, LayerShape, Lora, Matrix, ModelShape, Projection, TokenAdapters,
//! };
//! use moe_lora_pool::{AdapterPool, HostMemory, PoolConfig};
//! use std::collections::BTreeMap;
//!
//! let shape = ModelShape::uniform(LayerShape::new(2, 1, 8, 4)?, 1, DType::Bf16);
//! let pool = AdapterPool::new(HostMemory, &shape, PoolConfig { bytes: 1 << 20, ..PoolConfig::default() })?;
//!
//! let down = Lora::new(Matrix::from_vec(vec![0.1_f32; 4], 1, 4)?, Matrix::from_vec(vec![0.1_f32; 8], 8, 1)?, 2.0)?;
//! let experts = vec![ExpertLora::default(), ExpertLora { down: Some(down), ..Default::default() }];
//! let layers = BTreeMap::from([(0, AdapterLayer::new(&shape.layer, experts)?)]);
//! let math = pool.load("math", AdapterWeights::new(&shape, layers)?)?;
//! assert_eq!(pool.snapshot().used_bytes, 2 * (4 + 8), "rank 1, bf16");
//!
//! let lease = pool.lease(&TokenAdapters::from_ids(&[None, Some(math)]))?;
//! let table = lease.table(0)?;
//! assert!(table.get(math.slot as i32, 1, Projection::Down).is_some());
//! assert!(table.get(math.slot as i32, 0, Projection::Down).is_none(), "absent is no change");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(unsafe_code)]

mod check;
mod config;
#[cfg(feature = "cuda")]
mod device_table;
mod error;
mod lease;
mod library;
mod memory;
mod policy;
mod pool;
mod shared;
mod snapshot;

pub use config::{Eviction, PoolConfig};
#[cfg(feature = "cuda")]
pub use device_table::DeviceTable;
pub use error::PoolError;
pub use lease::Lease;
pub use library::{
    AdapterLibrary, AdapterState, Admission, Counters, Held, LibraryConfig, LibraryEntry, LibrarySnapshot, Source,
    Tier, Waiting,
};
#[cfg(feature = "cuda")]
pub use memory::cuda::{CudaMemory, TableAddress};
pub use memory::{HostMemory, Memory};
pub use pool::{AdapterPool, PackedAdapter};
pub use snapshot::{AdapterSnapshot, PoolSnapshot};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
