//! What the benchmark gives to the GPU: the only unsafe code of this crate.
#![allow(unsafe_code, reason = "kernels check nothing; why each launch is sound is said where it is")]

use anyhow::{Result, ensure};
use moe_lora_cuda::{DeviceBuffer, Gpu, Stream};
use moe_lora_kernels::{Format, NoiseParams, PeakParams, ReadParams};
use moe_lora_runner::RunnerError;
use moe_lora_runner::raw::{self, ForwardArgs, Path};

/// Rows of noise, zero from a column on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Noise {
    pub(super) format: Format,
    pub(super) count: usize,
    pub(super) width: usize,
    pub(super) filled: usize,
    pub(super) seed: u32,
    pub(super) deviation: f32,
}

impl Noise {
    /// Writes it to a buffer from byte `offset` on.
    pub(super) fn write(&self, gpu: &Gpu, stream: &Stream, to: &DeviceBuffer, offset: usize) -> Result<()> {
        ensure!(
            offset + 2 * self.count <= to.bytes() && offset.is_multiple_of(2) && self.width > 0,
            "{self:?} at {offset}"
        );
        let params = NoiseParams {
            out: to.address() + offset as u64,
            count: self.count as u64,
            width: self.width as u64,
            filled: self.filled as u64,
            seed: self.seed,
            deviation: self.deviation,
        };
        // SAFETY: `count` numbers of two bytes from `offset` on are in the buffer, as was just checked.
        unsafe { gpu.kernels().launch(stream, self.format, &params, params.launch(gpu.info().sm_count)) }?;
        Ok(())
    }
}

/// Reads all of a buffer and keeps nothing. `sink` has 4 bytes.
pub(super) fn read(gpu: &Gpu, stream: &Stream, from: &DeviceBuffer, sink: &DeviceBuffer) -> Result<()> {
    ensure!(from.bytes().is_multiple_of(16) && sink.bytes() >= 4, "a buffer of 16-byte parts");
    let params = ReadParams { from: from.address(), bytes: from.bytes() as u64, sink: sink.address() };
    // SAFETY: both addresses are of live buffers, as large as said.
    unsafe { gpu.kernels().launch(stream, Format::Bf16, &params, params.launch(gpu.info().sm_count)) }?;
    Ok(())
}

/// Operands of a product of 8192 x 8192 x 8192.
pub(super) struct Product {
    a: DeviceBuffer,
    b: DeviceBuffer,
    sink: DeviceBuffer,
}

impl Product {
    const SIZE: usize = 8192;
    /// Operations, a multiplication with its addition counted as two.
    pub(super) const FLOPS: f64 = 2.0 * (Self::SIZE * Self::SIZE * Self::SIZE) as f64;

    pub(super) fn new(gpu: &Gpu, stream: &Stream) -> Result<Self> {
        let random = |seed| -> Result<DeviceBuffer> {
            let count = Self::SIZE * Self::SIZE;
            let buffer = gpu.alloc(2 * count)?;
            let noise = Noise { format: Format::Bf16, count, width: count, filled: count, seed, deviation: 1.0 };
            noise.write(gpu, stream, &buffer, 0)?;
            Ok(buffer)
        };
        Ok(Self { a: random(1)?, b: random(2)?, sink: gpu.alloc(4)? })
    }

    /// Multiplies and keeps nothing.
    pub(super) fn multiply(&self, gpu: &Gpu, stream: &Stream) -> Result<()> {
        let params = PeakParams {
            a: self.a.address(),
            b: self.b.address(),
            sink: self.sink.address(),
            m_tiles: (Self::SIZE / 128) as u32,
            n_tiles: (Self::SIZE / 256) as u32,
            k_steps: (Self::SIZE / 64) as u32,
            reserved: 0,
        };
        let launch = params.launch(gpu.info().sm_count, gpu.info().shared_bytes_per_block);
        // SAFETY: both operands have 8192 x 8192 numbers of two bytes, the sink has four bytes.
        unsafe { gpu.kernels().launch(stream, Format::Bf16, &params, launch) }?;
        Ok(())
    }
}

/// One forward of a part with fully sharded adapters, or of any other, through the raw door.
///
/// # Safety
/// As [`raw::forward_exchanging`].
pub(super) unsafe fn forward_exchanging(
    gpu: &Gpu,
    args: &ForwardArgs,
    mut exchange: impl FnMut(usize, usize) -> Result<()>,
) -> Result<()> {
    let mut failed = Ok(());
    // SAFETY: the caller's promise.
    let launched = unsafe {
        raw::forward_exchanging(gpu, args, |offset, count| {
            failed = exchange(offset, count);
            Ok::<(), RunnerError>(())
        })
    };
    failed?;
    Ok(launched?)
}

/// One forward through the raw door, on a path or the fastest.
///
/// # Safety
/// As [`raw::forward_on`].
pub(super) unsafe fn forward(gpu: &Gpu, args: &ForwardArgs, path: Option<Path>) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { raw::forward_on(gpu, args, path) }?;
    Ok(())
}
