//! What the benchmarks of moe-lora run on: layers of real models' sizes, drawn batches, and what these cost at least.
#![forbid(unsafe_code)]

mod compare;
mod draw;
mod floor;
mod plot;
mod presets;
mod rows;
mod steps;
mod traffic;
mod work;

pub use compare::{Peers, compare};
pub use draw::{Routes, draw_slots, spread};
pub use floor::{Ceilings, Touched};
pub use plot::{plots, plots_beside};
pub use presets::{AdapterSet, OLMOE, PRESETS, Preset, TOKENS};
pub use rows::{Card, Row, Run, StageTime, bands, geometric_mean};
pub use steps::steps;
pub use traffic::{Traffic, mixed_ranks_in, zipf};
pub use work::{Work, count};

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
