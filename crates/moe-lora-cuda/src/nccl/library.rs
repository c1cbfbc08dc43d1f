//! NCCL's shared library: where it may lie, and its functions.

use super::{NcclError, NcclId};
use libloading::Library;
use std::error::Error;
use std::ffi::{c_char, c_int, c_void};
use std::path::{Path, PathBuf};

pub(super) type RawComm = *mut c_void;

/// `ncclFloat32`, `ncclSum` and `ncclInProgress`.
pub(super) const FLOAT32: c_int = 7;
pub(super) const SUM: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;

/// The functions used, as `nccl.h` declares them.
pub(super) struct Api {
    pub(super) get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    pub(super) get_unique_id: unsafe extern "C" fn(*mut NcclId) -> c_int,
    pub(super) comm_init_rank: unsafe extern "C" fn(*mut RawComm, c_int, NcclId, c_int) -> c_int,
    pub(super) comm_abort: unsafe extern "C" fn(RawComm) -> c_int,
    pub(super) comm_get_async_error: unsafe extern "C" fn(RawComm, *mut c_int) -> c_int,
    pub(super) get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    pub(super) all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int,
}

impl Api {
    /// Loads the first library that is there; it stays loaded.
    pub(super) fn load() -> Result<Self, NcclError> {
        Self::load_first(&candidates())
    }

    fn load_first(paths: &[PathBuf]) -> Result<Self, NcclError> {
        let mut reasons = Vec::new();
        for path in paths {
            // SAFETY: NCCL runs no initialiser that needs anything of this process.
            let loaded = unsafe { Library::new(path) };
            match loaded.map_err(|e| e.source().map_or_else(|| e.to_string(), ToString::to_string)) {
                Ok(library) => return Self::find(library, path),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(NcclError::NotFound { reason: reasons.join("; ") })
    }

    fn find(library: Library, path: &Path) -> Result<Self, NcclError> {
        /// One function of the type that the field has.
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the field's type is what nccl.h declares for this name, since 2.4 or before.
                *unsafe { library.get($name.to_bytes()) }.map_err(|_| NcclError::NotFound {
                    reason: format!("{} lacks {}", path.display(), $name.to_string_lossy()),
                })?
            };
        }
        let api = Self {
            get_version: function!(c"ncclGetVersion"),
            get_unique_id: function!(c"ncclGetUniqueId"),
            comm_init_rank: function!(c"ncclCommInitRank"),
            comm_abort: function!(c"ncclCommAbort"),
            comm_get_async_error: function!(c"ncclCommGetAsyncError"),
            get_error_string: function!(c"ncclGetErrorString"),
            all_reduce: function!(c"ncclAllReduce"),
        };
        // The functions live as long as the program.
        std::mem::forget(library);
        Ok(api)
    }
}

/// `MOE_LORA_NCCL` alone if it is set; else by name, as the system's loader finds it, then where Python wheels and CUDA
/// packages put it.
fn candidates() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = variable("MOE_LORA_NCCL") {
        return vec![path];
    }
    let mut paths: Vec<PathBuf> = ["libnccl.so.2", "libnccl.so"].map(PathBuf::from).into();
    let fixed = ["/usr/local", "/usr"].map(PathBuf::from);
    for root in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(variable).chain(fixed) {
        paths.extend(wheels(&root));
    }
    for root in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).chain([PathBuf::from("/usr/local/cuda")]) {
        paths.extend(
            [root.join("lib64/libnccl.so.2"), root.join("lib/libnccl.so.2")].into_iter().filter(|p| p.exists()),
        );
    }
    paths
}

/// Libraries of the wheels `nvidia-nccl-cu*` in the Python installations under `root`.
fn wheels(root: &Path) -> Vec<PathBuf> {
    let versions = std::fs::read_dir(root.join("lib")).into_iter().flatten().flatten();
    let pythons = versions.filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"));
    let mut found: Vec<PathBuf> = pythons
        .flat_map(|python| {
            ["site-packages", "dist-packages"].map(|p| python.path().join(p).join("nvidia/nccl/lib/libnccl.so.2"))
        })
        .filter(|path| path.exists())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_what_was_tried() {
        let Err(error) = Api::load_first(&["libnccl-of-nobody.so.2".into(), "/nowhere/libnccl.so.2".into()]) else {
            panic!("there is no such library");
        };
        let text = error.to_string();
        assert!(text.starts_with("no NCCL library: ") && text.contains("libnccl-of-nobody.so.2"), "{text}");
        assert!(text.contains("/nowhere/libnccl.so.2"), "{text}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_library_without_the_functions_is_named() {
        let Err(error) = Api::load_first(&["libc.so.6".into()]) else { panic!("libc is no NCCL") };
        assert_eq!(error.to_string(), "no NCCL library: libc.so.6 lacks ncclGetVersion");
    }

    #[test]
    fn wheels_are_found_where_pip_puts_them() {
        let root = std::env::temp_dir().join(format!("moe-lora-nccl-{}", std::process::id()));
        let lib = root.join("lib/python3.12/site-packages/nvidia/nccl/lib");
        std::fs::create_dir_all(&lib).unwrap();
        assert!(wheels(&root).is_empty());
        std::fs::write(lib.join("libnccl.so.2"), "").unwrap();
        assert_eq!(wheels(&root), [lib.join("libnccl.so.2")]);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
