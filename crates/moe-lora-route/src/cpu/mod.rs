//! The CPU backend.

mod align;
mod align_block;
mod logits;
mod topk;

#[cfg(feature = "cuda")]
pub(crate) use align_block::check as check_align_block;

pub use align::Aligner;
pub use align_block::{AlignBlockInput, AlignBlockOutput, max_num_tokens_padded, moe_lora_align_block_size};
pub use logits::{route, router_logits};
pub use topk::topk;
