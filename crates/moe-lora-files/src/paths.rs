//! Paths that files name, and files that appear whole.

use moe_lora_core::InputError;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

/// Resolves the name of a shard inside `folder`: a relative path without `..`. Links inside the folder are followed, as
/// the Hugging Face cache is made of links.
///
/// # Errors
/// If the name would leave the folder.
pub fn contained_path(folder: &Path, name: &str) -> Result<PathBuf, InputError> {
    let relative = Path::new(name);
    let plain = relative.components().all(|c| matches!(c, Component::Normal(_)));
    if name.is_empty() || name.contains(['\0', '\\']) || !plain {
        return Err(InputError::new(format!("the file name {name:?}"), "a name inside the folder").in_file(folder));
    }
    Ok(folder.join(relative))
}

/// Writes a file beside its destination and renames it over: other readers see the old file or the new one.
///
/// # Errors
/// What the system says; the destination is untouched then.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::other("not a file name"))?;
    let mut beside = name.to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = path.with_file_name(beside);
    let done = File::create(&beside).and_then(|mut file| {
        write(&mut file)?;
        file.flush()?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    });
    if done.is_err() {
        std::fs::remove_file(&beside).ok();
    }
    done
}
