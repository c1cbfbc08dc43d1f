//! A case's adapters as the kernels take them.

use super::upload;
use bytemuck::{bytes_of, cast_slice};
use moe_lora_core::{Element, Projection};
use moe_lora_cuda::{DeviceBuffer, Gpu, GpuError, Stream};
use moe_lora_kernels::AdapterEntry;
use moe_lora_reference::random::Case;

/// All matrices of a case in one buffer, NaN between them, and the table of their places.
pub(super) fn adapters<T: Element>(
    gpu: &Gpu,
    stream: &Stream,
    case: &Case,
) -> Result<(DeviceBuffer, DeviceBuffer), GpuError> {
    let mut bytes: Vec<u8> = Vec::new();
    let mut places = Vec::new();
    for layer in &case.adapters {
        for expert in layer.experts() {
            for projection in Projection::ALL {
                let Some(lora) = expert.get(projection) else {
                    places.push(None);
                    continue;
                };
                let (rank, stored) = (lora.rank(), lora.rank().next_multiple_of(8));
                let mut a = lora.a().to_vec::<T>();
                a.resize(stored * lora.in_features(), T::from_f32(0.0));
                let mut b = vec![T::from_f32(0.0); lora.out_features() * stored];
                let rows = lora.b().to_vec::<T>();
                b.chunks_mut(stored).zip(rows.chunks(rank)).for_each(|(to, from)| to[..rank].copy_from_slice(from));
                let mut put = |values: &[T]| {
                    bytes.resize(bytes.len().next_multiple_of(16) + 16, 0xff);
                    let at = bytes.len();
                    bytes.extend_from_slice(cast_slice(values));
                    at
                };
                places.push(Some((put(&a), put(&b), rank as i32, lora.scale())));
            }
        }
    }
    bytes.extend_from_slice(bytes_of(&u64::MAX));
    let memory = upload(gpu, stream, &bytes)?;
    let entries: Vec<AdapterEntry> = places
        .into_iter()
        .map(|place| {
            place.map_or(AdapterEntry::default(), |(a, b, rank, scale)| AdapterEntry {
                a: memory.address() + a as u64,
                b: memory.address() + b as u64,
                rank,
                scale,
            })
        })
        .collect();
    let table = upload(gpu, stream, &entries)?;
    Ok((memory, table))
}
