//! Test-side adapters: random canonical matrices, a writer for each file layout, and the comparison.
#![allow(dead_code, unreachable_pub)] // each test file uses a part

pub mod input;
pub mod seeds;

use half::{bf16, f16};
use moe_lora_adapter::{AdapterError, OpenOptions, PeftAdapter};
use moe_lora_core::{AdapterWeights, DType, ExpertStorage, LayerShape, ModelShape, Projection};
use std::collections::BTreeMap;

/// A dense array of any dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Array {
    pub fn from_fn<const N: usize>(shape: [usize; N], mut f: impl FnMut([usize; N]) -> f32) -> Self {
        let mut at = [0; N];
        let values = (0..shape.iter().product()).map(|n| {
            let mut n: usize = n;
            for d in (0..N).rev() {
                at[d] = n % shape[d];
                n /= shape[d];
            }
            f(at)
        });
        Self { shape: shape.to_vec(), values: values.collect() }
    }

    /// Signed numbers that every format holds exactly.
    pub fn random<const N: usize>(rng: &mut fastrand::Rng, shape: [usize; N]) -> Self {
        Self::from_fn(shape, |_| {
            loop {
                let value = rng.i32(-127..=127);
                if value != 0 {
                    break value as f32 / 64.0;
                }
            }
        })
    }

    pub fn get<const N: usize>(&self, at: [usize; N]) -> f32 {
        assert_eq!(self.shape.len(), N);
        self.values[at.iter().zip(&self.shape).fold(0, |n, (i, d)| n * d + i)]
    }
}

/// One A `[r, in]` and B `[out, r]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    pub a: Array,
    pub b: Array,
    pub scale: f32,
}

impl Pair {
    pub fn rank(&self) -> usize {
        self.a.shape[0]
    }

    /// `scale * B A`, `[out][in]`.
    pub fn delta(&self) -> Vec<f64> {
        let (r, out, inner) = (self.rank(), self.b.shape[0], self.a.shape[1]);
        let at = |n: usize, i: usize| {
            (0..r).map(|k| f64::from(self.b.get([n, k])) * f64::from(self.a.get([k, i]))).sum::<f64>()
        };
        (0..out).flat_map(|n| (0..inner).map(move |i| (n, i))).map(|(n, i)| f64::from(self.scale) * at(n, i)).collect()
    }
}

/// Canonical pairs by layer, expert, projection.
pub type Pairs = BTreeMap<(usize, usize, Projection), Pair>;

/// Sizes E, H, I.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub e: usize,
    pub h: usize,
    pub i: usize,
}

impl Sizes {
    pub fn model(self, layers: usize) -> ModelShape {
        ModelShape::uniform(LayerShape::new(self.e, 1, self.h, self.i).unwrap(), layers, DType::F32)
    }

    pub fn out_in(self, projection: Projection) -> [usize; 2] {
        projection.base_shape(&LayerShape::new(self.e, 1, self.h, self.i).unwrap())
    }
}

/// A model whose code stores gpt-oss' way.
pub fn gpt_oss(mut model: ModelShape) -> ModelShape {
    model.storage = ExpertStorage { transposed: true, interleaved: true };
    model
}

/// A full random adapter; with `one_a`, gate and up have one A.
pub fn random(rng: &mut fastrand::Rng, sizes: Sizes, layers: usize, rank: usize, scale: f32, one_a: bool) -> Pairs {
    let mut pairs = Pairs::new();
    for layer in 0..layers {
        for e in 0..sizes.e {
            for p in Projection::ALL {
                let [out, inner] = sizes.out_in(p);
                let pair = Pair { a: Array::random(rng, [rank, inner]), b: Array::random(rng, [out, rank]), scale };
                pairs.insert((layer, e, p), pair);
            }
            if one_a {
                let a = pairs[&(layer, e, Projection::Gate)].a.clone();
                pairs.get_mut(&(layer, e, Projection::Up)).unwrap().a = a;
            }
        }
    }
    pairs
}

/// A file in the making.
#[derive(Clone, Debug)]
pub struct File {
    pub tensors: Vec<(String, DType, Array)>,
    pub config: serde_json::Map<String, serde_json::Value>,
}

impl File {
    pub fn new(rank: usize, alpha: f64) -> Self {
        let config = serde_json::json!({
            "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": null,
        });
        Self { tensors: Vec::new(), config: config.as_object().unwrap().clone() }
    }

    pub fn set(mut self, field: &str, value: serde_json::Value) -> Self {
        self.config.insert(field.to_owned(), value);
        self
    }

    /// Adds a tensor under `layers.{layer}.{rest}`.
    pub fn put(&mut self, layer: usize, rest: impl AsRef<str>, array: Array) {
        let name = format!("base_model.model.model.layers.{layer}.{}", rest.as_ref());
        self.tensors.push((name, DType::F32, array));
    }

    pub fn tensor(&mut self, end: &str) -> &mut (String, DType, Array) {
        let found = self.tensors.iter_mut().find(|t| t.0.ends_with(end));
        found.unwrap_or_else(|| panic!("no tensor {end}"))
    }

    pub fn remove(&mut self, end: &str) {
        let before = self.tensors.len();
        self.tensors.retain(|t| !t.0.ends_with(end));
        assert_ne!(before, self.tensors.len(), "no tensor {end}");
    }

    pub fn dtype(mut self, dtype: DType) -> Self {
        self.tensors.iter_mut().for_each(|t| t.1 = dtype);
        self
    }

    pub fn config_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.config).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let tensors = self.tensors.iter().map(|(name, dtype, array)| {
            let data: Vec<u8> = match dtype {
                DType::F32 => array.values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                DType::F16 => array.values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
                DType::Bf16 => array.values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            };
            (name.as_str(), dtype.to_string().to_uppercase(), array.shape.clone(), data)
        });
        safetensors(tensors)
    }

    pub fn open(&self) -> Result<PeftAdapter, AdapterError> {
        PeftAdapter::from_bytes(&self.config_bytes(), self.bytes())
    }

    pub fn open_with(&self, options: OpenOptions) -> Result<PeftAdapter, AdapterError> {
        PeftAdapter::from_bytes_with(&self.config_bytes(), self.bytes(), options)
    }

    pub fn resolve(&self, shape: &ModelShape) -> Result<AdapterWeights, AdapterError> {
        self.open()?.resolve(shape)
    }

    /// The error's line.
    #[track_caller]
    pub fn refusal(&self, shape: &ModelShape) -> String {
        let error = self.resolve(shape).expect_err("it should be refused");
        assert!(error.input().unwrap().file.is_some(), "{error}");
        error.to_string()
    }
}

pub fn safetensors<'a>(tensors: impl Iterator<Item = (&'a str, String, Vec<usize>, Vec<u8>)>) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        data.extend(bytes);
        header.insert(name.to_owned(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

pub const PROJ: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
pub const W: [&str; 3] = ["w1", "w3", "w2"];

/// F1, F2: a tensor for each expert.
pub fn per_expert(file: &mut File, pairs: &Pairs, block: &str, names: [&str; 3]) {
    for ((layer, e, p), pair) in pairs {
        let path = format!("{block}.experts.{e}.{}", names[*p as usize]);
        file.put(*layer, format!("{path}.lora_A.weight"), pair.a.clone());
        file.put(*layer, format!("{path}.lora_B.weight"), pair.b.clone());
    }
}

/// `[2I, r]` from gate and up, the rows one after the other or in turns.
pub fn fuse_b(gate: &Array, up: &Array, interleaved: bool) -> Array {
    let [i, r] = [gate.shape[0], gate.shape[1]];
    Array::from_fn([2 * i, r], |[row, k]| match (interleaved, row) {
        (false, row) if row < i => gate.get([row, k]),
        (false, row) => up.get([row - i, k]),
        (true, row) if row % 2 == 0 => gate.get([row / 2, k]),
        (true, row) => up.get([row / 2, k]),
    })
}

/// Per layer and expert the fused pair and the down pair, of adapters with one A for gate and up.
pub fn fused(pairs: &Pairs, interleaved: bool) -> BTreeMap<(usize, usize), [Pair; 2]> {
    let experts = pairs.keys().map(|(layer, e, _)| (*layer, *e));
    let fuse = |(layer, e)| {
        let [gate, up, down] = Projection::ALL.map(|p| &pairs[&(layer, e, p)]);
        assert_eq!(gate.a, up.a);
        let gate_up = Pair { a: gate.a.clone(), b: fuse_b(&gate.b, &up.b, interleaved), scale: gate.scale };
        ((layer, e), [gate_up, down.clone()])
    };
    experts.map(fuse).collect()
}

/// `[n, x, y]` from n arrays `[x, y]`.
pub fn stack(arrays: &[&Array]) -> Array {
    let [x, y] = [arrays[0].shape[0], arrays[0].shape[1]];
    Array::from_fn([arrays.len(), x, y], |[n, row, col]| arrays[n].get([row, col]))
}

/// Swaps the last two dimensions.
pub fn turned(array: &Array) -> Array {
    match *array.shape {
        [x, y] => Array::from_fn([y, x], |[row, col]| array.get([col, row])),
        [n, x, y] => Array::from_fn([n, y, x], |[n, row, col]| array.get([n, col, row])),
        _ => unreachable!(),
    }
}

/// F4 or F6: all experts of a layer in one tensor, under the given names.
pub fn stacked(file: &mut File, layer: usize, module: &str, pairs: &[&Pair], rank_last: bool) {
    let a = stack(&pairs.iter().map(|p| &p.a).collect::<Vec<_>>());
    let b = stack(&pairs.iter().map(|p| &p.b).collect::<Vec<_>>());
    let (a, b) = if rank_last { (turned(&a), turned(&b)) } else { (a, b) };
    file.put(layer, format!("{module}.lora_A.weight"), a);
    file.put(layer, format!("{module}.lora_B.weight"), b);
}

/// F5: as PEFT lays the experts out; `transposed` as for a parameter whose in and out it had the other way round.
pub fn flat(file: &mut File, layer: usize, module: &str, pairs: &[&Pair], transposed: bool) {
    let (e, r) = (pairs.len(), pairs[0].rank());
    let sides: Vec<(Array, Array)> = pairs
        .iter()
        .map(|p| if transposed { (turned(&p.b), turned(&p.a)) } else { (p.a.clone(), p.b.clone()) })
        .collect();
    let (inner, out) = (sides[0].0.shape[1], sides[0].1.shape[0]);
    let a = Array::from_fn([r * e, inner], |[row, i]| sides[row / r].0.get([row % r, i]));
    let b = Array::from_fn([out, r * e], |[o, col]| sides[col % e].1.get([o, col / e]));
    file.put(layer, format!("{module}.lora_A.weight"), a);
    file.put(layer, format!("{module}.lora_B.weight"), b);
}

/// The canonical pairs of a loaded adapter.
pub fn loaded(weights: &AdapterWeights) -> Pairs {
    let mut pairs = Pairs::new();
    for (layer, content) in weights.layers() {
        for (e, expert) in content.experts().iter().enumerate() {
            for p in Projection::ALL {
                let Some(lora) = expert.get(p) else { continue };
                assert_eq!(lora.a().row_stride(), lora.a().cols(), "dense");
                assert_eq!(lora.b().row_stride(), lora.b().cols(), "dense");
                let array = |m: &moe_lora_core::Matrix| Array { shape: m.shape().to_vec(), values: m.to_vec() };
                pairs.insert((*layer, e, p), Pair { a: array(lora.a()), b: array(lora.b()), scale: lora.scale() });
            }
        }
    }
    pairs
}

/// Same parts, same numbers.
#[track_caller]
pub fn assert_same(weights: &AdapterWeights, expected: &Pairs) {
    let found = loaded(weights);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (key, pair) in &found {
        assert_eq!(pair, &expected[key], "{key:?}");
    }
}

/// Same changes of every weight, whatever the factors.
#[track_caller]
pub fn assert_same_delta(weights: &AdapterWeights, expected: &Pairs) {
    let found = loaded(weights);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (key, pair) in &found {
        for (found, expected) in pair.delta().iter().zip(expected[key].delta()) {
            assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{key:?}: {found} {expected}");
        }
    }
}
