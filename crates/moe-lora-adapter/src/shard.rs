//! What the ranks of a parallel group keep of a layer that was read once.

use moe_lora_core::{AdapterLayer, Element, ExpertLora, InputError, LayerShape, Lora, Matrix, Projection, Shard};
use std::collections::HashMap;

/// The parts of a whole layer, in the order of `shards`. Several parts are views of what was read; one alone is copied out,
/// so that the rest of the layer can go.
pub(crate) fn parts<T: Element>(
    layer: AdapterLayer,
    shape: &LayerShape,
    shards: &[Shard],
) -> Result<Vec<AdapterLayer>, InputError> {
    match shards {
        [shard] if *shard == Shard::WHOLE => Ok(vec![layer]),
        [shard] => {
            let part = layer.shard(shape, shard)?;
            Ok(vec![dense::<T>(&part, &shard.share(shape)?.shape)?])
        }
        _ => shards.iter().map(|shard| layer.shard(shape, shard)).collect(),
    }
}

/// A copy of exactly its own numbers; what was one matrix stays one.
fn dense<T: Element>(layer: &AdapterLayer, shape: &LayerShape) -> Result<AdapterLayer, InputError> {
    let mut copies = HashMap::new();
    let mut copy = |matrix: &Matrix| {
        if let Some(copy) = copies.get(&matrix.storage_key()) {
            return Ok::<Matrix, InputError>(Matrix::clone(copy));
        }
        let copy = Matrix::from_vec(matrix.to_vec::<T>(), matrix.rows(), matrix.cols())?;
        copies.insert(matrix.storage_key(), copy.clone());
        Ok(copy)
    };
    let mut lora =
        |lora: Option<&Lora>| lora.map(|lora| lora.with_matrices(copy(lora.a())?, copy(lora.b())?)).transpose();
    let mut expert = |expert: &ExpertLora| -> Result<ExpertLora, InputError> {
        let [gate, up, down] = Projection::ALL.map(|p| lora(expert.get(p)));
        Ok(ExpertLora { gate: gate?, up: up?, down: down? })
    };
    AdapterLayer::new(shape, layer.experts().iter().map(&mut expert).collect::<Result<_, _>>()?)
}
