//! How experts are chosen: settings, weights, and the two ways a caller states a choice.

use crate::{InputError, LayerShape, Matrix};

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each expert (DeepSeek-V3).
    Sigmoid,
}

/// How a group of experts is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// By its best expert (DeepSeek-V2, `group_limited_greedy`).
    Max,
    /// By the sum of its best two (DeepSeek-V3, `noaux_tc`).
    TopTwoSum,
}

/// Only experts of the best groups can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimit {
    /// Groups that the experts fall into, equal in size (`n_group`).
    pub num_groups: usize,
    /// Groups a token may use (`topk_group`).
    pub top_groups: usize,
    /// How groups compare.
    pub score: GroupScore,
}

/// Settings of a router. The experts are the `top_k` best by score plus selection bias; their weights are the scores,
/// renormalised if asked, times the scaling factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterConfig {
    /// Experts a token uses, k.
    pub top_k: usize,
    /// Logits to scores.
    pub scoring: Scoring,
    /// Divide the chosen scores by their sum (`norm_topk_prob`).
    pub renormalize: bool,
    /// Added to the sum that [`renormalize`](Self::renormalize) divides by (DeepSeek: 1e-20).
    pub renormalize_epsilon: f32,
    /// Group-limited choice.
    pub groups: Option<GroupLimit>,
    /// Factor of every weight (`routed_scaling_factor`).
    pub routed_scaling_factor: f32,
}

impl RouterConfig {
    /// Softmax over all experts, renormalised: Mixtral, and gpt-oss, whose softmax over the chosen logits is the same.
    #[must_use]
    pub const fn softmax(top_k: usize) -> Self {
        Self {
            top_k,
            scoring: Scoring::Softmax,
            renormalize: true,
            renormalize_epsilon: 0.0,
            groups: None,
            routed_scaling_factor: 1.0,
        }
    }

    /// Checks the settings against a number of experts.
    ///
    /// # Errors
    /// Names the setting that is wrong.
    pub fn validate(&self, num_experts: usize) -> Result<(), InputError> {
        if self.top_k == 0 || self.top_k > num_experts {
            return Err(InputError::new(self.top_k.to_string(), format!("1 to {num_experts}")).in_tensor("top_k"));
        }
        if !self.routed_scaling_factor.is_finite() {
            let found = self.routed_scaling_factor.to_string();
            return Err(InputError::new(found, "a finite number").in_tensor("routed_scaling_factor"));
        }
        let Some(groups) = self.groups else { return Ok(()) };
        if groups.num_groups == 0 || !num_experts.is_multiple_of(groups.num_groups) {
            return Err(InputError::new(groups.num_groups.to_string(), format!("a divisor of {num_experts} experts"))
                .in_tensor("n_group"));
        }
        if groups.top_groups == 0 || groups.top_groups > groups.num_groups {
            return Err(InputError::new(groups.top_groups.to_string(), format!("1 to {}", groups.num_groups))
                .in_tensor("topk_group"));
        }
        let group_size = num_experts / groups.num_groups;
        if self.top_k > groups.top_groups * group_size {
            return Err(InputError::new(
                self.top_k.to_string(),
                format!("at most {} groups of {group_size}", groups.top_groups),
            )
            .in_tensor("top_k"));
        }
        if groups.score == GroupScore::TopTwoSum && group_size < 2 {
            return Err(InputError::new(format!("groups of {group_size}"), "groups of at least 2").in_tensor("n_group"));
        }
        Ok(())
    }
}

/// A layer's own router.
#[derive(Debug, Clone)]
pub struct RouterWeights {
    /// `[E, H]`: `logits = weight x + bias`.
    pub weight: Matrix,
    /// Added to the logits, `[E]` (gpt-oss).
    pub bias: Option<Vec<f32>>,
    /// Added to the scores for the choice alone, `[E]` (DeepSeek-V3 `e_score_correction_bias`).
    pub selection_bias: Option<Vec<f32>>,
    /// Settings.
    pub config: RouterConfig,
}

impl RouterWeights {
    /// Checks all parts against the layer's sizes.
    ///
    /// # Errors
    /// Names the part that is wrong.
    pub fn validate(&self, shape: &LayerShape) -> Result<(), InputError> {
        self.config.validate(shape.num_experts)?;
        let want = [shape.num_experts, shape.hidden_size];
        if self.weight.shape() != want {
            return Err(
                InputError::new(format!("{:?}", self.weight.shape()), format!("{want:?}")).in_tensor("router weight")
            );
        }
        if self.config.top_k != shape.top_k {
            return Err(InputError::new(self.config.top_k.to_string(), format!("the layer's {}", shape.top_k))
                .in_tensor("router top_k"));
        }
        for (name, bias) in [("router bias", &self.bias), ("selection bias", &self.selection_bias)] {
            if let Some(bias) = bias.as_ref().filter(|b| b.len() != shape.num_experts) {
                return Err(
                    InputError::new(format!("[{}]", bias.len()), format!("[{}]", shape.num_experts)).in_tensor(name)
                );
            }
        }
        Ok(())
    }
}

/// The experts of every token and their weights, row-major.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TopK {
    /// `[T, k]`; -1 is an expert of another rank, skipped everywhere.
    pub topk_ids: Vec<i32>,
    /// `[T, k]`, renormalisation and scaling included.
    pub topk_weights: Vec<f32>,
}

/// How a caller states the experts of its tokens.
#[derive(Debug, Clone, Copy)]
pub enum Routing<'a> {
    /// The layer's own router decides.
    Router,
    /// Router logits `[T, E]`; the layer's router settings decide.
    Logits(&'a [f32]),
    /// The choice was made elsewhere.
    Selected {
        /// `[T, k]`; -1 is skipped.
        topk_ids: &'a [i32],
        /// `[T, k]`.
        topk_weights: &'a [f32],
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_groups_are_refused() {
        let with = |num_groups, top_groups, top_k| {
            let groups = Some(GroupLimit { num_groups, top_groups, score: GroupScore::TopTwoSum });
            RouterConfig { groups, ..RouterConfig::softmax(top_k) }.validate(16)
        };
        assert!(with(4, 2, 8).is_ok());
        assert!(with(3, 2, 2).is_err(), "16 experts do not fall into 3 groups");
        assert!(with(4, 5, 2).is_err());
        assert!(with(4, 2, 9).is_err(), "2 groups of 4 hold 8 experts");
        assert!(with(16, 2, 2).is_err(), "groups of one have no best two");
        assert!(with(0, 0, 2).is_err());
    }
}
