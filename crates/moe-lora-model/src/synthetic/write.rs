//! Writing the files of a synthetic checkpoint.

use super::tensors::{Tensor, tensors};
use super::{TinyModel, config};
use crate::ModelError;
use half::{bf16, f16};
use moe_lora_core::DType;
use moe_lora_files::write_whole;
use serde_json::{Map, Value, json};
use std::cmp::Reverse;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Writes the model into `folder`, which is made if need be: `config.json`, and `model.safetensors` or shards with their
/// index. Existing files of these names are replaced.
///
/// # Errors
/// [`ModelError::Write`] if a file cannot be written.
pub fn write_checkpoint(folder: impl AsRef<Path>, model: &TinyModel) -> Result<(), ModelError> {
    let folder = folder.as_ref();
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ModelError::Write { path, source }
    };
    std::fs::create_dir_all(folder).map_err(failed(folder))?;
    let write_json = |name: &str, value: &Value| {
        let path = folder.join(name);
        write_whole(&path, |file| writeln!(file, "{value:#}")).map_err(failed(&path))
    };
    write_json("config.json", &config::config(model))?;
    let shards = shards(tensors(model), model.shard_bytes);
    let mut weight_map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match model.shard_bytes {
            None => "model.safetensors".to_owned(),
            Some(_) => format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len()),
        };
        weight_map.extend(shard.iter().map(|t| (t.name.clone(), Value::from(name.as_str()))));
        let path = folder.join(&name);
        write_whole(&path, |file| write_shard(BufWriter::new(file), shard)).map_err(failed(&path))?;
    }
    if model.shard_bytes.is_some() {
        let total: usize = shards.iter().flatten().map(Tensor::bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_json("model.safetensors.index.json", &index)?;
    }
    Ok(())
}

/// Distributes the tensors. Within a file wide formats come first, so that all are aligned.
fn shards(tensors: Vec<Tensor>, shard_bytes: Option<usize>) -> Vec<Vec<Tensor>> {
    let most = shard_bytes.unwrap_or(usize::MAX);
    let mut shards: Vec<Vec<Tensor>> = vec![Vec::new()];
    let mut bytes = 0;
    for tensor in tensors {
        if bytes > 0 && bytes + tensor.bytes() > most {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += tensor.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    for shard in &mut shards {
        shard.sort_by_key(|t| Reverse(t.dtype.size()));
    }
    shards
}

fn write_shard(mut file: impl Write, tensors: &[Tensor]) -> io::Result<()> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.bytes();
        let dtype = tensor.dtype.to_string().to_uppercase();
        let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for tensor in tensors {
        for value in (0..tensor.len()).map(|i| (tensor.value)(i)) {
            match tensor.dtype {
                DType::F32 => file.write_all(&value.to_le_bytes()),
                DType::F16 => file.write_all(&f16::from_f32(value).to_le_bytes()),
                DType::Bf16 => file.write_all(&bf16::from_f32(value).to_le_bytes()),
            }?;
        }
    }
    file.flush()
}
