//! The CPU backend.

mod align;
mod align_block;
mod logits;
mod topk;

pub use align::Aligner;
pub use align_block::{AlignBlockInput, AlignBlockOutput, max_num_tokens_padded, moe_lora_align_block_size};
pub use logits::{route, router_logits};
pub use topk::topk;
