//! Our rows beside those of other systems.

use crate::{Card, Run, Touched, bands, geometric_mean};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Rows of other systems, measured with the same method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peers {
    /// Where they come from.
    pub about: String,
    /// The card.
    pub card: Card,
    /// The rows.
    pub rows: Vec<PeerRow>,
}

/// One batch of another system.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerRow {
    /// The system.
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
    /// Relative error of a few tokens.
    pub rel_err: f64,
    /// What the batch touches.
    #[serde(flatten)]
    pub touched: Touched,
}

type Key<'a> = (&'a str, usize, usize, usize);

/// How many times faster we are than each peer, row by row and as geometric means, and everybody's share of the floor.
///
/// Plain layers (no adapter) are compared with plain layers. Every side's floor is that of its own batch and card.
#[must_use]
pub fn compare(ours: &Run, peers: &Peers) -> String {
    let names: BTreeSet<&str> = peers.rows.iter().map(|r| r.peer.as_str()).collect();
    let mut theirs: BTreeMap<Key<'_>, Vec<&PeerRow>> = BTreeMap::new();
    for row in &peers.rows {
        theirs.entry((&row.model, row.adapters, row.rank, row.tokens)).or_default().push(row);
    }
    let mut text = format!("{:<16} {:>5} {:>3} {:>3} {:>9}", "model", "T", "L", "R", "ours us");
    text.extend(names.iter().map(|name| format!(" {name:>22}")));
    text += "   (times slower than ours)\n";
    // By peer, band and kind: ratios. The last name is the best of all peers, row by row.
    let mut ratios: Vec<(&str, usize, bool, f64)> = Vec::new();
    for row in &ours.rows {
        let Some(found) =
            theirs.get(&(&*row.model, row.adapters, if row.adapters > 0 { row.rank } else { 0 }, row.tokens))
        else {
            continue;
        };
        text += &format!("{:<16} {:>5} {:>3} {:>3} {:>9.1}", row.model, row.tokens, row.adapters, row.rank, row.us);
        for name in &names {
            let cell = found.iter().find(|r| r.peer == *name).map(|r| {
                ratios.push((name, row.tokens, row.adapters > 0, r.us / row.us));
                format!("{:.1} ({:.2})", r.us, r.us / row.us)
            });
            text += &format!(" {:>22}", cell.unwrap_or_else(|| "-".to_owned()));
        }
        text.push('\n');
        if let Some(best) = found.iter().map(|r| r.us).min_by(f64::total_cmp) {
            ratios.push((BEST, row.tokens, row.adapters > 0, best / row.us));
        }
    }
    for (title, lora) in [("times slower than ours, with LoRA", true), ("times slower than ours, base only", false)] {
        let cell = |name: &str, band: &std::ops::RangeInclusive<usize>| {
            let chosen = ratios.iter().filter(|r| r.0 == name && r.2 == lora && band.contains(&r.1));
            geometric_mean(chosen.map(|r| r.3)).map(|m| format!("{m:.2}"))
        };
        text += &table(title, names.iter().copied().chain([BEST]), cell);
    }
    for (title, lora) in [("share of the floor, with LoRA", true), ("share of the floor, base only", false)] {
        let cell = |name: &str, band: &std::ops::RangeInclusive<usize>| {
            let share = |r: &PeerRow| r.touched.floor_us(&peers.card.ceilings) / r.us;
            let of_peer = |r: &&PeerRow| r.peer == name && (r.adapters > 0) == lora && band.contains(&r.tokens);
            let mean = match name {
                OURS => geometric_mean(
                    ours.rows
                        .iter()
                        .filter(|r| (r.adapters > 0) == lora && band.contains(&r.tokens))
                        .map(crate::Row::share),
                ),
                _ => geometric_mean(peers.rows.iter().filter(of_peer).map(share)),
            };
            mean.map(|m| format!("{:.0}%", 100.0 * m))
        };
        text += &table(title, names.iter().copied().chain([OURS]), cell);
    }
    text
}

const BEST: &str = "the best of them";
const OURS: &str = "moe-lora";

fn table<'a>(
    title: &str,
    names: impl Iterator<Item = &'a str>,
    cell: impl Fn(&str, &std::ops::RangeInclusive<usize>) -> Option<String>,
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
        PeerRow { peer, model, adapters, rank: 16 * adapters.min(1), tokens, us, rel_err: 0.0, touched }
    }

    #[test]
    fn ratios_are_geometric_means_of_the_rows_that_both_have() {
        let ours = run(vec![row("m", 1, 4, 10.0), row("m", 1, 16, 10.0), row("m", 0, 4, 10.0), row("n", 1, 4, 1.0)]);
        let rows = vec![peer("a", 1, 4, 20.0), peer("a", 1, 16, 80.0), peer("b", 1, 4, 15.0), peer("b", 0, 4, 12.0)];
        let peers = Peers { about: String::new(), card: ours.card.clone(), rows };
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
        assert_eq!(of("share of the floor, with LoRA", OURS)[1], "50%");
        assert!(text.contains("20.0 (2.00)") && !text.contains("\nn "));
    }
}
