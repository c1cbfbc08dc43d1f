//! `config.json`: sizes, layers, activation and router settings of a model.

mod fields;
mod parse;
mod router;

pub(crate) use fields::Fields;
pub(crate) use parse::{family_and_fields, parse};

use crate::Family;
use moe_lora_core::{Activation, LayerShape, RouterConfig};

/// What `config.json` says about the MoE layers. A field that is absent or `null` has the value that transformers
/// gives it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The family, from `model_type`.
    pub family: Family,
    /// Sizes of a MoE layer.
    pub layer: LayerShape,
    /// Decoder layers, dense ones included.
    pub num_hidden_layers: usize,
    /// Absolute decoder indices of the MoE layers, ascending.
    pub moe_layers: Vec<usize>,
    /// How gate and up join.
    pub activation: Activation,
    /// How experts are chosen and weighted.
    pub router: RouterConfig,
}
