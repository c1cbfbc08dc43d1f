//! The fixtures: `xtask/golden/whole.py` says what they are.
#![allow(dead_code, reason = "every test file uses its part")]

pub(crate) mod feed;

use moe_lora::adapter::LinearAdapters;
use moe_lora::{AdapterId, AdapterPool, Checkpoint, Device, Limits, PeftAdapter, PoolConfig};
use moe_lora_generate::{Decoder, PartAdapter};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub(crate) const FAMILIES: [&str; 2] = ["qwen3_moe", "olmoe"];
pub(crate) const ADAPTERS: [&str; 3] = ["experts", "everything", "attention"];

pub(crate) fn folder() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::env::var_os("MOE_LORA_GENERATE_FIXTURES").map_or(beside, PathBuf::from)
}

pub(crate) fn adapter_dir(family: &str, name: &str) -> PathBuf {
    folder().join("adapters").join(format!("{family}-{name}"))
}

/// A request and what transformers answered.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Golden {
    pub(crate) prompt: String,
    pub(crate) adapter: Option<String>,
    pub(crate) prompt_tokens: Vec<u32>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: String,
    /// `[tokens, V]`.
    #[serde(skip)]
    pub(crate) logits: Vec<f32>,
}

pub(crate) fn golden(family: &str) -> Vec<Golden> {
    let text = std::fs::read(folder().join(format!("{family}-requests.json"))).unwrap();
    let mut all: Vec<Golden> = serde_json::from_slice(&text).unwrap();
    let path = folder().join(format!("{family}-logits.safetensors"));
    let tensors = moe_lora_files::SafetensorsFile::open(path).unwrap();
    for (i, golden) in all.iter_mut().enumerate() {
        let bytes = tensors.read(tensors.get(&i.to_string()).unwrap()).unwrap();
        golden.logits = bytemuck::pod_collect_to_vec(&bytes);
    }
    all
}

/// A decoder with its adapters.
pub(crate) struct Model {
    pub(crate) decoder: Decoder,
    pub(crate) pool: AdapterPool,
    adapters: HashMap<String, (AdapterId, LinearAdapters)>,
}

impl Model {
    pub(crate) fn open(family: &str, device: &Device) -> Self {
        let checkpoint = Checkpoint::open(folder().join(family)).unwrap();
        let pool = AdapterPool::new(device, checkpoint.shape(), PoolConfig::default()).unwrap();
        let limits = Limits { max_tokens: 24, max_rank: 8 };
        let decoder = Decoder::new(&checkpoint, device, &pool, limits, |_, _| ()).unwrap();
        let load = |name: &&str| {
            let adapter = PeftAdapter::open(adapter_dir(family, name)).unwrap();
            let id = pool.load(name, adapter.resolve(checkpoint.shape()).unwrap()).unwrap();
            let linear = adapter.resolve_linear(decoder.dtype(), |n, module| decoder.module_shape(n, module)).unwrap();
            assert!(linear.left().is_empty(), "{:?}", linear.left());
            (name.to_string(), (id, linear))
        };
        let adapters = ADAPTERS.iter().map(load).collect();
        Self { decoder, pool, adapters }
    }

    pub(crate) fn adapter(&self, name: Option<&str>) -> Option<PartAdapter<'_>> {
        let (id, linear) = &self.adapters[name?];
        Some(PartAdapter { id: *id, linear })
    }
}
