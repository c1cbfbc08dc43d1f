//! PEFT adapter folders, written as PEFT writes them.

use anyhow::Result;
use moe_lora::Projection;
use moe_lora::model::synthetic::TinyModel;
use moe_lora::reference::random::signed;
use moe_lora_files::{Dtype, write_whole};
use safetensors::tensor::TensorView;
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// An adapter of the demo.
pub(super) struct DemoAdapter {
    pub(super) name: &'static str,
    pub(super) rank: usize,
    pub(super) use_rslora: bool,
    pub(super) only_down: bool,
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` with one pair of matrices for every expert and projection.
pub(super) fn write_adapter(dir: &Path, adapter: &DemoAdapter, model: &TinyModel, seed: u64) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    let mut rng = fastrand::Rng::with_seed(seed);
    let projections = if adapter.only_down { &Projection::ALL[2..] } else { &Projection::ALL[..] };
    let mut tensors = Vec::new();
    for layer in 0..model.num_layers {
        for expert in 0..model.shape.num_experts {
            for &projection in projections {
                let [out, width] = projection.base_shape(&model.shape);
                let key = format!("base_model.model.model.layers.{layer}.mlp.experts.{expert}.{projection}_proj");
                let mut draw = |rows: usize, cols: usize, deviation: f32| -> (Vec<usize>, Vec<u8>) {
                    let values: Vec<f32> = (0..rows * cols).map(|_| signed(&mut rng, deviation)).collect();
                    (vec![rows, cols], bytemuck::cast_slice(&values).to_vec())
                };
                let rank = adapter.rank;
                tensors.push((format!("{key}.lora_A.weight"), draw(rank, width, (width as f32).powf(-0.5))));
                tensors.push((format!("{key}.lora_B.weight"), draw(out, rank, 0.5 * (rank as f32).powf(-0.5))));
            }
        }
    }
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, (shape, bytes))| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<_>>()?;
    let bytes = safetensors::serialize(views, None)?;
    write_whole(&dir.join("adapter_model.safetensors"), |file| file.write_all(&bytes))?;

    let targets: Vec<String> = projections.iter().map(|p| format!("{p}_proj")).collect();
    // alpha / r is 1 for all of them, alpha / sqrt(r) with rsLoRA.
    let alpha = if adapter.use_rslora { (adapter.rank as f64).sqrt() } else { adapter.rank as f64 };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": alpha,
        "use_rslora": adapter.use_rslora,
        "target_modules": targets,
        "bias": "none",
    });
    write_whole(&dir.join("adapter_config.json"), |file| file.write_all(&serde_json::to_vec_pretty(&config)?))?;
    Ok(())
}
