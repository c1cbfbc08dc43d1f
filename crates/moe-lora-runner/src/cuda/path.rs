//! Which kernels run a batch.

use super::raw::ForwardArgs;
use super::{decode, decode_layer, prefill};
use moe_lora_core::InputError;
use moe_lora_cuda::Gpu;
use moe_lora_kernels::{DecodePlan, Format, LayerPlan};
use std::fmt;

/// The kernels of a forward. All compute the same layer; which one is fastest depends on the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// Hopper's launch of a whole layer for up to 16 tokens.
    Layer,
    /// Hopper's three launches for few tokens.
    Decode,
    /// Those of every GPU.
    Portable,
    /// Hopper's products for experts with many rows.
    Prefill,
}

/// A path, with what its launches need.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kernels {
    Layer(LayerPlan),
    Decode(DecodePlan),
    Portable,
    Prefill,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Layer => "layer",
            Self::Decode => "decode",
            Self::Portable => "portable",
            Self::Prefill => "prefill",
        })
    }
}

impl Kernels {
    /// The kernels of `path`, or those that are fastest: a function of sizes, layout and GPU, never of routing or adapters.
    pub(super) fn of(gpu: &Gpu, format: Format, args: &ForwardArgs, path: Option<Path>) -> Result<Self, InputError> {
        // Parts of fully sharded adapters have the launches of every GPU alone, and one launch for all knows no other ranks' experts.
        let whole = args.adapter_parts <= 1;
        let all_here = args.first_expert == 0 && args.all_experts <= args.num_experts;
        let layer = || decode_layer::plan(gpu, format, args).filter(|_| whole && all_here);
        let decode = || decode::plan(gpu, format, args).filter(|_| whole);
        let prefill = whole && prefill::fits(gpu, format, args);
        let chosen = match path {
            None => {
                let few = decode_layer::few_ranks(args).then(layer).flatten().map(Self::Layer);
                few.or_else(|| decode::few_rows(args).then(decode).flatten().map(Self::Decode))
            }
            Some(Path::Layer) => Some(layer().map(Self::Layer).ok_or_else(|| misfit(Path::Layer, args))?),
            Some(Path::Decode) => Some(decode().map(Self::Decode).ok_or_else(|| misfit(Path::Decode, args))?),
            Some(Path::Portable) => Some(Self::Portable),
            Some(Path::Prefill) if prefill => Some(Self::Prefill),
            Some(Path::Prefill) => return Err(misfit(Path::Prefill, args)),
        };
        let many_rows = prefill && prefill::many_rows(args);
        Ok(chosen.unwrap_or(if many_rows { Self::Prefill } else { Self::Portable }))
    }

    pub(super) const fn path(&self) -> Path {
        match self {
            Self::Layer(_) => Path::Layer,
            Self::Decode(_) => Path::Decode,
            Self::Portable => Path::Portable,
            Self::Prefill => Path::Prefill,
        }
    }
}

fn misfit(path: Path, args: &ForwardArgs) -> InputError {
    let ForwardArgs { num_tokens, top_k, num_experts, max_rank, .. } = args;
    let found = format!("{num_tokens} tokens with {top_k} of {num_experts} experts, ranks up to {max_rank}");
    InputError::new(found, format!("a GPU, layer and batch that the {path} kernels can run")).in_tensor("path")
}
