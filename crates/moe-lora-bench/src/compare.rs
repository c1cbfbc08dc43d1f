//! Our rows beside those of other systems.

use crate::{Card, Touched, bands, geometric_mean};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// Rows of one or more systems, all measured with the same method. A [`Run`](crate::Run) reads as one of ours.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peers {
    /// Where they come from.
    pub about: String,
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

/// How many times faster we are than each peer, row by row and as geometric means; everybody's share of the floor and error.
///
/// Only rows that both sides have count. Plain layers (no adapter) are compared with plain layers. Every side's floor is that of its own batch and card.
#[must_use]
pub fn compare(ours: &Peers, peers: &Peers) -> String {
    let names: Vec<&str> = peers.rows.iter().map(|r| r.peer.as_str()).collect::<BTreeSet<_>>().into_iter().collect();
    let mut theirs: BTreeMap<_, Vec<&PeerRow>> = BTreeMap::new();
    for row in &peers.rows {
        theirs.entry(row.key()).or_default().push(row);
    }
    let shared: BTreeSet<_> = ours.rows.iter().map(PeerRow::key).filter(|key| theirs.contains_key(key)).collect();
    let mut text = format!("{:<16} {:>5} {:>3} {:>3} {:>9}", "model", "T", "L", "R", "ours us");
    text.extend(names.iter().map(|name| format!(" {name:>22}")));
    text += "   us (times slower)\n";
    let mut ratios: Vec<(&str, &PeerRow, f64)> = Vec::new();
    let (mut rows, mut same_batches, mut less_exact) = (0, 0, 0);
    for row in &ours.rows {
        let Some(found) = theirs.get(&row.key()) else { continue };
        text += &format!("{:<16} {:>5} {:>3} {:>3} {:>9.1}", row.model, row.tokens, row.adapters, row.rank, row.us);
        for name in &names {
            let cell = found.iter().find(|r| r.peer == *name).map(|r| {
                ratios.push((name, row, r.us / row.us));
                format!("{:.1} ({:.2})", r.us, r.us / row.us)
            });
            text += &format!(" {:>22}", cell.unwrap_or_else(|| "-".to_owned()));
        }
        text.push('\n');
        let best = found.iter().map(|r| r.us).fold(f64::INFINITY, f64::min);
        ratios.push((BEST, row, best / row.us));
        let least_error = found.iter().filter_map(|r| r.rel_err).fold(f64::INFINITY, f64::min);
        rows += 1;
        same_batches += usize::from(found.iter().all(|r| r.touched == row.touched));
        less_exact += usize::from(row.rel_err.is_some_and(|error| error >= least_error));
    }
    text += &format!(
        "\n{rows} rows, {same_batches} of them on batches that touch the same; in {less_exact} some system's error is no larger \
         than ours\n"
    );
    for (kind, lora) in [("with LoRA", true), ("base only", false)] {
        text +=
            &table(&format!("times slower than ours, {kind}"), names.iter().copied().chain([BEST]), |name, band| {
                let chosen = ratios.iter().filter(|(peer, row, _)| *peer == name && row.is(lora, band));
                geometric_mean(chosen.map(|(_, _, ratio)| *ratio)).map(|m| format!("{m:.2}"))
            });
    }
    for (kind, lora) in [("with LoRA", true), ("base only", false)] {
        text += &table(&format!("share of the floor, {kind}"), names.iter().copied().chain([OURS]), |name, band| {
            let side = if name == OURS { ours } else { peers };
            let of_side = side.rows.iter().filter(|r| (name == OURS || r.peer == name) && shared.contains(&r.key()));
            let chosen = of_side.filter(|r| r.is(lora, band));
            let shares = chosen.map(|r| r.touched.floor_us(&side.card.ceilings) / r.us);
            geometric_mean(shares).map(|m| format!("{:.0}%", 100.0 * m))
        });
    }
    text
}

fn ours() -> String {
    OURS.to_owned()
}

const BEST: &str = "the best of them";
const OURS: &str = "moe-lora";

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
        let rows = vec![peer("a", 1, 4, 20.0), peer("a", 1, 16, 80.0), peer("b", 1, 4, 15.0), peer("b", 0, 4, 12.0)];
        let peers = Peers { about: String::new(), card: ours.card.clone(), rows };
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
        assert_eq!(of("times slower than ours, base only", "b")[1], "1.20");
        assert_eq!(of("share of the floor, with LoRA", "b")[1], "7%");
        assert!(text.contains("3 rows, 0 of them on batches that touch the same; in 0 some"));
        assert!(text.contains("20.0 (2.00)") && !text.contains("\nn "));
    }
}
