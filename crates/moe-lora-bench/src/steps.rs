//! How smoothly time grows with the batch: falls and jumps from one number of tokens to the next.

use crate::{Row, Run};
use std::fmt::Write;

/// Time may not fall by more than this where tokens are added.
const MOST_FALL: f64 = 0.02;
/// Nor rise by more than this beyond what the floor rises by.
const MOST_JUMP: f64 = 0.12;

/// One step from a batch to the next larger one of the same layer, adapters and wanted path.
struct Step<'a> {
    from: &'a Row,
    to: &'a Row,
}

impl Step<'_> {
    /// By which part of itself time falls; negative where it rises.
    fn fall(&self) -> f64 {
        1.0 - self.to.us / self.from.us
    }

    /// By which part of itself time rises beyond what the floor does.
    fn jump(&self) -> f64 {
        self.to.us / self.from.us - self.to.floor_us / self.from.floor_us
    }

    fn line(&self, value: f64) -> String {
        let Row { tokens, us, path, .. } = self.to;
        let Row { tokens: before, us: us_before, path: path_before, .. } = self.from;
        let percent = 100.0 * value;
        format!("{percent:5.1} % at {before} to {tokens}, {path_before} {us_before:.1} to {path} {us:.1} us")
    }
}

/// For every layer and set of adapters the largest fall and jump, and every one that is too large.
#[must_use]
pub fn steps(run: &Run) -> String {
    let set = |row: &Row| (row.model.clone(), row.adapters, row.rank, row.slots);
    let mut sets: Vec<_> = run.rows.iter().map(set).collect();
    sets.dedup();
    let mut text = String::new();
    let mut seen = Vec::new();
    for of in sets {
        if seen.contains(&of) {
            continue;
        }
        let mut rows: Vec<&Row> = run.rows.iter().filter(|row| set(row) == of).collect();
        rows.sort_by_key(|row| row.tokens);
        let steps = || rows.windows(2).map(|pair| Step { from: pair[0], to: pair[1] });
        let _ = writeln!(text, "{} {} x {}", of.0, of.1, of.2);
        for (name, most) in [("fall", MOST_FALL), ("jump", MOST_JUMP)] {
            let value = |step: &Step<'_>| if name == "fall" { step.fall() } else { step.jump() };
            let mut found: Vec<(f64, Step<'_>)> = steps().map(|step| (value(&step), step)).collect();
            found.sort_by(|a, b| b.0.total_cmp(&a.0));
            for (i, (value, step)) in found.iter().enumerate() {
                if i == 0 || *value > most {
                    let verdict = if *value > most { "too large" } else { "largest" };
                    let _ = writeln!(text, "    {verdict} {name}: {}", step.line(*value));
                }
            }
        }
        seen.push(of);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::{row, run};

    #[test]
    fn falls_and_jumps_are_found_whatever_the_order() {
        // Floors are half of the time in these rows, so that they rise alike.
        let mut rows: Vec<Row> = [(64, 100.0), (128, 95.0), (96, 101.0), (160, 96.0)]
            .into_iter()
            .map(|(tokens, us)| Row { floor_us: 50.0, ..row("m", 1, tokens, us) })
            .collect();
        rows.push(row("n", 0, 64, 10.0));
        rows.push(row("n", 0, 96, 20.0));
        let text = steps(&run(rows));
        assert!(
            text.contains("m 1 x 16\n    too large fall:   5.9 % at 96 to 128, portable 101.0 to portable 95.0 us")
        );
        assert!(
            text.contains("    largest jump:   1.1 % at 128 to 160")
                && text.contains("largest jump:   0.0 % at 64 to 96")
        );
    }
}
