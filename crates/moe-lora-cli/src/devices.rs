//! `moe-lora devices`, and what `--device` means.

use crate::args::{DeviceChoice, Devices};
use crate::table::bytes;
use anyhow::{Context, Result};
use moe_lora::gemm::cpu::Kernel;
use moe_lora::pool::CudaMemory;
use moe_lora::{Device, LayerShape};
use moe_lora_cuda::{DeviceInfo, Gpu, GpuError};
use serde_json::json;

pub(crate) fn run(args: &Devices) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernels: Vec<String> = Kernel::available().map(|k| k.to_string()).collect();
    let images = images();
    let gpus = Gpu::probe().map(|list| list.iter().map(|gpu| (describe(gpu), why_not(gpu))).collect::<Vec<_>>());
    if args.json {
        let (list, reason) = match &gpus {
            Ok(list) => (&list[..], None),
            Err(reason) => (&[][..], Some(reason.to_string())),
        };
        let gpu =
            |(name, why): &(String, Option<String>)| json!({ "gpu": name, "usable": why.is_none(), "because": why });
        let list: Vec<_> = list.iter().map(gpu).collect();
        let facts = json!({
            "cpu": { "cores": cores, "kernels": kernels },
            "cuda_kernels": images,
            "gpus": list,
            "no_gpu_because": reason,
        });
        println!("{}", serde_json::to_string_pretty(&facts)?);
        return Ok(());
    }
    println!("cpu     {cores} cores, kernels: {}", kernels.join(", "));
    println!("cuda    kernels in this build: {}", images.as_deref().unwrap_or("none, it was made without nvcc"));
    match gpus {
        Ok(list) => list.iter().enumerate().for_each(|(n, (name, why))| {
            let usable = why.as_ref().map_or("usable".to_owned(), |why| format!("not usable: {why}"));
            println!("cuda:{n}  {name}; {usable}");
        }),
        Err(reason) => println!("cuda    not usable: {reason}"),
    }
    Ok(())
}

/// What the CUDA kernels were built for and with, if they were.
fn images() -> Option<String> {
    let line = |start: &str| moe_lora_kernels::manifest().lines().find_map(|l| l.strip_prefix(start));
    let archs: Vec<_> = line("archs ")?.split(' ').map(|arch| format!("sm_{arch}")).collect();
    Some(format!("{}, {}", archs.join(", "), line("nvcc ")?))
}

fn describe(gpu: &DeviceInfo) -> String {
    let ((major, minor), (cuda_major, cuda_minor)) = (gpu.compute_capability, gpu.driver_version);
    let memory = bytes(gpu.memory_bytes);
    format!("{}, sm_{major}{minor}, {memory}, driver for CUDA {cuda_major}.{cuda_minor}", gpu.name)
}

fn why_not(gpu: &DeviceInfo) -> Option<String> {
    Device::cuda(gpu.ordinal).err().map(|why| why.to_string())
}

/// The device behind `--device`, for layers of `shape`. Says on standard error why a GPU that is there is not taken.
pub(crate) fn choose(choice: DeviceChoice, shape: &LayerShape) -> Result<Device> {
    let why = match choice {
        DeviceChoice::Cpu => return Ok(Device::cpu()),
        DeviceChoice::Cuda(n) => return Device::cuda(n).with_context(|| format!("cuda:{n}")),
        DeviceChoice::Auto => match Device::cuda(0) {
            Ok(device) => match CudaMemory::check_shape(shape) {
                Ok(()) => return Ok(device),
                Err(why) => why.to_string(),
            },
            Err(GpuError::NoDriver { .. } | GpuError::NoDevice) => return Ok(Device::cpu()),
            Err(why) => why.to_string(),
        },
    };
    eprintln!("note: running on the CPU, as the GPU cannot be used: {why}");
    Ok(Device::cpu())
}
