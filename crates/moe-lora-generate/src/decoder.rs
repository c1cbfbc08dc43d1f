//! A whole decoder: embedding, layers, head.

mod step;

pub use step::{Part, PartAdapter, StepOutput};

use crate::math::Rotations;
use crate::{GenerateError, KvCache};
use moe_lora::model::{DecoderConfig, DecoderEnds, DecoderLayer};
use moe_lora::{AdapterPool, Checkpoint, DType, Device, FusedMoEWithLoRA, InputError, Limits};

/// A decoder whose sequences each have their own adapter. Experts run on the pool's device, the rest on the processor.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    dtype: DType,
    ends: DecoderEnds,
    layers: Vec<Layer>,
    rotations: Rotations,
}

#[derive(Debug)]
struct Layer {
    weights: DecoderLayer,
    /// `None` in dense layers.
    experts: Option<FusedMoEWithLoRA>,
}

impl Decoder {
    /// Reads a checkpoint; `progress(done, all)` hears of every layer. Steps of more than `max_tokens` tokens run their
    /// experts in pieces.
    ///
    /// # Errors
    /// If the family is not one whose whole model is known, a tensor is missing or wrong, or the device cannot hold it.
    pub fn new(
        checkpoint: &Checkpoint,
        device: &Device,
        pool: &AdapterPool,
        limits: Limits,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, GenerateError> {
        let config = checkpoint.decoder_config()?;
        let ends = checkpoint.decoder_ends()?;
        let all = config.num_hidden_layers;
        let mut layers: Vec<Layer> = Vec::with_capacity(all);
        for n in 0..all {
            progress(n, all);
            let weights = checkpoint.decoder_layer(n)?;
            let mut experts = None;
            if weights.mlp.is_none() {
                let layer = FusedMoEWithLoRA::with_limits(n, checkpoint.layer_weights(n)?, device, pool, limits)?;
                let layer = layer.with_router(checkpoint.router(n)?)?;
                experts = Some(match layers.iter().find_map(|l| l.experts.as_ref()) {
                    Some(other) => layer.sharing_workspace_with(other)?,
                    None => layer,
                });
            }
            layers.push(Layer { weights, experts });
        }
        progress(all, all);
        let rotations = Rotations::new(config.head_dim, config.rope_theta, config.rope_factor);
        Ok(Self { dtype: checkpoint.shape().dtype, ends, layers, rotations, config })
    }

    /// Sizes and settings.
    #[must_use]
    pub const fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The format of its weights and caches.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// The embedding of a token that is in the vocabulary.
    fn embed(&self, token: u32) -> impl Iterator<Item = f32> + use<'_> {
        let matrix = &self.ends.embed_tokens;
        let first = token as usize * matrix.row_stride();
        let numbers = matrix.slice();
        (first..first + matrix.cols()).map(move |i| numbers.get(i))
    }

    /// `[out, in]` of a decoder layer's module outside the experts, for adapters: what
    /// [`PeftAdapter::resolve_linear`](moe_lora::PeftAdapter::resolve_linear) asks for.
    #[must_use]
    pub fn module_shape(&self, layer: usize, module: &str) -> Option<[usize; 2]> {
        module_shape(&self.config, layer, module)
    }

    /// An empty cache for a sequence of `capacity` tokens.
    #[must_use]
    pub fn new_cache(&self, capacity: usize) -> KvCache {
        KvCache::new(&self.config, self.dtype, capacity)
    }

    /// Runs new tokens of some sequences through the model, all in one batch. Logits come for the last token of each part
    /// that asks for them. On the processor a sequence's bits do not depend on the other parts, nor on how its tokens are
    /// cut into steps.
    ///
    /// The adapters must be loaded in the pool, and [leased](moe_lora::AdapterPool::lease) until this returns.
    ///
    /// # Errors
    /// If a token is outside the vocabulary, a cache is full or an adapter is not loaded, or a layer fails; caches are
    /// unspecified then.
    pub fn forward(&self, parts: &mut [Part<'_>]) -> Result<StepOutput, GenerateError> {
        for part in parts.iter() {
            let room = part.cache.capacity() - part.cache.len();
            if part.tokens.is_empty() || part.tokens.len() > room {
                let found = format!("{} new tokens", part.tokens.len());
                return Err(InputError::new(found, format!("1 to {room}, what the cache has room for")).into());
            }
            check_tokens(part.tokens, self.config.vocab_size)?;
        }
        match self.dtype {
            DType::Bf16 => step::run::<half::bf16>(self, parts),
            // Activations of f16 models stay in f32, whose range they may need.
            DType::F32 | DType::F16 => step::run::<f32>(self, parts),
        }
    }
}

/// That all tokens are in the vocabulary.
pub(crate) fn check_tokens(tokens: &[u32], vocab_size: usize) -> Result<(), InputError> {
    match tokens.iter().find(|&&t| t as usize >= vocab_size) {
        Some(token) => Err(InputError::new(format!("token {token}"), format!("tokens below {vocab_size}"))),
        None => Ok(()),
    }
}

/// `[out, in]` of a module outside the experts to which adapters apply.
pub(crate) fn module_shape(config: &DecoderConfig, layer: usize, module: &str) -> Option<[usize; 2]> {
    let h = config.hidden_size;
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    if layer >= config.num_hidden_layers {
        return None;
    }
    let dense = config.dense_layers.binary_search(&layer).ok().map(|_| config.dense_intermediate_size);
    match (module, dense) {
        ("self_attn.q_proj", _) => Some([q, h]),
        ("self_attn.k_proj" | "self_attn.v_proj", _) => Some([kv, h]),
        ("self_attn.o_proj", _) => Some([h, q]),
        ("mlp.gate_proj" | "mlp.up_proj", Some(i)) => Some([i, h]),
        ("mlp.down_proj", Some(i)) => Some([h, i]),
        _ => None,
    }
}
