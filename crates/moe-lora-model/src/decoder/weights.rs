//! The tensors of a whole decoder beside its experts.

use super::{DecoderConfig, QkNorm};
use crate::convert::{Block, to_f32};
use crate::tensors::{Tensor, Tensors};
use moe_lora_core::{DType, InputError, Matrix};
use std::collections::HashSet;

/// Attention of one layer.
#[derive(Debug, Clone)]
pub struct Attention {
    /// `[heads * head_dim, H]`.
    pub q_proj: Matrix,
    /// `[kv heads * head_dim, H]`.
    pub k_proj: Matrix,
    /// `[kv heads * head_dim, H]`.
    pub v_proj: Matrix,
    /// `[H, heads * head_dim]`.
    pub o_proj: Matrix,
    /// Biases of q, k, v and o, if the model has them.
    pub bias: Option<[Vec<f32>; 4]>,
    /// Weight of the queries' norm: `[head_dim]` or `[heads * head_dim]`, see [`QkNorm`].
    pub q_norm: Vec<f32>,
    /// Weight of the keys' norm.
    pub k_norm: Vec<f32>,
}

/// The feed-forward part of a layer without experts.
#[derive(Debug, Clone)]
pub struct DenseMlp {
    /// `[I, H]`.
    pub gate_proj: Matrix,
    /// `[I, H]`.
    pub up_proj: Matrix,
    /// `[H, I]`.
    pub down_proj: Matrix,
}

/// A decoder layer without its router and routed experts.
#[derive(Debug, Clone)]
pub struct DecoderLayer {
    /// Weight of the norm before attention, `[H]`.
    pub input_layernorm: Vec<f32>,
    /// Attention.
    pub attention: Attention,
    /// Weight of the norm before the feed-forward part, `[H]`.
    pub post_attention_layernorm: Vec<f32>,
    /// The feed-forward part of a dense layer; `None` where there are experts.
    pub mlp: Option<DenseMlp>,
}

/// What is before the first layer and after the last.
#[derive(Debug, Clone)]
pub struct DecoderEnds {
    /// `[V, H]`.
    pub embed_tokens: Matrix,
    /// Weight of the last norm, `[H]`.
    pub norm: Vec<f32>,
    /// `[V, H]`; the embedding itself where the model ties them.
    pub lm_head: Matrix,
}

/// Tensors under one prefix, all to be used.
struct Reader<'a> {
    tensors: &'a Tensors,
    prefix: &'a str,
    /// The format of the model's matrices.
    dtype: DType,
    used: HashSet<&'a str>,
}

impl<'a> Reader<'a> {
    fn find(&mut self, name: &str, want: &[usize], meaning: &str) -> Result<Tensor<'a>, InputError> {
        let tensor = self.tensors.require(&format!("{}{name}", self.prefix))?;
        tensor.expect_shape(want, meaning)?;
        self.used.insert(tensor.name());
        Ok(tensor)
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2], meaning: &str) -> Result<Matrix, InputError> {
        let tensor = self.find(&format!("{name}.weight"), &shape, meaning)?;
        let found = tensor.dtype()?;
        if found != self.dtype {
            return Err(tensor.wrong(found.to_string(), format!("{}, as the experts", self.dtype)));
        }
        Block::new(tensor)?.matrix(0, shape[0], shape[1])
    }

    fn vector(&mut self, name: &str, len: usize, meaning: &str) -> Result<Vec<f32>, InputError> {
        to_f32(self.find(name, &[len], meaning)?)
    }

    /// Refuses tensors that nothing used, but for those that `known` takes.
    fn finish(self, known: impl Fn(&str) -> bool) -> Result<(), InputError> {
        let rest = |t: &Tensor<'_>| {
            let name = t.name().get(self.prefix.len()..).unwrap_or_default();
            !self.used.contains(t.name()) && !name.ends_with("rotary_emb.inv_freq") && !known(name)
        };
        match self.tensors.with_prefix(self.prefix).find(rest) {
            None => Ok(()),
            Some(tensor) => Err(tensor.wrong("a tensor that the model by config.json does not have", "none")),
        }
    }
}

/// Reads the layer whose names start with `prefix`.
pub(crate) fn layer(
    tensors: &Tensors,
    config: &DecoderConfig,
    dtype: DType,
    prefix: &str,
    number: usize,
) -> Result<DecoderLayer, InputError> {
    let h = config.hidden_size;
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let mut read = Reader { tensors, prefix, dtype, used: HashSet::new() };
    let [q_norm, k_norm] = match config.qk_norm {
        QkNorm::EachHead => [config.head_dim; 2],
        QkNorm::AllHeads => [q, kv],
    };
    let bias = match config.attention_bias {
        false => None,
        true => {
            let mut bias = |name: &str, len| read.vector(&format!("self_attn.{name}_proj.bias"), len, "[out]");
            Some([bias("q", q)?, bias("k", kv)?, bias("v", kv)?, bias("o", h)?])
        }
    };
    let attention = Attention {
        q_proj: read.matrix("self_attn.q_proj", [q, h], "[heads * head_dim, H]")?,
        k_proj: read.matrix("self_attn.k_proj", [kv, h], "[kv heads * head_dim, H]")?,
        v_proj: read.matrix("self_attn.v_proj", [kv, h], "[kv heads * head_dim, H]")?,
        o_proj: read.matrix("self_attn.o_proj", [h, q], "[H, heads * head_dim]")?,
        bias,
        q_norm: read.vector("self_attn.q_norm.weight", q_norm, "width of the queries' norm")?,
        k_norm: read.vector("self_attn.k_norm.weight", k_norm, "width of the keys' norm")?,
    };
    let dense = config.dense_layers.binary_search(&number).is_ok();
    let mlp = match dense {
        false => None,
        true => {
            let i = config.dense_intermediate_size;
            Some(DenseMlp {
                gate_proj: read.matrix("mlp.gate_proj", [i, h], "[I, H]")?,
                up_proj: read.matrix("mlp.up_proj", [i, h], "[I, H]")?,
                down_proj: read.matrix("mlp.down_proj", [h, i], "[H, I]")?,
            })
        }
    };
    let layer = DecoderLayer {
        input_layernorm: read.vector("input_layernorm.weight", h, "[H]")?,
        attention,
        post_attention_layernorm: read.vector("post_attention_layernorm.weight", h, "[H]")?,
        mlp,
    };
    // Routers and experts were checked when the checkpoint was opened.
    read.finish(|name| !dense && name.starts_with("mlp."))?;
    Ok(layer)
}

/// Reads what stands under `root` (`model.`), and the head.
pub(crate) fn ends(
    tensors: &Tensors,
    config: &DecoderConfig,
    dtype: DType,
    root: &str,
) -> Result<DecoderEnds, InputError> {
    let shape = [config.vocab_size, config.hidden_size];
    let mut read = Reader { tensors, prefix: root, dtype, used: HashSet::new() };
    let embed_tokens = read.matrix("embed_tokens", shape, "[V, H]")?;
    let norm = read.vector("norm.weight", config.hidden_size, "[H]")?;
    let lm_head = if config.tie_word_embeddings {
        embed_tokens.clone()
    } else {
        Reader { tensors, prefix: "", dtype, used: HashSet::new() }.matrix("lm_head", shape, "[V, H]")?
    };
    Ok(DecoderEnds { embed_tokens, norm, lm_head })
}
