//! An adapter folder, opened.

use crate::config::AdapterConfig;
use crate::index::Index;
use crate::load::Context;
use crate::{AdapterError, AdapterSummary, LinearAdapters, OpenOptions, linear, resolve, strict, summary};
use half::{bf16, f16};
use moe_lora_core::{AdapterWeights, DType, InputError, ModelShape, Shard};
use moe_lora_files::SafetensorsFile;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// Larger settings are refused; one entry a module of the largest models takes about 6 MB.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A PEFT adapter whose settings and tensor names were read and checked; its tensors were not read yet.
#[derive(Debug)]
pub struct PeftAdapter {
    file: SafetensorsFile,
    config: AdapterConfig,
    index: Index,
    options: OpenOptions,
    warnings: Vec<String>,
}

impl PeftAdapter {
    /// Opens a folder that holds `adapter_config.json` and `adapter_model.safetensors`, with the default options.
    ///
    /// # Errors
    /// If a file is missing or malformed, a setting or an expert tensor's name is unknown to this crate, or asks for
    /// something other than LoRA.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, AdapterError> {
        Self::open_with(dir, OpenOptions::default())
    }

    /// As [`open`](Self::open), with options.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(dir: impl AsRef<Path>, options: OpenOptions) -> Result<Self, AdapterError> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            let found = if dir.exists() { "a file" } else { "nothing" };
            return Err(InputError::new(found, "a folder with an adapter").in_file(dir).into());
        }
        let config_path = dir.join(CONFIG);
        let text = read_text(&config_path)?;
        let tensors_path = dir.join(TENSORS);
        if !tensors_path.exists() {
            return Err(InputError::new(other_weights(dir), TENSORS).in_file(dir).into());
        }
        let file = SafetensorsFile::open(&tensors_path)?;
        if let Some(vocab_size) = options.vocab_size {
            check_added_tokens(&dir.join("added_tokens.json"), vocab_size)?;
        }
        Self::new(&text, &config_path, file, options)
    }

    /// Takes the contents of the two files.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(config: &[u8], safetensors: Vec<u8>) -> Result<Self, AdapterError> {
        Self::from_bytes_with(config, safetensors, OpenOptions::default())
    }

    /// As [`from_bytes`](Self::from_bytes), with options.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes_with(config: &[u8], safetensors: Vec<u8>, options: OpenOptions) -> Result<Self, AdapterError> {
        Self::new(config, Path::new(CONFIG), SafetensorsFile::from_bytes(TENSORS, safetensors)?, options)
    }

    fn new(text: &[u8], path: &Path, file: SafetensorsFile, options: OpenOptions) -> Result<Self, AdapterError> {
        let mut warnings = Vec::new();
        let config = AdapterConfig::parse(text, &options, &mut warnings).map_err(|e| e.in_file(path))?;
        let index = Index::new(&file).map_err(|e| e.in_file(file.path()))?;
        if options.strict {
            strict::check(&config, &index, &file).map_err(|e| e.in_file(file.path()))?;
        }
        if index.layers.values().all(|layer| layer.sites.is_empty()) {
            warnings.push("no expert tensors: the adapter changes nothing in the MoE layers".to_owned());
        }
        if config.target_parameters.is_empty() && index.layers.values().any(|l| l.flat().next().is_some()) {
            warnings.push("no target_parameters in the settings: gate_up and down are told by their sizes".to_owned());
        }
        Ok(Self { file, config, index, options, warnings })
    }

    /// Reads and checks every expert tensor against the model and converts it to the model's format. Nothing is scaled.
    ///
    /// Memory: the result, one pair of tensors besides it. A's that serve gate and up, or all experts, are one matrix.
    ///
    /// # Errors
    /// Names file, tensor, layer, expert and projection, what was found, and what the model or the settings ask for:
    /// sizes, ranks, experts and layers that do not fit, A without B, numbers that are not finite in the model's format,
    /// a layout that cannot be told.
    pub fn resolve(&self, shape: &ModelShape) -> Result<AdapterWeights, AdapterError> {
        // One shard gives one result.
        let all = self.resolve_shards(shape, &[Shard::WHOLE])?;
        all.into_iter().next().ok_or_else(|| InputError::new("no shard", "one").into())
    }

    /// [`resolve`](Self::resolve) for ranks of a parallel group, in the order of `shards`: what each one's pool holds, which
    /// is made for [`ModelShape::shard`]. `shape` is the whole model's.
    ///
    /// Every tensor is read once, however many shards there are, and checked whole: ranks in different processes refuse the
    /// same files. Several shards are views of one copy of the adapter; for one shard alone memory never holds more than its
    /// part and one layer.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve), and [`Shard::share`].
    pub fn resolve_shards(&self, shape: &ModelShape, shards: &[Shard]) -> Result<Vec<AdapterWeights>, AdapterError> {
        let cx = Context { file: &self.file, config: &self.config, options: &self.options, shape, layer: 0 };
        let weights = match shape.dtype {
            DType::F32 => resolve::resolve::<f32>(cx, &self.index, shards),
            DType::F16 => resolve::resolve::<f16>(cx, &self.index, shards),
            DType::Bf16 => resolve::resolve::<bf16>(cx, &self.index, shards),
        };
        Ok(weights.map_err(|e| e.in_file(self.file.path()))?)
    }

    /// Reads and checks the LoRA of modules outside the experts: of every decoder layer's module, `self_attn.q_proj` for
    /// instance, for which `shape_of(layer, module)` gives `[out, in]`. The matrices are converted to `dtype`, nothing is
    /// scaled.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub fn resolve_linear(
        &self,
        dtype: DType,
        shape_of: impl Fn(usize, &str) -> Option<[usize; 2]>,
    ) -> Result<LinearAdapters, AdapterError> {
        let parts = (&self.file, &self.config, &self.index);
        let all = match dtype {
            DType::F32 => linear::resolve::<f32>(parts, &self.options, shape_of),
            DType::F16 => linear::resolve::<f16>(parts, &self.options, shape_of),
            DType::Bf16 => linear::resolve::<bf16>(parts, &self.options, shape_of),
        };
        Ok(all.map_err(|e| e.in_file(self.file.path()))?)
    }

    /// The settings.
    #[must_use]
    pub const fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// What is odd but no reason to refuse, a line each.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Names of tensors that change no expert: attention, routers, shared experts, embeddings. [`resolve`](Self::resolve)
    /// leaves them; [`resolve_linear`](Self::resolve_linear) reads those that its caller applies.
    #[must_use]
    pub fn unused_keys(&self) -> &[String] {
        &self.index.unused
    }

    /// What can be told without the model.
    #[must_use]
    pub fn summary(&self) -> AdapterSummary {
        summary::of(&self.file, &self.config, &self.index)
    }
}

fn read_text(path: &Path) -> Result<Vec<u8>, InputError> {
    let unreadable = |e: std::io::Error| InputError::new(e.to_string(), "a readable JSON file").in_file(path);
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(InputError::new("something that is not a file", "a JSON file").in_file(path));
    }
    let mut text = Vec::new();
    File::open(path).and_then(|f| f.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text)).map_err(unreadable)?;
    if text.len() as u64 > MAX_CONFIG_BYTES {
        return Err(InputError::new("a larger file", format!("at most {MAX_CONFIG_BYTES} bytes")).in_file(path));
    }
    Ok(text)
}

/// Says what stands where `adapter_model.safetensors` should.
fn other_weights(dir: &Path) -> String {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut others: Vec<_> = names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("adapter_model"))
        .take(3)
        .collect();
    others.sort();
    match others.first() {
        None => "no tensors".to_owned(),
        Some(name) if name == TENSORS => "a link to nothing".to_owned(),
        Some(name) if name.ends_with(".bin") => format!("{name}, which is a pickle"),
        Some(name) if name.ends_with(".safetensors") => format!("{name}, one of several parts"),
        Some(name) => name.clone(),
    }
}

/// Tokens beyond the vocabulary come with changed embeddings.
fn check_added_tokens(path: &Path, vocab_size: usize) -> Result<(), InputError> {
    if !path.exists() {
        return Ok(());
    }
    let tokens: HashMap<String, u64> = moe_lora_files::read_json(path)?;
    match tokens.into_iter().find(|(_, id)| *id >= vocab_size as u64) {
        Some((token, id)) => {
            let found = format!("token {token:?} with id {id}");
            Err(InputError::new(found, format!("ids below the vocabulary's {vocab_size}")).in_file(path))
        }
        None => Ok(()),
    }
}
