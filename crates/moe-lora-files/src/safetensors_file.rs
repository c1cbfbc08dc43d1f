//! One safetensors file: header in memory, data wherever it is.

use crate::header::{self, MAX_HEADER_BYTES, TensorInfo};
use crate::map;
use moe_lora_core::{Buffer, InputError};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A safetensors file whose header was checked.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    tensors: Vec<TensorInfo>,
    data_start: usize,
    data: Data,
}

#[derive(Debug)]
enum Data {
    File(Mutex<File>),
    Shared(Buffer),
}

impl SafetensorsFile {
    /// Opens a file and checks its header; data is read tensor by tensor with [`read`](Self::read).
    ///
    /// # Errors
    /// If the file cannot be read or its header is not valid: sizes, offsets, gaps, overlaps, duplicate names.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, InputError> {
        let path = path.as_ref();
        Self::open_inner(path).map_err(|e| e.in_file(path))
    }

    fn open_inner(path: &Path) -> Result<Self, InputError> {
        let unreadable = |e: std::io::Error| InputError::new(e.to_string(), "a readable file");
        let mut file = File::open(path).map_err(unreadable)?;
        let meta = file.metadata().map_err(unreadable)?;
        if !meta.is_file() {
            return Err(InputError::new("something that is not a file", "a safetensors file"));
        }
        let length = usize::try_from(meta.len()).unwrap_or(usize::MAX);
        let mut prefix = Vec::with_capacity(8);
        file.by_ref().take(8).read_to_end(&mut prefix).map_err(unreadable)?;
        let header_bytes = header_size(&prefix, length)?;
        let mut json = Vec::with_capacity(header_bytes);
        file.by_ref().take(header_bytes as u64).read_to_end(&mut json).map_err(unreadable)?;
        let data_start = 8 + header_bytes;
        let tensors = header::parse(&json, length - data_start)?;
        Ok(Self { path: path.to_owned(), tensors, data_start, data: Data::File(Mutex::new(file)) })
    }

    /// Takes a file's content; `name` stands for its path in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<Self, InputError> {
        let path = name.into();
        let parsed = header_size(&bytes, bytes.len()).and_then(|header_bytes| {
            let data_start = 8 + header_bytes;
            Ok((data_start, header::parse(&bytes[8..data_start], bytes.len() - data_start)?))
        });
        let (data_start, tensors) = parsed.map_err(|e| e.in_file(&path))?;
        Ok(Self { path, tensors, data_start, data: Data::Shared(Buffer::from_bytes(bytes)) })
    }

    /// Maps the data, so that [`buffer`](Self::buffer) hands out tensors without a copy. The file must not be
    /// truncated while mapped; checkpoints are not.
    ///
    /// # Errors
    /// If the system cannot map the file, or it changed its length since it was opened.
    pub fn map(mut self) -> Result<Self, InputError> {
        if let Data::File(file) = &self.data {
            let guard = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let bytes = map::map(&guard).map_err(|e| InputError::new(e.to_string(), "a file that can be mapped"));
            let bytes = bytes.map_err(|e| e.in_file(&self.path))?;
            let end = self.data_start + self.tensors.iter().map(|t| t.range.end).max().unwrap_or(0);
            if bytes.len() != end {
                let found = format!("{} bytes", bytes.len());
                return Err(InputError::new(found, format!("{end} bytes, as when opened")).in_file(&self.path));
            }
            drop(guard);
            self.data = Data::Shared(Buffer::from_bytes(bytes));
        }
        Ok(self)
    }

    /// The path, or the name that stands for it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, sorted by name.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// One tensor's entry.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        let index = self.tensors.binary_search_by(|t| (*t.name).cmp(name)).ok()?;
        self.tensors.get(index)
    }

    /// The mapped data and a tensor's place in it; `None` if the file is not mapped.
    #[must_use]
    pub fn buffer(&self, tensor: &TensorInfo) -> Option<(&Buffer, usize)> {
        match &self.data {
            Data::Shared(buffer) => Some((buffer, self.data_start + tensor.range.start)),
            Data::File(_) => None,
        }
    }

    /// A tensor's bytes, copied.
    ///
    /// # Errors
    /// If the file cannot be read any more.
    pub fn read(&self, tensor: &TensorInfo) -> Result<Vec<u8>, InputError> {
        let start = self.data_start + tensor.range.start;
        let length = tensor.range.len();
        match &self.data {
            Data::Shared(buffer) => Ok(buffer.bytes()[start..start + length].to_vec()),
            Data::File(file) => {
                let mut file = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let mut bytes = Vec::with_capacity(length);
                file.seek(SeekFrom::Start(start as u64))
                    .and_then(|_| file.by_ref().take(length as u64).read_to_end(&mut bytes))
                    .map_err(|e| InputError::new(e.to_string(), "readable data"))
                    .and_then(|read| {
                        let short = || InputError::new(format!("{read} bytes"), format!("{length} bytes"));
                        if read == length { Ok(()) } else { Err(short()) }
                    })
                    .map_err(|e| e.in_tensor(&*tensor.name).in_file(&self.path))?;
                Ok(bytes)
            }
        }
    }
}

/// Reads the 8-byte length prefix and checks it against the file's length.
fn header_size(prefix: &[u8], length: usize) -> Result<usize, InputError> {
    let Some(prefix) = prefix.first_chunk::<8>().filter(|_| length >= 8) else {
        return Err(InputError::new(format!("{length} bytes"), "a safetensors file of at least 8 bytes"));
    };
    let declared = u64::from_le_bytes(*prefix);
    match usize::try_from(declared) {
        Ok(size) if size <= MAX_HEADER_BYTES && size <= length - 8 => Ok(size),
        _ => Err(InputError::new(
            format!("a header of {declared} bytes in a file of {length}"),
            format!("a header within the file, at most {MAX_HEADER_BYTES} bytes"),
        )),
    }
}
