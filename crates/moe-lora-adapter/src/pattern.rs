//! `rank_pattern` and `alpha_pattern`.
//!
//! PEFT tries the keys in file order; one matches a module path if `(.*\.)?(key)$` matches it from its start. Most keys
//! are plain dotted names, one a module in the extreme; those are looked up, not tried. A dot in a plain name stands for
//! a dot here, where PEFT's expression would take any character.

use moe_lora_core::InputError;
use regex::bytes::{Regex, RegexBuilder};
use std::collections::HashMap;

/// More keys that need an expression are refused: each is tried on each module.
const MAX_EXPRESSIONS: usize = 512;

/// Bytes of one compiled expression; ordinary ones take 2 to 10 thousand.
const MAX_EXPRESSION_BYTES: usize = 1 << 15;

/// The ordered keys of one field.
#[derive(Debug, Clone, Default)]
pub(crate) struct Patterns {
    plain: HashMap<String, (usize, f64)>,
    expressions: Vec<(usize, Regex, f64)>,
}

impl Patterns {
    pub(crate) fn new(entries: Vec<(String, f64)>) -> Result<Self, InputError> {
        let mut patterns = Self::default();
        for (place, (key, value)) in entries.into_iter().enumerate() {
            let name = key.replace("\\.", ".");
            if name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
                patterns.plain.entry(name).or_insert((place, value)).1 = value;
            } else {
                patterns.expressions.push((place, expression(&key)?, value));
            }
            if patterns.expressions.len() > MAX_EXPRESSIONS {
                let found = format!("more than {MAX_EXPRESSIONS} regular expressions");
                return Err(InputError::new(found, "fewer, or plain module names"));
            }
        }
        Ok(patterns)
    }

    /// The value of the first key that matches.
    pub(crate) fn find(&self, path: &str) -> Option<f64> {
        if self.plain.is_empty() && self.expressions.is_empty() {
            return None;
        }
        let tails = path.match_indices('.').filter_map(|(dot, _)| path.get(dot + 1..));
        let plain = std::iter::once(path).chain(tails).filter_map(|tail| self.plain.get(tail)).min_by_key(|p| p.0);
        let before = plain.map_or(usize::MAX, |p| p.0);
        let mut earlier = self.expressions.iter().take_while(|(place, ..)| *place < before);
        let expression = earlier.find(|(_, expression, _)| expression.is_match(path.as_bytes()));
        expression.map(|(.., value)| *value).or(plain.map(|p| p.1))
    }
}

fn expression(key: &str) -> Result<Regex, InputError> {
    // Module paths are ASCII: without Unicode tables `\d` and `\w` stay small.
    RegexBuilder::new(&format!(r"^(?:(.*\.)?({key})$)"))
        .unicode(false)
        .size_limit(MAX_EXPRESSION_BYTES)
        .dfa_size_limit(MAX_EXPRESSION_BYTES)
        .build()
        .map_err(|_| {
            let shown: String = key.chars().take(100).collect();
            InputError::new(
                format!("the key {shown:?}"),
                "a module name or a small regular expression without look-around",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(keys: &[&str], path: &str) -> Option<f64> {
        let entries = keys.iter().enumerate().map(|(i, k)| ((*k).to_owned(), i as f64)).collect();
        Patterns::new(entries).unwrap().find(path)
    }

    #[test]
    fn the_first_key_that_matches_wins() {
        let path = "model.layers.0.mlp.experts.3.gate_proj";
        assert_eq!(find(&["up_proj", "gate_proj", "experts.3.gate_proj"], path), Some(1.0));
        assert_eq!(find(&["experts.3.gate_proj", "gate_proj"], path), Some(0.0));
        assert_eq!(find(&[path], path), Some(0.0));
        assert_eq!(find(&["ate_proj", "experts", "experts.3", ""], path), None, "whole segments, to the end");
        assert_eq!(find(&[r".*\.gate_proj", "gate_proj"], path), Some(0.0));
        assert_eq!(find(&["gate_proj", r".*\.gate_proj"], path), Some(0.0));
        assert_eq!(find(&[r"layers\.0\.mlp\.experts\.3\.gate_proj"], path), Some(0.0));
        assert_eq!(find(&[r"layers\.\d+\.mlp\.experts\.(1|3)\.(gate|up)_proj"], path), Some(0.0));
        assert_eq!(find(&["^model.layers.0.*proj", "x"], path), Some(0.0));
        assert_eq!(find(&["^layers.0.*proj"], path), None, "anchored by its author");
        assert_eq!(find(&["gate_proj|up_proj"], path), Some(0.0));
    }

    #[test]
    fn expressions_are_bounded() {
        for bad in ["(?!x)y", "(", r"(a)\1", "[a-z]{1000}{1000}"] {
            assert!(Patterns::new(vec![(bad.to_owned(), 1.0)]).is_err(), "{bad}");
        }
        let many = (0..=MAX_EXPRESSIONS).map(|i| (format!("{i}.*"), 1.0)).collect();
        assert!(Patterns::new(many).is_err());
    }
}
