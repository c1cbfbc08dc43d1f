//! Memory, events and errors of the device, on a GPU.

use half::bf16;
use moe_lora_cuda::{GpuError, testing};
use moe_lora_kernels::{Format, NoiseParams};

#[test]
fn copies_are_ordered_by_events() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("copies") else { return Ok(()) };
    let (compute, copy) = (gpu.stream()?, gpu.stream()?);
    let buffer = gpu.alloc(1 << 20)?;
    let mut pinned = gpu.alloc_pinned(1 << 20)?;
    pinned.as_mut_slice().iter_mut().enumerate().for_each(|(i, b)| *b = (i % 251) as u8);
    compute.fill(&buffer, 0, 1 << 20, 7)?;
    copy.wait(&compute.record(false)?)?;
    // SAFETY: the copy waits for the fill, the download for the copy; nothing touches the pinned bytes meanwhile.
    unsafe { copy.upload_async(&buffer, 256, &pinned, 0, 1000) }?;
    compute.wait(&copy.record(false)?)?;
    let mut found = vec![0_u8; 2000];
    compute.download(&buffer, 0, &mut found)?;
    assert!(found[..256].iter().chain(&found[1256..]).all(|&b| b == 7));
    assert_eq!(found[256..1256], pinned.as_slice()[..1000]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("bounds") else { return Ok(()) };
    let (stream, buffer) = (gpu.stream()?, gpu.alloc(16)?);
    let error = stream.upload(&buffer, 8, &[0_u32; 3]).unwrap_err();
    assert_eq!(error, GpuError::OutOfBounds { offset: 8, bytes: 12, size: 16 });
    assert!(matches!(gpu.alloc(1 << 50), Err(GpuError::OutOfMemory { .. })));
    let error = stream.capture(|| stream.synchronize());
    assert!(error.is_err(), "waiting cannot be captured");
    // The stream is usable afterwards.
    stream.upload(&buffer, 0, &[1_u32; 4])
}

#[test]
fn every_kernel_is_loaded_without_local_memory() {
    let Some(gpu) = testing::gpu("kernels") else { return };
    for kernel in moe_lora_kernels::Kernel::ALL {
        let Some(function) = gpu.kernels().function(kernel) else {
            assert!(kernel.family().hopper() && gpu.info().compute_capability != (9, 0), "{kernel:?}");
            continue;
        };
        assert_eq!(function.local_size_bytes().unwrap_or(-1), 0, "{kernel:?}");
    }
}

/// A captured fill and a captured kernel; the kernel alone makes the same noise again, which is what its parameters say.
#[test]
fn the_kernels_of_a_graph_run_alone() -> Result<(), GpuError> {
    let Some(gpu) = testing::gpu("kernels of a graph") else { return Ok(()) };
    let (stream, count) = (gpu.stream()?, 64 << 10);
    let buffer = gpu.alloc(2 * count)?;
    let mut both = Vec::new();
    for seed in [1, 2] {
        let (out, count) = (buffer.address(), count as u64);
        let params = NoiseParams { out, count, width: 16, filled: 12, seed, deviation: 0.5 };
        let graph = stream.capture(|| {
            stream.fill(&buffer, 0, buffer.bytes(), 0xff)?;
            // SAFETY: the buffer has `count` numbers of two bytes.
            unsafe { gpu.kernels().launch(&stream, Format::Bf16, &params, params.launch(gpu.info().sm_count)) }
        })?;
        assert_eq!(graph.num_launches()?, 2);
        let kernels = graph.kernels(&stream)?;
        assert_eq!(kernels.iter().map(|k| k.name()).collect::<Vec<_>>(), ["moe_lora_noise_bf16"]);
        graph.launch()?;
        let mut whole = vec![bf16::ZERO; count as usize];
        stream.download(&buffer, 0, &mut whole)?;
        stream.fill(&buffer, 0, buffer.bytes(), 0xff)?;
        kernels[0].launch()?;
        let mut alone = vec![bf16::ZERO; count as usize];
        stream.download(&buffer, 0, &mut alone)?;
        assert!(whole == alone && alone.chunks(16).all(|row| row[12..] == [bf16::ZERO; 4]));
        let noise: Vec<f64> = alone.chunks(16).flat_map(|row| &row[..12]).map(|v| f64::from(v.to_f32())).collect();
        let mean = noise.iter().sum::<f64>() / noise.len() as f64;
        let deviation = (noise.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / noise.len() as f64).sqrt();
        assert!(mean.abs() < 0.01 && (deviation - 0.5).abs() < 0.01, "{mean} {deviation}");
        both.push(alone);
    }
    let equal = both[0].iter().zip(&both[1]).filter(|(a, b)| a == b && **a != bf16::ZERO).count();
    assert!(equal < both[0].len() / 50, "{equal} numbers of two seeds are equal");
    Ok(())
}
