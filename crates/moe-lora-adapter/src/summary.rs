//! What an adapter is, as far as its own files tell.

use crate::config::AdapterConfig;
use crate::flat;
use crate::index::{Index, Layer};
use crate::key::{Naming, Site, Target, module_path};
use moe_lora_files::{SafetensorsFile, TensorInfo};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt;

/// A way to lay an adapter's tensors out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KeyForm {
    /// `experts.{e}.gate_proj`, `up_proj`, `down_proj`.
    PerExpert,
    /// `experts.{e}.w1`, `w3`, `w2`.
    PerExpertMixtral,
    /// `experts.{e}.gate_up_proj` or `experts.gate_up_projs.{e}`.
    PerExpertFused,
    /// `experts.gate_up_proj` and the like, `[experts, rank, in]`.
    Stacked,
    /// PEFT's `target_parameters`: `experts.base_layer`, all experts in one dimension.
    TargetParameters,
    /// As `Stacked`, with the rank last: `[experts, in, rank]`.
    RankLast,
}

impl fmt::Display for KeyForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PerExpert => "a tensor for each expert",
            Self::PerExpertMixtral => "a tensor for each expert (w1, w2, w3)",
            Self::PerExpertFused => "a tensor for each expert, gate and up fused",
            Self::Stacked => "experts stacked",
            Self::TargetParameters => "target_parameters",
            Self::RankLast => "experts stacked, rank last",
        })
    }
}

/// What [`PeftAdapter::summary`](crate::PeftAdapter::summary) tells. Lists are sorted and hold every value once.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct AdapterSummary {
    /// Layouts of the expert tensors.
    pub forms: Vec<KeyForm>,
    /// Decoder layers with expert tensors.
    pub layers: Vec<usize>,
    /// Experts with tensors, as far as the file tells: the largest index plus one, or the size of the stacks.
    pub experts: usize,
    /// `gate`, `up`, `gate_up`, `down`; for `target_parameters` what the settings name.
    pub projections: Vec<String>,
    /// Ranks of the tensors; for `target_parameters` those of the settings, since experts and rank are one dimension.
    pub ranks: Vec<usize>,
    /// Factors of `B A`.
    pub scales: Vec<f32>,
    /// Number formats of the expert tensors.
    pub dtypes: Vec<String>,
    /// Number of expert tensors.
    pub expert_tensors: usize,
    /// Their bytes in the file.
    pub expert_bytes: usize,
    /// Number of other tensors, which are not loaded.
    pub unused_tensors: usize,
}

#[derive(Default)]
struct Seen {
    forms: BTreeSet<KeyForm>,
    experts: usize,
    projections: BTreeSet<Target>,
    ranks: BTreeSet<usize>,
    /// Bits, since floats have no order; all are finite.
    scales: BTreeSet<u32>,
    dtypes: BTreeSet<String>,
    tensors: usize,
    bytes: usize,
}

pub(crate) fn of(file: &SafetensorsFile, config: &AdapterConfig, index: &Index) -> AdapterSummary {
    let mut seen = Seen::default();
    for layer in index.layers.values() {
        for (site, pair) in &layer.sites {
            let tensor = |place: Option<usize>| file.tensors().get(place?);
            seen.add(layer, *site, tensor(pair.a), tensor(pair.b), config);
        }
    }
    let mut scales: Vec<f32> = seen.scales.into_iter().map(f32::from_bits).collect();
    scales.sort_by(f32::total_cmp);
    AdapterSummary {
        forms: seen.forms.into_iter().collect(),
        layers: index.layers.iter().filter(|(_, l)| !l.sites.is_empty()).map(|(n, _)| *n).collect(),
        experts: seen.experts,
        projections: seen.projections.iter().map(Target::to_string).collect(),
        ranks: seen.ranks.into_iter().collect(),
        scales,
        dtypes: seen.dtypes.into_iter().collect(),
        expert_tensors: seen.tensors,
        expert_bytes: seen.bytes,
        unused_tensors: index.unused.len(),
    }
}

impl Seen {
    fn add(
        &mut self,
        layer: &Layer,
        site: Site,
        a: Option<&TensorInfo>,
        b: Option<&TensorInfo>,
        config: &AdapterConfig,
    ) {
        for tensor in [a, b].into_iter().flatten() {
            self.tensors += 1;
            self.bytes += tensor.range.len();
            self.dtypes.insert(format!("{:?}", tensor.dtype));
        }
        let Some(tensor) = b.or(a) else { return };
        let shape = |t: Option<&TensorInfo>| t.and_then(|t| <[usize; 3]>::try_from(&*t.shape).ok());
        let path = module_path(&tensor.name);
        match site {
            Site::Each { target, expert } => {
                self.forms.insert(match (target, layer.uses_numbered_names()) {
                    (Target::GateUp, _) => KeyForm::PerExpertFused,
                    (_, true) => KeyForm::PerExpertMixtral,
                    (Target::Down, _) if layer.each(Target::GateUp).next().is_some() => KeyForm::PerExpertFused,
                    _ => KeyForm::PerExpert,
                });
                self.experts = self.experts.max(expert.saturating_add(1));
                self.ranks.extend(b.and_then(|b| b.shape.get(1)).or_else(|| a.and_then(|a| a.shape.first())));
                self.settings(target, path, config);
            }
            Site::Packed { target } => {
                let (a, b) = (shape(a), shape(b));
                let last = matches!((a, b), (Some([_, x, y]), Some([_, u, v])) if y == u && x != v && x != 2 * v);
                self.forms.insert(if last { KeyForm::RankLast } else { KeyForm::Stacked });
                let experts = [a, b].into_iter().flatten().map(|[n, ..]| n);
                self.experts = experts.fold(self.experts, usize::max);
                let rank = b.map(|[_, u, v]| if last { u } else { v }).or(a.map(|[_, x, _]| x));
                self.ranks.extend(rank);
                self.settings(target, path, config);
            }
            Site::Flat { depth } => {
                self.forms.insert(KeyForm::TargetParameters);
                // The deepest was wrapped first. Which one it really is takes the model's sizes.
                let named = flat::named(config, layer);
                let one = named.iter().rev().nth(depth).filter(|_| named.len() == layer.flat().count());
                let path = one.map_or(layer.module.clone(), |(name, _)| format!("{}.{name}", layer.module));
                let rank = config.rank(&path);
                self.ranks.insert(rank);
                self.experts = self.experts.max(a.and_then(|a| a.shape.first()).map_or(0, |rows| rows / rank));
                match one {
                    Some((_, target)) => self.settings(*target, &path, config),
                    None => self.scales.extend(config.scale(&path).ok().map(f32::to_bits)),
                }
            }
        }
    }

    fn settings(&mut self, target: Target, path: &str, config: &AdapterConfig) {
        self.projections.insert(target);
        self.scales.extend(config.scale(path).ok().map(f32::to_bits));
    }
}

impl Layer {
    /// Whether its projections are called w1, w2 and w3.
    pub(crate) fn uses_numbered_names(&self) -> bool {
        self.each_naming() == Some(Naming::W)
    }
}
