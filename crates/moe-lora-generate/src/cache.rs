//! Keys and values of one sequence.

use half::{bf16, f16};
use moe_lora::model::DecoderConfig;
use moe_lora_core::{DType, Element, Slice};

/// What a sequence has seen, for every decoder layer, in the model's format. Keys lie token by token, values turned, so that
/// both products of attention read rows.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    capacity: usize,
    len: usize,
}

/// One layer's part.
#[derive(Debug)]
pub(crate) struct LayerCache {
    /// `[kv heads, capacity, head_dim]`.
    keys: Numbers,
    /// `[kv heads, head_dim, capacity]`.
    values: Numbers,
}

impl KvCache {
    /// Room for a sequence of `capacity` tokens.
    #[must_use]
    pub fn new(config: &DecoderConfig, dtype: DType, capacity: usize) -> Self {
        let numbers = || Numbers::zeros(dtype, config.num_key_value_heads * config.head_dim * capacity);
        let layer = |_| LayerCache { keys: numbers(), values: numbers() };
        Self { layers: (0..config.num_hidden_layers).map(layer).collect(), capacity, len: 0 }
    }

    /// Bytes of a cache for `capacity` tokens.
    #[must_use]
    pub fn bytes_for(config: &DecoderConfig, dtype: DType, capacity: usize) -> usize {
        let token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.size();
        token.saturating_mul(capacity)
    }

    /// Tokens that it holds.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that it has room for.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn layer(&self, n: usize) -> &LayerCache {
        &self.layers[n]
    }

    /// Counts tokens that every layer has stored.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Stores the keys and values of new tokens, `[tokens, kv heads * head_dim]` each, in one layer.
    pub(crate) fn store(&mut self, layer: usize, head_dim: usize, keys: &[f32], values: &[f32]) {
        let (len, capacity) = (self.len, self.capacity);
        let layer = &mut self.layers[layer];
        match (&mut layer.keys, &mut layer.values) {
            (Numbers::F32(k), Numbers::F32(v)) => store(k, v, [len, capacity, head_dim], keys, values),
            (Numbers::F16(k), Numbers::F16(v)) => store(k, v, [len, capacity, head_dim], keys, values),
            (Numbers::Bf16(k), Numbers::Bf16(v)) => store(k, v, [len, capacity, head_dim], keys, values),
            _ => unreachable!("keys and values are made in one format"),
        }
    }
}

impl LayerCache {
    /// Keys of one head: the numbers, whose rows of `head_dim` lie one after the other.
    pub(crate) fn keys(&self, head: usize, heads: usize) -> Slice<'_> {
        self.keys.part(head, heads)
    }

    /// Values of one head: rows of `capacity`, one for each of `head_dim`.
    pub(crate) fn values(&self, head: usize, heads: usize) -> Slice<'_> {
        self.values.part(head, heads)
    }
}

fn store<T: Element>(
    to_keys: &mut [T],
    to_values: &mut [T],
    [len, capacity, head_dim]: [usize; 3],
    keys: &[f32],
    values: &[f32],
) {
    let width = to_keys.len() / capacity;
    let tokens = keys.len() / width;
    let heads = to_keys.chunks_mut(capacity * head_dim).zip(to_values.chunks_mut(capacity * head_dim));
    for (head, (to_keys, to_values)) in heads.enumerate() {
        let column = head * head_dim;
        for (to, from) in to_keys[len * head_dim..].chunks_mut(head_dim).zip(keys.chunks(width)) {
            to.iter_mut().zip(&from[column..]).for_each(|(to, from)| *to = T::from_f32(*from));
        }
        for (d, to) in to_values.chunks_mut(capacity).enumerate() {
            let from = values.iter().skip(column + d).step_by(width);
            to[len..len + tokens].iter_mut().zip(from).for_each(|(to, from)| *to = T::from_f32(*from));
        }
    }
}

/// Numbers of one format.
#[derive(Debug)]
enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Numbers {
    fn zeros(dtype: DType, n: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(vec![0.0; n]),
            DType::F16 => Self::F16(vec![f16::ZERO; n]),
            DType::Bf16 => Self::Bf16(vec![bf16::ZERO; n]),
        }
    }

    /// One of `parts` equal parts.
    fn part(&self, index: usize, parts: usize) -> Slice<'_> {
        fn cut<T>(all: &[T], index: usize, parts: usize) -> &[T] {
            let n = all.len() / parts;
            &all[index * n..][..n]
        }
        match self {
            Self::F32(all) => Slice::F32(cut(all, index, parts)),
            Self::F16(all) => Slice::F16(cut(all, index, parts)),
            Self::Bf16(all) => Slice::Bf16(cut(all, index, parts)),
        }
    }
}
