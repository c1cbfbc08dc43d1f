//! Which tensor is what: names sorted into layers and pairs, and layers in which two key forms meet refused.

use crate::key::{self, ExpertKey, Naming, Side, Site, Target};
use moe_lora_core::InputError;
use moe_lora_files::{SafetensorsFile, TensorInfo};
use std::collections::BTreeMap;

/// The two tensors of a site, as places in the file's list.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pair {
    pub(crate) a: Option<usize>,
    pub(crate) b: Option<usize>,
}

impl Pair {
    pub(crate) fn side(&self, side: Side) -> Option<usize> {
        match side {
            Side::A => self.a,
            Side::B => self.b,
        }
    }
}

/// The expert tensors of one layer.
#[derive(Debug)]
pub(crate) struct Layer {
    /// Path of the module that holds the experts.
    pub(crate) module: String,
    pub(crate) sites: BTreeMap<Site, Pair>,
    each: Option<Naming>,
    packed: Option<Naming>,
}

impl Layer {
    /// The sites of single experts for one target, by expert.
    pub(crate) fn each(&self, target: Target) -> impl Iterator<Item = (usize, Pair)> {
        let range = Site::Each { target, expert: 0 }..=Site::Each { target, expert: usize::MAX };
        self.sites.range(range).filter_map(|(site, &pair)| match site {
            Site::Each { expert, .. } => Some((*expert, pair)),
            _ => None,
        })
    }

    pub(crate) fn packed(&self, target: Target) -> Option<Pair> {
        self.sites.get(&Site::Packed { target }).copied()
    }

    /// The pairs of `target_parameters`, in the order in which PEFT wrapped them: the deepest first.
    pub(crate) fn flat(&self) -> impl Iterator<Item = Pair> {
        self.sites.range(Site::Flat { depth: 0 }..).rev().map(|(_, &pair)| pair)
    }

    pub(crate) fn each_naming(&self) -> Option<Naming> {
        self.each
    }

    fn has(&self, target: Target) -> bool {
        self.packed(target).is_some() || self.each(target).next().is_some()
    }
}

/// All tensors of a file.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) layers: BTreeMap<usize, Layer>,
    /// Names that have nothing to do with experts.
    pub(crate) unused: Vec<String>,
    prefix: Option<String>,
}

impl Index {
    pub(crate) fn new(file: &SafetensorsFile) -> Result<Self, InputError> {
        let mut index = Self::default();
        let tensors = file.tensors();
        for (place, tensor) in tensors.iter().enumerate() {
            match key::parse(&tensor.name, tensor.shape.len())? {
                None => index.unused.push(tensor.name.to_string()),
                Some(key) => index.insert(&key, place, tensors)?,
            }
        }
        for (n, layer) in &index.layers {
            layer.check_forms(tensors).map_err(|(place, e)| {
                let name = place.and_then(|p| tensors.get(p)).map_or_else(String::new, |t| t.name.to_string());
                InputError::new(format!("layer {n}: {}", e.found), e.expected).in_tensor(name)
            })?;
        }
        Ok(index)
    }

    fn insert(&mut self, key: &ExpertKey<'_>, place: usize, tensors: &[TensorInfo]) -> Result<(), InputError> {
        let name = |place: usize| tensors.get(place).map_or("", |t| &*t.name);
        let refused = |found: String, expected: &str| Err(InputError::new(found, expected).in_tensor(name(place)));
        let prefix = self.prefix.get_or_insert_with(|| key.prefix.to_owned());
        if *prefix != key.prefix {
            let found = format!("experts under {:?} and {prefix:?}", key.prefix);
            return refused(found, "experts of one stack of layers");
        }
        let layer = self.layers.entry(key.layer).or_insert_with(|| Layer {
            module: key.module.to_owned(),
            sites: BTreeMap::new(),
            each: None,
            packed: None,
        });
        if layer.module != key.module {
            return refused(
                format!("layer {}: two key forms, under {} and {}", key.layer, layer.module, key.module),
                "one form for a layer",
            );
        }
        // An empty tensor stands for a part that was not trained.
        if tensors.get(place).is_some_and(|t| t.shape.contains(&0)) {
            return Ok(());
        }
        let naming = match key.site {
            Site::Each { .. } => layer.each.get_or_insert(key.naming),
            _ => layer.packed.get_or_insert(key.naming),
        };
        if *naming != key.naming {
            return refused(format!("layer {}: two key forms", key.layer), "one family of names for a layer");
        }
        let pair = layer.sites.entry(key.site).or_default();
        let side = match key.side {
            Side::A => &mut pair.a,
            Side::B => &mut pair.b,
        };
        match side.replace(place) {
            None => Ok(()),
            Some(first) => {
                refused(format!("layer {}: the same tensor twice", key.layer), &format!("it once, as {}", name(first)))
            }
        }
    }
}

impl Layer {
    fn check_forms(&self, tensors: &[TensorInfo]) -> Result<(), (Option<usize>, InputError)> {
        let first = self.sites.values().next().and_then(|p| p.a.or(p.b));
        let refused = |found: &str, expected: &str| Err((first, InputError::new(found, expected)));
        if self.has(Target::GateUp) && (self.has(Target::Gate) || self.has(Target::Up)) {
            return refused("gate_up and also gate or up", "either fused or separate");
        }
        let flat = self.sites.keys().any(|s| matches!(s, Site::Flat { .. }));
        if flat && self.sites.keys().any(|s| !matches!(s, Site::Flat { .. })) {
            return refused("two key forms, target_parameters and named projections", "one form for a layer");
        }
        if self.each.is_none() {
            return Ok(());
        }
        // The one mixture that occurs: a side that all experts share, stacked with expert dimension 1.
        for target in Target::ALL {
            for side in [Side::A, Side::B] {
                let Some(place) = self.packed(target).and_then(|p| p.side(side)) else { continue };
                let shared = tensors.get(place).is_some_and(|t| t.shape.len() == 3 && t.shape.first() == Some(&1));
                if !shared || self.each(target).any(|(_, pair)| pair.side(side).is_some()) {
                    let found = format!("two key forms for {target}, one tensor for all experts and one for each");
                    return Err((Some(place), InputError::new(found, "one form for a layer")));
                }
            }
        }
        Ok(())
    }
}
