//! The grammar of tensor names.
//!
//! Only the end of a name counts, `layers.{n}.<path>.experts.<rest>`: wrappers put anything before it.

use moe_lora_core::{InputError, LayerShape, Projection};
use std::fmt;

/// Longer names are refused; the longest real ones have about 120 bytes.
const MAX_NAME: usize = 1024;

/// Blocks on which stacked tensors may lie directly, without `experts` between.
const BLOCKS: [&str; 4] = ["block_sparse_moe", "mlp", "feed_forward", "mixer"];

/// What may stand before the number of a decoder layer; other towers of a model have other names.
const DECODERS: [&str; 4] =
    ["model.layers.", "model.language_model.layers.", "language_model.model.layers.", "layers."];

/// One of the two matrices of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

/// What a pair of tensors changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    Gate,
    Up,
    /// Gate and up in one, `[2I, H]`.
    GateUp,
    Down,
}

impl Target {
    pub(crate) const ALL: [Self; 4] = [Self::Gate, Self::Up, Self::GateUp, Self::Down];

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "gate_proj" | "w1" => Self::Gate,
            "up_proj" | "w3" => Self::Up,
            "gate_up_proj" => Self::GateUp,
            "down_proj" | "w2" => Self::Down,
            _ => return None,
        })
    }

    /// `[out, in]`.
    pub(crate) const fn base_shape(self, shape: &LayerShape) -> [usize; 2] {
        match self {
            Self::Gate | Self::Up => Projection::Gate.base_shape(shape),
            Self::GateUp => [2 * shape.intermediate_size, shape.hidden_size],
            Self::Down => Projection::Down.base_shape(shape),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::GateUp => "gate_up",
            Self::Down => "down",
        })
    }
}

/// Where in its layer a pair of tensors belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Site {
    /// `experts.{e}.down_proj`: one expert.
    Each { target: Target, expert: usize },
    /// `experts.down_proj`: all experts, 3-D.
    Packed { target: Target },
    /// `experts.base_layer`: all experts in the rows or columns of 2-D tensors; `depth` counts `base_layer`.
    Flat { depth: usize },
}

/// Family of projection names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// `gate_proj`, `up_proj`, `gate_up_proj`, `down_proj`.
    Proj,
    /// `w1`, `w3`, `w2`.
    W,
    /// `gate_up_projs.{e}`, `down_projs.{e}`.
    Projs,
    /// No projection name: the tensors of `target_parameters`.
    Nameless,
}

/// A tensor name that belongs to an expert.
#[derive(Debug)]
pub(crate) struct ExpertKey<'a> {
    /// What stands before `layers.{n}`.
    pub(crate) prefix: &'a str,
    /// The module that holds the experts, as PEFT's patterns see it: `model.layers.0.mlp.experts`.
    pub(crate) module: &'a str,
    pub(crate) layer: usize,
    pub(crate) site: Site,
    pub(crate) naming: Naming,
    pub(crate) side: Side,
}

/// The name without the wrapper that PEFT puts before every module path.
pub(crate) fn unwrapped(name: &str) -> &str {
    name.strip_prefix("base_model.model.").unwrap_or(name)
}

/// The path of the module or parameter that the tensor changes, for names that carry it.
pub(crate) fn module_path(name: &str) -> &str {
    let path = unwrapped(name);
    path.find(".lora_").and_then(|end| path.get(..end)).unwrap_or(path)
}

/// Reads a tensor's name; `None` if it has nothing to do with experts.
pub(crate) fn parse(name: &str, dims: usize) -> Result<Option<ExpertKey<'_>>, InputError> {
    if name.len() > MAX_NAME {
        return Err(InputError::new(format!("a name of {} bytes", name.len()), format!("at most {MAX_NAME}")));
    }
    let segments: Vec<&str> = name.split('.').collect();
    let (above, rest) = match segments.iter().position(|&s| s == "experts") {
        Some(at) => segments.split_at(at + 1),
        None => match direct_on_block(&segments, dims) {
            Some(at) => segments.split_at(at),
            None => return Ok(None),
        },
    };
    // Layers that predict further tokens are no layers of the model.
    if above.contains(&"mtp") {
        return Ok(None);
    }
    let unknown = || {
        InputError::new("an unknown expert tensor", "experts.{e}.gate_proj.lora_A.weight or another known form")
            .in_tensor(name)
    };
    let at = layers_at(above).ok_or_else(unknown)?;
    let layer = above.get(at + 1).and_then(|s| index(s)).ok_or_else(unknown)?;
    let (site, naming, tail) = site(rest).ok_or_else(unknown)?;
    let side = side(tail).map_err(|known| known.map_or_else(unknown, |e| e.in_tensor(name)))?;
    let length = |segments: &[&str]| segments.iter().map(|s| s.len() + 1).sum::<usize>();
    let prefix = name.get(..length(above.get(..at).unwrap_or_default())).unwrap_or_default();
    let module = unwrapped(name.get(..length(above) - 1).unwrap_or_default());
    Ok(Some(ExpertKey { prefix, module, layer, site, naming, side }))
}

/// A tensor name of a module outside the experts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LinearKey<'a> {
    pub(crate) layer: usize,
    /// What follows `layers.{n}.`: `self_attn.q_proj`.
    pub(crate) module: &'a str,
    pub(crate) side: Side,
}

/// Reads the name of a tensor of a decoder layer's module; `None` if it is something else.
pub(crate) fn parse_linear(name: &str) -> Option<LinearKey<'_>> {
    let path = module_path(name);
    let decoder = DECODERS.iter().find_map(|prefix| path.strip_prefix(prefix))?;
    let (layer, module) = decoder.split_once('.')?;
    let tail: Vec<&str> = unwrapped(name).get(path.len() + 1..)?.split('.').collect();
    Some(LinearKey { layer: index(layer)?, module, side: side(&tail).ok()? })
}

/// Number of segments up to a block that holds stacked tensors itself (`block_sparse_moe.w1.lora_A`). The same names on
/// other blocks are dense layers unless the tensor has three dimensions.
fn direct_on_block(segments: &[&str], dims: usize) -> Option<usize> {
    let at = layers_at(segments)?;
    let (block, target) = (*segments.get(at + 2)?, *segments.get(at + 3)?);
    let stacked = block == "block_sparse_moe" || dims == 3;
    let lora = segments.get(at + 4)?.starts_with("lora_");
    (BLOCKS.contains(&block) && Target::from_name(target).is_some() && stacked && lora).then_some(at + 3)
}

/// Place of the last `layers` that a number follows.
fn layers_at(segments: &[&str]) -> Option<usize> {
    segments.windows(2).rposition(|w| matches!(w, ["layers", n] if index(n).is_some()))
}

fn index(segment: &str) -> Option<usize> {
    // `parse` alone would take "+1" too.
    segment.bytes().all(|b| b.is_ascii_digit()).then(|| segment.parse().ok()).flatten()
}

fn naming(name: &str) -> Naming {
    if name.starts_with('w') { Naming::W } else { Naming::Proj }
}

/// What follows `experts`: the site, and the segments from `lora_A` on.
fn site<'a, 'b>(rest: &'b [&'a str]) -> Option<(Site, Naming, &'b [&'a str])> {
    if let [first, second, tail @ ..] = rest {
        let projs = match *first {
            "gate_up_projs" => Some(Target::GateUp),
            "down_projs" => Some(Target::Down),
            _ => None,
        };
        if let (Some(target), Some(expert)) = (projs, index(second)) {
            return Some((Site::Each { target, expert }, Naming::Projs, tail));
        }
        if let (Some(expert), Some(target)) = (index(first), Target::from_name(second)) {
            return Some((Site::Each { target, expert }, naming(second), tail));
        }
    }
    let (first, tail) = rest.split_first()?;
    if let Some(target) = Target::from_name(first) {
        return Some((Site::Packed { target }, naming(first), tail));
    }
    let depth = rest.iter().take_while(|&&s| s == "base_layer").count();
    let tail = rest.get(depth..)?;
    tail.first()?.starts_with("lora_").then_some((Site::Flat { depth }, Naming::Nameless, tail))
}

/// `lora_A`, with or without an adapter name and `weight` after it. `Err(None)` is an unknown name.
fn side(tail: &[&str]) -> Result<Side, Option<InputError>> {
    let (first, after) = tail.split_first().ok_or(None)?;
    if after.last() == Some(&"bias") {
        return Err(Some(InputError::new("a bias of lora_B", "lora_A and lora_B weights only")));
    }
    let side = match *first {
        "lora_A" => Side::A,
        "lora_B" => Side::B,
        "lora_magnitude_vector" => {
            return Err(Some(InputError::new("a magnitude vector (DoRA)", "lora_A and lora_B weights only")));
        }
        _ => return Err(None),
    };
    match after {
        [] | [_] | [_, "weight"] => Ok(side),
        _ => Err(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(name: &str) -> (usize, Site, &str) {
        let key = parse(name, 3).unwrap().unwrap();
        (key.layer, key.site, key.module)
    }

    #[test]
    fn every_form_is_read() {
        let each = |target, expert| Site::Each { target, expert };
        for (name, site, module) in [
            ("base_model.model.model.layers.7.mlp.experts.3.up_proj.lora_A.weight", each(Target::Up, 3), "mlp.experts"),
            ("model.layers.7.block_sparse_moe.experts.3.w2.lora_B.default.weight", each(Target::Down, 3), ""),
            ("base_model.model.model.layers.7.mlp.experts.gate_up_projs.5.lora_A.weight", each(Target::GateUp, 5), ""),
            (
                "x.model.language_model.layers.7.feed_forward.experts.gate_up_proj.lora_B",
                Site::Packed { target: Target::GateUp },
                "",
            ),
            ("layers.7.mixer.experts.w1.lora_B.weight", Site::Packed { target: Target::Gate }, ""),
            ("layers.7.block_sparse_moe.w3.lora_A", Site::Packed { target: Target::Up }, ""),
            ("layers.7.mlp.experts.lora_A.weight", Site::Flat { depth: 0 }, ""),
            ("layers.7.mlp.experts.base_layer.base_layer.lora_A.weight", Site::Flat { depth: 2 }, ""),
        ] {
            let (layer, found, path) = known(name);
            assert_eq!((layer, found), (7, site), "{name}");
            assert!(path.ends_with(module) && !path.starts_with("base_model"), "{path}");
        }
        assert_eq!(
            known("base_model.model.model.layers.7.mlp.experts.3.up_proj.lora_A.weight").2,
            "model.layers.7.mlp.experts"
        );
        assert_eq!(module_path("base_model.model.a.b.lora_A.default.weight"), "a.b");
    }

    #[test]
    fn modules_of_decoder_layers_are_read() {
        let key = |module, side| Some(LinearKey { layer: 7, module, side });
        let q = "base_model.model.model.layers.7.self_attn.q_proj.lora_A";
        assert_eq!(parse_linear(&format!("{q}.weight")), key("self_attn.q_proj", Side::A));
        assert_eq!(parse_linear("model.layers.7.mlp.gate.lora_B.default.weight"), key("mlp.gate", Side::B));
        for other in [
            "base_model.model.lm_head.lora_A.weight",
            "base_model.model.visual.layers.7.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.7.self_attn.q_proj.lora_B.bias",
            "base_model.model.model.layers.7.self_attn.q_proj.lora_embedding_A",
            "base_model.model.model.layers.7.self_attn.q_proj",
            "base_model.model.model.layers.+7.self_attn.q_proj.lora_A.weight",
            "model.layers.",
        ] {
            assert_eq!(parse_linear(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_no_expert_is_handed_back_and_the_unknown_refused() {
        for outside in [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "model.layers.0.mlp.shared_experts.gate_proj.lora_A.weight",
            "model.layers.0.block_sparse_moe.gate.lora_A.weight",
            "model.mtp.layers.0.mlp.experts.0.up_proj.lora_A.weight",
            "lm_head.lora_A.weight",
        ] {
            assert!(parse(outside, 2).unwrap().is_none(), "{outside}");
        }
        assert!(parse("model.layers.0.mlp.gate_proj.lora_A.weight", 2).unwrap().is_none(), "a dense layer");
        for unknown in [
            "model.layers.0.mlp.experts.0.side_proj.lora_A.weight",
            "model.layers.0.mlp.experts.0.up_proj.weight",
            "model.layers.0.mlp.experts.+1.up_proj.lora_A.weight",
            "model.layers.0.mlp.experts.0.up_proj.lora_B.bias",
            "model.layers.0.mlp.experts.0.up_proj.lora_magnitude_vector",
            "model.layers.0.mlp.experts.0.up_proj.lora_A.a.b.weight",
            "model.layers.99999999999999999999.mlp.experts.0.up_proj.lora_A.weight",
            "experts.0.up_proj.lora_A.weight",
            "layers.0.experts",
        ] {
            assert_eq!(parse(unknown, 2).unwrap_err().tensor.as_deref(), Some(unknown));
        }
        assert!(parse(&"x.".repeat(4000), 2).is_err());
    }
}
