//! What a whole model has beside its experts: attention, norms, embeddings, dense layers.

mod config;
mod weights;

pub use config::{DecoderConfig, QkNorm};
pub(crate) use config::{config, token_ids};
pub use weights::{Attention, DecoderEnds, DecoderLayer, DenseMlp};
pub(crate) use weights::{ends, layer};
