//! The layer with its pool: mixed batches, eviction, replacement, routing, and errors that blame the right one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use moe_lora_core::{
    AdapterId, AdapterTable, AdapterWeights, DType, LayerShape, ModelShape, RouterConfig, RouterWeights, Routing,
    TokenAdapters,
};
use moe_lora_layer::FusedMoEWithLoRA;
use moe_lora_pool::{AdapterPool, PoolConfig};
use moe_lora_reference::metrics::relative_error;
use moe_lora_reference::random::{AdapterSpec, Case, CaseSpec, matrix};
use moe_lora_reference::{LayerInput, forward};
use moe_lora_runner::{Device, Limits};

struct Server {
    case: Case,
    model: ModelShape,
    pool: AdapterPool,
    layer: FusedMoEWithLoRA,
}

impl Server {
    /// Six adapters of rank 8 and one layer, 4, in a pool with room for `room` of them.
    fn new(room: usize) -> Self {
        let shape = LayerShape::new(6, 2, 40, 24).unwrap();
        let case = CaseSpec { adapters: vec![AdapterSpec::rank(8); 6], ..CaseSpec::new(shape, 12) }.build(1);
        let model = ModelShape { moe_layers: vec![2, 4], ..ModelShape::uniform(shape, 1, DType::F32) };
        let device = Device::cpu();
        let bytes = room * 3 * shape.num_experts * 8 * (40 + 24) * 4;
        let pool = AdapterPool::new(&device, &model, PoolConfig { bytes, ..Default::default() }).unwrap();
        let layer = FusedMoEWithLoRA::new(4, case.weights.clone(), &device, &pool).unwrap();
        Self { case, model, pool, layer }
    }

    fn adapter(&self, n: usize) -> AdapterWeights {
        AdapterWeights::new(&self.model, [(4, self.case.adapters[n].clone())].into()).unwrap()
    }

    fn load(&self, n: usize) -> AdapterId {
        self.pool.load(&format!("adapter {n}"), self.adapter(n)).unwrap()
    }

    fn serve(&self, tokens: &[Option<AdapterId>]) -> Result<Vec<f64>, moe_lora_layer::LayerError> {
        let count = tokens.len();
        let hidden = &self.case.hidden_as::<f32>()[..count * 40];
        let mut out = vec![f32::NAN; hidden.len()];
        self.layer.forward(hidden, self.routing(count), &TokenAdapters::from_ids(tokens), &mut out)?;
        Ok(out.into_iter().map(f64::from).collect())
    }

    fn routing(&self, tokens: usize) -> Routing<'_> {
        let (ids, weights) = (&self.case.topk_ids[..tokens * 2], &self.case.topk_weights[..tokens * 2]);
        Routing::Selected { topk_ids: ids, topk_weights: weights }
    }

    /// The truth where token `t` uses adapter `slots[t]` of the case.
    fn truth(&self, slots: &[i32]) -> Vec<f64> {
        let input = LayerInput {
            hidden: &self.case.hidden[..slots.len() * 40],
            topk_ids: &self.case.topk_ids[..slots.len() * 2],
            topk_weights: &self.case.topk_weights[..slots.len() * 2],
            token_slots: slots,
            weights: &self.case.weights,
            adapters: &AdapterTable::new(self.case.adapters.iter().map(Some).collect()),
        };
        forward(&input).unwrap()
    }
}

#[track_caller]
fn equal(found: &[f64], truth: &[f64]) {
    let error = relative_error(found, truth);
    assert!(error <= 1e-5, "{error:.2e}");
}

/// vLLM's `[1, None, 3, None]`, with numbers.
#[test]
fn adapters_and_base_in_one_batch() {
    let server = Server::new(6);
    let (one, three) = (server.load(1), server.load(3));
    equal(&server.serve(&[Some(one), None, Some(three), None]).unwrap(), &server.truth(&[1, -1, 3, -1]));
    equal(&server.serve(&[None; 4]).unwrap(), &server.truth(&[-1; 4]));
    equal(&server.serve(&[Some(three); 12]).unwrap(), &server.truth(&[3; 12]));
    assert!(server.serve(&[]).unwrap().is_empty());
}

#[test]
fn a_batch_equals_its_parts() {
    let server = Server::new(6);
    let ids: Vec<_> = (0..3).map(|n| server.load(n)).collect();
    let tokens: Vec<_> = (0..12).map(|t| (t % 4 > 0).then(|| ids[t % 4 - 1])).collect();
    let whole = server.serve(&tokens).unwrap();
    assert_eq!(server.serve(&tokens[..5]).unwrap(), whole[..5 * 40]);
}

/// A batch of 3 adapters, then 3 others in a pool that holds 3: an eviction each, and the evicted are errors by name.
#[test]
fn more_adapters_than_fit_take_turns() {
    let server = Server::new(3);
    let first: Vec<_> = (0..3).map(|n| server.load(n)).collect();
    equal(&server.serve(&[Some(first[0]), Some(first[1]), Some(first[2])]).unwrap(), &server.truth(&[0, 1, 2]));
    let second: Vec<_> = (3..6).map(|n| server.load(n)).collect();
    equal(&server.serve(&[Some(second[0]), Some(second[1]), Some(second[2])]).unwrap(), &server.truth(&[3, 4, 5]));
    assert!(server.serve(&[None, Some(first[1])]).is_err(), "an evicted adapter must not be another one's weights");
    equal(&server.serve(&[None, Some(second[1])]).unwrap(), &server.truth(&[-1, 4]));
}

#[test]
fn a_replaced_adapter_serves_its_new_weights_under_the_old_id() {
    let server = Server::new(3);
    let id = server.load(0);
    assert_eq!(server.pool.replace("adapter 0", server.adapter(5)).unwrap(), id);
    equal(&server.serve(&[Some(id), None]).unwrap(), &server.truth(&[5, -1]));
    server.pool.unload(id).unwrap();
    assert!(server.serve(&[Some(id)]).is_err());
}

#[test]
fn layers_that_an_adapter_leaves_alone_are_base_layers() {
    let server = Server::new(3);
    let elsewhere = AdapterWeights::new(&server.model, [(2, server.case.adapters[0].clone())].into()).unwrap();
    let id = server.pool.load("elsewhere", elsewhere).unwrap();
    assert_eq!(server.serve(&[Some(id); 4]).unwrap(), server.serve(&[None; 4]).unwrap());
}

#[test]
fn logits_and_the_own_router_lead_to_the_same_output() {
    let mut server = Server::new(3);
    let router = RouterWeights {
        weight: matrix(&mut fastrand::Rng::with_seed(3), DType::F32, 6, 40, 0.3),
        bias: None,
        selection_bias: Some(vec![0.3, 0.0, -0.2, 0.1, 0.0, 0.4]),
        config: RouterConfig { routed_scaling_factor: 2.5, ..RouterConfig::softmax(2) },
    };
    let id = server.load(2);
    let hidden = server.case.hidden_as::<f32>();
    let tokens = TokenAdapters::from_ids(&[Some(id); 12]);
    let mut logits = Vec::new();
    moe_lora_route::router_logits(&router, &hidden, &mut logits).unwrap();

    let mut out = vec![f32::NAN; hidden.len()];
    let missing = server.layer.forward(&hidden, Routing::Router, &tokens, &mut out).unwrap_err();
    assert!(missing.input().is_some() && missing.to_string().contains("router"));
    server.layer = server.layer.with_router(router).unwrap();
    server.layer.forward(&hidden, Routing::Router, &tokens, &mut out).unwrap();
    let mut again = vec![f32::NAN; hidden.len()];
    server.layer.forward(&hidden, Routing::Logits(&logits), &tokens, &mut again).unwrap();
    assert_eq!(out, again);
    let topk = server.layer.route(&hidden, Routing::Router).unwrap();
    (server.case.topk_ids, server.case.topk_weights) = (topk.topk_ids, topk.topk_weights);
    equal(&out.iter().map(|&v| v.into()).collect::<Vec<_>>(), &server.truth(&[2; 12]));
}

#[test]
fn what_does_not_fit_is_refused() {
    let server = Server::new(3);
    let device = Device::cpu();
    let layer = |n, weights| FusedMoEWithLoRA::new(n, weights, &device, &server.pool);
    assert!(layer(3, server.case.weights.clone()).unwrap_err().to_string().contains("layer 3"));
    let other = CaseSpec::new(LayerShape::new(6, 2, 40, 25).unwrap(), 1).build(0).weights;
    assert!(layer(4, other).is_err());
    let limits = Limits { max_tokens: 0, max_rank: 8 };
    assert!(FusedMoEWithLoRA::with_limits(4, server.case.weights.clone(), &device, &server.pool, limits).is_err());

    let hidden = server.case.hidden_as::<f32>();
    let mut out = vec![0.0_f32; hidden.len()];
    let short = server.layer.forward(&hidden[1..], server.routing(12), &TokenAdapters::base(12), &mut out).unwrap_err();
    assert!(short.input().is_some() && short.to_string().contains("hidden"));
    let forged = AdapterId { slot: u32::MAX, generation: 0 };
    assert!(server.serve(&[Some(forged)]).is_err());
}

#[test]
fn layers_can_share_one_workspace_across_threads() {
    let server = Server::new(3);
    let id = server.load(1);
    let device = Device::cpu();
    let twin = FusedMoEWithLoRA::new(2, server.case.weights.clone(), &device, &server.pool).unwrap();
    let twin = twin.sharing_workspace_with(&server.layer).unwrap();
    let (base, mixed) = (server.truth(&[-1; 12]), server.truth(&[1; 12]));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..20).for_each(|_| equal(&server.serve(&[Some(id); 12]).unwrap(), &mixed)));
            scope.spawn(|| {
                let hidden = server.case.hidden_as::<f32>();
                for _ in 0..20 {
                    // Layer 2 is one that the adapter leaves alone.
                    let mut out = vec![f32::NAN; hidden.len()];
                    let tokens = TokenAdapters::from_ids(&[Some(id); 12]);
                    twin.forward(&hidden, server.routing(12), &tokens, &mut out).unwrap();
                    equal(&out.iter().map(|&v| v.into()).collect::<Vec<_>>(), &base);
                }
            });
        }
    });
}
