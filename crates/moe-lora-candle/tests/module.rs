//! The module against the layer that it wraps: the same bits, from tensors however they lie.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

use candle_core::{DType, Device, Tensor, WithDType};
use candle_nn::VarBuilder;
use half::{bf16, f16};
use moe_lora::{
    Activation, AdapterPool, AdapterWeights, Element, FusedMoEWithLoRA, LayerShape, ModelShape, PoolConfig,
    RouterConfig, RouterWeights, Routing, TokenAdapters,
};
use moe_lora_candle::{BlockConfig, MoeWithLora, TensorRouting};
use moe_lora_reference::random::{AdapterSpec, Case, CaseSpec, signed};
use std::collections::{BTreeMap, HashMap};

const TOKENS: usize = 12;

fn shape() -> LayerShape {
    LayerShape::new(5, 2, 24, 16).unwrap()
}

struct Setup {
    case: Case,
    pool: AdapterPool,
    router: RouterWeights,
    adapters: TokenAdapters,
}

impl Setup {
    fn new<W: Element>(seed: u64) -> Self {
        let adapters = vec![AdapterSpec::rank(4), AdapterSpec::rank(3)];
        let base = CaseSpec::new(shape(), TOKENS);
        let case = CaseSpec { weight_dtype: W::DTYPE, hidden_dtype: W::DTYPE, adapters, ..base }.build(seed);
        let model = ModelShape::uniform(shape(), 1, W::DTYPE);
        let pool = AdapterPool::new(&moe_lora::Device::cpu(), &model, PoolConfig::default()).unwrap();
        let load = |(n, layer): (usize, &moe_lora::AdapterLayer)| {
            let weights = AdapterWeights::new(&model, BTreeMap::from([(0, layer.clone())])).unwrap();
            pool.load(&n.to_string(), weights).unwrap()
        };
        let ids: Vec<_> = case.adapters.iter().enumerate().map(load).collect();
        let tokens: Vec<_> = case.token_slots.iter().map(|&s| usize::try_from(s).ok().map(|s| ids[s])).collect();
        assert!(tokens.iter().flatten().count() > 0);
        let mut rng = fastrand::Rng::with_seed(seed);
        let weight = (0..5 * 24).map(|_| W::from_f32(signed(&mut rng, 1.0))).collect();
        let weight = moe_lora::Matrix::from_vec(weight, 5, 24).unwrap();
        let config = RouterConfig::softmax(2);
        let router = RouterWeights { weight, bias: None, selection_bias: None, config };
        Self { case, pool, router, adapters: TokenAdapters::from_ids(&tokens) }
    }

    fn layer(&self) -> FusedMoEWithLoRA {
        let layer = FusedMoEWithLoRA::new(0, self.case.weights.clone(), &moe_lora::Device::cpu(), &self.pool).unwrap();
        layer.with_router(self.router.clone()).unwrap()
    }

    fn hidden<X: Element + WithDType>(&self) -> Tensor {
        Tensor::from_vec(self.case.hidden_as::<X>(), (TOKENS, 24), &Device::Cpu).unwrap()
    }

    fn direct<X: Element>(&self, routing: Routing<'_>) -> Vec<X> {
        let hidden = self.case.hidden_as::<X>();
        let mut out = vec![X::from_f32(f32::NAN); hidden.len()];
        self.layer().forward(&hidden, routing, &self.adapters, &mut out).unwrap();
        out
    }
}

fn numbers<X: WithDType>(tensor: &Tensor) -> Vec<X> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn same_bits<X: Element + WithDType>() {
    let setup = Setup::new::<X>(1);
    let block = MoeWithLora::new(setup.layer());
    let hidden = setup.hidden::<X>();
    let adapters = &setup.adapters;

    let want = setup.direct::<X>(Routing::Router);
    let out = block.forward(&hidden, TensorRouting::Router, adapters).unwrap();
    assert_eq!((out.dims(), out.dtype()), (hidden.dims(), hidden.dtype()));
    assert_eq!(numbers::<X>(&out), want);

    // Batch and sequence; a part of a larger tensor; columns first.
    let batch = hidden.reshape((3, 4, 24)).unwrap();
    let out = block.forward(&batch, TensorRouting::Router, adapters).unwrap();
    assert_eq!((out.dims(), numbers::<X>(&out)), (&[3, 4, 24][..], want.clone()));
    let zeros = hidden.zeros_like().unwrap();
    let part = Tensor::cat(&[&zeros, &hidden, &zeros], 0).unwrap().narrow(0, TOKENS, TOKENS).unwrap();
    assert_eq!(numbers::<X>(&block.forward(&part, TensorRouting::Router, adapters).unwrap()), want);
    let turned = hidden.t().unwrap().contiguous().unwrap().t().unwrap();
    assert!(!turned.is_contiguous());
    assert_eq!(numbers::<X>(&block.forward(&turned, TensorRouting::Router, adapters).unwrap()), want);

    let mut rng = fastrand::Rng::with_seed(2);
    let logits: Vec<f32> = (0..TOKENS * 5).map(|_| signed(&mut rng, 3.0)).collect();
    let want = setup.direct::<X>(Routing::Logits(&logits));
    let logits = Tensor::from_vec(logits, (TOKENS, 5), &Device::Cpu).unwrap();
    assert_eq!(numbers::<X>(&block.forward(&hidden, TensorRouting::Logits(&logits), adapters).unwrap()), want);

    let (topk_ids, topk_weights) = (&setup.case.topk_ids, &setup.case.topk_weights);
    let want = setup.direct::<X>(Routing::Selected { topk_ids, topk_weights });
    let topk_weights = &Tensor::from_slice(topk_weights, (TOKENS, 2), &Device::Cpu).unwrap();
    let wide: Vec<i64> = topk_ids.iter().map(|&id| id.into()).collect();
    let unsigned: Vec<u32> = topk_ids.iter().map(|&id| id.cast_unsigned()).collect();
    for topk_ids in &[
        Tensor::from_vec(wide, (TOKENS, 2), &Device::Cpu).unwrap(),
        Tensor::from_vec(unsigned, (TOKENS, 2), &Device::Cpu).unwrap(),
        Tensor::from_slice(topk_ids, (TOKENS, 2), &Device::Cpu).unwrap(),
    ] {
        let selected = TensorRouting::Selected { topk_ids, topk_weights };
        assert_eq!(numbers::<X>(&block.forward(&hidden, selected, adapters).unwrap()), want);
    }
}

#[test]
fn tensors_give_the_bits_of_the_layer() {
    same_bits::<f32>();
    same_bits::<f16>();
    same_bits::<bf16>();
}

#[test]
fn a_var_builder_gives_the_same_block_in_both_forms() {
    let setup = Setup::new::<bf16>(3);
    let tensor = |values: Vec<bf16>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let (mut each, mut fused) = (HashMap::new(), HashMap::new());
    let (mut gate_up, mut down) = (Vec::new(), Vec::new());
    for (e, expert) in setup.case.weights.experts().iter().enumerate() {
        for (name, matrix) in [("gate", &expert.gate), ("up", &expert.up), ("down", &expert.down)] {
            let values = matrix.to_vec::<bf16>();
            if name == "down" { &mut down } else { &mut gate_up }.extend_from_slice(&values);
            each.insert(format!("mlp.experts.{e}.{name}_proj.weight"), tensor(values, &matrix.shape()));
        }
    }
    fused.insert("mlp.experts.gate_up_proj".to_owned(), tensor(gate_up, &[5, 32, 24]));
    fused.insert("mlp.experts.down_proj".to_owned(), tensor(down, &[5, 24, 16]));
    let config = BlockConfig { layer: 0, shape: shape(), activation: Activation::Silu, router: setup.router.config };
    let hidden = setup.hidden::<bf16>();
    for mut tensors in [each, fused] {
        tensors.insert("mlp.gate.weight".to_owned(), tensor(setup.router.weight.to_vec(), &[5, 24]));
        let read = |tensors: &HashMap<String, Tensor>, config| {
            let weights = VarBuilder::from_tensors(tensors.clone(), DType::BF16, &Device::Cpu);
            MoeWithLora::from_var_builder(weights.pp("mlp"), config, &moe_lora::Device::cpu(), &setup.pool)
        };
        let block = read(&tensors, config).unwrap();
        let out = block.forward(&hidden, TensorRouting::Router, &setup.adapters).unwrap();
        assert_eq!(numbers::<bf16>(&out), setup.direct::<bf16>(Routing::Router));
        assert!(read(&tensors, BlockConfig { layer: 1, ..config }).is_err(), "the pool has no layer 1");
        tensors.retain(|name, _| !name.contains("down_proj"));
        assert!(read(&tensors, config).is_err(), "no down projection");
    }
}

#[test]
fn what_does_not_fit_is_told() {
    let setup = Setup::new::<f32>(4);
    let block = MoeWithLora::new(setup.layer());
    let refused = |hidden: &Tensor, routing, why: &str| {
        let error = block.forward(hidden, routing, &setup.adapters).unwrap_err().to_string();
        assert!(error.contains(why), "{error:?}, not {why:?}");
    };
    let hidden = setup.hidden::<f32>();
    let router = TensorRouting::Router;
    refused(&hidden.to_dtype(DType::F64).unwrap(), router, "F64");
    refused(&hidden.narrow(0, 0, 5).unwrap(), router, "[5, 24] of 12 tokens");
    refused(&hidden.t().unwrap(), router, "[24, 12]");
    let logits = Tensor::zeros((TOKENS, 4), DType::F32, &Device::Cpu).unwrap();
    refused(&hidden, TensorRouting::Logits(&logits), "logits [12, 4], where [12, 5]");
    let topk_ids = &Tensor::full(7_i64, (TOKENS, 2), &Device::Cpu).unwrap();
    let topk_weights = &Tensor::ones((TOKENS, 2), DType::F32, &Device::Cpu).unwrap();
    refused(&hidden, TensorRouting::Selected { topk_ids, topk_weights }, "7");
    let base = MoeWithLora::new(
        FusedMoEWithLoRA::new(0, setup.case.weights.clone(), &moe_lora::Device::cpu(), &setup.pool).unwrap(),
    );
    let error = base.forward(&hidden, router, &setup.adapters).unwrap_err().to_string();
    assert!(error.contains("a layer without a router"), "{error}");
}
