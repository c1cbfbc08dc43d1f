//! Expert choice: the best k of every token, within the best groups if the model asks for it.
//!
//! Follows the routers of Hugging Face `transformers` 5.23 (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V2 and -V3, gpt-oss).
//! Where `torch.topk` leaves the order of equal scores open, the lower expert (or group) wins here. Two places need a
//! word:
//!
//! - Without a selection bias experts are compared by their logits. Scores grow with the logits, so the choice is the
//!   same, and logits that round to one score still count as different; gpt-oss compares logits in any case.
//! - Experts outside the best groups are never chosen. DeepSeek-V3 masks them with -inf, which is just this.
//!   DeepSeek-V2 masks with 0, which differs only where a score underflowed to 0: torch may then name a masked expert,
//!   at weight 0.

use crate::RouteError;
use crate::error::check_len;
use moe_lora_core::{GroupLimit, GroupScore, InputError, RouterConfig, Scoring, TopK};
use rayon::prelude::*;

/// Tokens of one task.
const TASK: usize = 32;

/// Chooses the experts of every token from its logits, `[T, num_experts]` row-major.
///
/// `selection_bias` `[num_experts]` is added to the scores for the choice alone. Of each token `out` lists the experts
/// by descending choice score, equal ones by ascending id, with the weights of [`RouterConfig`]: scores in f32 (a
/// softmax shifted by its maximum, or a sigmoid), divided by their sum plus `renormalize_epsilon` if asked, times
/// `routed_scaling_factor`. No token's result depends on another's.
///
/// # Errors
/// If the settings or lengths do not fit `num_experts`; if a logit or bias is NaN or infinite (token and expert are
/// named); if a token is to be renormalised whose chosen scores all underflowed to 0. `out` is then empty.
pub fn topk(
    logits: &[f32],
    num_experts: usize,
    config: &RouterConfig,
    selection_bias: Option<&[f32]>,
    out: &mut TopK,
) -> Result<(), RouteError> {
    out.topk_ids.clear();
    out.topk_weights.clear();
    check(logits, num_experts, config, selection_bias)?;
    let top_k = config.top_k;
    let pairs = logits.len() / num_experts * top_k;
    out.topk_ids.resize(pairs, -1);
    out.topk_weights.resize(pairs, 0.0);
    let failed = (out.topk_ids.par_chunks_mut(TASK * top_k))
        .zip(out.topk_weights.par_chunks_mut(TASK * top_k))
        .zip(logits.par_chunks(TASK * num_experts))
        .enumerate()
        .map_init(Scratch::default, |scratch, (task, ((ids, weights), logits))| {
            let mut tokens =
                ids.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k)).zip(logits.chunks_exact(num_experts));
            let failed = tokens
                .position(|((ids, weights), logits)| !scratch.choose(logits, config, selection_bias, ids, weights))?;
            Some(task * TASK + failed)
        })
        .find_map_first(|failed| failed);
    match failed {
        None => Ok(()),
        Some(token) => {
            *out = TopK::default();
            let found = format!("chosen scores of token {token} that sum to 0");
            Err(InputError::new(found, "a sum to renormalize by").in_tensor("router logits").into())
        }
    }
}

fn check(
    logits: &[f32],
    num_experts: usize,
    config: &RouterConfig,
    selection_bias: Option<&[f32]>,
) -> Result<(), RouteError> {
    if i32::try_from(num_experts).is_err() {
        return Err(InputError::new(num_experts.to_string(), "a number of experts below 2^31")
            .in_tensor("experts")
            .into());
    }
    config.validate(num_experts)?;
    if !config.renormalize_epsilon.is_finite() || config.renormalize_epsilon < 0.0 {
        let found = config.renormalize_epsilon.to_string();
        return Err(InputError::new(found, "a finite number from 0 on").in_tensor("renormalize_epsilon").into());
    }
    if !logits.len().is_multiple_of(num_experts) {
        let found = format!("{} numbers", logits.len());
        return Err(InputError::new(found, format!("[T, {num_experts}]")).in_tensor("router logits").into());
    }
    if let Some(bias) = selection_bias {
        check_len("selection bias", bias.len(), Some(num_experts), "[E]")?;
        if let Some((expert, value)) = bias.iter().enumerate().find(|(_, x)| !x.is_finite()) {
            let found = format!("{value} for expert {expert}");
            return Err(InputError::new(found, "finite numbers").in_tensor("selection bias").into());
        }
    }
    if let Some((at, value)) = logits.iter().enumerate().find(|(_, x)| !x.is_finite()) {
        let found = format!("{value} for token {}, expert {}", at / num_experts, at % num_experts);
        return Err(InputError::new(found, "finite numbers").in_tensor("router logits").into());
    }
    Ok(())
}

/// What the choice of one token needs, kept for the next.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    biased: Vec<f32>,
    group_scores: Vec<f32>,
    best_groups: Vec<i32>,
    best_group_scores: Vec<f32>,
    open: Vec<bool>,
}

impl Scratch {
    /// Fills the k `ids` and `weights` of one token; false if they cannot be renormalised.
    fn choose(
        &mut self,
        logits: &[f32],
        config: &RouterConfig,
        bias: Option<&[f32]>,
        ids: &mut [i32],
        weights: &mut [f32],
    ) -> bool {
        score(logits, config.scoring, &mut self.scores);
        if let Some(bias) = bias {
            self.biased.clear();
            self.biased.extend(self.scores.iter().zip(bias).map(|(score, bias)| score + bias));
        }
        let groups = config.groups.map(|groups| {
            self.open_groups(groups, bias.is_some());
            logits.len() / groups.num_groups
        });
        let keys = if bias.is_some() { &self.biased } else { logits };
        let keyed = keys.iter().copied().enumerate();
        match groups {
            None => best(keyed, ids, weights),
            Some(size) => best(keyed.filter(|(expert, _)| self.open[expert / size]), ids, weights),
        }
        for (weight, &id) in weights.iter_mut().zip(&*ids) {
            *weight = self.scores[id as usize];
        }
        let factor = config.routed_scaling_factor;
        if config.renormalize {
            let sum = weights.iter().sum::<f32>() + config.renormalize_epsilon;
            if sum <= 0.0 {
                return false;
            }
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        if factor != 1.0 {
            weights.iter_mut().for_each(|weight| *weight *= factor);
        }
        true
    }

    /// Marks the groups that the token may use.
    fn open_groups(&mut self, groups: GroupLimit, biased: bool) {
        let choice = if biased { &self.biased } else { &self.scores };
        let score = |group: &[f32]| match groups.score {
            GroupScore::Max => group.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            GroupScore::TopTwoSum => {
                let two = (f32::NEG_INFINITY, f32::NEG_INFINITY);
                let (first, second) = group.iter().fold(two, |(a, b), &x| if x > a { (x, a) } else { (a, b.max(x)) });
                first + second
            }
        };
        self.group_scores.clear();
        self.group_scores.extend(choice.chunks_exact(choice.len() / groups.num_groups).map(score));
        self.best_groups.resize(groups.top_groups, 0);
        self.best_group_scores.resize(groups.top_groups, 0.0);
        best(self.group_scores.iter().copied().enumerate(), &mut self.best_groups, &mut self.best_group_scores);
        self.open.clear();
        self.open.resize(groups.num_groups, false);
        for &group in &self.best_groups {
            self.open[group as usize] = true;
        }
    }
}

/// Logits to scores. The softmax's sum is kept in f64, so that it does not suffer from many experts.
fn score(logits: &[f32], scoring: Scoring, scores: &mut Vec<f32>) {
    scores.clear();
    match scoring {
        Scoring::Sigmoid => scores.extend(logits.iter().map(|x| 1.0 / (1.0 + (-x).exp()))),
        Scoring::Softmax => {
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.extend(logits.iter().map(|x| (x - most).exp()));
            let sum = scores.iter().map(|&x| f64::from(x)).sum::<f64>() as f32;
            scores.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// The candidates with the largest keys in descending order; among equal keys, those that came first.
fn best(candidates: impl Iterator<Item = (usize, f32)>, ids: &mut [i32], keys: &mut [f32]) {
    let mut found = 0;
    for (id, key) in candidates {
        if found < ids.len() {
            found += 1;
        } else if key <= keys[found - 1] {
            continue;
        }
        let mut at = found - 1;
        while at > 0 && key > keys[at - 1] {
            keys[at] = keys[at - 1];
            ids[at] = ids[at - 1];
            at -= 1;
        }
        keys[at] = key;
        ids[at] = id as i32;
    }
}
