//! The safetensors header: who is where, checked.
//!
//! Format: <https://github.com/huggingface/safetensors#format>. The `safetensors` crate's own parser keeps the last of
//! two equal keys and needs many times the header's size for hostile headers, so the header is read here, with the
//! crate's dtypes, and by the crate's rules: tensors follow each other without gap or overlap up to the file's end.

use moe_lora_core::InputError;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

/// Headers beyond this many bytes are refused.
pub const MAX_HEADER_BYTES: usize = 64 << 20;

/// Tensors of more dimensions than any expert weight could have are refused.
const MAX_DIMS: usize = 8;

/// One tensor's entry in the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: Box<str>,
    /// Its number format.
    pub dtype: Dtype,
    /// Its sizes, outermost first.
    pub shape: Box<[usize]>,
    /// Its bytes, counted from the end of the header.
    pub range: Range<usize>,
}

/// Parses and checks a header whose data is `data_bytes` long. The result is sorted by name.
pub(crate) fn parse(json: &[u8], data_bytes: usize) -> Result<Vec<TensorInfo>, InputError> {
    // One '{' opens the header and one each tensor; counting them sizes the list without regrowth.
    let capacity = json.iter().filter(|&&b| b == b'{').count().saturating_sub(1).min(json.len() / 40);
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let mut tensors = deserializer
        .deserialize_map(HeaderVisitor { capacity })
        .and_then(|tensors| deserializer.end().map(|()| tensors))
        .map_err(|e| InputError::new(format!("header: {e}"), "a safetensors header"))?;
    check_layout(&mut tensors, data_bytes)?;
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    if let Some(twins) = tensors.windows(2).find(|w| w[0].name == w[1].name) {
        return Err(InputError::new("the name twice", "unique tensor names").in_tensor(&*twins[0].name));
    }
    Ok(tensors)
}

fn check_layout(tensors: &mut [TensorInfo], data_bytes: usize) -> Result<(), InputError> {
    tensors.sort_unstable_by_key(|t| (t.range.start, t.range.end));
    let mut end = 0;
    for tensor in tensors.iter() {
        let bits = tensor.shape.iter().try_fold(tensor.dtype.bitsize(), |n, &d| n.checked_mul(d));
        let bytes = bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8);
        if bytes.is_none() || bytes != tensor.range.end.checked_sub(tensor.range.start) {
            return Err(InputError::new(
                format!("bytes {}..{}", tensor.range.start, tensor.range.end),
                format!("the size of {:?} {:?}", tensor.shape, tensor.dtype),
            )
            .in_tensor(&*tensor.name));
        }
        if tensor.range.start != end {
            return Err(InputError::new(
                format!("data from byte {}", tensor.range.start),
                format!("byte {end}, where the tensor before it ends"),
            )
            .in_tensor(&*tensor.name));
        }
        end = tensor.range.end;
    }
    if end != data_bytes {
        return Err(InputError::new(
            format!("{data_bytes} bytes of data"),
            format!("the {end} bytes that the header describes"),
        ));
    }
    Ok(())
}

struct HeaderVisitor {
    capacity: usize,
}

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Vec<TensorInfo>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to tensors")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut tensors = Vec::with_capacity(self.capacity);
        while let Some(Name(name)) = map.next_key()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let Entry { dtype, shape: Shape(shape), data_offsets: [start, end] } = map.next_value()?;
            tensors.push(TensorInfo { name: name.into(), dtype, shape, range: start..end });
        }
        Ok(tensors)
    }
}

/// A key, borrowed from the header unless it holds escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Shape,
    data_offsets: [usize; 2],
}

struct Shape(Box<[usize]>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {MAX_DIMS} dimensions")
            }
            fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Shape, S::Error> {
                let mut dims = [0; MAX_DIMS];
                let mut rank = 0;
                while let Some(dim) = seq.next_element()? {
                    *dims.get_mut(rank).ok_or_else(|| S::Error::invalid_length(rank + 1, &self))? = dim;
                    rank += 1;
                }
                Ok(Shape(dims[..rank].into()))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}
