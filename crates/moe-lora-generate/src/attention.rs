//! Causal attention of every sequence of a step over its own cache.

use crate::cache::LayerCache;
use crate::math::softmax;
use moe_lora::gemm::GemmError;
use moe_lora::gemm::cpu::{Kernel, products};
use rayon::prelude::*;

/// Query rows that go through a cache together.
const ROWS: usize = 64;

/// Heads of a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// Key and value heads.
    pub(crate) kv: usize,
    /// Query heads of each.
    pub(crate) group: usize,
    /// Width.
    pub(crate) dim: usize,
}

/// One sequence's part of a step.
pub(crate) struct Query<'a> {
    /// The layer's cache, the new tokens stored already.
    pub(crate) cache: &'a LayerCache,
    /// Tokens that the cache has room for.
    pub(crate) capacity: usize,
    /// Tokens before the new ones.
    pub(crate) past: usize,
    /// New tokens.
    pub(crate) tokens: usize,
}

/// One head's queries of some tokens of one sequence.
struct Task<'a> {
    query: &'a Query<'a>,
    head: usize,
    /// The first token, counted among the new ones.
    first: usize,
    q: &'a [f32],
    out: &'a mut [f32],
}

/// `out = softmax(q K^T) V`, both `[kv head, token, group, dim]` sequence by sequence. Queries are scaled already.
pub(crate) fn attention(queries: &[Query<'_>], heads: Heads, q: &[f32], out: &mut [f32]) -> Result<(), GemmError> {
    let per_token = heads.group * heads.dim;
    let piece = (ROWS / heads.group).max(1);
    let (mut q, mut out) = (q, out);
    let mut tasks = Vec::new();
    for query in queries {
        for head in 0..heads.kv {
            for first in (0..query.tokens).step_by(piece) {
                let n = piece.min(query.tokens - first) * per_token;
                let (task_q, rest_q) = q.split_at(n);
                let (task_out, rest_out) = out.split_at_mut(n);
                (q, out) = (rest_q, rest_out);
                tasks.push(Task { query, head, first, q: task_q, out: task_out });
            }
        }
    }
    tasks.into_par_iter().try_for_each_init(Vec::new, |scores, task| run(task, heads, scores))
}

fn run(task: Task<'_>, heads: Heads, scores: &mut Vec<f32>) -> Result<(), GemmError> {
    let Task { query, head, first, q, out } = task;
    // Kernel::products works in f32 whatever the cache's format is.
    let kernel = Kernel::available().find(|k| *k != Kernel::Avx512Bf16).unwrap_or(Kernel::Portable);
    let rows = q.len() / heads.dim;
    let start = query.past + first;
    let seen = start + rows / heads.group;
    scores.resize(scores.len().max(rows * seen), 0.0);
    let scores = &mut scores[..rows * seen];
    let keys = query.cache.keys(head, heads.kv);
    products(kernel, keys, [seen, heads.dim, heads.dim], (q, heads.dim), (scores, seen))?;
    for (row, scores) in scores.chunks_mut(seen).enumerate() {
        softmax(scores, start + row / heads.group + 1);
    }
    let values = query.cache.values(head, heads.kv);
    products(kernel, values, [heads.dim, seen, query.capacity], (scores, seen), (out, heads.dim))
}
