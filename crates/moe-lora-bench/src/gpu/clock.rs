//! How a forward is timed, and what the card can do at most.

use super::launch::{self, Product};
use anyhow::Result;
use moe_lora_bench::Ceilings;
use moe_lora_cuda::{DeviceBuffer, Gpu, Stream};

const FLUSH_BYTES: usize = 256 << 20;
/// Timed runs of a forward; the median counts.
const RUNS: usize = 20;
/// What the read bandwidth is measured on, and how often.
const READ_BYTES: usize = 4 << 30;
const READ_RUNS: usize = 10;
const PRODUCT_RUNS: usize = 20;

/// Times work between two events, with a cold and clean L2: before each run 256 MB are written, then another 256 MB read, so
/// that no dirty line is written back within the time.
pub(super) struct Clock {
    written: DeviceBuffer,
    read: DeviceBuffer,
    sink: DeviceBuffer,
}

impl Clock {
    pub(super) fn new(gpu: &Gpu, stream: &Stream) -> Result<Self> {
        let read = gpu.alloc(FLUSH_BYTES)?;
        stream.fill(&read, 0, FLUSH_BYTES, 0)?;
        Ok(Self { written: gpu.alloc(FLUSH_BYTES)?, read, sink: gpu.alloc(4)? })
    }

    /// The median of 20 runs, in microseconds.
    pub(super) fn median(&self, gpu: &Gpu, stream: &Stream, work: impl FnMut() -> Result<()>) -> Result<f64> {
        self.median_after(gpu, stream, || Ok(()), work)
    }

    /// The same, each run behind other work, which does not count.
    pub(super) fn median_after(
        &self,
        gpu: &Gpu,
        stream: &Stream,
        mut before: impl FnMut() -> Result<()>,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<f64> {
        let mut times = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            stream.fill(&self.written, 0, FLUSH_BYTES, 0)?;
            launch::read(gpu, stream, &self.read, &self.sink)?;
            before()?;
            let begin = stream.record(true)?;
            work()?;
            let end = stream.record(true)?;
            times.push(begin.microseconds_to(&end)?);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[RUNS / 2])
    }

    /// Measures the card.
    pub(super) fn ceilings(&self, gpu: &Gpu, stream: &Stream) -> Result<Ceilings> {
        Ok(Ceilings { read_tb_s: self.read_bandwidth(gpu, stream)?, peak_tflop_s: peak(gpu, stream)? })
    }

    /// Terabytes a second of a read of 4 GB in order.
    fn read_bandwidth(&self, gpu: &Gpu, stream: &Stream) -> Result<f64> {
        let memory = gpu.alloc(READ_BYTES)?;
        stream.fill(&memory, 0, READ_BYTES, 0)?;
        let us = mean(stream, READ_RUNS, || launch::read(gpu, stream, &memory, &self.sink))?;
        Ok(READ_BYTES as f64 / us * 1e-6)
    }
}

/// Teraflops a second of the main loop of an 8192 x 8192 x 8192 product of noise.
fn peak(gpu: &Gpu, stream: &Stream) -> Result<f64> {
    let product = Product::new(gpu, stream)?;
    let us = mean(stream, PRODUCT_RUNS, || product.multiply(gpu, stream))?;
    Ok(Product::FLOPS / us * 1e-6)
}

/// Microseconds of one run among many without a pause, after three that do not count.
fn mean(stream: &Stream, runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..3 {
        work()?;
    }
    let begin = stream.record(true)?;
    for _ in 0..runs {
        work()?;
    }
    let end = stream.record(true)?;
    Ok(begin.microseconds_to(&end)? / runs as f64)
}
