//! Files that come from strangers, read without trust.
//!
//! [`SafetensorsFile`] opens a safetensors file, checks its whole header within fixed limits and reads single tensors;
//! [`SafetensorsFile::map`] maps it instead, for checkpoints larger than memory. [`read_json`] and [`contained_path`] do the
//! same for configuration files and for paths that a file names. [`write_whole`] writes a file beside its destination and
//! renames it, so that nobody ever sees half of it.
//!
//! Whatever is wrong ends in an [`InputError`](moe_lora_core::InputError) that names the file; nothing panics, and memory
//! stays below four times the header.
//!
//! # Example
//!
//! ```
//! use moe_lora_files::SafetensorsFile;
//!
//! let error = SafetensorsFile::from_bytes("weights.safetensors", vec![0; 4]).unwrap_err();
//! assert!(error.to_string().starts_with("weights.safetensors: found 4 bytes"));
//! ```

mod header;
mod json;
mod map;
mod paths;
mod safetensors_file;

pub use header::{MAX_HEADER_BYTES, TensorInfo};
pub use json::{MAX_JSON_BYTES, read_json};
pub use paths::{contained_path, write_whole};
pub use safetensors::Dtype;
pub use safetensors_file::SafetensorsFile;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
