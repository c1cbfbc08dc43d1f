//! A whole Qwen3-MoE or OLMoE decoder of candle's operations, with [`MoeWithLora`] where its experts are.

use candle_core::{D, DType, Device, Error, IndexOp, Result, Tensor, bail};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use candle_nn::rotary_emb::rope;
use moe_lora::model::{DecoderConfig, DecoderLayer, QkNorm};
use moe_lora::{AdapterId, AdapterPool, Checkpoint, FusedMoEWithLoRA, Matrix, PeftAdapter, TokenAdapters};
use moe_lora_candle::{MoeWithLora, TensorRouting};
use std::collections::HashMap;
use std::ops::Range;

const ATTENTION: [&str; 4] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
const DENSE: [&str; 3] = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];

pub(crate) struct Model {
    config: DecoderConfig,
    device: Device,
    /// Of weights, caches and what goes into projections; the residual stream is f32.
    dtype: DType,
    embed: Tensor,
    head: Tensor,
    norm: Tensor,
    layers: Vec<Layer>,
    /// Of every position, `[positions, head_dim / 2]`.
    rotations: [Tensor; 2],
    pool: AdapterPool,
}

struct Layer {
    norms: [Tensor; 2],
    /// Of queries and keys.
    qk_norms: [Tensor; 2],
    /// q, k, v, o.
    attention: [Linear; 4],
    feed_forward: FeedForward,
}

enum FeedForward {
    Experts(Box<MoeWithLora>),
    /// gate, up, down.
    Dense([Linear; 3]),
}

struct Linear {
    module: &'static str,
    /// `[out, in]`.
    weight: Tensor,
    bias: Option<Tensor>,
}

/// An adapter: its experts in the pool, the rest as tensors.
pub(crate) struct Adapter {
    id: AdapterId,
    /// A `[r, in]`, B `[out, r]` and the scale, by layer and module.
    linear: HashMap<(usize, &'static str), (Tensor, Tensor, f64)>,
}

/// A text as it grows.
pub(crate) struct Sequence<'a> {
    pub(crate) tokens: Vec<u32>,
    pub(crate) adapter: Option<&'a Adapter>,
    /// Tokens that the model has seen.
    seen: usize,
    /// Keys and values `[kv heads, seen, head_dim]` of every layer.
    cache: Vec<Option<[Tensor; 2]>>,
}

impl<'a> Sequence<'a> {
    pub(crate) const fn new(tokens: Vec<u32>, adapter: Option<&'a Adapter>) -> Self {
        Self { tokens, adapter, seen: 0, cache: Vec::new() }
    }
}

/// What all layers of a step share.
struct Step {
    /// Rows of every sequence.
    spans: Vec<Range<usize>>,
    tokens: TokenAdapters,
    cos: Tensor,
    sin: Tensor,
}

impl Model {
    /// Reads a checkpoint to candle's `device`, which is its CPU device; experts go to `experts_on`.
    pub(crate) fn open(folder: &str, device: &Device, experts_on: &moe_lora::Device) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder).map_err(Error::wrap)?;
        let shape = checkpoint.shape();
        let pool = AdapterPool::new(experts_on, shape, Default::default()).map_err(Error::wrap)?;
        let config = checkpoint.decoder_config().map_err(Error::wrap)?;
        let ends = checkpoint.decoder_ends().map_err(Error::wrap)?;
        let dtype = match shape.dtype {
            moe_lora::DType::F32 => DType::F32,
            moe_lora::DType::F16 => DType::F16,
            moe_lora::DType::Bf16 => DType::BF16,
        };
        let matrix = |m: &Matrix| tensor(m, dtype, device);
        let row = |values: &[f32]| Tensor::from_slice(values, values.len(), device);
        let mut layers: Vec<Layer> = Vec::new();
        for n in 0..config.num_hidden_layers {
            let DecoderLayer { input_layernorm, attention: a, post_attention_layernorm, mlp } =
                checkpoint.decoder_layer(n).map_err(Error::wrap)?;
            let bias = |i: usize| a.bias.as_ref().map(|b| row(&b[i])?.to_dtype(dtype)).transpose();
            let project = |i: usize, weight: &Matrix| {
                Ok::<_, Error>(Linear { module: ATTENTION[i], weight: matrix(weight)?, bias: bias(i)? })
            };
            let attention =
                [project(0, &a.q_proj)?, project(1, &a.k_proj)?, project(2, &a.v_proj)?, project(3, &a.o_proj)?];
            let feed_forward = match mlp {
                Some(mlp) => {
                    let dense = |i: usize, weight: &Matrix| {
                        Ok::<_, Error>(Linear { module: DENSE[i], weight: matrix(weight)?, bias: None })
                    };
                    FeedForward::Dense([dense(0, &mlp.gate_proj)?, dense(1, &mlp.up_proj)?, dense(2, &mlp.down_proj)?])
                }
                None => {
                    let weights = checkpoint.layer_weights(n).map_err(Error::wrap)?;
                    let layer = FusedMoEWithLoRA::new(n, weights, experts_on, &pool).map_err(Error::wrap)?;
                    let layer = layer.with_router(checkpoint.router(n).map_err(Error::wrap)?).map_err(Error::wrap)?;
                    let other = layers.iter().find_map(|l| match &l.feed_forward {
                        FeedForward::Experts(block) => Some(block.layer()),
                        FeedForward::Dense(_) => None,
                    });
                    FeedForward::Experts(Box::new(MoeWithLora::new(match other {
                        Some(other) => layer.sharing_workspace_with(other).map_err(Error::wrap)?,
                        None => layer,
                    })))
                }
            };
            layers.push(Layer {
                norms: [row(&input_layernorm)?, row(&post_attention_layernorm)?],
                qk_norms: [row(&a.q_norm)?, row(&a.k_norm)?],
                attention,
                feed_forward,
            });
        }
        let angles: Vec<f32> = (0..config.max_position_embeddings)
            .flat_map(|position| {
                let (dim, theta) = (config.head_dim, f64::from(config.rope_theta));
                let at = position as f32;
                let frequency = move |i: usize| theta.powf(-2.0 * i as f64 / dim as f64) as f32;
                (0..dim / 2).map(move |i| at * (frequency(i) / config.rope_factor))
            })
            .collect();
        let angles = Tensor::from_vec(angles, (config.max_position_embeddings, config.head_dim / 2), device)?;
        Ok(Self {
            device: device.clone(),
            dtype,
            embed: matrix(&ends.embed_tokens)?,
            head: matrix(&ends.lm_head)?,
            norm: row(&ends.norm)?,
            layers,
            rotations: [angles.cos()?, angles.sin()?],
            pool,
            config,
        })
    }

    pub(crate) const fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Reads an adapter's experts to the pool, and the rest to candle's device.
    pub(crate) fn load(&self, name: &str, folder: &str) -> Result<Adapter> {
        let adapter = PeftAdapter::open(folder).map_err(Error::wrap)?;
        let weights = adapter.resolve(self.pool.shape()).map_err(Error::wrap)?;
        let of = |layer: usize| -> Vec<&Linear> {
            let layer = &self.layers[layer];
            let dense = match &layer.feed_forward {
                FeedForward::Dense(linears) => &linears[..],
                FeedForward::Experts(_) => &[],
            };
            layer.attention.iter().chain(dense).collect()
        };
        let shape_of = |layer: usize, module: &str| {
            let linear = (layer < self.layers.len()).then(|| of(layer).into_iter().find(|l| l.module == module))??;
            linear.weight.dims2().ok().map(Into::into)
        };
        let found = adapter.resolve_linear(self.pool.shape().dtype, shape_of).map_err(Error::wrap)?;
        if let Some(other) = found.left().first() {
            bail!("adapter {name}: {other} changes what this model does not adapt");
        }
        let mut linear = HashMap::new();
        for layer in 0..self.layers.len() {
            for module in of(layer).into_iter().map(|l| l.module) {
                if let Some(lora) = found.get(layer, module) {
                    let [a, b] = [lora.a(), lora.b()].map(|m| tensor(m, self.dtype, &self.device));
                    linear.insert((layer, module), (a?, b?, f64::from(lora.scale())));
                }
            }
        }
        Ok(Adapter { id: self.pool.load(name, weights).map_err(Error::wrap)?, linear })
    }

    /// Runs what the sequences have new through the model, as one batch. Logits `[sequences, V]`, f32.
    pub(crate) fn step(&self, sequences: &mut [Sequence<'_>]) -> Result<Tensor> {
        let (mut spans, mut ids, mut positions, mut adapters) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for s in sequences.iter() {
            let new = s.tokens.len() - s.seen;
            spans.push(ids.len()..ids.len() + new);
            ids.extend_from_slice(&s.tokens[s.seen..]);
            positions.extend((s.seen..s.tokens.len()).map(|position| position as u32));
            adapters.extend(std::iter::repeat_n(s.adapter.map(|a| a.id), new));
        }
        let positions = Tensor::from_vec(positions, ids.len(), &self.device)?;
        let [cos, sin] = [0, 1].map(|i| self.rotations[i].index_select(&positions, 0));
        let step = Step { spans, tokens: TokenAdapters::from_ids(&adapters), cos: cos?, sin: sin? };
        let ids = Tensor::new(ids, &self.device)?;
        let mut hidden = self.embed.index_select(&ids, 0)?.to_dtype(DType::F32)?;
        for (n, layer) in self.layers.iter().enumerate() {
            let x = self.normed(&hidden, &layer.norms[0])?;
            hidden = (hidden + self.attention(n, layer, &x, &step, sequences)?.to_dtype(DType::F32)?)?;
            let x = self.normed(&hidden, &layer.norms[1])?;
            let change = match &layer.feed_forward {
                FeedForward::Experts(block) => block.forward(&x, TensorRouting::Router, &step.tokens)?,
                FeedForward::Dense([gate, up, down]) => {
                    let project = |linear, x: &Tensor| self.project(n, linear, x, &step, sequences);
                    project(down, &(silu(&project(gate, &x)?)? * project(up, &x)?)?)?
                }
            };
            hidden = (hidden + change.to_dtype(DType::F32)?)?;
        }
        sequences.iter_mut().for_each(|s| s.seen = s.tokens.len());
        let last: Vec<u32> = step.spans.iter().map(|span| span.end as u32 - 1).collect();
        let last = hidden.index_select(&Tensor::new(last, &self.device)?, 0)?;
        self.normed(&last, &self.norm)?.matmul(&self.head.t()?)?.to_dtype(DType::F32)
    }

    fn normed(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        rms_norm(x, weight, self.config.rms_norm_eps)?.to_dtype(self.dtype)
    }

    /// `x weight^T + bias`, and every sequence's own adapter on its rows.
    fn project(
        &self,
        n: usize,
        linear: &Linear,
        x: &Tensor,
        step: &Step,
        sequences: &[Sequence<'_>],
    ) -> Result<Tensor> {
        let mut out = x.matmul(&linear.weight.t()?)?;
        if let Some(bias) = &linear.bias {
            out = out.broadcast_add(bias)?;
        }
        let lora = |s: &Sequence<'_>| s.adapter.and_then(|a| a.linear.get(&(n, linear.module)).cloned());
        if !sequences.iter().any(|s| lora(s).is_some()) {
            return Ok(out);
        }
        let rows = step.spans.iter().zip(sequences).map(|(span, s)| {
            let rows = out.i(span.clone())?;
            let Some((a, b, scale)) = lora(s) else { return Ok(rows) };
            rows + (x.i(span.clone())?.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?
        });
        Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
    }

    fn attention(
        &self,
        n: usize,
        layer: &Layer,
        x: &Tensor,
        step: &Step,
        sequences: &mut [Sequence<'_>],
    ) -> Result<Tensor> {
        let config = &self.config;
        let (dim, rows) = (config.head_dim, x.dim(0)?);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let [q, k, v, o] = &layer.attention;
        // `[heads, T, head_dim]`, normalised and rotated.
        let turned = |linear, norm, heads: usize| {
            let x = self.project(n, linear, x, step, sequences)?;
            let width = if config.qk_norm == QkNorm::EachHead { dim } else { heads * dim };
            let x =
                self.clipped(&rms_norm(&x.to_dtype(DType::F32)?.reshape(((), width))?, norm, config.rms_norm_eps)?)?;
            let x = x.reshape((1, rows, heads, dim))?.transpose(1, 2)?.contiguous()?;
            rope(&x, &step.cos, &step.sin)?.squeeze(0)?.to_dtype(self.dtype)
        };
        let (q, k) = (turned(q, &layer.qk_norms[0], heads)?, turned(k, &layer.qk_norms[1], kv_heads)?);
        let v = self.clipped(&self.project(n, v, x, step, sequences)?)?;
        let v = v.reshape((rows, kv_heads, dim))?.transpose(0, 1)?.contiguous()?;
        let mut seen = Vec::new();
        for (span, sequence) in step.spans.iter().zip(&mut *sequences) {
            let [mut k, mut v] = [&k, &v].map(|all| all.narrow(1, span.start, span.len()));
            sequence.cache.resize(self.layers.len(), None);
            if let Some([old_k, old_v]) = &sequence.cache[n] {
                (k, v) = (Tensor::cat(&[old_k, &k?], 1), Tensor::cat(&[old_v, &v?], 1));
            }
            let (k, v) = (k?.contiguous()?, v?.contiguous()?);
            // The query heads of one key and value head lie one after the other.
            let new = span.len();
            let q = q.narrow(1, span.start, new)?.contiguous()?.reshape((kv_heads, (), dim))?;
            let scores = (q.matmul(&k.t()?)?.to_dtype(DType::F32)? / (dim as f64).sqrt())?;
            let scores = softmax_last_dim(&self.masked(&scores.reshape((heads, new, ()))?, sequence.seen)?)?;
            let out = scores.to_dtype(self.dtype)?.reshape((kv_heads, heads / kv_heads * new, ()))?.matmul(&v)?;
            seen.push(out.reshape((heads, new, dim))?.transpose(0, 1)?.reshape((new, heads * dim))?);
            sequence.cache[n] = Some([k, v]);
        }
        self.project(n, o, &Tensor::cat(&seen, 0)?, step, sequences)
    }

    fn clipped(&self, x: &Tensor) -> Result<Tensor> {
        match self.config.clip_qkv {
            Some(bound) => x.clamp(-bound, bound),
            None => Ok(x.clone()),
        }
    }

    /// Hides from `scores` `[heads, new, past + new]` what comes later.
    fn masked(&self, scores: &Tensor, past: usize) -> Result<Tensor> {
        let (new, all) = (scores.dim(1)?, scores.dim(D::Minus1)?);
        if new == 1 {
            return Ok(scores.clone());
        }
        let hidden = |i: usize| if i % all > past + i / all { f32::NEG_INFINITY } else { 0.0 };
        let mask: Vec<f32> = (0..new * all).map(hidden).collect();
        scores.broadcast_add(&Tensor::from_vec(mask, (new, all), &self.device)?)
    }
}

fn tensor(matrix: &Matrix, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = &matrix.shape()[..];
    let host = match matrix.dtype() {
        moe_lora::DType::F32 => Tensor::from_vec(matrix.to_vec::<f32>(), shape, &Device::Cpu),
        moe_lora::DType::F16 => Tensor::from_vec(matrix.to_vec::<half::f16>(), shape, &Device::Cpu),
        moe_lora::DType::Bf16 => Tensor::from_vec(matrix.to_vec::<half::bf16>(), shape, &Device::Cpu),
    };
    host?.to_dtype(dtype)?.to_device(device)
}
