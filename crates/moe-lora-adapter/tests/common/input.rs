//! How one run of bytes stands for a model, a configuration and a tensor file; the fuzz target reads it the same way.
#![allow(dead_code)] // the target only splits

use moe_lora_core::{DType, ExpertStorage, LayerShape, ModelShape};

/// Small models: one plain, one with H = 2I stored as gpt-oss is, one with H = I.
pub fn models() -> [ModelShape; 3] {
    let layer = |h, i| LayerShape::new(4, 2, h, i).unwrap_or_else(|e| unreachable!("{e}"));
    let plain = ModelShape::uniform(layer(8, 6), 2, DType::Bf16);
    let storage = ExpertStorage { transposed: true, interleaved: true };
    let gpt_oss = ModelShape { storage, ..ModelShape::uniform(layer(8, 4), 2, DType::F16) };
    [plain, gpt_oss, ModelShape::uniform(layer(8, 8), 2, DType::F32)]
}

/// `[model, config length as 2 bytes, config, tensor file]`.
pub fn split(input: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let (&[model, low, high], rest) = input.split_first_chunk::<3>()?;
    let (config, file) = rest.split_at_checked(usize::from(u16::from_le_bytes([low, high])))?;
    Some((usize::from(model) % 3, config, file))
}

/// The inverse of [`split`].
pub fn join(model: u8, config: &[u8], file: &[u8]) -> Vec<u8> {
    let length = u16::try_from(config.len()).unwrap_or(u16::MAX).to_le_bytes();
    [&[model, length[0], length[1]], config, file].concat()
}
