//! Checkpoints, adapters and outputs that Hugging Face transformers and PEFT computed, through the public API.
//!
//! `xtask/golden/README.md` says what the fixtures are. `MOE_LORA_FIXTURES` names their folder where the sources are not.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "tests may fail loudly and speak")]

use moe_lora::adapter::{ExpertLayout, OpenOptions};
use moe_lora::reference::metrics::{relative_error, worst_row_error};
use moe_lora::reference::{LayerInput, forward};
use moe_lora::{
    AdapterPool, AdapterTable, AdapterWeights, Checkpoint, DType, Device, Element, FusedMoEWithLoRA, ModelShape,
    PeftAdapter, PoolConfig, Routing, TokenAdapters,
};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::env::var_os("MOE_LORA_FIXTURES").map_or(beside, PathBuf::from)
}

/// One `case-*.json` with its tensors.
struct Case {
    name: String,
    model: Checkpoint,
    layer: usize,
    adapters: Vec<PeftAdapter>,
    hidden: Vec<f32>,
    tokens: Vec<i32>,
    want: Vec<f64>,
    want_ids: Vec<i32>,
    want_weights: Vec<f32>,
}

impl Case {
    fn open(json: &Path) -> Self {
        let about: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        let root = folder();
        let tensors = moe_lora_files::SafetensorsFile::open(json.with_extension("safetensors")).unwrap();
        let bytes = |name: &str| tensors.read(tensors.get(name).unwrap()).unwrap();
        let f32s = |name: &str| bytemuck::pod_collect_to_vec::<u8, f32>(&bytes(name));
        let i32s = |name: &str| bytemuck::pod_collect_to_vec::<u8, i32>(&bytes(name));
        let hidden = match tensors.get("hidden_states").unwrap().dtype {
            moe_lora_files::Dtype::F32 => f32s("hidden_states"),
            moe_lora_files::Dtype::F16 => widen::<half::f16>(&bytes("hidden_states")),
            moe_lora_files::Dtype::BF16 => widen::<half::bf16>(&bytes("hidden_states")),
            other => panic!("{other:?}"),
        };
        let adapter = |entry: &Value| {
            let expert_layout = match about["orientation"][entry[0].as_str().unwrap()].as_str() {
                Some("direct") => Some(ExpertLayout::Direct),
                Some("transposed") => Some(ExpertLayout::Transposed),
                _ => None,
            };
            let dir = root.join(entry[1].as_str().unwrap());
            PeftAdapter::open_with(dir, OpenOptions { expert_layout, ..Default::default() }).unwrap()
        };
        Self {
            name: json.file_stem().unwrap().to_string_lossy().into_owned(),
            model: Checkpoint::open(root.join(about["checkpoint"].as_str().unwrap())).unwrap(),
            layer: about["layer"].as_u64().unwrap() as usize,
            adapters: about["adapters"].as_array().unwrap().iter().map(adapter).collect(),
            hidden,
            tokens: i32s("adapter_index"),
            want: f32s("expected_hidden_states").into_iter().map(f64::from).collect(),
            want_ids: i32s("expected_topk_ids"),
            want_weights: f32s("expected_topk_weights"),
        }
    }

    fn resolve(&self, dtype: DType) -> Vec<AdapterWeights> {
        let shape = ModelShape { dtype, ..self.model.shape().clone() };
        self.adapters.iter().map(|a| a.resolve(&shape).unwrap_or_else(|e| panic!("{}: {e}", self.name))).collect()
    }
}

fn widen<T: Element>(bytes: &[u8]) -> Vec<f32> {
    bytemuck::pod_collect_to_vec::<u8, T>(bytes).into_iter().map(T::to_f32).collect()
}

fn cases() -> Vec<Case> {
    let mut files: Vec<_> = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "json") && p.file_name().unwrap() != "refused.json");
    files.sort();
    assert!(files.len() >= 20, "only {} cases in {}", files.len(), folder().display());
    files.iter().map(|file| Case::open(file)).collect()
}

/// The experts of each token with their weights, in the order of their ids.
fn pairs(ids: &[i32], weights: &[f32], k: usize) -> Vec<Vec<(i32, f32)>> {
    let token = |(ids, weights): (&[i32], &[f32])| {
        let mut pairs: Vec<_> = ids.iter().copied().zip(weights.iter().copied()).collect();
        pairs.sort_by_key(|p| p.0);
        pairs
    };
    ids.chunks(k).zip(weights.chunks(k)).map(token).collect()
}

/// What the layer of `case` computes on `device`, with the experts that it chose.
fn serve(case: &Case, device: &Device) -> Result<Vec<f64>, Box<dyn std::error::Error>> {
    let shape = case.model.shape();
    let pool = AdapterPool::new(device, shape, PoolConfig::default())?;
    let load = |(n, weights): (usize, AdapterWeights)| pool.load(&n.to_string(), weights);
    let ids = case.resolve(shape.dtype).into_iter().enumerate().map(load).collect::<Result<Vec<_>, _>>()?;
    let layer = FusedMoEWithLoRA::new(case.layer, case.model.layer_weights(case.layer)?, device, &pool)?;
    let layer = layer.with_router(case.model.router(case.layer)?)?;

    let topk = layer.route(&case.hidden, Routing::Router)?;
    let k = shape.layer.top_k;
    let (found, want) = (pairs(&topk.topk_ids, &topk.topk_weights, k), pairs(&case.want_ids, &case.want_weights, k));
    for (t, (found, want)) in found.iter().zip(&want).enumerate() {
        let alike = found.iter().zip(want).all(|(f, w)| f.0 == w.0 && (f.1 - w.1).abs() <= 1e-5 * w.1.abs());
        assert!(alike, "{}: token {t} has experts {found:?}, Hugging Face has {want:?}", case.name);
    }

    let tokens: Vec<_> = case.tokens.iter().map(|&a| usize::try_from(a).ok().map(|a| ids[a])).collect();
    let mut out = vec![f32::NAN; case.hidden.len()];
    layer.forward(&case.hidden, Routing::Router, &TokenAdapters::from_ids(&tokens), &mut out)?;
    Ok(out.into_iter().map(f64::from).collect())
}

#[test]
fn the_layer_computes_what_hugging_face_computes() {
    for case in cases() {
        let out = serve(&case, &Device::cpu()).unwrap();
        // Hidden states are f32 here, so narrow checkpoints round nothing but the adapters.
        let bound = match case.model.shape().dtype {
            DType::F32 => 1e-4,
            DType::F16 => 5e-4,
            DType::Bf16 => 3e-3,
        };
        let error = relative_error(&out, &case.want);
        assert!(error <= bound, "{}: error {error:.1e}, bound {bound:.0e}", case.name);
        let worst = worst_row_error(&out, &case.want, case.model.shape().layer.hidden_size);
        assert!(worst <= 1e-2, "{}: worst token {worst:.1e}", case.name);
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use moe_lora::{ExpertWeights, LayerShape, LayerWeights, Matrix};

    /// A matrix as a GPU holds it.
    fn rounded(matrix: &Matrix, dtype: DType) -> Matrix {
        let [rows, cols] = matrix.shape();
        match dtype {
            DType::F16 => Matrix::from_vec(matrix.to_vec::<half::f16>(), rows, cols).unwrap(),
            _ => Matrix::from_vec(matrix.to_vec::<half::bf16>(), rows, cols).unwrap(),
        }
    }

    /// The truth of a case whose weights, adapters and hidden states were rounded as a GPU rounds them.
    fn truth_of_rounded(case: &Case, dtype: DType) -> Vec<f64> {
        let exact = case.model.layer_weights(case.layer).unwrap();
        let experts = exact.experts().iter().map(|e| ExpertWeights {
            gate: rounded(&e.gate, dtype),
            up: rounded(&e.up, dtype),
            down: rounded(&e.down, dtype),
            bias: e.bias.clone(),
        });
        let weights = LayerWeights::new(*exact.shape(), experts.collect(), exact.activation())
            .unwrap()
            .with_router_weight(exact.router_weight())
            .with_routed_scaling_factor(exact.routed_scaling_factor());
        let adapters = case.resolve(dtype);
        let hidden = Matrix::from_vec(case.hidden.clone(), case.tokens.len(), weights.shape().hidden_size).unwrap();
        forward(&LayerInput {
            hidden: &rounded(&hidden, dtype).to_vec::<f32>().into_iter().map(f64::from).collect::<Vec<_>>(),
            weights: &weights,
            topk_ids: &case.want_ids,
            topk_weights: &case.want_weights,
            token_slots: &case.tokens,
            adapters: &AdapterTable::new(adapters.iter().map(|a| a.layers().get(&case.layer)).collect()),
        })
        .unwrap()
    }

    #[test]
    fn a_gpu_computes_what_hugging_face_computes() {
        let Some(_) = moe_lora_cuda::testing::gpu("golden cases") else { return };
        let device = Device::cuda(0).unwrap();
        let (mut ran, mut refused) = (0, 0);
        for case in cases() {
            let shape = case.model.shape();
            let LayerShape { hidden_size, intermediate_size, .. } = shape.layer;
            if hidden_size % 8 != 0 || intermediate_size % 8 != 0 {
                let line = serve(&case, &device).unwrap_err().to_string();
                assert!(line.contains("multiples of 8"), "{}: {line}", case.name);
                refused += 1;
                continue;
            }
            let out = serve(&case, &device).unwrap();
            let dtype = moe_lora::pool::CudaMemory::dtype(shape.dtype);
            let (error, all) =
                (relative_error(&out, &truth_of_rounded(&case, dtype)), relative_error(&out, &case.want));
            eprintln!("{}: error {error:.1e}, with the rounding of its inputs {all:.1e}", case.name);
            let bound = if dtype == DType::F16 { 5e-4 } else { 3e-3 };
            assert!(error <= bound, "{}: error {error:.1e}, bound {bound:.0e}", case.name);
            // Against Hugging Face's f32 also the rounding of f32 inputs counts.
            assert!(all <= 1e-2, "{}: error {all:.1e}", case.name);
            ran += 1;
        }
        assert!(ran >= 15 && refused >= 1, "{ran} ran, {refused} were refused");
    }
}

#[test]
fn the_reference_computes_what_hugging_face_computes() {
    for case in cases() {
        // In f32 no adapter is rounded, whatever the checkpoint's format.
        let adapters = case.resolve(DType::F32);
        let truth = forward(&LayerInput {
            hidden: &case.hidden.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
            weights: &case.model.layer_weights(case.layer).unwrap(),
            topk_ids: &case.want_ids,
            topk_weights: &case.want_weights,
            token_slots: &case.tokens,
            adapters: &AdapterTable::new(adapters.iter().map(|a| a.layers().get(&case.layer)).collect()),
        });
        let error = relative_error(&truth.unwrap(), &case.want);
        assert!(error <= 1e-5, "{}: error {error:.1e}", case.name);
    }
}

#[test]
fn adapters_that_must_be_refused_are() {
    let list: Value = serde_json::from_slice(&std::fs::read(folder().join("refused.json")).unwrap()).unwrap();
    for entry in list.as_array().unwrap() {
        let path = |key: &str| folder().join(entry[key].as_str().unwrap());
        let model = Checkpoint::open(path("checkpoint")).unwrap();
        let refused = PeftAdapter::open(path("adapter")).and_then(|a| a.resolve(model.shape()));
        let Err(error) = refused else { panic!("{} was read, but {}", entry["adapter"], entry["why"]) };
        let line = error.to_string();
        let field = entry["why"].as_str().unwrap().split(':').next().unwrap();
        assert!(!line.contains('\n') && line.contains("found") && line.contains("expected"), "{line}");
        assert!(line.contains(field) || field == "rank_pattern", "{line} does not name {field}");
    }
}
