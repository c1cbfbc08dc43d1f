//! Tensors of PEFT's `target_parameters` (form F5): all experts in the rows of A and the columns of B.
//!
//! PEFT (0.17.0 to 0.21.2, `ParamWrapper.get_delta_weight`) reads A as `(experts, rank, in)` and B as `(out, rank,
//! experts)`. What it calls in and out depends on its version and on the model's code, so the shapes decide, for the whole
//! file at once; see [`ExpertLayout`].

use crate::index::{Index, Layer, Pair};
use crate::key::{Side, Target};
use crate::load::{Context, matrices, read};
use crate::repack::{experts_first, transpose_each};
use crate::stacked::{Part, Parts, gate_first, put};
use crate::{AdapterConfig, ExpertLayout, layout};
use moe_lora_core::{Element, InputError};
use moe_lora_files::TensorInfo;
use std::collections::BTreeMap;

/// One parameter of a layer, told from the others.
#[derive(Debug)]
pub(crate) struct Parameter<'a> {
    pub(crate) target: Target,
    /// Its name in the module that holds the experts.
    pub(crate) name: &'static str,
    pub(crate) a: &'a TensorInfo,
    pub(crate) b: &'a TensorInfo,
    /// The rank of one expert.
    pub(crate) rank: usize,
    /// Width of A.
    pub(crate) width: usize,
    /// Height of B.
    pub(crate) height: usize,
}

/// What the flat tensors of a file are.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) layers: BTreeMap<usize, Vec<Parameter<'a>>>,
    pub(crate) layout: ExpertLayout,
}

/// Tells the parameters of every layer apart and decides the layout; `None` if there are none.
pub(crate) fn plan<'a>(cx: Context<'a>, index: &Index) -> Result<Option<Plan<'a>>, InputError> {
    let mut layers = BTreeMap::new();
    for (&layer, entry) in &index.layers {
        if entry.flat().next().is_some() {
            let cx = Context { layer, ..cx };
            layers.insert(layer, parameters(cx, entry)?);
        }
    }
    if layers.is_empty() {
        return Ok(None);
    }
    let layout = layout::decide(cx, &layers)?;
    Ok(Some(Plan { layers, layout }))
}

/// Names that a parameter may have, in the order in which modules register them.
const NAMES: [(&str, Target); 7] = [
    ("gate_up_proj", Target::GateUp),
    ("gate_proj", Target::Gate),
    ("up_proj", Target::Up),
    ("w1", Target::Gate),
    ("w3", Target::Up),
    ("down_proj", Target::Down),
    ("w2", Target::Down),
];

/// The parameters of a layer's experts that `target_parameters` names, in the order of [`NAMES`].
pub(crate) fn named(config: &AdapterConfig, layer: &Layer) -> Vec<(&'static str, Target)> {
    NAMES.into_iter().filter(|(name, _)| config.targets_parameter(&format!("{}.{name}", layer.module))).collect()
}

/// The parameters of a layer. Fused gate_up and down are told by their sizes; separate ones, which all have the sizes
/// {H, I}, by the order in which `target_parameters` has them wrapped.
fn parameters<'a>(cx: Context<'a>, layer: &Layer) -> Result<Vec<Parameter<'a>>, InputError> {
    let (h, i) = (cx.shape.layer.hidden_size, cx.shape.layer.intermediate_size);
    let mut found: Vec<Parameter<'a>> = layer.flat().map(|pair| parameter(cx, pair)).collect::<Result<_, _>>()?;
    let named = named(cx.config, layer);
    let sized = |p: &Parameter<'_>, one, two| (p.width, p.height) == (one, two) || (p.width, p.height) == (two, one);
    let first = found.first().map_or("", |p| &*p.a.name);
    let refused = |found: String, expected: String| {
        Err(InputError::new(format!("layer {}: {found}", cx.layer), expected).in_tensor(first))
    };
    if let Some(p) = found.iter().find(|p| !sized(p, h, i) && !sized(p, h, 2 * i)) {
        return refused(
            format!("A {:?}, B {:?}", p.a.shape, p.b.shape),
            format!("A width and B height of {h} and {} (gate_up) or {h} and {i} (down)", 2 * i),
        );
    }
    let fused = found.iter().filter(|p| sized(p, h, 2 * i)).count();
    let names = named.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    if fused > 0 || named.iter().any(|(_, target)| *target == Target::GateUp) {
        if fused > 1 || found.len() - fused > 1 {
            let found = format!("{} parameters, {fused} of them with the sizes of gate_up", found.len());
            return refused(found, "gate_up and down".to_owned());
        }
        for p in &mut found {
            p.target = if sized(p, h, 2 * i) { Target::GateUp } else { Target::Down };
        }
    } else if found.len() == named.len() {
        let targets = order(&found, &named, h != i);
        let Some(targets) = targets else {
            return refused(format!("the parameters {names}"), "names whose order in the module is known".to_owned());
        };
        for (p, target) in found.iter_mut().zip(targets) {
            p.target = target;
        }
    } else {
        return refused(
            format!("{} parameters of sizes {h} and {i}", found.len()),
            format!("as many as target_parameters names for this layer ({names})"),
        );
    }
    for p in &mut found {
        match named.iter().find(|(_, target)| *target == p.target) {
            Some((name, _)) => p.name = name,
            None if cx.config.target_parameters.is_empty() => p.name = default_name(p.target),
            None => {
                let expected = format!("the parameters that target_parameters names ({names})");
                return refused(format!("{} by its sizes", p.target), expected);
            }
        }
    }
    if cx.options.strict && !cx.config.target_parameters.is_empty() && found.len() < named.len() {
        return refused(format!("{} parameters", found.len()), format!("all that target_parameters names ({names})"));
    }
    Ok(found)
}

fn default_name(target: Target) -> &'static str {
    NAMES.iter().find(|(_, t)| *t == target).map_or("", |(name, _)| name)
}

/// The targets of separate parameters, in the order of `found`. Modules register gate, up, down; those that say w1, w2, w3
/// may have down in the middle, so there the sizes tell which one it is.
fn order(found: &[Parameter<'_>], named: &[(&str, Target)], sizes_differ: bool) -> Option<Vec<Target>> {
    let count = |target| named.iter().filter(|(_, t)| *t == target).count();
    if Target::ALL.into_iter().any(|target| count(target) > 1) {
        return None;
    }
    let numbered = named.iter().any(|(name, _)| name.starts_with('w'));
    if !numbered || count(Target::Up) + count(Target::Down) < 2 {
        return Some(named.iter().map(|(_, target)| *target).collect());
    }
    if found.len() != 3 || !sizes_differ {
        return None;
    }
    let lone = found.iter().position(|p| found.iter().filter(|q| q.width == p.width).count() == 1)?;
    let mut targets = vec![Target::Gate, Target::Up];
    targets.insert(lone, Target::Down);
    Some(targets)
}

/// The pair's sizes; its target is found later.
fn parameter<'a>(cx: Context<'a>, pair: Pair) -> Result<Parameter<'a>, InputError> {
    let experts = cx.shape.layer.num_experts;
    let (a, b) = match (cx.tensor(pair.a), cx.tensor(pair.b)) {
        (Some(a), Some(b)) => (a, b),
        (one, other) => {
            let (side, tensor) = if one.is_some() { ("A without B", one) } else { ("B without A", other) };
            let name = tensor.map_or("", |t| &*t.name);
            return Err(InputError::new(format!("layer {}: {side}", cx.layer), "A and B").in_tensor(name));
        }
    };
    match (&*a.shape, &*b.shape) {
        (&[rows, width], &[height, cols]) if rows == cols && rows % experts == 0 => {
            Ok(Parameter { target: Target::Down, name: "", a, b, rank: rows / experts, width, height })
        }
        (a_shape, b_shape) => Err(InputError::new(
            format!("layer {}: A {a_shape:?}, B {b_shape:?}", cx.layer),
            format!("A [rank * {experts}, ..] and B [.., rank * {experts}] for {experts} experts"),
        )
        .in_tensor(&*a.name)),
    }
}

/// Loads one parameter of all experts.
pub(crate) fn load<'a, T: Element>(
    cx: Context<'a>,
    layer: &Layer,
    parameter: &Parameter<'a>,
    layout: ExpertLayout,
) -> Result<Parts<'a>, InputError> {
    let Parameter { target, a, b, rank, width, height, .. } = *parameter;
    let experts = cx.shape.layer.num_experts;
    let path = format!("{}.{}", layer.module, parameter.name);
    let part = Part { a: None, b: None, rank: cx.config.rank(&path), scale: cx.config.scale(&path)?, tensor: &b.name };
    let mut parts = Parts { target, each: vec![part; experts], a_shared: false, b_shared: false, may_pack_a: false };
    let from_a = read::<T>(cx, a, target, |at| Some(at / (rank * width)))?; // [experts, rank, width]
    match layout {
        ExpertLayout::Direct => put(&mut parts, Side::A, matrices(from_a, rank, width)?),
        ExpertLayout::Transposed => {
            let values = gate_first(cx, target, transpose_each(&from_a, rank, width), rank);
            drop(from_a);
            put(&mut parts, Side::B, matrices(values, width, rank)?);
        }
    }
    let from_b = read::<T>(cx, b, target, |at| Some(at % experts))?; // [height, rank, experts]
    let by_expert = experts_first(&from_b, height, rank, experts);
    drop(from_b);
    match layout {
        ExpertLayout::Direct => {
            let values = gate_first(cx, target, by_expert, rank);
            put(&mut parts, Side::B, matrices(values, height, rank)?);
        }
        ExpertLayout::Transposed => {
            put(&mut parts, Side::A, matrices(transpose_each(&by_expert, height, rank), rank, height)?);
        }
    }
    Ok(parts)
}
