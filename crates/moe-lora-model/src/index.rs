//! `model.safetensors.index.json`: which shard holds which tensor.

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

/// Checkpoints of more files are refused.
pub(crate) const MAX_SHARDS: usize = 10_000;

/// The index, in memory of about the file's size however hostile it is: names lie in one string.
#[derive(Debug, Default)]
pub(crate) struct Index {
    shards: Vec<String>,
    names: String,
    /// End of the name in `names`, and the shard.
    entries: Vec<(u32, u32)>,
}

impl Index {
    /// File names of the shards, in the order of their first mention.
    pub(crate) fn shards(&self) -> &[String] {
        &self.shards
    }

    /// Every tensor with the number of its shard.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, usize)> {
        let mut start = 0;
        self.entries.iter().map(move |&(end, shard)| {
            let name = self.names.get(start..end as usize).unwrap_or_default();
            start = end as usize;
            (name, shard as usize)
        })
    }
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Other fields (`metadata`) are skipped without being stored.
        #[derive(serde::Deserialize)]
        struct File {
            weight_map: WeightMap,
        }
        let File { weight_map: WeightMap(index) } = File::deserialize(deserializer)?;
        Ok(index)
    }
}

struct WeightMap(Index);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(WeightMapVisitor).map(Self)
    }
}

struct WeightMapVisitor;

impl<'de> Visitor<'de> for WeightMapVisitor {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to file names")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Index, M::Error> {
        let mut index = Index::default();
        let mut numbers = HashMap::new();
        while let Some((Text(name), Text(file))) = map.next_entry()? {
            let shard = match numbers.get(&*file) {
                Some(&shard) => shard,
                None if index.shards.len() == MAX_SHARDS => {
                    return Err(M::Error::custom(format!("more than {MAX_SHARDS} files")));
                }
                None => {
                    let shard = index.shards.len() as u32;
                    index.shards.push(file.clone().into_owned());
                    numbers.insert(file.into_owned(), shard);
                    shard
                }
            };
            index.names.push_str(&name);
            let end = u32::try_from(index.names.len()).map_err(|_| M::Error::custom("names of 4 GiB"))?;
            index.entries.push((end, shard));
        }
        Ok(index)
    }
}

/// A string, borrowed from the text where that is possible.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
