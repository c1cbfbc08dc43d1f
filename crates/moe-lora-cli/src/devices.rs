//! `moe-lora devices`, and what `--device` means.

use crate::args::{DeviceChoice, Devices};
use crate::table::bytes;
use anyhow::{Result, bail};
use moe_lora::Device;
use moe_lora::gemm::cpu::Kernel;
use moe_lora_cuda::{DeviceInfo, Gpu};
use serde_json::json;

pub(crate) fn run(args: &Devices) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernels: Vec<String> = Kernel::available().map(|k| k.to_string()).collect();
    let gpus = gpus();
    if args.json {
        let (list, reason) = match &gpus {
            Ok(list) => (list.clone(), None),
            Err(reason) => (Vec::new(), Some(reason)),
        };
        let cpu = json!({ "cores": cores, "kernels": kernels });
        println!("{}", serde_json::to_string_pretty(&json!({ "cpu": cpu, "gpus": list, "no_gpu_because": reason }))?);
        return Ok(());
    }
    println!("cpu     {cores} cores, kernels: {}", kernels.join(", "));
    match gpus {
        Ok(list) => list.iter().enumerate().for_each(|(n, gpu)| println!("cuda:{n}  {gpu}; {NO_BACKEND}")),
        Err(reason) => println!("cuda    not usable: {reason}"),
    }
    Ok(())
}

const NO_BACKEND: &str = "this version computes on the CPU only";

/// One line a GPU, or why there is none.
fn gpus() -> Result<Vec<String>, String> {
    let describe = |gpu: &DeviceInfo| {
        let ((major, minor), (cuda_major, cuda_minor)) = (gpu.compute_capability, gpu.driver_version);
        let memory = bytes(gpu.memory_bytes);
        format!("{}, sm_{major}{minor}, {memory}, driver for CUDA {cuda_major}.{cuda_minor}", gpu.name)
    };
    Gpu::probe().map(|gpus| gpus.iter().map(describe).collect()).map_err(|e| e.to_string())
}

/// The device behind `--device`.
pub(crate) fn choose(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Auto => Ok(Device::best()),
        DeviceChoice::Cpu => Ok(Device::cpu()),
        DeviceChoice::Cuda(n) => match gpus() {
            Ok(list) if n < list.len() => bail!("cuda:{n}: {NO_BACKEND}"),
            Ok(list) => bail!("cuda:{n}: there are {} GPUs", list.len()),
            Err(reason) => bail!("cuda:{n}: {reason}"),
        },
    }
}
