//! Random layers, adapters and batches: signed, and different for every adapter, expert and projection.

use crate::layer::LayerInput;
use crate::rounding::to_dtype;
use fastrand::Rng;
use half::{bf16, f16};
use moe_lora_core::{
    Activation, AdapterLayer, AdapterTable, DType, Element, ExpertBias, ExpertLora, ExpertWeights, LayerShape,
    LayerWeights, Lora, Matrix, RouterWeightPlacement,
};

/// How the tokens of a batch choose experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoutingMix {
    /// Different experts for each token, all equally likely.
    Uniform,
    /// A few experts get most tokens.
    Skewed,
    /// All tokens choose experts `0..k`.
    AllOnOne,
    /// Experts are drawn independently, so a token may name one twice.
    Duplicates,
    /// A quarter of the pairs belong to another rank (-1).
    ForeignExperts,
}

/// How the tokens of a batch choose adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterMix {
    /// Every token uses the base model.
    AllBase,
    /// Any adapter or none, equally likely.
    Mixed,
    /// Token `t` uses adapter `t % L`.
    RoundRobin,
    /// Neighbouring tokens share an adapter, as prefilled prompts do.
    Runs,
}

/// One adapter to draw. Rank 0 leaves a projection alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdapterSpec {
    /// Ranks of gate, up and down.
    pub ranks: [usize; 3],
    /// One A for gate and up (needs equal ranks).
    pub shared_gate_up_a: bool,
    /// One gate A, one up A and one down B for all experts.
    pub shared_outer: bool,
    /// Leave every second expert alone.
    pub some_experts: bool,
}

impl AdapterSpec {
    /// All projections of all experts with one rank.
    #[must_use]
    pub const fn rank(rank: usize) -> Self {
        Self { ranks: [rank; 3], shared_gate_up_a: false, shared_outer: false, some_experts: false }
    }
}

/// What to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseSpec {
    /// Sizes.
    pub shape: LayerShape,
    /// Tokens, T.
    pub tokens: usize,
    /// Format of base weights and adapters.
    pub weight_dtype: DType,
    /// Format that the hidden states are rounded to.
    pub hidden_dtype: DType,
    /// Gate.
    pub activation: Activation,
    /// Biases on all projections.
    pub bias: bool,
    /// Gate and up rows alternate in memory.
    pub interleaved: bool,
    /// Where the routing weight goes.
    pub router_weight: RouterWeightPlacement,
    /// Factor of the output.
    pub routed_scaling_factor: f32,
    /// Experts of the tokens.
    pub routing: RoutingMix,
    /// One entry a slot.
    pub adapters: Vec<AdapterSpec>,
    /// Adapters of the tokens.
    pub mix: AdapterMix,
}

impl CaseSpec {
    /// The plain case: f32, SiLU, uniform routing, tokens mixed over the adapters that are added later.
    #[must_use]
    pub fn new(shape: LayerShape, tokens: usize) -> Self {
        Self {
            shape,
            tokens,
            weight_dtype: DType::F32,
            hidden_dtype: DType::F32,
            activation: Activation::Silu,
            bias: false,
            interleaved: false,
            router_weight: RouterWeightPlacement::Output,
            routed_scaling_factor: 1.0,
            routing: RoutingMix::Uniform,
            adapters: Vec::new(),
            mix: AdapterMix::Mixed,
        }
    }

    /// The same format for weights and hidden states.
    #[must_use]
    pub fn dtype(self, dtype: DType) -> Self {
        Self { weight_dtype: dtype, hidden_dtype: dtype, ..self }
    }

    /// Draws the case; equal seeds give equal cases.
    #[must_use]
    pub fn build(self, seed: u64) -> Case {
        let mut rng = Rng::with_seed(seed);
        let weights = layer_weights(&mut rng, &self);
        let adapters =
            self.adapters.iter().map(|a| adapter_layer(&mut rng, &self.shape, self.weight_dtype, a)).collect();
        let hidden = (0..self.tokens * self.shape.hidden_size)
            .map(|_| to_dtype(signed(&mut rng, 1.0).into(), self.hidden_dtype))
            .collect();
        let topk_ids = (0..self.tokens).flat_map(|_| token_experts(&mut rng, &self.shape, self.routing)).collect();
        let topk_weights = (0..self.tokens).flat_map(|_| token_weights(&mut rng, self.shape.top_k)).collect();
        let token_slots = token_slots(&mut rng, self.tokens, self.adapters.len(), self.mix);
        Case { weights, adapters, hidden, topk_ids, topk_weights, token_slots, spec: self }
    }
}

/// A drawn layer, its adapters and a batch.
#[derive(Debug, Clone)]
pub struct Case {
    /// What it was drawn from.
    pub spec: CaseSpec,
    /// Base weights.
    pub weights: LayerWeights,
    /// One a slot.
    pub adapters: Vec<AdapterLayer>,
    /// `[T, H]`, exact in the hidden format.
    pub hidden: Vec<f64>,
    /// `[T, k]`.
    pub topk_ids: Vec<i32>,
    /// `[T, k]`, positive, summing to 1 for each token.
    pub topk_weights: Vec<f32>,
    /// `[T]`.
    pub token_slots: Vec<i32>,
}

impl Case {
    /// The adapters by slot.
    #[must_use]
    pub fn table(&self) -> AdapterTable<'_> {
        AdapterTable::new(self.adapters.iter().map(Some).collect())
    }

    /// The hidden states in format `T`.
    #[must_use]
    pub fn hidden_as<T: Element>(&self) -> Vec<T> {
        self.hidden.iter().map(|&x| T::from_f32(x as f32)).collect()
    }

    /// The truth of this case.
    ///
    /// # Errors
    /// As [`forward`](crate::forward): only if the fields were changed to something inconsistent.
    pub fn truth(&self) -> Result<Vec<f64>, moe_lora_core::InputError> {
        crate::forward(&self.input_with(&self.table()))
    }

    /// The truth of this case with every token on the base model.
    ///
    /// # Errors
    /// As [`truth`](Self::truth).
    pub fn base_truth(&self) -> Result<Vec<f64>, moe_lora_core::InputError> {
        crate::forward(&self.input_with(&AdapterTable::default()))
    }

    /// The reference's view of this case, for a table that outlives it.
    #[must_use]
    pub fn input_with<'a>(&'a self, adapters: &'a AdapterTable<'a>) -> LayerInput<'a> {
        LayerInput {
            hidden: &self.hidden,
            weights: &self.weights,
            topk_ids: &self.topk_ids,
            topk_weights: &self.topk_weights,
            token_slots: &self.token_slots,
            adapters,
        }
    }
}

/// A uniform number with mean 0 and standard deviation `deviation`.
pub fn signed(rng: &mut Rng, deviation: f32) -> f32 {
    (rng.f32() * 2.0 - 1.0) * 3_f32.sqrt() * deviation
}

/// A dense random matrix in a run-time format.
///
/// # Panics
/// If a size is zero.
#[must_use]
#[expect(clippy::expect_used, reason = "cases are drawn by tests, whose sizes are not input")]
pub fn matrix(rng: &mut Rng, dtype: DType, rows: usize, cols: usize, deviation: f32) -> Matrix {
    fn fill<T: Element>(rng: &mut Rng, rows: usize, cols: usize, deviation: f32) -> Matrix {
        let values = (0..rows * cols).map(|_| T::from_f32(signed(rng, deviation))).collect();
        Matrix::from_vec::<T>(values, rows, cols).expect("rows and cols are not zero")
    }
    match dtype {
        DType::F32 => fill::<f32>(rng, rows, cols, deviation),
        DType::F16 => fill::<f16>(rng, rows, cols, deviation),
        DType::Bf16 => fill::<bf16>(rng, rows, cols, deviation),
    }
}

/// Random base weights, scaled so that every projection keeps the size of its input.
#[must_use]
#[expect(clippy::expect_used, reason = "the sizes come from the shape itself")]
pub fn layer_weights(rng: &mut Rng, spec: &CaseSpec) -> LayerWeights {
    let LayerShape { num_experts, hidden_size, intermediate_size, .. } = spec.shape;
    let (hidden_deviation, inner_deviation) = (root(hidden_size), root(intermediate_size));
    let experts = (0..num_experts)
        .map(|_| {
            let w13 = matrix(rng, spec.weight_dtype, 2 * intermediate_size, hidden_size, hidden_deviation);
            let (up_first, step) = if spec.interleaved { (1, 2) } else { (intermediate_size, 1) };
            let half = |first| w13.select_rows(first, intermediate_size, step).expect("half of the rows of w13");
            let bias = |n, rng: &mut Rng| (0..n).map(|_| signed(rng, 0.5)).collect::<Vec<f32>>();
            ExpertWeights {
                gate: half(0),
                up: half(up_first),
                down: matrix(rng, spec.weight_dtype, hidden_size, intermediate_size, 2.0 * inner_deviation),
                bias: spec.bias.then(|| ExpertBias {
                    gate: bias(intermediate_size, rng),
                    up: bias(intermediate_size, rng),
                    down: bias(hidden_size, rng),
                }),
            }
        })
        .collect();
    LayerWeights::new(spec.shape, experts, spec.activation)
        .expect("every matrix has the size that the shape asks for")
        .with_router_weight(spec.router_weight)
        .with_routed_scaling_factor(spec.routed_scaling_factor)
}

/// A random adapter whose change is about as large as what the base weights do.
#[must_use]
#[expect(clippy::expect_used, reason = "the sizes come from the shape itself")]
pub fn adapter_layer(rng: &mut Rng, shape: &LayerShape, dtype: DType, spec: &AdapterSpec) -> AdapterLayer {
    let LayerShape { num_experts, hidden_size, intermediate_size, .. } = *shape;
    let widths = [(hidden_size, intermediate_size), (hidden_size, intermediate_size), (intermediate_size, hidden_size)];
    let draw_a = |rng: &mut Rng, p: usize| matrix(rng, dtype, spec.ranks[p].max(1), widths[p].0, root(widths[p].0));
    let draw_b =
        |rng: &mut Rng, p: usize| matrix(rng, dtype, widths[p].1, spec.ranks[p].max(1), root(spec.ranks[p].max(1)));
    let outer = spec.shared_outer.then(|| (draw_a(rng, 0), draw_a(rng, 1), draw_b(rng, 2)));
    let experts = (0..num_experts)
        .map(|e| {
            if spec.some_experts && e % 2 == 1 {
                return ExpertLora::default();
            }
            let (gate_a, up_a, down_b) = match &outer {
                Some(outer) => outer.clone(),
                None => (draw_a(rng, 0), draw_a(rng, 1), draw_b(rng, 2)),
            };
            let up_a = if spec.shared_gate_up_a { gate_a.clone() } else { up_a };
            let pairs = [(gate_a, draw_b(rng, 0)), (up_a, draw_b(rng, 1)), (draw_a(rng, 2), down_b)];
            let mut projections = pairs.into_iter().zip(spec.ranks).map(|((a, b), rank)| {
                let scale = 0.75 + 0.5 * rng.f32();
                (rank > 0).then(|| Lora::new(a, b, scale).expect("A and B were drawn with one rank"))
            });
            let mut next = || projections.next().flatten();
            ExpertLora { gate: next(), up: next(), down: next() }
        })
        .collect();
    AdapterLayer::new(shape, experts).expect("every matrix has the size that the shape asks for")
}

fn root(n: usize) -> f32 {
    1.0 / (n as f32).sqrt()
}

fn token_experts(rng: &mut Rng, shape: &LayerShape, routing: RoutingMix) -> Vec<i32> {
    let (experts, k) = (shape.num_experts as i32, shape.top_k);
    let mut all: Vec<i32> = (0..experts).collect();
    match routing {
        RoutingMix::AllOnOne => all.truncate(k),
        RoutingMix::Uniform => {
            rng.shuffle(&mut all);
            all.truncate(k);
        }
        RoutingMix::Skewed => {
            // The smallest of two shuffled places: low experts are in front for most tokens.
            all.sort_by_cached_key(|&e| rng.i32(0..experts).min(rng.i32(0..experts)) + e / 2);
            all.truncate(k);
        }
        RoutingMix::Duplicates => all = (0..k).map(|_| rng.i32(0..experts)).collect(),
        RoutingMix::ForeignExperts => {
            rng.shuffle(&mut all);
            all.truncate(k);
            all.iter_mut().for_each(|e| *e = if rng.u8(0..4) == 0 { -1 } else { *e });
        }
    }
    all
}

fn token_weights(rng: &mut Rng, k: usize) -> Vec<f32> {
    let raw: Vec<f32> = (0..k).map(|_| 0.1 + rng.f32()).collect();
    let sum: f32 = raw.iter().sum();
    raw.into_iter().map(|w| w / sum).collect()
}

fn token_slots(rng: &mut Rng, tokens: usize, adapters: usize, mix: AdapterMix) -> Vec<i32> {
    let count = adapters as i32;
    let mut run = -1;
    (0..tokens)
        .map(|t| match mix {
            _ if adapters == 0 => -1,
            AdapterMix::AllBase => -1,
            AdapterMix::Mixed => rng.i32(-1..count),
            AdapterMix::RoundRobin => (t % adapters) as i32,
            AdapterMix::Runs => {
                if t % 5 == 0 {
                    run = rng.i32(-1..count);
                }
                run
            }
        })
        .collect()
}
