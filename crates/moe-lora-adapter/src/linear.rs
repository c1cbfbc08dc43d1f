//! LoRA of modules outside the experts: attention projections, dense layers.

use crate::index::{Index, Pair};
use crate::key::{LinearKey, Side, module_path, parse_linear};
use crate::load::numbers;
use crate::{AdapterConfig, OpenOptions};
use moe_lora_core::{Element, InputError, Lora, Matrix};
use moe_lora_files::{SafetensorsFile, TensorInfo};
use std::collections::{BTreeMap, HashSet};

/// What an adapter changes outside the experts.
#[derive(Debug, Clone, Default)]
pub struct LinearAdapters {
    loras: BTreeMap<usize, BTreeMap<String, Lora>>,
    left: Vec<String>,
}

impl LinearAdapters {
    /// The change of a module of a decoder layer, `self_attn.q_proj` for instance.
    #[must_use]
    pub fn get(&self, layer: usize, module: &str) -> Option<&Lora> {
        self.loras.get(&layer)?.get(module)
    }

    /// Names of tensors outside the experts that the caller does not apply: a model that ignores them computes something
    /// else than was trained.
    #[must_use]
    pub fn left(&self) -> &[String] {
        &self.left
    }

    /// Whether nothing is changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.loras.is_empty()
    }

    /// Bytes of all matrices.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        let loras = self.loras.values().flat_map(BTreeMap::values);
        loras.map(|lora| lora.a().size_bytes() + lora.b().size_bytes()).sum()
    }
}

/// Loads every module that `shape_of` knows.
pub(crate) fn resolve<T: Element>(
    (file, config, index): (&SafetensorsFile, &AdapterConfig, &Index),
    options: &OpenOptions,
    shape_of: impl Fn(usize, &str) -> Option<[usize; 2]>,
) -> Result<LinearAdapters, InputError> {
    let mut all = LinearAdapters::default();
    let mut pairs: BTreeMap<(usize, &str), Pair> = BTreeMap::new();
    let outside: HashSet<&str> = index.unused.iter().map(String::as_str).collect();
    for (place, tensor) in file.tensors().iter().enumerate().filter(|(_, t)| outside.contains(&*t.name)) {
        let key = parse_linear(&tensor.name).filter(|key| shape_of(key.layer, key.module).is_some());
        let Some(LinearKey { layer, module, side }) = key else {
            all.left.push(tensor.name.to_string());
            continue;
        };
        let pair = pairs.entry((layer, module)).or_default();
        let slot = match side {
            Side::A => &mut pair.a,
            Side::B => &mut pair.b,
        };
        if let Some(first) = slot.replace(place).and_then(|first| file.tensors().get(first)) {
            let expected = format!("it once, as {}", first.name);
            return Err(InputError::new("the same tensor twice", expected).in_tensor(&*tensor.name));
        }
    }
    for ((layer, module), pair) in pairs {
        let [out, inner] = shape_of(layer, module).unwrap_or_default();
        let at = |place: Option<usize>| file.tensors().get(place?);
        let (a, b) = match (at(pair.a), at(pair.b)) {
            (Some(a), Some(b)) => (a, b),
            (a, b) => {
                let (found, missing) = if a.is_some() { ("A", "B") } else { ("B", "A") };
                let name = a.or(b).map_or("", |t| &*t.name);
                return Err(InputError::new(format!("{found} without {missing}"), "both").in_tensor(name));
            }
        };
        let path = module_path(&a.name);
        let rank = config.rank(path);
        if rank > options.max_rank {
            let expected = format!("at most {}", options.max_rank);
            return Err(InputError::new(format!("rank {rank}"), expected).in_tensor(&*a.name));
        }
        let read = |tensor: &TensorInfo, rows: usize, cols: usize| {
            if *tensor.shape != [rows, cols] {
                let expected = format!("[{rows}, {cols}] (rank {rank} by adapter_config.json)");
                return Err(InputError::new(format!("{:?}", tensor.shape), expected).in_tensor(&*tensor.name));
            }
            let values = numbers::<T>(file, tensor, |_| format!("layer {layer} {module}"))?;
            Matrix::from_vec(values, rows, cols)
        };
        let lora = Lora::new(read(a, rank, inner)?, read(b, out, rank)?, config.scale(path)?)?;
        all.loras.entry(layer).or_default().insert(module.to_owned(), lora);
    }
    Ok(all)
}
