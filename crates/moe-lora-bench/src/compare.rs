//! Our rows beside those of other systems.

use crate::{Card, Touched, bands, geometric_mean};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

/// Rows of one or more systems, all measured with the same method. A [`Run`](crate::Run) reads as one of ours.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peers {
    /// Where they come from.
    pub about: String,
    /// The day, if they are kept from another run than ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<String>,
    /// The card.
    pub card: Card,
    /// The rows.
    pub rows: Vec<PeerRow>,
}

/// One batch of one system.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerRow {
    /// The system.
    #[serde(default = "ours")]
    pub peer: String,
    /// Name of the layer.
    pub model: String,
    /// Adapters of the batch; 0 is the plain layer.
    pub adapters: usize,
    /// Their rank.
    pub rank: usize,
    /// Tokens, T.
    pub tokens: usize,
    /// Median time of a forward.
    pub us: f64,
    /// Relative error of a few tokens, if they were checked.
    pub rel_err: Option<f64>,
    /// What the batch touches.
    #[serde(flatten)]
    pub touched: Touched,
}

impl PeerRow {
    fn is(&self, lora: bool, band: &RangeInclusive<usize>) -> bool {
        (self.adapters > 0) == lora && band.contains(&self.tokens)
    }

    /// What makes rows of two systems comparable. The rank of no adapter is nobody's.
    fn key(&self) -> (&str, usize, usize, usize) {
        (&self.model, self.adapters, if self.adapters > 0 { self.rank } else { 0 }, self.tokens)
    }
}

/// One system beside us: its name, and the file that has its rows.
pub(crate) struct System<'a> {
    pub(crate) label: String,
    pub(crate) name: &'a str,
    pub(crate) file: &'a Peers,
}

impl<'a> System<'a> {
    /// Every system once, from the first file that has it.
    pub(crate) fn all(files: &'a [Peers]) -> Vec<Self> {
        let mut systems: Vec<Self> = Vec::new();
        for file in files {
            let names: BTreeSet<&str> = file.rows.iter().map(|row| row.peer.as_str()).collect();
            let new: Vec<&str> = names.into_iter().filter(|n| systems.iter().all(|s| s.name != *n)).collect();
            let mark = if file.stored.is_some() { "*" } else { "" };
            systems.extend(new.into_iter().map(|name| Self { label: format!("{name}{mark}"), name, file }));
        }
        systems
    }

    fn row(&self, of: &PeerRow) -> Option<&'a PeerRow> {
        self.file.rows.iter().find(|row| row.peer == self.name && row.key() == of.key())
    }
}

/// How many times faster we are than each system, row by row and as geometric means; everybody's share of the floor and error.
///
/// A system that is in several files counts with the first one; the systems of stored files get a star. Only rows that both
/// sides have count. Plain layers (no adapter) are compared with plain layers. Every side's floor is that of its own batch and card.
#[must_use]
pub fn compare(ours: &Peers, others: &[Peers]) -> String {
    let systems = System::all(others);
    let mut text = format!("{:<16} {:>5} {:>3} {:>3} {:>9}", "model", "T", "L", "R", "ours us");
    text.extend(systems.iter().map(|system| format!(" {:>22}", system.label)));
    text += "   us (times slower)\n";
    let mut pairs: Vec<(&str, &PeerRow, &PeerRow)> = Vec::new();
    let (mut rows, mut same_batches, mut less_exact) = (0, 0, 0);
    for row in &ours.rows {
        let found: Vec<Option<&PeerRow>> = systems.iter().map(|system| system.row(row)).collect();
        let Some(best) = found.iter().flatten().min_by(|a, b| a.us.total_cmp(&b.us)) else { continue };
        text += &format!("{:<16} {:>5} {:>3} {:>3} {:>9.1}", row.model, row.tokens, row.adapters, row.rank, row.us);
        for (system, found) in systems.iter().zip(&found) {
            let cell = found.map(|theirs| {
                pairs.push((&system.label, row, theirs));
                format!("{:.1} ({:.2})", theirs.us, theirs.us / row.us)
            });
            text += &format!(" {:>22}", cell.unwrap_or_else(|| "-".to_owned()));
        }
        text.push('\n');
        pairs.push((BEST, row, best));
        let least_error = found.iter().flatten().filter_map(|r| r.rel_err).fold(f64::INFINITY, f64::min);
        rows += 1;
        same_batches += usize::from(found.iter().flatten().all(|r| r.touched == row.touched));
        less_exact += usize::from(row.rel_err.is_some_and(|error| error >= least_error));
    }
    for file in others {
        text.extend(file.stored.iter().map(|day| format!("\n* rows of {day}, not measured beside ours")));
    }
    text += &format!(
        "\n{rows} rows, {same_batches} of them on batches that touch the same; in {less_exact} some system's error is no larger \
         than ours\n"
    );
    let labels = || systems.iter().map(|system| system.label.as_str());
    for (kind, lora) in [("with LoRA", true), ("base only", false)] {
        let best = pairs.iter().filter(|(label, row, _)| *label == BEST && (row.adapters > 0) == lora);
        let faster = best.clone().filter(|(_, row, theirs)| row.us < theirs.us).count();
        text += &format!("{kind}: faster than the best of them in {faster} of {} rows\n", best.count());
    }
    for (kind, lora) in [("with LoRA", true), ("base only", false)] {
        text += &table(&format!("times slower than ours, {kind}"), labels().chain([BEST]), |name, band| {
            let chosen = pairs.iter().filter(|(label, row, _)| *label == name && row.is(lora, band));
            geometric_mean(chosen.map(|(_, row, theirs)| theirs.us / row.us)).map(|m| format!("{m:.2}"))
        });
    }
    for (kind, lora) in [("with LoRA", true), ("base only", false)] {
        text += &table(&format!("share of the floor, {kind}"), labels().chain([OURS]), |name, band| {
            let side = systems.iter().find(|s| s.label == name).map_or(ours, |system| system.file);
            let label = if name == OURS { BEST } else { name };
            let chosen = pairs.iter().filter(|(l, row, _)| *l == label && row.is(lora, band));
            let shares = chosen.map(|(_, row, theirs)| {
                let counted = if name == OURS { row } else { theirs };
                counted.touched.floor_us(&side.card.ceilings) / counted.us
            });
            geometric_mean(shares).map(|m| format!("{:.0}%", 100.0 * m))
        });
    }
    text
}

fn ours() -> String {
    OURS.to_owned()
}

const BEST: &str = "the best of them";
pub(crate) const OURS: &str = "moe-lora";

fn table<'a>(
    title: &str,
    names: impl Iterator<Item = &'a str>,
    cell: impl Fn(&str, &RangeInclusive<usize>) -> Option<String>,
) -> String {
    let mut text = format!("\n{title:<34}");
    text.extend(bands().map(|(band, _)| format!("{band:>12}")));
    text.push('\n');
    for name in names {
        text += &format!("{name:<34}");
        text.extend(bands().map(|(_, band)| format!("{:>12}", cell(name, &band).unwrap_or_else(|| "-".to_owned()))));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::{row, run};

    fn peer(name: &str, adapters: usize, tokens: usize, us: f64) -> PeerRow {
        let touched = Touched { bytes: 3_000_000, ..Touched::default() };
        let (peer, model) = (name.to_owned(), "m".to_owned());
        PeerRow { peer, model, adapters, rank: 16 * adapters.min(1), tokens, us, rel_err: Some(4e-3), touched }
    }

    #[test]
    fn ratios_are_geometric_means_of_the_rows_that_both_have() {
        let ours = run(vec![row("m", 1, 4, 10.0), row("m", 1, 16, 10.0), row("m", 0, 4, 10.0), row("n", 1, 4, 1.0)]);
        let file = |stored, rows| Peers { about: String::new(), stored, card: ours.card.clone(), rows };
        let a = file(None, vec![peer("a", 1, 4, 20.0), peer("a", 1, 16, 80.0)]);
        let stored = vec![peer("a", 1, 4, 1.0), peer("b", 1, 4, 15.0), peer("b", 0, 4, 8.0)];
        let peers = [a, file(Some("Monday".to_owned()), stored)];
        // As the command reads a run.
        let ours: Peers = serde_json::from_str(&serde_json::to_string(&ours).unwrap()).unwrap();
        let text = compare(&ours, &peers);
        let of = |title: &str, name: &str| {
            let part = &text[text.find(title).unwrap()..];
            let line = part.lines().skip(1).find(|l| l.starts_with(name)).unwrap();
            line[34..].split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(of("times slower than ours, with LoRA", "a"), ["-", "4.00", "-", "-", "-", "4.00"]);
        assert_eq!(of("times slower than ours, with LoRA", BEST)[1], "3.46");
        assert_eq!(of("times slower than ours, base only", "b*")[1], "0.80");
        assert_eq!(of("share of the floor, with LoRA", "b*")[1], "7%");
        assert!(text.contains("3 rows, 0 of them on batches that touch the same; in 0 some"));
        assert!(text.contains("20.0 (2.00)") && !text.contains("\nn "));
        assert!(text.contains("with LoRA: faster than the best of them in 2 of 2 rows"));
        assert!(text.contains("base only: faster than the best of them in 0 of 1 rows"));
        assert!(text.contains("* rows of Monday"));
    }
}
