//! Finding and driving nvcc. Shared by this crate's build script and `cargo xtask kernels` through `#[path]`; std only.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, io};

/// The kernel families: one source file and one image each.
pub(crate) const FAMILIES: [&str; 15] = [
    "route",
    "shrink",
    "gate_up",
    "down",
    "combine",
    "measure",
    "peak",
    "prefill_shrink",
    "prefill_gate_up",
    "prefill_down",
    "cluster_route",
    "decode_route",
    "decode_gate_up",
    "decode_down",
    "decode_layer",
];

/// Families for Hopper alone: machine code for `sm_90a` and no PTX; empty images if that is not among the architectures.
pub(crate) const HOPPER: [&str; 8] = [
    "prefill_shrink",
    "prefill_gate_up",
    "prefill_down",
    "cluster_route",
    "decode_route",
    "decode_gate_up",
    "decode_down",
    "decode_layer",
];

/// Variables that decide what is built.
pub(crate) const VARIABLES: [&str; 4] = ["NVCC", "CUDA_HOME", "MOE_LORA_CUDA_ARCHS", "MOE_LORA_FATBIN_DIR"];

/// What ptxas said of one kernel on one architecture.
#[derive(Debug, Clone, Default)]
pub(crate) struct KernelReport {
    /// Family.
    pub(crate) family: String,
    /// Entry point.
    pub(crate) name: String,
    /// `sm_90a` and the like.
    pub(crate) arch: String,
    /// Registers of a thread.
    pub(crate) registers: u32,
    /// Bytes of static shared memory.
    pub(crate) shared: u32,
    /// Bytes of stack of a thread.
    pub(crate) stack: u32,
    /// Bytes stored to and loaded from spill slots.
    pub(crate) spills: u32,
}

/// Everything that one build made.
#[derive(Debug, Default)]
pub(crate) struct Build {
    /// Hash of all sources and options.
    pub(crate) source_hash: String,
    /// nvcc's version line.
    pub(crate) nvcc: String,
    /// One entry a kernel and architecture.
    pub(crate) kernels: Vec<KernelReport>,
}

impl Build {
    /// The manifest's text: one fact a line.
    pub(crate) fn manifest(&self) -> String {
        let mut text = format!("source {}\nnvcc {}\narchs {}\n", self.source_hash, self.nvcc, archs().join(" "));
        for k in &self.kernels {
            text += &format!(
                "kernel {} {} {} registers {} shared {} stack {} spills {}\n",
                k.family, k.name, k.arch, k.registers, k.shared, k.stack, k.spills
            );
        }
        text
    }
}

/// The nvcc to use: `NVCC`, `CUDA_HOME`, `PATH`, then the wheels in the workspace's `target/toolkit`.
pub(crate) fn find(workspace: &Path) -> Option<PathBuf> {
    let named = env::var_os("NVCC").map(PathBuf::from).filter(|p| p.is_file());
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|dir| dir.join("nvcc"));
    let wheel = toolkit(workspace).join("nvidia/cu13/bin/nvcc");
    named.or_else(|| home.into_iter().chain(on_path).chain([wheel]).find(|p| p.is_file()))
}

/// Where `cargo xtask toolkit` installs.
pub(crate) fn toolkit(workspace: &Path) -> PathBuf {
    workspace.join("target/toolkit")
}

/// Architectures of the machine code; PTX for `compute_80` always comes along.
pub(crate) fn archs() -> Vec<String> {
    let list = env::var("MOE_LORA_CUDA_ARCHS").unwrap_or_default();
    let list = if list.trim().is_empty() { "80;90a" } else { &list };
    list.split([';', ',', ' ']).filter(|a| !a.is_empty()).map(str::to_owned).collect()
}

/// A hash of every source below `cuda` and of the options (64-bit FNV-1a, hexadecimal).
pub(crate) fn source_hash(cuda: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    list(cuda, &mut files)?;
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for file in files {
        add(file.strip_prefix(cuda).unwrap_or(&file).to_string_lossy().replace('\\', "/").as_bytes());
        add(&fs::read(&file)?);
    }
    add(options(&archs(), true).join(" ").as_bytes());
    Ok(format!("{hash:016x}"))
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

fn options(archs: &[String], ptx: bool) -> Vec<String> {
    let fixed = "-fatbin -std=c++17 -O3 -DNDEBUG --compress-mode=size --threads 2 -Xptxas -v";
    let mut options: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    options.extend(archs.iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")));
    if ptx {
        options.push("-gencode=arch=compute_80,code=compute_80".to_owned());
    }
    options
}

/// Compiles every family of `cuda` into `<family>.fatbin` in `out`, a few at a time.
pub(crate) fn build(nvcc: &Path, cuda: &Path, out: &Path) -> Result<Build, String> {
    let version = Command::new(nvcc).arg("--version").output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let nvcc_version = version.lines().find(|l| l.contains("release")).unwrap_or("unknown").trim().to_owned();
    let source_hash = source_hash(cuda).map_err(|e| format!("{}: {e}", cuda.display()))?;
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2)).min(FAMILIES.len());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(family) = FAMILIES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = compile(nvcc, cuda, family, out);
                    if let Ok(mut results) = results.lock() {
                        results.push((*family, result));
                    }
                }
            });
        }
    });
    let mut results = results.into_inner().map_err(|_| "a compiler thread panicked".to_owned())?;
    results.sort_by_key(|(family, _)| FAMILIES.iter().position(|f| f == family));
    let mut kernels = Vec::new();
    for (_, result) in results {
        kernels.extend(result?);
    }
    Ok(Build { source_hash, nvcc: nvcc_version, kernels })
}

fn compile(nvcc: &Path, cuda: &Path, family: &str, out: &Path) -> Result<Vec<KernelReport>, String> {
    let hopper = HOPPER.contains(&family);
    let archs: Vec<String> = archs().into_iter().filter(|arch| !hopper || arch == "90a").collect();
    let image = out.join(format!("{family}.fatbin"));
    if archs.is_empty() && hopper {
        fs::write(&image, b"").map_err(|e| format!("{}: {e}", image.display()))?;
        return Ok(Vec::new());
    }
    let output = Command::new(nvcc)
        .args(options(&archs, !hopper))
        .arg("-I")
        .arg(cuda)
        .arg("-o")
        .arg(&image)
        .arg(cuda.join(format!("{family}.cu")))
        .output()
        .map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let log = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("nvcc failed on {family}.cu:\n{log}"));
    }
    Ok(parse(family, &log))
}

/// Reads what `ptxas -v` printed.
fn parse(family: &str, log: &str) -> Vec<KernelReport> {
    let mut reports: Vec<KernelReport> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut parts = rest.split('\'');
            let name = parts.next().unwrap_or_default().to_owned();
            let arch = parts.nth(1).unwrap_or_default().to_owned();
            reports.push(KernelReport { family: family.to_owned(), name, arch, ..KernelReport::default() });
        } else if let Some(report) = reports.last_mut() {
            let before = |what: &str| -> Option<u32> {
                line[..line.find(what)?].trim_end().rsplit(' ').next()?.trim().parse().ok()
            };
            report.registers = before(" registers").unwrap_or(report.registers);
            report.shared = before(" bytes smem").unwrap_or(report.shared);
            report.stack = before(" bytes stack frame").unwrap_or(report.stack);
            report.spills += before(" bytes spill stores").unwrap_or(0) + before(" bytes spill loads").unwrap_or(0);
        }
    }
    reports
}
