//! Typed access to the fields of a JSON object; every error names the field. `null` means absent.

use moe_lora_core::InputError;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// No size in a configuration may be larger.
const MOST: u64 = 1 << 20;

/// The fields of one JSON object.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Where the object lies in the file: empty, or `text_config.`.
    place: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) const fn new(map: &'a Map<String, Value>, place: &'static str) -> Self {
        Self { map, place }
    }

    /// The field's full name, as errors print it.
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.place)
    }

    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// Whether the field is there and `null`.
    pub(crate) fn is_null(&self, field: &str) -> bool {
        self.map.get(field).is_some_and(Value::is_null)
    }

    /// An error about a field that is there.
    pub(crate) fn wrong(&self, field: &str, expected: impl Into<String>) -> InputError {
        let found = self.get(field).map_or_else(|| "nothing".to_owned(), brief);
        InputError::new(found, expected).in_tensor(self.name(field))
    }

    fn typed<T>(
        &self,
        field: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, InputError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(field, expected))
    }

    /// A whole number of at most 2^20.
    pub(crate) fn size(&self, field: &str) -> Result<Option<usize>, InputError> {
        let whole = |v: &Value| v.as_u64().filter(|&n| n <= MOST).and_then(|n| usize::try_from(n).ok());
        self.typed(field, "a whole number from 0 to 1048576", whole)
    }

    /// A number that is finite in f32.
    pub(crate) fn number(&self, field: &str) -> Result<Option<f32>, InputError> {
        let finite = |v: &Value| v.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
        self.typed(field, "a finite number", finite)
    }

    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>, InputError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    pub(crate) fn text(&self, field: &str) -> Result<Option<&'a str>, InputError> {
        self.typed(field, "a string", Value::as_str)
    }

    /// Like [`text`](Self::text), of one value: anything else means a model that this family's code does not compute.
    pub(crate) fn only(&self, field: &str, value: &str) -> Result<(), InputError> {
        match self.text(field)? {
            Some(found) if found != value => Err(self.wrong(field, format!("{value:?}"))),
            _ => Ok(()),
        }
    }

    /// A list of layer indices.
    pub(crate) fn indices(&self, field: &str) -> Result<BTreeSet<u64>, InputError> {
        let list = |v: &Value| v.as_array()?.iter().map(Value::as_u64).collect();
        Ok(self.typed(field, "a list of layer indices", list)?.unwrap_or_default())
    }
}

/// A value as an error prints it: scalars whole, the rest by kind.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
        scalar => scalar.to_string(),
    }
}
