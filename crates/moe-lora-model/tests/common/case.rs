//! One hostile checkpoint: three files' bytes, opened and used as far as they let us. Shared with the fuzz target.

use moe_lora_core::{Matrix, ModelShape};
use moe_lora_model::{Checkpoint, ModelError};
use std::fs;
use std::path::{Path, PathBuf};

const INDEX: &str = "model.safetensors.index.json";

/// `config.json`, the index (none if empty) and the one shard.
#[derive(Clone, Default)]
pub(crate) struct Case {
    pub(crate) parts: [Vec<u8>; 3],
}

impl Case {
    /// Two little-endian u16 lengths, of config and index, then the three parts. Any bytes are a case.
    pub(crate) fn decode(bytes: &[u8]) -> Self {
        let (lengths, rest) = bytes.split_at(bytes.len().min(4));
        let length = |i: usize| lengths.get(i..i + 2).map_or(0, |b| usize::from(u16::from_le_bytes([b[0], b[1]])));
        let (config, rest) = rest.split_at(rest.len().min(length(0)));
        let (index, shard) = rest.split_at(rest.len().min(length(2)));
        Self { parts: [config.to_vec(), index.to_vec(), shard.to_vec()] }
    }

    #[allow(dead_code, reason = "for whoever writes the corpus")]
    pub(crate) fn encode(&self) -> Vec<u8> {
        let [config, index, shard] = &self.parts;
        let length = |part: &[u8]| u16::try_from(part.len()).expect("a small file").to_le_bytes();
        [&length(config), &length(index), config.as_slice(), index, shard].concat()
    }

    /// Writes the files; an index finds its shard as `a.safetensors`.
    pub(crate) fn write(&self, folder: &Path) {
        let [config, index, shard] = &self.parts;
        fs::write(folder.join("config.json"), config).expect("a writable folder");
        let _ = fs::remove_file(folder.join(INDEX));
        let _ = fs::remove_file(folder.join("model.safetensors"));
        if !index.is_empty() {
            fs::write(folder.join(INDEX), index).expect("a writable folder");
        }
        let name = if index.is_empty() { "model.safetensors" } else { "a.safetensors" };
        fs::write(folder.join(name), shard).expect("a writable folder");
    }
}

/// Opens the checkpoint and reads its layers. Every refusal has to be bad input, in one short line.
pub(crate) fn open(folder: &Path) -> Result<ModelShape, ModelError> {
    let check = |error: ModelError| {
        let text = error.to_string();
        assert!(error.input().is_some() && !text.contains('\n') && text.len() < 20_000, "{text}");
        error
    };
    let checkpoint = Checkpoint::open(folder).map_err(check)?;
    for &layer in checkpoint.shape().moe_layers.iter().take(2) {
        if let Ok(weights) = checkpoint.layer_weights(layer).map_err(check) {
            for expert in weights.experts() {
                [&expert.gate, &expert.up, &expert.down].into_iter().for_each(touch);
            }
        }
        if let Ok(router) = checkpoint.router(layer).map_err(check) {
            router.validate(&checkpoint.shape().layer).expect("a router of the layer's sizes");
            touch(&router.weight);
        }
    }
    Ok(checkpoint.shape().clone())
}

fn touch(matrix: &Matrix) {
    std::hint::black_box(matrix.get(0, 0) + matrix.get(matrix.rows() - 1, matrix.cols() - 1));
}

/// A folder in memory where the system has one.
pub(crate) fn fast_folder() -> PathBuf {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() }
}
