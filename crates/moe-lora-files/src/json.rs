//! Configuration files.

use moe_lora_core::InputError;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// JSON files beyond this many bytes are refused. The largest index in the field (DeepSeek-V3) has 9 MB.
pub const MAX_JSON_BYTES: u64 = 64 << 20;

/// Reads a JSON file into a typed value.
///
/// # Errors
/// If the file cannot be read, is too large, or is not what `T` expects.
pub fn read_json<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<T, InputError> {
    let path = path.as_ref();
    let unreadable = |e: std::io::Error| InputError::new(e.to_string(), "a readable JSON file").in_file(path);
    let mut text = Vec::new();
    File::open(path).and_then(|f| f.take(MAX_JSON_BYTES + 1).read_to_end(&mut text)).map_err(unreadable)?;
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(InputError::new("a larger file", format!("at most {MAX_JSON_BYTES} bytes")).in_file(path));
    }
    serde_json::from_slice(&text).map_err(|e| InputError::new(e.to_string(), "valid JSON").in_file(path))
}
