//! Everything that can be wrong with an adapter, found before the pool changes.

use crate::PoolConfig;
use moe_lora_core::{AdapterWeights, DType, Element, InputError, Lora, Matrix, ModelShape, Projection};
use std::collections::HashSet;

/// Checks layers, experts, shapes, ranks and numbers against the model that the pool serves. `weights` may have been made
/// for another one. `dtype` is the format that they will be stored in.
pub(crate) fn check(
    weights: &AdapterWeights,
    shape: &ModelShape,
    dtype: DType,
    config: &PoolConfig,
) -> Result<(), InputError> {
    let mut seen = HashSet::new();
    for (&n, layer) in weights.layers() {
        if shape.moe_layers.binary_search(&n).is_err() {
            return Err(InputError::new(format!("layer {n}"), format!("a MoE layer of {:?}", shape.moe_layers)));
        }
        if layer.experts().len() != shape.layer.num_experts {
            let found = format!("{} experts", layer.experts().len());
            return Err(InputError::new(found, format!("the model's {}", shape.layer.num_experts))
                .in_tensor(format!("layer {n}")));
        }
        for (e, expert) in layer.experts().iter().enumerate() {
            for projection in Projection::ALL {
                let Some(lora) = expert.get(projection) else { continue };
                let place = || format!("layer {n} expert {e} {projection}");
                sizes(lora, projection, shape, config).map_err(|error| error.in_tensor(place()))?;
                for (side, matrix) in [("A", lora.a()), ("B", lora.b())] {
                    if seen.insert(matrix.storage_key()) {
                        numbers(matrix, dtype).map_err(|error| error.in_tensor(format!("{} {side}", place())))?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn sizes(lora: &Lora, projection: Projection, shape: &ModelShape, config: &PoolConfig) -> Result<(), InputError> {
    let found = [lora.out_features(), lora.in_features()];
    let want = projection.lora_shape(&shape.layer);
    if found != want || lora.a().rows() != projection.a_rows(&shape.layer, lora.rank()) {
        return Err(InputError::new(format!("B A of {found:?}"), format!("{want:?}")));
    }
    if lora.rank() > config.max_rank {
        return Err(InputError::new(
            format!("rank {}", lora.rank()),
            format!("at most the pool's max_rank of {}", config.max_rank),
        ));
    }
    Ok(())
}

/// Refuses NaN, infinity and what rounds to infinity in `dtype`.
fn numbers(matrix: &Matrix, dtype: DType) -> Result<(), InputError> {
    match matrix.dtype() {
        DType::F32 => finite::<f32>(matrix, dtype),
        DType::F16 => finite::<half::f16>(matrix, dtype),
        DType::Bf16 => finite::<half::bf16>(matrix, dtype),
    }
}

fn finite<T: Element>(matrix: &Matrix, dtype: DType) -> Result<(), InputError> {
    let bound = infinite_from(dtype);
    let Some(view) = matrix.view::<T>() else { return Ok(()) };
    for r in 0..view.rows() {
        // No early exit inside a row, so that it vectorises.
        let fits = |x: &T| x.to_f32().abs() < bound;
        if !view.row(r).iter().fold(true, |all, x| all & fits(x))
            && let Some((c, x)) = view.row(r).iter().enumerate().find(|(_, x)| !fits(x))
        {
            let found = format!("{} at row {r}, column {c}", x.to_f32());
            return Err(InputError::new(found, format!("a number that is finite in {dtype}")));
        }
    }
    Ok(())
}

/// The smallest magnitude that rounds to infinity: half a step above the largest finite number.
const fn infinite_from(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::INFINITY,
        DType::F16 => 65520.0,
        DType::Bf16 => f32::from_bits(0x7f7f_8000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn the_bounds_are_where_rounding_reaches_infinity() {
        let below = |bound: f32| f32::from_bits(bound.to_bits() - 1);
        let (at, under) = (infinite_from(DType::F16), below(infinite_from(DType::F16)));
        assert!(f16::from_f32(at).is_infinite() && f16::from_f32(under).is_finite());
        let (at, under) = (infinite_from(DType::Bf16), below(infinite_from(DType::Bf16)));
        assert!(bf16::from_f32(at).is_infinite() && bf16::from_f32(under).is_finite());
    }

    #[test]
    fn numbers_that_are_not_finite_in_the_model_format_are_found() {
        for (x, dtype, good) in [
            (f32::NAN, DType::F32, false),
            (f32::NEG_INFINITY, DType::F32, false),
            (f32::MAX, DType::F32, true),
            (f32::MAX, DType::Bf16, false),
            (-65519.0, DType::F16, true),
            (-65520.0, DType::F16, false),
            (65520.0, DType::Bf16, true),
        ] {
            let matrix = Matrix::from_vec(vec![0.5, -0.5, 0.25, x], 2, 2).unwrap();
            let found = numbers(&matrix, dtype);
            assert_eq!(found.is_ok(), good, "{x} in {dtype}");
            if let Err(error) = found {
                assert!(error.found.ends_with("at row 1, column 1"), "{error}");
            }
        }
    }
}
