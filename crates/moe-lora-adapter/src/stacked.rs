//! Named projections: a tensor for each expert (forms F1, F2, F3) or one for all (F4, F6).

use crate::index::{Layer, Pair};
use crate::key::{Side, Target, module_path};
use crate::load::{Context, matrices, read};
use crate::repack::{deinterleave_each, transpose_each};
use moe_lora_core::{Element, InputError, Matrix};
use moe_lora_files::TensorInfo;

/// What the file has for one expert and target.
#[derive(Debug, Clone, Default)]
pub(crate) struct Part<'a> {
    pub(crate) a: Option<Matrix>,
    pub(crate) b: Option<Matrix>,
    /// Rank that the configuration gives it.
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// One of the tensors it came from.
    pub(crate) tensor: &'a str,
}

/// What the file has for all experts of a layer and one target.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) target: Target,
    pub(crate) each: Vec<Part<'a>>,
    /// All experts have the same A.
    pub(crate) a_shared: bool,
    /// All experts have the same B.
    pub(crate) b_shared: bool,
    /// A of gate_up may hold gate rows and up rows one after the other.
    pub(crate) may_pack_a: bool,
}

/// Loads one target; `None` if the layer has nothing for it.
pub(crate) fn load<'a, T: Element>(
    cx: Context<'a>,
    layer: &Layer,
    target: Target,
) -> Result<Option<Parts<'a>>, InputError> {
    let packed = layer.packed(target);
    if packed.is_none() && layer.each(target).next().is_none() {
        return Ok(None);
    }
    let each = vec![Part::default(); cx.shape.layer.num_experts];
    let mut parts = Parts { target, each, a_shared: false, b_shared: false, may_pack_a: packed.is_some() };
    if let Some(pair) = packed {
        load_packed::<T>(cx, pair, &mut parts)?;
    }
    for (expert, pair) in layer.each(target) {
        load_expert::<T>(cx, expert, pair, &mut parts)?;
    }
    Ok(Some(parts))
}

fn load_expert<'a, T: Element>(
    cx: Context<'a>,
    expert: usize,
    pair: Pair,
    parts: &mut Parts<'a>,
) -> Result<(), InputError> {
    let target = parts.target;
    let place = cx.place(target, Some(expert));
    let [out, inner] = target.base_shape(&cx.shape.layer);
    let (a, b) = (cx.tensor(pair.a), cx.tensor(pair.b));
    let name = b.or(a).map_or("", |t| &*t.name);
    let Some(part) = parts.each.get_mut(expert) else {
        let experts = cx.shape.layer.num_experts;
        return Err(InputError::new(place.to_string(), format!("experts below the model's {experts}")).in_tensor(name));
    };
    let path = module_path(name);
    (part.rank, part.scale, part.tensor) = (cx.config.rank(path), cx.config.scale(path)?, name);
    let refused = |tensor: &TensorInfo, expected: String| {
        InputError::new(format!("{place}: {:?}", tensor.shape), expected).in_tensor(&*tensor.name)
    };
    if let Some(tensor) = a {
        match *tensor.shape {
            [rank, width] if width == inner => {
                let values = read::<T>(cx, tensor, target, |_| Some(expert))?;
                part.a = Some(Matrix::from_vec(values, rank, width)?);
            }
            _ => return Err(refused(tensor, format!("A [rank, {inner}]"))),
        }
    }
    if let Some(tensor) = b {
        match *tensor.shape {
            [height, rank] if height == out => {
                let values = gate_first(cx, target, read::<T>(cx, tensor, target, |_| Some(expert))?, rank);
                part.b = Some(Matrix::from_vec(values, height, rank)?);
            }
            _ => return Err(refused(tensor, format!("B [{out}, rank]"))),
        }
    }
    Ok(())
}

fn load_packed<'a, T: Element>(cx: Context<'a>, pair: Pair, parts: &mut Parts<'a>) -> Result<(), InputError> {
    let target = parts.target;
    let (a, b) = (cx.tensor(pair.a), cx.tensor(pair.b));
    let rank_last = rank_last(cx, target, a, b)?;
    let name = b.or(a).map_or("", |t| &*t.name);
    let path = module_path(name);
    let (rank, scale) = (cx.config.rank(path), cx.config.scale(path)?);
    for part in &mut parts.each {
        (part.rank, part.scale, part.tensor) = (rank, scale, name);
    }
    // [experts, x, y] of the tensor; the number of a value tells its expert.
    let dims = |tensor: &TensorInfo| <[usize; 3]>::try_from(&*tensor.shape).unwrap_or_default();
    let read = |tensor: &TensorInfo, x: usize, y: usize, n: usize| {
        read::<T>(cx, tensor, target, |at| (n > 1).then(|| at / (x * y)))
    };
    if let Some(tensor) = a {
        let [n, x, y] = dims(tensor);
        let values = read(tensor, x, y, n)?;
        let all = if rank_last { matrices(transpose_each(&values, x, y), y, x) } else { matrices(values, x, y) }?;
        parts.a_shared = n == 1;
        put(parts, Side::A, all);
    }
    if let Some(tensor) = b {
        let [n, x, y] = dims(tensor);
        let values = read(tensor, x, y, n)?;
        let (values, out, rank) = if rank_last { (transpose_each(&values, x, y), y, x) } else { (values, x, y) };
        let all = matrices(gate_first(cx, target, values, rank), out, rank)?;
        parts.b_shared = n == 1;
        put(parts, Side::B, all);
    }
    Ok(())
}

/// Gives every expert its matrix of one side, or all the same.
pub(crate) fn put(parts: &mut Parts<'_>, side: Side, matrices: Vec<Matrix>) {
    for (part, matrix) in parts.each.iter_mut().zip(matrices.into_iter().cycle()) {
        match side {
            Side::A => part.a = Some(matrix),
            Side::B => part.b = Some(matrix),
        }
    }
}

/// Tells rank-last tensors (F6: A `[E, in, rank]`, B `[E, rank, out]`) from the usual ones (F4: A `[E, rank, in]`, B
/// `[E, out, rank]`).
fn rank_last(
    cx: Context<'_>,
    target: Target,
    a: Option<&TensorInfo>,
    b: Option<&TensorInfo>,
) -> Result<bool, InputError> {
    let experts = cx.shape.layer.num_experts;
    let [out, inner] = target.base_shape(&cx.shape.layer);
    let stack = |t: &TensorInfo| <[usize; 3]>::try_from(&*t.shape).ok().filter(|[n, ..]| *n == 1 || *n == experts);
    let stacked = a.is_none_or(|t| stack(t).is_some()) && b.is_none_or(|t| stack(t).is_some());
    let fits = |last: bool| {
        let a = a.and_then(stack).map(|[_, x, y]| if last { (y, x) } else { (x, y) }); // (rank, in)
        let b = b.and_then(stack).map(|[_, x, y]| if last { (x, y) } else { (y, x) }); // (rank, out)
        let ranks = a.zip(b).is_none_or(|((a, _), (b, _))| a == b || (target == Target::GateUp && a == 2 * b));
        stacked && ranks && a.is_none_or(|a| a.1 == inner) && b.is_none_or(|b| b.1 == out)
    };
    let expected = match (fits(false), fits(true)) {
        (true, false) => return Ok(false),
        (false, true) => return Ok(true),
        (false, false) => format!(
            "A [1 or {experts}, rank, {inner}] and B [1 or {experts}, {out}, rank] of one rank, or A [.., {inner}, rank] \
             and B [.., rank, {out}]"
        ),
        (true, true) => "shapes that fit one order of rank and width, not both".to_owned(),
    };
    let shown = |side: &str, t: Option<&TensorInfo>| t.map(|t| format!("{side} {:?}", t.shape));
    let found: Vec<String> = [shown("A", a), shown("B", b)].into_iter().flatten().collect();
    let name = a.or(b).map_or("", |t| &*t.name);
    Err(InputError::new(format!("{}: {}", cx.place(target, None), found.join(", ")), expected).in_tensor(name))
}

/// `[n, out, rank]` of B with the gate rows of gate_up before the up rows.
pub(crate) fn gate_first<T: Copy>(cx: Context<'_>, target: Target, values: Vec<T>, rank: usize) -> Vec<T> {
    if target == Target::GateUp && cx.shape.storage.interleaved {
        deinterleave_each(&values, 2 * cx.shape.layer.intermediate_size, rank)
    } else {
        values
    }
}
