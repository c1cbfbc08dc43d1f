//! The CUDA device of moe-lora.
//!
//! [`Gpu::probe`] lists the GPUs of a machine and [`Gpu::open`] makes one ready, with every kernel loaded; both work on any
//! machine and give a typed reason ([`GpuError`]) where there is no driver, no GPU or no kernel image. Then there are
//! [`Stream`]s with [`Event`]s and [`Graph`]s, [`DeviceBuffer`]s shared out by a [`Layout`], [`PinnedBuffer`]s, and
//! [`Kernels::launch`], which takes the parameter structs of `moe-lora-kernels`.
//!
//! [`NcclComm`] is a rank's end of collectives between GPUs.
//!
//! Only the driver's own interface and NCCL's are used, each loaded when first needed: a program that links this crate starts without CUDA.
//! Addresses are plain numbers and order is stated by events; nothing is tracked behind the caller's back.
//!
//! # Example
//!
//! ```
//! use moe_lora_cuda::{Gpu, GpuError};
//!
//! match Gpu::open(0) {
//!     Ok(gpu) => {
//!         let (stream, buffer) = (gpu.stream()?, gpu.alloc(16)?);
//!         stream.upload(&buffer, 0, &[1.0_f32, 2.0, 3.0, 4.0])?;
//!         let mut back = [0.0_f32; 2];
//!         stream.download(&buffer, 8, &mut back)?;
//!         assert_eq!(back, [3.0, 4.0]);
//!     }
//!     Err(why) => println!("going on without a GPU: {why}"),
//! }
//! # Ok::<(), GpuError>(())
//! ```

mod error;
mod gpu;
mod kernels;
mod memory;
mod nccl;
mod nodes;
mod probe;
mod stream;
mod tensor_map;
pub mod testing;

pub use error::GpuError;
pub use gpu::Gpu;
pub use kernels::Kernels;
pub use memory::{ALIGNMENT, DeviceBuffer, Layout, PinnedBuffer};
pub use nccl::{NcclComm, NcclError, NcclId, nccl_version};
pub use nodes::GraphKernel;
pub use probe::DeviceInfo;
pub use stream::{Event, Graph, Stream};
pub use tensor_map::{Dimension, decode_down, decode_gate_up, decode_layer, prefill_down, prefill_gate_up, tensor_map};

pub use cudarc;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
