//! What a pool's budget buys: adapters in the same bytes, and hits under uneven traffic.

use fastrand::Rng;
use moe_lora::pool::{Eviction, HostMemory};
use moe_lora::{
    AdapterLayer, AdapterPool, AdapterWeights, DType, ExpertLora, InputError, LayerShape, Lora, Matrix, ModelShape,
    PoolConfig, PoolError, TokenAdapters,
};

/// Adapters of ranks 8, 16 and 64 in turns that fit into the bytes of `slots` slots, where every slot has room for the
/// largest rank, as in pools with whole slots.
#[must_use]
pub fn mixed_ranks_in(slots: usize) -> usize {
    let budget = 64 * slots;
    let mut used = 0;
    [8, 16, 64]
        .into_iter()
        .cycle()
        .take_while(|rank| {
            used += rank;
            used <= budget
        })
        .count()
}

/// What traffic met.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Traffic {
    /// Share of the requests whose adapter was in the pool.
    pub hits: f64,
    /// The same for a pool that always keeps those which are asked for most, which nobody knows in advance.
    pub best: f64,
}

/// Sends `requests` requests for `names` adapters of one size to a pool that holds `resident` of them. The n-th name is
/// asked for in proportion to `1 / n^exponent`.
///
/// # Errors
/// What the pool says.
pub fn zipf(
    eviction: Eviction,
    [names, resident]: [usize; 2],
    exponent: f64,
    requests: usize,
    seed: u64,
) -> Result<Traffic, PoolError> {
    let model = ModelShape::uniform(LayerShape::new(1, 1, 8, 8)?, 1, DType::F32);
    let adapter = tiny(&model)?;
    let bytes = adapter.size_bytes();
    let config = PoolConfig { bytes: resident * bytes, max_adapters: resident, eviction, ..PoolConfig::default() };
    let pool = AdapterPool::new(HostMemory, &model, config)?;
    let packed = pool.pack("any", &adapter)?;
    let mut sums: Vec<f64> = Vec::with_capacity(names);
    for n in 1..=names {
        sums.push(sums.last().unwrap_or(&0.0) + (n as f64).powf(-exponent));
    }
    let total = sums.last().copied().unwrap_or(1.0);
    let (mut rng, mut hits) = (Rng::with_seed(seed), 0);
    for _ in 0..requests {
        let at = rng.f64() * total;
        let name = sums.partition_point(|sum| *sum < at).to_string();
        let found = pool.find(&name);
        hits += usize::from(found.is_some());
        let id = found.map_or_else(|| pool.load_packed(&name, &packed), Ok)?;
        drop(pool.lease(&TokenAdapters::from_ids(&[Some(id)]))?);
    }
    let best = sums.get(resident.saturating_sub(1)).unwrap_or(&total) / total;
    Ok(Traffic { hits: hits as f64 / requests.max(1) as f64, best })
}

fn tiny(model: &ModelShape) -> Result<AdapterWeights, InputError> {
    let matrix = || Matrix::from_vec(vec![0.5_f32; 8], 1, 8);
    let b = Matrix::from_vec(vec![0.5_f32; 8], 8, 1)?;
    let expert = ExpertLora { down: Some(Lora::new(matrix()?, b, 1.0)?), ..Default::default() };
    AdapterWeights::new(model, [(0, AdapterLayer::new(&model.layer, vec![expert])?)].into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_ranks_hold_at_least_twice_the_adapters_of_whole_slots() {
        for slots in [8, 16, 64] {
            assert!(mixed_ranks_in(slots) >= 2 * slots, "{} in {slots}", mixed_ranks_in(slots));
        }
    }

    #[test]
    fn traffic_hits_what_it_used_last() {
        let even = zipf(Eviction::LeastRecent, [50, 10], 0.0, 20_000, 1).unwrap();
        assert!((even.hits - 0.2).abs() < 0.02 && (even.best - 0.2).abs() < 1e-9, "{even:?}");
        let steep = |eviction| zipf(eviction, [500, 16], 1.0, 40_000, 1).unwrap();
        let (recent, frequent) = (steep(Eviction::LeastRecent), steep(Eviction::LeastFrequent));
        assert!(
            recent.hits > 0.25 && recent.hits < frequent.hits && frequent.hits < recent.best,
            "{recent:?} {frequent:?}"
        );
    }
}
