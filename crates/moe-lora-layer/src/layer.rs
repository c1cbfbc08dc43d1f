//! The layer.

use crate::LayerError;
use crate::ranks::Ranks;
use crate::stages::{Stages, lock};
use moe_lora_collective::Communicator;
use moe_lora_core::{
    Element, InputError, LayerShape, LayerWeights, RouterConfig, RouterWeights, Routing, Shard, TokenAdapters, TopK,
};
use moe_lora_pool::{AdapterPool, Lease};
use moe_lora_runner::{Batch, Device, Limits};
use std::sync::{Arc, Mutex};

/// One MoE layer whose tokens each name their own adapter, or none.
#[derive(Debug)]
pub struct FusedMoEWithLoRA {
    pub(crate) index: usize,
    weights: LayerWeights,
    router: Option<RouterWeights>,
    router_config: RouterConfig,
    pub(crate) pool: AdapterPool,
    /// Kept from call to call for its memory.
    topk: Mutex<TopK>,
    pub(crate) stages: Stages,
    /// If it is a part of a layer.
    pub(crate) ranks: Option<Ranks>,
}

impl FusedMoEWithLoRA {
    /// Joins the base weights of decoder layer `index` (absolute, as adapters number it) with the pool that serves the
    /// model's adapters. Routing by logits is softmax over all experts, renormalised, until a
    /// [router](Self::with_router) says otherwise.
    ///
    /// # Errors
    /// If the pool serves a model of another shape, has no such layer or is not in the device's memory; on a GPU also if its
    /// kernels cannot run the layer or its memory does not suffice.
    pub fn new(index: usize, weights: LayerWeights, device: &Device, pool: &AdapterPool) -> Result<Self, LayerError> {
        let default = Limits::default();
        let limits = Limits { max_rank: pool.config().max_rank.min(default.max_rank), ..default };
        Self::with_limits(index, weights, device, pool, limits)
    }

    /// [`new`](Self::new) with a workspace for batches and ranks other than the [default](Limits::default) or, if that is
    /// less, the rank that the pool allows. On a GPU the limits choose the kernels: those for few tokens on Hopper take ranks
    /// up to 64.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if a limit is zero.
    pub fn with_limits(
        index: usize,
        weights: LayerWeights,
        device: &Device,
        pool: &AdapterPool,
        limits: Limits,
    ) -> Result<Self, LayerError> {
        let model = pool.shape();
        if model.layer != *weights.shape() || model.moe_layers.binary_search(&index).is_err() {
            return Err(InputError::new(
                format!("layer {index} of {:?}", weights.shape()),
                format!("one of the layers {:?} of {:?} that the pool serves", model.moe_layers, model.layer),
            )
            .into());
        }
        if pool.memory() != device.memory() {
            return Err(InputError::new(format!("a pool on {}", pool.memory()), format!("one on {device}")).into());
        }
        let stages = Stages::new(device, &weights, model.dtype, limits)?;
        let router_config = RouterConfig::softmax(weights.shape().top_k);
        let topk = Mutex::default();
        Ok(Self { index, weights, router: None, router_config, pool: pool.clone(), topk, stages, ranks: None })
    }

    /// Makes it one rank's part of a layer of shape `whole`: its weights, and the adapters of its pool, are those of `shard`.
    /// Hidden states, routing and token adapters are the whole layer's, the same on every rank, and so is the output:
    /// `communicator` sums it. Without one the output is the rank's part of the sum, for engines that sum it themselves.
    ///
    /// Routers choose among all experts; those of other ranks are skipped here. Call it before [`with_router`](Self::with_router).
    /// A forward that fails on one rank fails on all.
    ///
    /// # Errors
    /// If the weights are not the share of `shard`, or `communicator` is another rank's.
    pub fn with_shard(
        mut self,
        whole: &LayerShape,
        shard: &Shard,
        communicator: Option<Arc<dyn Communicator>>,
    ) -> Result<Self, LayerError> {
        self.ranks = Some(Ranks::new(whole, shard, self.weights.shape(), communicator)?);
        self.router_config = RouterConfig::softmax(whole.top_k);
        self.router = None;
        Ok(self)
    }

    /// The ranks of its tensor-parallel group, numbered as there, which a part with
    /// [fully sharded](Shard::with_fully_sharded_adapters) adapters exchanges with, twice a forward. A group of its own, also where
    /// it has the ranks of the communicator of [`with_shard`](Self::with_shard). Ranks whose adapters are whole do without.
    ///
    /// # Errors
    /// If the layer is no part, or `group` is another rank's.
    pub fn with_adapter_group(mut self, group: Arc<dyn Communicator>) -> Result<Self, LayerError> {
        let whole = || InputError::new("a whole layer", "a rank's part").in_tensor("layer");
        self.ranks.as_mut().ok_or_else(whole)?.set_adapter_group(group)?;
        Ok(self)
    }

    /// Uses the checkpoint's own router for [`Routing::Router`], and its settings for [`Routing::Logits`].
    ///
    /// # Errors
    /// If the router is one for other sizes.
    pub fn with_router(mut self, router: RouterWeights) -> Result<Self, LayerError> {
        router.validate(self.shape())?;
        self.router_config = router.config;
        self.router = Some(router);
        Ok(self)
    }

    /// Shares the workspace of another layer of the same shape; their forwards then take turns.
    ///
    /// # Errors
    /// If the shapes or devices differ.
    pub fn sharing_workspace_with(mut self, other: &Self) -> Result<Self, LayerError> {
        let (mine, theirs) = (self.weights.shape(), other.weights.shape());
        if mine != theirs {
            return Err(InputError::new(format!("{theirs:?}"), format!("{mine:?}")).into());
        }
        self.stages.share(&other.stages)?;
        Ok(self)
    }

    /// Sizes of the whole layer.
    #[must_use]
    pub const fn shape(&self) -> &LayerShape {
        match &self.ranks {
            Some(ranks) => ranks.whole(),
            None => self.weights.shape(),
        }
    }

    /// The base weights: those of this rank, if it is one of several.
    #[must_use]
    pub const fn weights(&self) -> &LayerWeights {
        &self.weights
    }

    /// Bytes of the workspace.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.stages.workspace_bytes()
    }

    /// The experts of every token: what [`forward`](Self::forward) would use.
    ///
    /// # Errors
    /// If lengths do not fit, a logit is not finite, or [`Routing::Router`] is asked of a layer without a router.
    pub fn route<X: Element>(&self, hidden: &[X], routing: Routing<'_>) -> Result<TopK, LayerError> {
        let mut topk = TopK::default();
        self.route_into(hidden, routing, &mut topk)?;
        Ok(topk)
    }

    /// `out [T, H]` of `hidden [T, H]`, every token with its own adapter. Formats may differ: on the CPU f32 hidden states
    /// stay f32 whatever the weights are, a GPU rounds them to the weights' format.
    ///
    /// # Errors
    /// If lengths do not fit, or an adapter was unloaded or evicted; nothing else in the batch is to blame then, and `out`
    /// is unspecified.
    pub fn forward<X: Element, Y: Element>(
        &self,
        hidden: &[X],
        routing: Routing<'_>,
        tokens: &TokenAdapters,
        out: &mut [Y],
    ) -> Result<(), LayerError> {
        let scratch = &mut *lock(&self.topk);
        let Some(ranks) = &self.ranks else {
            let (lease, batch) = self.prepare(hidden, routing, tokens, scratch)?;
            return self.stages.forward(&self.weights, batch, (&lease, self.index), out);
        };
        ranks.forward(&self.stages, out, |groups, sums| {
            let (lease, batch) = self.prepare(hidden, routing, tokens, scratch)?;
            match groups {
                (None, None) => self.stages.forward(&self.weights, batch, (&lease, self.index), sums),
                _ => self.stages.forward_together(&self.weights, batch, (&lease, self.index), groups, sums),
            }
        })
    }

    /// Holds the batch's adapters and chooses its experts.
    fn prepare<'a, X: Element>(
        &self,
        hidden: &'a [X],
        routing: Routing<'a>,
        tokens: &'a TokenAdapters,
        scratch: &'a mut TopK,
    ) -> Result<(Lease, Batch<'a, X, ()>), LayerError> {
        let lease = self.pool.lease(tokens)?;
        let (topk_ids, topk_weights) = match routing {
            Routing::Selected { topk_ids, topk_weights } => (topk_ids, topk_weights),
            _ => {
                self.route_into(hidden, routing, scratch)?;
                (&scratch.topk_ids[..], &scratch.topk_weights[..])
            }
        };
        Ok((lease, Batch { hidden, topk_ids, topk_weights, token_slots: tokens.slots(), adapters: () }))
    }

    fn route_into<X: Element>(&self, hidden: &[X], routing: Routing<'_>, out: &mut TopK) -> Result<(), LayerError> {
        let shape = self.shape();
        match routing {
            Routing::Router => {
                let missing = || InputError::new("a layer without a router", "logits, or a choice of experts");
                moe_lora_route::route(self.router.as_ref().ok_or_else(missing)?, hidden, out)?;
            }
            Routing::Logits(logits) => {
                let bias = self.router.as_ref().and_then(|r| r.selection_bias.as_deref());
                moe_lora_route::topk(logits, shape.num_experts, &self.router_config, bias, out)?;
            }
            Routing::Selected { topk_ids, topk_weights } => {
                out.topk_ids.clear();
                out.topk_ids.extend_from_slice(topk_ids);
                out.topk_weights.clear();
                out.topk_weights.extend_from_slice(topk_weights);
            }
        }
        Ok(())
    }
}
