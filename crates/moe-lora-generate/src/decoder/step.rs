//! One step: the new tokens of all sequences through all layers.

use super::{Decoder, Layer};
use crate::attention::{Heads, Query, attention};
use crate::math::{rms_norm, rms_norm_one, rotate};
use crate::{GenerateError, KvCache};
use moe_lora::adapter::LinearAdapters;
use moe_lora::gemm::cpu::{Kernel, Linear, LinearScratch, linear};
use moe_lora::model::{Attention, DenseMlp, QkNorm};
use moe_lora::{Activation, AdapterId, Element, Lora, Matrix, Routing, TokenAdapters};
use rayon::prelude::*;
use std::ops::Range;

/// The new tokens of one sequence.
#[derive(Debug)]
pub struct Part<'a> {
    /// At least one.
    pub tokens: &'a [u32],
    /// What came before; the new tokens are added.
    pub cache: &'a mut KvCache,
    /// The sequence's adapter; `None` is the base model.
    pub adapter: Option<PartAdapter<'a>>,
    /// Whether the logits of the last token are wanted.
    pub logits: bool,
}

impl Part<'_> {
    fn query(&self, layer: usize) -> Query<'_> {
        Query {
            cache: self.cache.layer(layer),
            capacity: self.cache.capacity(),
            past: self.cache.len(),
            tokens: self.tokens.len(),
        }
    }
}

/// An adapter in its two halves.
#[derive(Debug, Clone, Copy)]
pub struct PartAdapter<'a> {
    /// Its experts, in the pool.
    pub id: AdapterId,
    /// The rest.
    pub linear: &'a LinearAdapters,
}

/// What a step gives back.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// `[parts that asked, V]`, in the order of the parts.
    pub logits: Vec<f32>,
    /// Parts whose numbers left the range of the format: their logits and caches mean nothing. Others are not touched by
    /// it.
    pub broken: Vec<bool>,
}

/// All that the stages of a step share.
struct Step<'a, 'p> {
    decoder: &'a Decoder,
    parts: &'a mut [Part<'p>],
    /// Rows of each part.
    spans: Vec<Range<usize>>,
    /// Rotations of each row, `[T, head_dim / 2]`.
    rotations: Vec<[f32; 2]>,
    tokens: TokenAdapters,
    broken: Vec<bool>,
    scratch: LinearScratch,
}

pub(super) fn run<X: Element>(decoder: &Decoder, parts: &mut [Part<'_>]) -> Result<StepOutput, GenerateError> {
    let (mut spans, mut ids, mut rotations) = (Vec::new(), Vec::new(), Vec::new());
    for part in parts.iter() {
        spans.push(ids.len()..ids.len() + part.tokens.len());
        ids.extend(part.tokens.iter().map(|_| part.adapter.map(|a| a.id)));
        let past = part.cache.len();
        (past..past + part.tokens.len()).for_each(|position| decoder.rotations.at(position, &mut rotations));
    }
    let broken = vec![false; parts.len()];
    let tokens = TokenAdapters::from_ids(&ids);
    let scratch = LinearScratch::default();
    Step { decoder, parts, spans, rotations, tokens, broken, scratch }.run::<X>()
}

impl<'p> Step<'_, 'p> {
    fn run<X: Element>(mut self) -> Result<StepOutput, GenerateError> {
        let decoder = self.decoder;
        let config = &decoder.config;
        let (width, eps) = (config.hidden_size, config.rms_norm_eps);
        let mut hidden: Vec<f32> = self.parts.iter().flat_map(|p| p.tokens).flat_map(|&t| decoder.embed(t)).collect();
        let mut normed = vec![X::from_f32(0.0); hidden.len()];
        let mut change = vec![0.0_f32; hidden.len()];
        for (n, layer) in decoder.layers.iter().enumerate() {
            rms_norm(&hidden, &layer.weights.input_layernorm, eps, &mut normed);
            self.mend(&mut hidden, &mut normed);
            self.attention(n, &layer.weights.attention, &normed, &mut change)?;
            add(&mut hidden, &change);
            rms_norm(&hidden, &layer.weights.post_attention_layernorm, eps, &mut normed);
            self.mend(&mut hidden, &mut normed);
            self.feed_forward(n, layer, &normed, &mut change)?;
            add(&mut hidden, &change);
        }
        for part in &mut *self.parts {
            part.cache.advance(part.tokens.len());
        }
        rms_norm(&hidden, &decoder.ends.norm, eps, &mut normed);
        self.mend(&mut hidden, &mut normed);
        let asked = self.parts.iter().zip(&self.spans).filter(|(part, _)| part.logits);
        let last: Vec<X> = asked.flat_map(|(_, span)| normed[(span.end - 1) * width..][..width].to_vec()).collect();
        let mut logits = vec![0.0; last.len() / width * config.vocab_size];
        self.project(&decoder.ends.lm_head, None, &[], &last, &mut logits)?;
        Ok(StepOutput { logits, broken: self.broken })
    }

    /// Zeroes rows that are not finite, so that nothing behind them fails for all, and remembers whose they are.
    fn mend<X: Element>(&mut self, hidden: &mut [f32], normed: &mut [X]) {
        let width = self.decoder.config.hidden_size;
        for (broken, span) in self.broken.iter_mut().zip(&self.spans) {
            for row in span.clone() {
                let row = row * width..(row + 1) * width;
                if !normed[row.clone()].iter().fold(true, |all, x| all & x.to_f32().is_finite()) {
                    normed[row.clone()].fill(X::from_f32(0.0));
                    hidden[row].fill(0.0);
                    *broken = true;
                }
            }
        }
    }

    /// The adapters of all rows on one module; empty if there is none.
    fn loras(&self, layer: usize, module: &str) -> Vec<Option<&'p Lora>> {
        let mut loras = Vec::new();
        for part in self.parts.iter() {
            let lora = part.adapter.and_then(|adapter| adapter.linear.get(layer, module));
            loras.extend(part.tokens.iter().map(|_| lora));
        }
        if loras.iter().all(Option::is_none) { Vec::new() } else { loras }
    }

    fn project<X: Element>(
        &mut self,
        weight: &Matrix,
        bias: Option<&[f32]>,
        loras: &[Option<&Lora>],
        x: &[X],
        out: &mut [f32],
    ) -> Result<(), GenerateError> {
        let kernel = Kernel::best(weight.dtype(), X::DTYPE);
        Ok(linear(&Linear { weight, bias, loras }, x, kernel, &mut self.scratch, out)?)
    }

    /// `out = o_proj(attention(x))`, keys and values stored.
    fn attention<X: Element>(
        &mut self,
        n: usize,
        weights: &Attention,
        x: &[X],
        out: &mut [f32],
    ) -> Result<(), GenerateError> {
        let config = &self.decoder.config;
        let dim = config.head_dim;
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let rows = x.len() / config.hidden_size;
        let bias = |i: usize| weights.bias.as_ref().and_then(|b| b.get(i)).map(Vec::as_slice);
        let [mut q, mut k, mut v] = [heads, kv_heads, kv_heads].map(|heads| vec![0.0_f32; rows * heads * dim]);
        for (i, (name, weight, out)) in [
            ("self_attn.q_proj", &weights.q_proj, &mut q),
            ("self_attn.k_proj", &weights.k_proj, &mut k),
            ("self_attn.v_proj", &weights.v_proj, &mut v),
        ]
        .into_iter()
        .enumerate()
        {
            self.project(weight, bias(i), &self.loras(n, name), x, out)?;
        }
        let bound = config.clip_qkv.unwrap_or(f32::INFINITY);
        let scale = (dim as f32).sqrt().recip();
        for (vectors, heads, norm, scale) in
            [(&mut q, heads, &weights.q_norm, scale), (&mut k, kv_heads, &weights.k_norm, 1.0)]
        {
            let rotations = self.rotations.par_chunks(dim / 2);
            vectors.par_chunks_mut(heads * dim).zip(rotations).for_each(|(vector, rotations)| {
                let normed = if config.qk_norm == QkNorm::EachHead { dim } else { heads * dim };
                vector.chunks_mut(normed).for_each(|x| rms_norm_one(x, norm, config.rms_norm_eps));
                vector.iter_mut().for_each(|x| *x = clip(*x, bound));
                vector.chunks_mut(dim).for_each(|head| rotate(head, rotations));
                vector.iter_mut().for_each(|x| *x *= scale);
            });
        }
        v.iter_mut().for_each(|x| *x = clip(*x, bound));
        let width = kv_heads * dim;
        self.parts.par_iter_mut().zip(&self.spans).for_each(|(part, span)| {
            let new = span.start * width..span.end * width;
            part.cache.store(n, dim, &k[new.clone()], &v[new]);
        });

        let group = heads / kv_heads;
        let by_head = reorder(&q, &self.spans, [kv_heads, group * dim], true, |x| x);
        let queries: Vec<_> = self.parts.iter().map(|part| part.query(n)).collect();
        attention(&queries, Heads { kv: kv_heads, group, dim }, &by_head, &mut q)?;
        let seen = reorder(&q, &self.spans, [kv_heads, group * dim], false, X::from_f32);
        self.project(&weights.o_proj, bias(3), &self.loras(n, "self_attn.o_proj"), &seen, out)
    }

    fn feed_forward<X: Element>(
        &mut self,
        n: usize,
        layer: &Layer,
        x: &[X],
        out: &mut [f32],
    ) -> Result<(), GenerateError> {
        if let Some(experts) = &layer.experts {
            experts.forward(x, Routing::Router, &self.tokens, out)?;
        }
        if let Some(mlp) = &layer.weights.mlp {
            self.dense(n, mlp, x, out)?;
        }
        Ok(())
    }

    fn dense<X: Element>(&mut self, n: usize, mlp: &DenseMlp, x: &[X], out: &mut [f32]) -> Result<(), GenerateError> {
        let size = x.len() / self.decoder.config.hidden_size * mlp.gate_proj.rows();
        let [mut gate, mut up] = [(); 2].map(|()| vec![0.0_f32; size]);
        self.project(&mlp.gate_proj, None, &self.loras(n, "mlp.gate_proj"), x, &mut gate)?;
        self.project(&mlp.up_proj, None, &self.loras(n, "mlp.up_proj"), x, &mut up)?;
        let activation = self.decoder.config.activation;
        let inner: Vec<X> = gate.iter().zip(&up).map(|(&g, &u)| X::from_f32(glu(activation, g, u))).collect();
        self.project(&mlp.down_proj, None, &self.loras(n, "mlp.down_proj"), &inner, out)
    }
}

/// Moves rows between `[token, head, width]` and, sequence by sequence, `[head, token, width]`.
fn reorder<X: Element>(
    from: &[f32],
    spans: &[Range<usize>],
    [heads, width]: [usize; 2],
    heads_first: bool,
    convert: impl Fn(f32) -> X,
) -> Vec<X> {
    let mut to = vec![X::from_f32(0.0); from.len()];
    for span in spans {
        let tokens = span.len();
        let all = span.start * heads * width..span.end * heads * width;
        let (from, to) = (&from[all.clone()], &mut to[all]);
        for token in 0..tokens {
            for head in 0..heads {
                let (by_token, by_head) = (token * heads + head, head * tokens + token);
                let (source, target) = if heads_first { (by_token, by_head) } else { (by_head, by_token) };
                let to = to[target * width..][..width].iter_mut();
                to.zip(&from[source * width..]).for_each(|(to, from)| *to = convert(*from));
            }
        }
    }
    to
}

fn add(hidden: &mut [f32], change: &[f32]) {
    hidden.iter_mut().zip(change).for_each(|(hidden, change)| *hidden += change);
}

/// Like `clamp`, but a NaN stays one.
fn clip(x: f32, bound: f32) -> f32 {
    if x > bound {
        bound
    } else if x < -bound {
        -bound
    } else {
        x
    }
}

fn glu(activation: Activation, gate: f32, up: f32) -> f32 {
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Gelu => gate * 0.5 * (1.0 + libm::erff(gate * std::f32::consts::FRAC_1_SQRT_2)) * up,
        Activation::GeluTanh => gate * sigmoid(1.595_769 * (gate + 0.044_715 * gate * gate * gate)) * up,
        _ => gate * sigmoid(gate) * up,
    }
}
