//! `adapter_config.json`: what is used, what changes nothing, and what is refused.
//!
//! Field meanings and defaults are those of PEFT 0.17 to 0.21 (`peft.LoraConfig`). `null`, `""`, `[]` and `{}` mean absent.

use crate::fields::{self, Field};
use crate::{OpenOptions, pattern::Patterns};
use moe_lora_core::InputError;
use serde::Serialize;
use std::collections::HashSet;

/// What `target_modules` says. It names what was trained; the tensors that are there drive the loading.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Module names or their ends.
    Names(Vec<String>),
    /// A regular expression, or `all-linear`.
    Pattern(String),
}

/// The parts of `adapter_config.json` that matter here.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct AdapterConfig {
    /// Rank of every module without an entry in `rank_pattern`.
    pub r: usize,
    /// Scale times rank, likewise.
    pub lora_alpha: f64,
    /// Whether the scale is `lora_alpha / sqrt(r)`.
    pub use_rslora: bool,
    /// Modules that were trained.
    pub target_modules: Option<TargetModules>,
    /// Ends of the names of 3-D parameters that were trained.
    pub target_parameters: Vec<String>,
    /// PEFT that wrote the file.
    pub peft_version: Option<String>,
    /// The base model, as it was called in training.
    pub base_model_name_or_path: Option<String>,
    /// How the matrices were initialised, where it is a name.
    pub init_lora_weights: Option<String>,
    #[serde(skip)]
    rank_pattern: Patterns,
    #[serde(skip)]
    alpha_pattern: Patterns,
    #[serde(skip)]
    parameter_ends: HashSet<String>,
}

impl AdapterConfig {
    /// Reads the file's text. Whatever is worth a word but no refusal goes to `warnings`.
    pub(crate) fn parse(text: &[u8], options: &OpenOptions, warnings: &mut Vec<String>) -> Result<Self, InputError> {
        let mut config = Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            target_modules: None,
            target_parameters: Vec::new(),
            peft_version: None,
            base_model_name_or_path: None,
            init_lora_weights: None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            parameter_ends: HashSet::new(),
        };
        let mut is_lora = false;
        for (name, value) in &fields::read(text)? {
            let field = Field::new(name, value);
            if field.is_absent() {
                continue;
            }
            if name == "peft_type" {
                is_lora = field.string().is_ok_and(|s| s.eq_ignore_ascii_case("LORA"));
                if !is_lora {
                    return Err(field.refused("LORA"));
                }
            } else {
                config.take(field, options, warnings)?;
            }
        }
        if !is_lora {
            return Err(InputError::new("nothing", "LORA").in_tensor("peft_type"));
        }
        if config.lora_alpha == 0.0 {
            warnings.push("lora_alpha is 0: the adapter changes nothing".to_owned());
        }
        Ok(config)
    }

    fn take(&mut self, field: Field<'_>, options: &OpenOptions, warnings: &mut Vec<String>) -> Result<(), InputError> {
        let handled = |name: &str| options.engine_handles.iter().any(|h| h == name);
        match field.name {
            "r" => self.r = field.rank()?,
            "lora_alpha" => self.lora_alpha = field.number()?,
            "use_rslora" => self.use_rslora = field.boolean()?,
            "rank_pattern" => self.rank_pattern = field.ranks()?,
            "alpha_pattern" => self.alpha_pattern = field.alphas()?,
            "target_modules" => {
                let names = field.strings().map(TargetModules::Names);
                self.target_modules = Some(names.or_else(|_| field.string().map(TargetModules::Pattern))?);
            }
            "target_parameters" => {
                self.target_parameters = field.strings()?;
                self.parameter_ends = self.target_parameters.iter().cloned().collect();
            }
            "peft_version" => self.peft_version = Some(field.string()?),
            "base_model_name_or_path" => self.base_model_name_or_path = Some(field.string()?),
            "bias" if field.string().is_ok_and(|s| s == "none") => {}
            "bias" => return Err(field.refused("\"none\"; others ship changed biases of the base model")),
            "use_dora" => field.must_be_false("no DoRA: magnitude vectors change the norm of the base weights")?,
            "lora_bias" => field.must_be_false("no bias on lora_B")?,
            "fan_in_fan_out" => field.must_be_false("false, as in every MoE model")?,
            "use_qalora" => field.must_be_false("plain LoRA without QALoRA")?,
            "init_lora_weights" => self.init_lora_weights = field.initialisation()?,
            "modules_to_save" => {
                if let Some(module) = field.strings()?.into_iter().find(|m| !handled(m)) {
                    return Err(InputError::new(format!("{module:?}"), "no whole modules beside the LoRA matrices")
                        .in_tensor(field.name));
                }
            }
            "trainable_token_indices" if handled(field.name) => {}
            "trainable_token_indices" => {
                return Err(field.refused("nothing: changed embeddings are not expert weights"));
            }
            "alora_invocation_tokens" if handled(field.name) => {}
            "alora_invocation_tokens" => {
                return Err(field.refused("nothing: an adapter for all tokens, not from an invocation (aLoRA) on"));
            }
            "layer_replication" | "use_bdlora" | "kasa_config" | "arrow_config" | "monteclora_config" => {
                if !field.is_false() {
                    return Err(field.refused("nothing: plain LoRA on the model as it is"));
                }
            }
            // Used in training, at run time in PEFT, or for information; the matrices are the same without them.
            "exclude_modules"
            | "layers_to_transform"
            | "layers_pattern"
            | "lora_dropout"
            | "inference_mode"
            | "runtime_config"
            | "megatron_config"
            | "megatron_core"
            | "ensure_weight_tying"
            | "velora_config"
            | "loftq_config"
            | "eva_config"
            | "corda_config"
            | "lora_ga_config"
            | "qalora_group_size"
            | "revision"
            | "task_type"
            | "auto_mapping" => {}
            _ if field.is_false() => {}
            _ if options.strict => return Err(field.refused("no unknown field (strict)")),
            name => {
                let shown: String = name.chars().take(80).collect();
                warnings.push(format!("adapter_config.json: the unknown field {shown:?} is ignored"));
            }
        }
        Ok(())
    }

    /// Rank of a module or parameter by its path.
    pub(crate) fn rank(&self, path: &str) -> usize {
        // Pattern values were checked to be ranks.
        self.rank_pattern.find(path).map_or(self.r, |rank| rank as usize)
    }

    /// Factor of `B A` by path: `lora_alpha / r`, or over the root of `r` with rsLoRA.
    pub(crate) fn scale(&self, path: &str) -> Result<f32, InputError> {
        let rank = self.rank(path) as f64;
        let alpha = self.alpha_pattern.find(path).unwrap_or(self.lora_alpha);
        let scale = (alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32;
        if scale.is_finite() {
            return Ok(scale);
        }
        Err(InputError::new(format!("{alpha} over rank {rank}"), "a finite f32 scale").in_tensor("lora_alpha"))
    }

    /// Whether `target_parameters` names the parameter, by PEFT's rule: as a whole, or as its end.
    pub(crate) fn targets_parameter(&self, path: &str) -> bool {
        let tails = path.match_indices('.').filter_map(|(dot, _)| path.get(dot + 1..));
        std::iter::once(path).chain(tails).any(|tail| self.parameter_ends.contains(tail))
    }
}
