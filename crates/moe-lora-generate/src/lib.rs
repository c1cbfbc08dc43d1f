//! Whole Mixture-of-Experts models that generate text, each request of a batch with its own LoRA adapter.
//!
//! [`Engine`] opens a Qwen3-MoE or OLMoE checkpoint with its tokenizer and answers requests by continuous batching: a
//! request joins at the next step and leaves when it is done, its adapter is read by another thread while the others
//! generate, and one that fails leaves the others as they were. Experts run in [`moe_lora::FusedMoEWithLoRA`], on its
//! devices; attention, with its own adapters, and the rest run on the processor.
//!
//! On the processor a request's tokens are the same, bit for bit, whoever shares its batch and however its prompt is cut
//! into steps. [`Decoder`] is the model alone, for programs that batch themselves.
//!
//! # Example
//!
//! ```no_run
//! use moe_lora_generate::{Engine, Event, Options, Prompt, Request};
//!
//! let mut engine = Engine::open("Qwen3-30B-A3B", Options::default(), |done, all| eprintln!("{done} of {all} layers"))?;
//! engine.register("math", "adapters/math");
//! engine.submit(Request::new(Prompt::Text("The capital of France is".into()), None));
//! engine.submit(Request::new(Prompt::Text("2 + 2 =".into()), Some("math")));
//! while !engine.is_idle() {
//!     for event in engine.step()? {
//!         match event {
//!             Event::Finished { id, completion, .. } => println!("{id}: {}", completion.text),
//!             Event::Failed { id, error } => eprintln!("{id}: {error}"),
//!             _ => {}
//!         }
//!     }
//! }
//! # Ok::<(), moe_lora_generate::GenerateError>(())
//! ```
#![forbid(unsafe_code)]

mod adapters;
mod attention;
mod cache;
mod decoder;
mod engine;
mod error;
mod math;
mod request;
mod sample;
mod text;

pub use cache::KvCache;
pub use decoder::{Decoder, Part, PartAdapter, StepOutput};
pub use engine::{Engine, Options, Statistics};
pub use error::{GenerateError, RequestError};
pub use request::{Completion, Event, Finish, Prompt, Request, RequestId};
pub use sample::Sampling;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
