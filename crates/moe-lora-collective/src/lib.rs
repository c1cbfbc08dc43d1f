//! Collectives between the ranks of a parallel group.
//!
//! A [`Communicator`] is one rank's end of a group whose ranks all call the same collectives in the same order. There are three:
//! [`Single`], a group of one; [`ThreadCommunicator`], ranks that are threads of one process; and `NcclCommunicator` (feature
//! `cuda`), ranks that each have a GPU, in one process or many. Sums are f32.
//!
//! No rank waits for one that is gone: a rank that [fails](Communicator::fail), [aborts](Communicator::abort), dies or is
//! silent for too long ends in a [`CollectiveError`] on all the others.
//!
//! # Example
//!
//! ```
//! use moe_lora_collective::{Communicator, ThreadCommunicator};
//!
//! let ranks = ThreadCommunicator::group(3);
//! std::thread::scope(|scope| {
//!     for communicator in ranks {
//!         scope.spawn(move || {
//!             let mut values = [communicator.rank() as f32];
//!             communicator.all_reduce(&mut values)?;
//!             assert_eq!(values, [3.0]);
//!             Ok::<(), moe_lora_collective::CollectiveError>(())
//!         });
//!     }
//! });
//! ```
#![forbid(unsafe_code)]

mod communicator;
mod error;
#[cfg(feature = "cuda")]
mod nccl;
pub mod rendezvous;
mod threads;

#[cfg(feature = "cuda")]
pub use communicator::GpuCommunicator;
pub use communicator::{Communicator, Single};
pub use error::CollectiveError;
#[cfg(feature = "cuda")]
pub use nccl::NcclCommunicator;
pub use threads::ThreadCommunicator;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
