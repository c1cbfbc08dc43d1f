//! From parts to LoRA pairs: sides joined and checked, gate_up cut into gate and up.

use crate::key::Target;
use crate::load::{Context, matrices};
use crate::stacked::Parts;
use moe_lora_core::{Element, ExpertLora, InputError, Lora, Matrix};

/// One expert's A and B for gate and up together.
struct Fused {
    expert: usize,
    a: Matrix,
    b: Matrix,
    scale: f32,
}

/// Puts the parts of one target into the layer's experts.
pub(crate) fn install<T: Element>(
    cx: Context<'_>,
    parts: Parts<'_>,
    experts: &mut [ExpertLora],
) -> Result<(), InputError> {
    let target = parts.target;
    check_sides(cx, &parts)?;
    let mut fused = Vec::new();
    for (e, (part, expert)) in parts.each.into_iter().zip(experts.iter_mut()).enumerate() {
        // Where one side is shared, an expert without the other one is an expert that was not trained.
        let (Some(a), Some(b)) = (part.a, part.b) else { continue };
        let rank = b.cols();
        let refused = |found: String, expected: String| {
            InputError::new(format!("{}: {found}", cx.place(target, Some(e))), expected).in_tensor(part.tensor)
        };
        let pair = parts.may_pack_a && target == Target::GateUp && a.rows() == 2 * rank;
        if a.rows() != rank && !pair {
            return Err(refused(format!("A of rank {}, B of rank {rank}", a.rows()), "one rank".to_owned()));
        }
        if rank != part.rank {
            let expected = format!("rank {}, as adapter_config.json says", part.rank);
            return Err(refused(format!("rank {rank}"), expected));
        }
        if rank > cx.options.max_rank {
            return Err(refused(format!("rank {rank}"), format!("at most the maximum of {}", cx.options.max_rank)));
        }
        let scale = part.scale;
        match target {
            Target::Gate => expert.gate = Some(Lora::new(a, b, scale)?),
            Target::Up => expert.up = Some(Lora::new(a, b, scale)?),
            Target::Down => expert.down = Some(Lora::new(a, b, scale)?),
            Target::GateUp => fused.push(Fused { expert: e, a, b, scale }),
        }
    }
    let size = cx.shape.layer.intermediate_size;
    let diagonal = is_block_diagonal::<T>(&fused, size);
    let mut last: Option<(Matrix, [Matrix; 2])> = None;
    for Fused { expert, a, b, scale } in fused {
        let halves = match &last {
            // One B for all experts stays one.
            Some((whole, halves)) if whole.same_storage(&b) => halves.clone(),
            _ if diagonal => diagonal_blocks::<T>(&b, size)?,
            _ => [b.select_rows(0, size, 1)?, b.select_rows(size, size, 1)?],
        };
        let [gate_b, up_b] = halves.clone();
        last = Some((b, halves));
        let rank = gate_b.cols();
        let (gate_a, up_a) =
            if a.rows() == rank { (a.clone(), a) } else { (a.select_rows(0, rank, 1)?, a.select_rows(rank, rank, 1)?) };
        if let Some(expert) = experts.get_mut(expert) {
            expert.gate = Some(Lora::new(gate_a, gate_b, scale)?);
            expert.up = Some(Lora::new(up_a, up_b, scale)?);
        }
    }
    Ok(())
}

/// Refuses A without B and B without A.
fn check_sides(cx: Context<'_>, parts: &Parts<'_>) -> Result<(), InputError> {
    let any_a = parts.each.iter().any(|p| p.a.is_some());
    let any_b = parts.each.iter().any(|p| p.b.is_some());
    for (e, part) in parts.each.iter().enumerate() {
        let (found, expected) = match (&part.a, &part.b) {
            (Some(a), None) if !parts.a_shared || !any_b => (format!("A {:?} without B", a.shape()), "A and B"),
            (None, Some(b)) if !parts.b_shared || !any_a => (format!("B {:?} without A", b.shape()), "A and B"),
            _ => continue,
        };
        let found = format!("{}: {found}", cx.place(parts.target, Some(e)));
        return Err(InputError::new(found, expected).in_tensor(part.tensor));
    }
    Ok(())
}

/// Whether gate uses the first half of the rank only and up the second half, in every expert: what PEFT makes of separate
/// gate and up adapters when it fuses them (since 0.19.0). Cut back they are half the work.
fn is_block_diagonal<T: Element>(fused: &[Fused], size: usize) -> bool {
    let zero = |values: &[T]| values.iter().all(|v| v.to_f32() == 0.0);
    let mut empty = true;
    for Fused { a, b, .. } in fused {
        let half = b.cols() / 2;
        let Some(view) = b.view::<T>() else { return false };
        if b.cols() % 2 != 0 || a.rows() != b.cols() {
            return false;
        }
        for row in 0..b.rows() {
            let (first, second) = view.row(row).split_at(half);
            let (used, unused) = if row < size { (first, second) } else { (second, first) };
            if !zero(unused) {
                return false;
            }
            empty &= zero(used);
        }
    }
    !empty
}

/// B of gate and B of up out of `[[gate, 0], [0, up]]`.
fn diagonal_blocks<T: Element>(b: &Matrix, size: usize) -> Result<[Matrix; 2], InputError> {
    let half = b.cols() / 2;
    let mut values = Vec::with_capacity(b.rows() * half);
    if let Some(view) = b.view::<T>() {
        for row in 0..b.rows() {
            let (first, second) = view.row(row).split_at(half);
            values.extend_from_slice(if row < size { first } else { second });
        }
    }
    let blocks = matrices(values, size, half)?;
    <[Matrix; 2]>::try_from(blocks).map_err(|b| InputError::new(format!("{} blocks", b.len()), "2 blocks"))
}
