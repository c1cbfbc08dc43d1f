//! A checkpoint folder that tests take apart and put together again, through the `safetensors` crate.
#![allow(dead_code, reason = "each test file uses its share")]

use moe_lora_core::LayerShape;
use moe_lora_model::synthetic::{TinyModel, write_checkpoint};
use moe_lora_model::{Checkpoint, Family};
use safetensors::{Dtype, SafeTensors, serialize, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// dtype, shape, bytes.
pub(crate) type Raw = (Dtype, Vec<usize>, Vec<u8>);

pub(crate) struct Folder {
    dir: TempDir,
}

impl Folder {
    pub(crate) fn new(model: &TinyModel) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), model).unwrap();
        Self { dir }
    }

    pub(crate) fn of(family: Family) -> Self {
        Self::new(&TinyModel::new(family, LayerShape::new(4, 2, 8, 6).unwrap()))
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(crate) fn open(&self) -> Checkpoint {
        Checkpoint::open(self.path()).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The refusal's one line, without the folder.
    pub(crate) fn refusal(&self) -> String {
        let error = Checkpoint::open(self.path()).expect_err("a refusal");
        assert!(error.input().is_some(), "{error}");
        error.to_string().replace(&format!("{}/", self.path().display()), "")
    }

    pub(crate) fn edit_json(&self, name: &str, edit: impl FnOnce(&mut Value)) -> &Self {
        let mut value = serde_json::from_slice(&std::fs::read(self.file(name)).unwrap()).unwrap();
        edit(&mut value);
        std::fs::write(self.file(name), value.to_string()).unwrap();
        self
    }

    /// Sets a field of `config.json`, or removes it (`None`).
    pub(crate) fn config(&self, field: &str, value: impl Into<Option<Value>>) -> &Self {
        let value = value.into();
        self.edit_json("config.json", |config| {
            let fields = config.as_object_mut().unwrap();
            match value {
                Some(value) => fields.insert(field.to_owned(), value),
                None => fields.remove(field),
            };
        })
    }

    pub(crate) fn edit(&self, file: &str, edit: impl FnOnce(&mut BTreeMap<String, Raw>)) -> &Self {
        let mut tensors = read(&self.file(file));
        edit(&mut tensors);
        write(&self.file(file), &tensors);
        self
    }

    pub(crate) fn edit_model(&self, edit: impl FnOnce(&mut BTreeMap<String, Raw>)) -> &Self {
        self.edit("model.safetensors", edit)
    }
}

pub(crate) fn read(path: &Path) -> BTreeMap<String, Raw> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let raw = |t: TensorView<'_>| (t.dtype(), t.shape().to_vec(), t.data().to_vec());
    tensors.tensors().into_iter().map(|(n, t)| (n, raw(t))).collect()
}

pub(crate) fn write(path: &Path, tensors: &BTreeMap<String, Raw>) {
    let views = tensors.iter().map(|(n, (d, s, b))| (n, TensorView::new(*d, s.clone(), b).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// A file whose data starts at a multiple of 8 bytes, or one byte after.
pub(crate) fn write_unpadded(path: &Path, tensors: &BTreeMap<String, Raw>, aligned: bool) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in tensors {
        let entry =
            json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [data.len(), data.len() + bytes.len()]});
        header.insert(name.clone(), entry);
        data.extend_from_slice(bytes);
    }
    let mut header = Value::Object(header).to_string();
    while header.len() % 8 != usize::from(!aligned) {
        header.push(' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend(data);
    std::fs::write(path, file).unwrap();
}

/// Numbers of an f32 tensor.
pub(crate) fn floats((dtype, _, bytes): &Raw) -> Vec<f32> {
    assert_eq!(*dtype, Dtype::F32);
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}
