//! The fields of a JSON object, each read for what it has to be.

use crate::pattern::Patterns;
use moe_lora_core::InputError;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

/// Objects of more fields are refused; PEFT writes about 40.
const MAX_FIELDS: usize = 1024;

/// Larger ranks are refused before the tensors are looked at.
const MAX_RANK: f64 = (1 << 20) as f64;

/// Reads an object's fields in their order, without looking into them.
pub(crate) fn read(text: &[u8]) -> Result<Vec<(String, &RawValue)>, InputError> {
    let valid = "a JSON object of an adapter's settings";
    let Pairs(fields) = serde_json::from_slice(text).map_err(|e| InputError::new(e.to_string(), valid))?;
    if fields.len() > MAX_FIELDS {
        return Err(InputError::new("too many fields", format!("at most {MAX_FIELDS}")));
    }
    let mut names = HashSet::new();
    match fields.iter().find(|(name, _)| !names.insert(name)) {
        Some((name, _)) => Err(InputError::new("the field twice", "unique fields").in_tensor(name)),
        None => Ok(fields),
    }
}

/// One field that is there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field<'a> {
    pub(crate) name: &'a str,
    text: &'a str,
}

impl<'a> Field<'a> {
    pub(crate) fn new(name: &'a str, value: &'a RawValue) -> Self {
        Self { name, text: value.get() }
    }

    /// Whether it is `null` or empty.
    pub(crate) fn is_absent(&self) -> bool {
        let empty = |open, close| {
            self.text.strip_prefix(open).and_then(|t| t.strip_suffix(close)).is_some_and(|t| t.trim().is_empty())
        };
        self.text == "null" || self.text == "\"\"" || empty('[', ']') || empty('{', '}')
    }

    pub(crate) fn is_false(&self) -> bool {
        self.text == "false"
    }

    /// The refusal of this value.
    pub(crate) fn refused(&self, expected: &str) -> InputError {
        let shown: String = self.text.chars().take(80).collect();
        InputError::new(shown, expected).in_tensor(self.name)
    }

    fn parse<T: DeserializeOwned>(&self, expected: &str) -> Result<T, InputError> {
        serde_json::from_str(self.text).map_err(|_| self.refused(expected))
    }

    pub(crate) fn string(&self) -> Result<String, InputError> {
        self.parse("a string")
    }

    pub(crate) fn strings(&self) -> Result<Vec<String>, InputError> {
        self.parse("a list of names")
    }

    pub(crate) fn boolean(&self) -> Result<bool, InputError> {
        self.parse("true or false")
    }

    pub(crate) fn number(&self) -> Result<f64, InputError> {
        self.parse("a number")
            .and_then(|n: f64| if n.is_finite() { Ok(n) } else { Err(self.refused("a finite number")) })
    }

    /// A whole number from 1 on; 8.0 is one too.
    pub(crate) fn rank(&self) -> Result<usize, InputError> {
        let rank = self.number()?;
        if is_rank(rank) { Ok(rank as usize) } else { Err(self.refused(&format!("a rank of 1 to {MAX_RANK}"))) }
    }

    pub(crate) fn ranks(&self) -> Result<Patterns, InputError> {
        let Pairs(ranks) = self.parse("an object of module names and ranks")?;
        match ranks.iter().find(|(_, rank)| !is_rank(*rank)) {
            Some((key, rank)) => {
                let found = format!("{rank} for {key:?}");
                Err(InputError::new(found, format!("ranks of 1 to {MAX_RANK}")).in_tensor(self.name))
            }
            None => Patterns::new(ranks).map_err(|e| e.in_tensor(self.name)),
        }
    }

    pub(crate) fn alphas(&self) -> Result<Patterns, InputError> {
        let Pairs(alphas) = self.parse("an object of module names and numbers")?;
        Patterns::new(alphas).map_err(|e| e.in_tensor(self.name))
    }

    pub(crate) fn must_be_false(&self, expected: &str) -> Result<(), InputError> {
        if self.is_false() { Ok(()) } else { Err(self.refused(expected)) }
    }

    /// `init_lora_weights`, if training with it left the base weights alone.
    pub(crate) fn initialisation(&self) -> Result<Option<String>, InputError> {
        if let Ok(bool) = self.boolean() {
            return Ok((!bool).then(|| "random".to_owned()));
        }
        let name = self.string()?;
        if ["gaussian", "orthogonal", "eva", "mica"].iter().any(|known| name.eq_ignore_ascii_case(known)) {
            return Ok(Some(name));
        }
        // pissa*, olora, corda, loftq and lora_ga do; an initialisation of tomorrow might.
        Err(self.refused("an initialisation that leaves the base weights unchanged: gaussian, orthogonal, eva or mica"))
    }
}

fn is_rank(rank: f64) -> bool {
    (1.0..=MAX_RANK).contains(&rank) && rank.fract() == 0.0
}

/// An object as a list, since the order of patterns matters.
struct Pairs<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for PairsVisitor<V> {
            type Value = Pairs<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Pairs<V>, M::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor(PhantomData))
    }
}
