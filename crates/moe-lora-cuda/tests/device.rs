//! Memory, events and errors of the device, on a GPU.

use moe_lora_cuda::{GpuError, testing};

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
