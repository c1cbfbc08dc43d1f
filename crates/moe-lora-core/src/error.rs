//! The one error that says what is wrong with an input.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};

/// Something that the caller handed in is not what it has to be: a file, a tensor, a size or a setting.
///
/// Its `Display` is one line: where, what was found, what was expected. Errors of the other crates wrap it, so that a
/// program can tell bad input (this) from a failed run (anything else).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputError {
    /// The file or folder at fault, if the input came from one.
    pub file: Option<PathBuf>,
    /// The tensor, configuration field or argument at fault.
    pub tensor: Option<String>,
    /// What was found.
    pub found: String,
    /// What was expected instead.
    pub expected: String,
}

impl InputError {
    /// An error that does not name its place yet: see [`in_tensor`](Self::in_tensor) and [`in_file`](Self::in_file).
    pub fn new(found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { file: None, tensor: None, found: found.into(), expected: expected.into() }
    }

    /// Names the tensor, field or argument, unless a callee already named a more exact one.
    #[must_use]
    pub fn in_tensor(mut self, tensor: impl Into<String>) -> Self {
        self.tensor.get_or_insert_with(|| tensor.into());
        self
    }

    /// Names the file, unless a callee already did.
    #[must_use]
    pub fn in_file(mut self, file: impl AsRef<Path>) -> Self {
        self.file.get_or_insert_with(|| file.as_ref().to_owned());
        self
    }
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}: ", one_line(&file.display().to_string()))?;
        }
        if let Some(tensor) = &self.tensor {
            write!(f, "{}: ", one_line(tensor))?;
        }
        write!(f, "found {}, expected {}", one_line(&self.found), one_line(&self.expected))
    }
}

impl Error for InputError {}

/// Names come from strangers' files: control characters are escaped and very long names are cut.
fn one_line(text: &str) -> String {
    const LONGEST: usize = 400;
    let mut line: String = text
        .chars()
        .take(LONGEST)
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_names_file_tensor_found_expected() {
        let error = InputError::new("[3, 4]", "[4, 4]").in_tensor("w1\n\u{1b}[2J").in_file("model.safetensors");
        let text = error.to_string();
        assert_eq!(text, "model.safetensors: w1\\n\\u{1b}[2J: found [3, 4], expected [4, 4]");
        assert_eq!(error.in_tensor("outer").tensor.as_deref(), Some("w1\n\u{1b}[2J"), "the inner name is kept");
    }

    #[test]
    fn long_names_are_cut() {
        assert!(InputError::new("x".repeat(10_000), "short").to_string().chars().count() < 500);
    }
}
