//! All tensors of a checkpoint folder, in whichever shard they lie.

use crate::index::{Index, MAX_SHARDS};
use moe_lora_core::{Buffer, DType, InputError};
use moe_lora_files::{Dtype, SafetensorsFile, TensorInfo, contained_path, read_json};
use std::path::{Path, PathBuf};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// The shards of a checkpoint, each mapped once, and where each tensor is.
#[derive(Debug)]
pub(crate) struct Tensors {
    folder: PathBuf,
    shards: Vec<SafetensorsFile>,
    /// (shard, tensor in it), sorted by the tensor's name.
    order: Vec<(u32, u32)>,
}

impl Tensors {
    /// Reads the index and the header of every shard. Data is mapped, which reads none of it.
    pub(crate) fn open(folder: &Path) -> Result<Self, InputError> {
        let index_path = folder.join(INDEX);
        if !exists(&index_path) {
            return Self::from_shards(folder, &unindexed_shards(folder)?);
        }
        let index: Index = read_json(&index_path)?;
        let paths = index.shards().iter().map(|name| contained_path(folder, name));
        let paths: Vec<PathBuf> =
            paths.collect::<Result<_, _>>().map_err(|e| InputError { file: Some(index_path.clone()), ..e })?;
        let tensors = Self::from_shards(folder, &paths)?;
        for (name, shard) in index.entries() {
            if tensors.shards.get(shard).is_none_or(|s| s.get(name).is_none()) {
                let file = index.shards().get(shard).map_or("", String::as_str);
                let found = format!("{file}, which lacks the tensor");
                return Err(InputError::new(found, "a file that holds it").in_tensor(name).in_file(index_path));
            }
        }
        Ok(tensors)
    }

    fn from_shards(folder: &Path, paths: &[PathBuf]) -> Result<Self, InputError> {
        let shards: Vec<_> =
            paths.iter().map(|p| SafetensorsFile::open(p)?.map()).collect::<Result<_, InputError>>()?;
        let mut order = Vec::with_capacity(shards.iter().map(|s| s.tensors().len()).sum());
        for (shard, file) in shards.iter().enumerate() {
            order.extend((0..file.tensors().len()).map(|tensor| (shard as u32, tensor as u32)));
        }
        let mut tensors = Self { folder: folder.to_owned(), shards, order: Vec::new() };
        order.sort_unstable_by(|&a, &b| tensors.name(a).cmp(tensors.name(b)));
        let twins = order.windows(2).find(|w| tensors.name(w[0]) == tensors.name(w[1]));
        if let Some(&[a, b]) = twins {
            let path = |at: (u32, u32)| tensors.shards.get(at.0 as usize).map_or(folder, |s| s.path());
            let found = format!("it in {} also", path(a).display());
            return Err(InputError::new(found, "each tensor in one file").in_tensor(tensors.name(a)).in_file(path(b)));
        }
        tensors.order = order;
        Ok(tensors)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn at(&self, (shard, tensor): (u32, u32)) -> Option<Tensor<'_>> {
        let file = self.shards.get(shard as usize)?;
        Some(Tensor { file, info: file.tensors().get(tensor as usize)? })
    }

    fn name(&self, at: (u32, u32)) -> &str {
        self.at(at).map_or("", |t| t.name())
    }

    /// All tensors whose names start so, sorted by name.
    pub(crate) fn with_prefix(&self, prefix: &str) -> impl Iterator<Item = Tensor<'_>> {
        let start = self.order.partition_point(|&at| self.name(at) < prefix);
        let rest = self.order.get(start..).unwrap_or_default();
        rest.iter().filter_map(|&at| self.at(at)).take_while(move |t| t.name().starts_with(prefix))
    }

    pub(crate) fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.with_prefix(name).next().filter(|t| t.name() == name)
    }

    /// A tensor that has to be there.
    pub(crate) fn require(&self, name: &str) -> Result<Tensor<'_>, InputError> {
        let missing = || InputError::new("no such tensor", "it in one of the safetensors files");
        self.get(name).ok_or_else(|| missing().in_tensor(name).in_file(&self.folder))
    }
}

/// `model.safetensors`, or else every safetensors file of the folder, by name.
fn unindexed_shards(folder: &Path) -> Result<Vec<PathBuf>, InputError> {
    let single = folder.join(SINGLE);
    if exists(&single) {
        return Ok(vec![single]);
    }
    let unreadable = |e: std::io::Error| InputError::new(e.to_string(), "a readable folder").in_file(folder);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            paths.push(path);
        }
    }
    if paths.is_empty() || paths.len() > MAX_SHARDS {
        let expected = format!("{SINGLE}, or 1 to {MAX_SHARDS} other ones");
        return Err(InputError::new(format!("{} safetensors files", paths.len()), expected).in_file(folder));
    }
    paths.sort_unstable();
    Ok(paths)
}

/// Whether there is anything of that name, be it a link to nowhere: what is there but broken is an error, not absent.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// One tensor and the file it lies in.
#[derive(Clone, Copy)]
pub(crate) struct Tensor<'a> {
    file: &'a SafetensorsFile,
    info: &'a TensorInfo,
}

impl<'a> Tensor<'a> {
    pub(crate) fn name(&self) -> &'a str {
        &self.info.name
    }

    /// Names this tensor and its file.
    pub(crate) fn wrong(&self, found: impl Into<String>, expected: impl Into<String>) -> InputError {
        InputError::new(found, expected).in_tensor(self.name()).in_file(self.file.path())
    }

    /// Checks the sizes; `meaning` says what they are.
    pub(crate) fn expect_shape(&self, want: &[usize], meaning: &str) -> Result<(), InputError> {
        if *self.info.shape == *want {
            return Ok(());
        }
        Err(self.wrong(format!("{:?}", self.info.shape), format!("{want:?} ({meaning} by config.json)")))
    }

    /// The number format, if it is one that layers compute in.
    pub(crate) fn dtype(&self) -> Result<DType, InputError> {
        match self.info.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::Bf16),
            other => Err(self.wrong(
                format!("{other:?} numbers"),
                "F32, F16 or BF16 (quantised checkpoints have to be dequantised first)",
            )),
        }
    }

    /// The mapped bytes and the tensor's place in them.
    pub(crate) fn mapped(&self) -> Result<(&'a Buffer, usize), InputError> {
        self.file.buffer(self.info).ok_or_else(|| self.wrong("a file that is not mapped", "a mapped file"))
    }

    /// The tensor's bytes in the map.
    pub(crate) fn bytes(&self) -> Result<&'a [u8], InputError> {
        let (buffer, offset) = self.mapped()?;
        let bytes = buffer.bytes().get(offset..offset + self.info.range.len());
        bytes.ok_or_else(|| self.wrong("a place outside its file", "a place inside"))
    }
}
