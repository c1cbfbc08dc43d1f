//! A checkpoint folder: opened and checked once, then read layer by layer.

use crate::decoder::{self, DecoderConfig, DecoderEnds, DecoderLayer};
use crate::experts::Experts;
use crate::load::load;
use crate::router::Router;
use crate::tensors::Tensors;
use crate::{Family, ModelConfig, ModelError, config};
use moe_lora_core::{DType, InputError, LayerWeights, ModelShape, RouterWeights, Shard};
use moe_lora_files::read_json;
use serde_json::Value;
use std::path::Path;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// A larger `config.json` is refused; real ones have a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// What can stand before the number of a decoder layer: a language model, a multimodal one in two spellings, and a model
/// saved without its head.
const LAYERS: [&str; 4] = ["model.layers.", "model.language_model.layers.", "language_model.model.layers.", "layers."];

/// A Hugging Face checkpoint folder of a MoE model.
#[derive(Debug)]
pub struct Checkpoint {
    tensors: Tensors,
    config: ModelConfig,
    /// `config.json` as it is, for what only whole models need.
    settings: Value,
    shape: ModelShape,
    /// Names around a layer's number: `model.layers.` and `mlp`.
    naming: [&'static str; 2],
}

impl Checkpoint {
    /// Opens a folder: `config.json`, the index if there is one, and the header of every shard are read, and every MoE
    /// layer's tensors are checked against the configuration. Shards are mapped, which reads none of their data.
    ///
    /// Layers of which no expert tensor is there are an error only when they are [used](Self::layer_weights), so that a
    /// checkpoint cut down to some layers still serves.
    ///
    /// # Errors
    /// [`ModelError::Input`], which names file, tensor or field, what was found and what was expected: files that are
    /// missing, malformed or truncated, shards outside the folder, tensors that are missing, unknown, there twice or of the
    /// wrong shape or format, settings that contradict each other or the family, quantised weights.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, ModelError> {
        Ok(Self::open_folder(folder.as_ref())?)
    }

    fn open_folder(folder: &Path) -> Result<Self, InputError> {
        if !folder.is_dir() {
            return Err(InputError::new("no such folder", "a folder with a checkpoint").in_file(folder));
        }
        let path = folder.join(CONFIG);
        let bytes = std::fs::metadata(&path).map_or(0, |m| m.len());
        if bytes > MAX_CONFIG_BYTES {
            let found = format!("{bytes} bytes");
            return Err(InputError::new(found, format!("at most {MAX_CONFIG_BYTES} bytes")).in_file(path));
        }
        let settings: Value = read_json(&path)?;
        let config = config::parse(&settings).map_err(|e| e.in_file(&path))?;
        let tensors = Tensors::open(folder)?;
        let naming = naming(&tensors, &config)?;
        let dtype = check_layers(&tensors, &config, naming)?;
        let shape = ModelShape {
            layer: config.layer,
            moe_layers: config.moe_layers.clone(),
            dtype,
            storage: config.family.storage(),
        };
        Ok(Self { tensors, config, settings, shape, naming })
    }

    /// Sizes, MoE layers, and the format of the expert tensors.
    #[must_use]
    pub const fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// The model's family.
    #[must_use]
    pub const fn family(&self) -> Family {
        self.config.family
    }

    /// What `config.json` says.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Absolute decoder index of the first MoE layer.
    #[must_use]
    pub fn first_moe_layer(&self) -> usize {
        self.shape.moe_layers.first().copied().unwrap_or_default()
    }

    /// The routed experts of a layer, by absolute decoder index. Matrices are views of the mapped files; only gpt-oss's 3-D
    /// tensors are copied (into dense rows), and a tensor that lies misaligned in its file.
    ///
    /// The files must not be truncated while the matrices live.
    ///
    /// # Errors
    /// [`ModelError::Input`] if the layer has no experts, or its tensors are missing.
    pub fn layer_weights(&self, layer: usize) -> Result<LayerWeights, ModelError> {
        self.layer_shard(layer, &Shard::WHOLE)
    }

    /// The part of a layer that a rank holds: its experts, and its part of each. As in
    /// [`layer_weights`](Self::layer_weights), matrices are views of the mapped files, so a rank's pages alone are read; of
    /// what has to be copied, only the rank's part is.
    ///
    /// # Errors
    /// As [`layer_weights`](Self::layer_weights) and [`Shard::share`].
    pub fn layer_shard(&self, layer: usize, shard: &Shard) -> Result<LayerWeights, ModelError> {
        let block = self.block(layer)?;
        let share = shard.share(&self.config.layer)?;
        let experts = Experts::find(&self.tensors, &self.config, &block)?;
        let experts = load(&experts, &self.config.layer, self.config.family.storage(), &share)?;
        Ok(LayerWeights::new(share.shape, experts, self.config.activation)
            .map_err(|e| e.in_tensor(block).in_file(self.tensors.folder()))?)
    }

    /// The router of a layer, by absolute decoder index. Its settings include the routed scaling factor.
    ///
    /// # Errors
    /// [`ModelError::Input`] if the layer has no experts, its router is missing, or a bias is not finite.
    pub fn router(&self, layer: usize) -> Result<RouterWeights, ModelError> {
        let block = self.block(layer)?;
        Ok(Router::find(&self.tensors, &self.config, &block)?.load(&self.config)?)
    }

    /// The folder that was opened.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.tensors.folder()
    }

    /// What `config.json` says about the rest of the model: attention, norms, embeddings.
    ///
    /// # Errors
    /// [`ModelError::Input`] if the family is not one of those whose whole model is known (Qwen3-MoE, OLMoE), or a setting
    /// is malformed, contradicts another or asks for what is not computed here (sliding windows, RoPE scaling but linear).
    pub fn decoder_config(&self) -> Result<DecoderConfig, ModelError> {
        let folder = self.tensors.folder();
        let mut config = decoder::config(&self.settings, &self.config).map_err(|e| e.in_file(folder.join(CONFIG)))?;
        let generation = folder.join(GENERATION_CONFIG);
        if generation.exists() {
            let settings: Value = read_json(&generation)?;
            let ids = decoder::token_ids(settings.get("eos_token_id")).ok_or_else(|| {
                let found = InputError::new("something else", "a token id or a list of them");
                found.in_tensor("eos_token_id").in_file(generation)
            })?;
            if !ids.is_empty() {
                config.eos_token_ids = ids;
            }
        }
        Ok(config)
    }

    /// Everything of decoder layer `layer` but its router and routed experts.
    ///
    /// # Errors
    /// As [`decoder_config`](Self::decoder_config), and if a tensor is missing, unknown or of the wrong shape or format.
    pub fn decoder_layer(&self, layer: usize) -> Result<DecoderLayer, ModelError> {
        let config = self.decoder_config()?;
        let prefix = format!("{}{layer}.", self.naming[0]);
        Ok(decoder::layer(&self.tensors, &config, self.shape.dtype, &prefix, layer)?)
    }

    /// Embeddings, the last norm and the head.
    ///
    /// # Errors
    /// As [`decoder_layer`](Self::decoder_layer).
    pub fn decoder_ends(&self) -> Result<DecoderEnds, ModelError> {
        let config = self.decoder_config()?;
        let root = self.naming[0].strip_suffix("layers.").unwrap_or_default();
        Ok(decoder::ends(&self.tensors, &config, self.shape.dtype, root)?)
    }

    fn block(&self, layer: usize) -> Result<String, InputError> {
        if self.shape.moe_layers.binary_search(&layer).is_err() {
            let expected = format!("a MoE layer: {}", ranges(&self.shape.moe_layers));
            return Err(InputError::new(format!("layer {layer}"), expected).in_file(self.tensors.folder().join(CONFIG)));
        }
        Ok(block_name(self.naming, layer))
    }
}

fn block_name([layers, block]: [&str; 2], layer: usize) -> String {
    format!("{layers}{layer}.{block}")
}

fn has_experts(tensors: &Tensors, naming: [&str; 2], layer: usize) -> bool {
    tensors.with_prefix(&format!("{}.experts.", block_name(naming, layer))).next().is_some()
}

/// Finds the one spelling under which the MoE layers have experts.
fn naming(tensors: &Tensors, config: &ModelConfig) -> Result<[&'static str; 2], InputError> {
    let blocks = config.family.blocks();
    let all = LAYERS.iter().flat_map(|&layers| blocks.iter().map(move |&block| [layers, block]));
    let used: Vec<_> = all.filter(|&n| config.moe_layers.iter().any(|&layer| has_experts(tensors, n, layer))).collect();
    let experts = |n: [&str; 2]| format!("{}N.{}.experts", n[0], n[1]);
    match *used.as_slice() {
        [one] => Ok(one),
        [one, other, ..] => {
            Err(InputError::new(format!("experts under {} also", experts(other)), "one name for a layer")
                .in_tensor(experts(one))
                .in_file(tensors.folder()))
        }
        [] => {
            let expected = format!("expert weights of {} for layers {}", config.family, ranges(&config.moe_layers));
            Err(InputError::new("no expert weights", expected)
                .in_tensor(experts([LAYERS[0], blocks[0]]))
                .in_file(tensors.folder()))
        }
    }
}

/// Checks every layer that is there; the format of the experts must be one.
fn check_layers(tensors: &Tensors, config: &ModelConfig, naming: [&str; 2]) -> Result<DType, InputError> {
    let mut all: Option<(usize, DType)> = None;
    for &layer in config.moe_layers.iter().filter(|&&layer| has_experts(tensors, naming, layer)) {
        let block = block_name(naming, layer);
        let dtype = Experts::find(tensors, config, &block)?.dtype()?;
        if Router::exists(tensors, config.family, &block) {
            Router::find(tensors, config, &block)?;
        }
        match all {
            Some((first, expected)) if expected != dtype => {
                return Err(InputError::new(dtype.to_string(), format!("{expected}, as the experts of layer {first}"))
                    .in_tensor(format!("{block}.experts"))
                    .in_file(tensors.folder()));
            }
            _ => all = all.or(Some((layer, dtype))),
        }
    }
    all.map(|(_, dtype)| dtype).ok_or_else(|| InputError::new("no expert weights", "some").in_file(tensors.folder()))
}

/// `[1, 3, 4, 5]` as `1, 3 to 5`.
fn ranges(layers: &[usize]) -> String {
    let runs = layers.chunk_by(|a, b| a + 1 == *b);
    let texts = runs.filter_map(|run| match *run {
        [] => None,
        [one] => Some(one.to_string()),
        [first, .., last] => Some(format!("{first} to {last}")),
    });
    texts.collect::<Vec<_>>().join(", ")
}
