//! The safetensors files that `forward` reads and writes.

use anyhow::{Context, Result};
use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use moe_lora::{InputError, TopK};
use moe_lora_files::{Dtype, SafetensorsFile, TensorInfo, write_whole};
use safetensors::tensor::TensorView;
use std::io::Write;
use std::path::Path;

/// Hidden states in the format of the file.
#[derive(Debug)]
pub(crate) enum Hidden {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Hidden {
    pub(crate) fn widened(&self) -> Vec<f64> {
        match self {
            Self::F32(v) => v.iter().map(|&x| x.into()).collect(),
            Self::F16(v) => v.iter().map(|&x| x.into()).collect(),
            Self::Bf16(v) => v.iter().map(|&x| x.into()).collect(),
        }
    }
}

/// What `--input` holds, checked against the layer's sizes.
#[derive(Debug)]
pub(crate) struct Input {
    /// `[T, H]`.
    pub(crate) hidden: Hidden,
    /// Adapter of every token, `None` for the base model, `[T]`.
    pub(crate) adapters: Vec<Option<usize>>,
    /// The experts, if the file chose them.
    pub(crate) topk: Option<TopK>,
}

/// Reads and checks an input file for a layer of width `hidden_size`, `top_k` of `num_experts` experts a token and
/// `num_adapters` adapters.
pub(crate) fn read_input(
    path: &Path,
    hidden_size: usize,
    top_k: usize,
    num_experts: usize,
    num_adapters: usize,
) -> Result<Input, InputError> {
    let file = SafetensorsFile::open(path)?;
    let known = ["hidden_states", "adapter_index", "topk_ids", "topk_weights"];
    if let Some(other) = file.tensors().iter().find(|t| !known.contains(&&*t.name)) {
        let found = InputError::new("an unknown tensor", known.join(", "));
        return Err(found.in_tensor(&*other.name).in_file(path));
    }
    let info = file.get("hidden_states").ok_or_else(|| {
        InputError::new("no such tensor", format!("[T, {hidden_size}]")).in_tensor("hidden_states").in_file(path)
    })?;
    let tokens = match *info.shape {
        [tokens, width] if width == hidden_size => tokens,
        _ => return Err(wrong(path, info, &format!("[T, {hidden_size}] of F32, F16 or BF16"))),
    };
    let hidden = match info.dtype {
        Dtype::F32 => Hidden::F32(values(&file, info)?),
        Dtype::F16 => Hidden::F16(values(&file, info)?),
        Dtype::BF16 => Hidden::Bf16(values(&file, info)?),
        _ => return Err(wrong(path, info, &format!("[T, {hidden_size}] of F32, F16 or BF16"))),
    };
    finite(path, "hidden_states", hidden.widened())?;

    let adapters = match optional::<i32>(&file, "adapter_index", Dtype::I32, &[tokens])? {
        Some(index) => index.iter().map(|&i| adapter(path, i, num_adapters)).collect::<Result<_, _>>()?,
        None => vec![None; tokens],
    };
    let topk_ids = optional::<i32>(&file, "topk_ids", Dtype::I32, &[tokens, top_k])?;
    let topk_weights = optional::<f32>(&file, "topk_weights", Dtype::F32, &[tokens, top_k])?;
    let topk = match (topk_ids, topk_weights) {
        (None, None) => None,
        (Some(topk_ids), Some(topk_weights)) => {
            if let Some(id) = topk_ids.iter().find(|&&id| id < -1 || i64::from(id) >= num_experts as i64) {
                let expected = format!("-1 to {}", num_experts - 1);
                return Err(InputError::new(format!("expert {id}"), expected).in_tensor("topk_ids").in_file(path));
            }
            finite(path, "topk_weights", topk_weights.iter().map(|&w| w.into()))?;
            Some(TopK { topk_ids, topk_weights })
        }
        (ids, _) => {
            let (found, missing) =
                if ids.is_some() { ("topk_ids", "topk_weights") } else { ("topk_weights", "topk_ids") };
            let found = InputError::new(format!("{found} without it"), "both or neither");
            return Err(found.in_tensor(missing).in_file(path));
        }
    };
    Ok(Input { hidden, adapters, topk })
}

fn adapter(path: &Path, index: i32, num_adapters: usize) -> Result<Option<usize>, InputError> {
    match usize::try_from(index) {
        Ok(i) if i < num_adapters => Ok(Some(i)),
        _ if index == -1 => Ok(None),
        _ => {
            let expected = match num_adapters {
                0 => "-1, as no --adapter was given".to_owned(),
                n => format!("-1 to {}", n - 1),
            };
            Err(InputError::new(format!("adapter {index}"), expected).in_tensor("adapter_index").in_file(path))
        }
    }
}

fn optional<T: Pod>(
    file: &SafetensorsFile,
    name: &str,
    dtype: Dtype,
    shape: &[usize],
) -> Result<Option<Vec<T>>, InputError> {
    let Some(info) = file.get(name) else { return Ok(None) };
    if info.dtype != dtype || *info.shape != *shape {
        return Err(wrong(file.path(), info, &format!("{shape:?} {dtype:?}")));
    }
    values(file, info).map(Some)
}

fn values<T: Pod + Zeroable>(file: &SafetensorsFile, info: &TensorInfo) -> Result<Vec<T>, InputError> {
    Ok(bytemuck::pod_collect_to_vec(&file.read(info)?))
}

fn finite(path: &Path, name: &str, values: impl IntoIterator<Item = f64>) -> Result<(), InputError> {
    match values.into_iter().enumerate().find(|(_, v)| !v.is_finite()) {
        Some((at, v)) => {
            Err(InputError::new(format!("{v} at value {at}"), "finite values").in_tensor(name).in_file(path))
        }
        None => Ok(()),
    }
}

fn wrong(path: &Path, info: &TensorInfo, expected: &str) -> InputError {
    InputError::new(format!("{:?} {:?}", info.shape, info.dtype), expected).in_tensor(&*info.name).in_file(path)
}

/// Writes `hidden_states [T,H]`, `topk_ids [T,k]` and `topk_weights [T,k]`; the file appears whole or not at all.
pub(crate) fn write_output(path: &Path, hidden: &[f32], topk: &TopK, hidden_size: usize, top_k: usize) -> Result<()> {
    let shape = |values: usize, width: usize| vec![values / width, width];
    let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes);
    let tensors = [
        ("hidden_states", view(Dtype::F32, shape(hidden.len(), hidden_size), bytemuck::cast_slice(hidden))?),
        ("topk_ids", view(Dtype::I32, shape(topk.topk_ids.len(), top_k), bytemuck::cast_slice(&topk.topk_ids))?),
        (
            "topk_weights",
            view(Dtype::F32, shape(topk.topk_weights.len(), top_k), bytemuck::cast_slice(&topk.topk_weights))?,
        ),
    ];
    let bytes = safetensors::serialize(tensors, None)?;
    write_whole(path, |file| file.write_all(&bytes)).with_context(|| format!("{}: cannot be written", path.display()))
}
