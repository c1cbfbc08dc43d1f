//! What a run on a GPU found: rows as they are kept in JSON, and as they are printed.

use crate::{Ceilings, Touched};
use serde::{Deserialize, Serialize};
use std::fmt;

/// One run on one card.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// What was timed, and how.
    pub about: String,
    /// Where.
    pub card: Card,
    /// The rows, in the order in which they were timed.
    pub rows: Vec<Row>,
}

/// A card, and what it can do at most.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Version of CUDA that its driver supports.
    pub driver: String,
    /// What floors are computed with.
    #[serde(flatten)]
    pub ceilings: Ceilings,
}

/// One batch on one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name of the layer.
    pub model: String,
    /// `[E, k, H, I]`.
    pub sizes: [usize; 4],
    /// `bf16` or `f16`.
    pub dtype: String,
    /// Adapters of the batch; 0 is the plain layer.
    pub adapters: usize,
    /// Their largest rank.
    pub rank: usize,
    /// Slots of the adapter table, of which the adapters fill the first ones.
    pub slots: usize,
    /// Share of the tokens that use none.
    pub base_share: f64,
    /// Tokens, T.
    pub tokens: usize,
    /// Median time of a forward.
    pub us: f64,
    /// The least time that this batch can take on the card.
    pub floor_us: f64,
    /// Time of the plain layer for the same tokens, if it was timed.
    pub base_us: Option<f64>,
    /// The kernels that ran: decode, portable or prefill. Empty in older runs.
    #[serde(default)]
    pub path: String,
    /// Kernel launches.
    pub launches: usize,
    /// Relative error of a few tokens against the f64 reference, if they were checked.
    pub rel_err: Option<f64>,
    /// What the batch touches.
    #[serde(flatten)]
    pub touched: Touched,
    /// Each kernel alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageTime>,
}

/// One kernel alone, with a cold L2.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageTime {
    /// The kernel.
    pub kernel: String,
    /// Median time.
    pub us: f64,
}

impl Row {
    /// The head of the table that rows print.
    #[must_use]
    pub fn header() -> String {
        format!(
            "{:<16} {:>5} {:>3} {:>3} {:>8} {:>6} {:>8} {:>7} {:>9} {:>9} {:>10} {:>11}",
            "model", "T", "L", "R", "us", "share", "TFLOP/s", "GB/s", "path", "launches", "over base", "rel. error"
        )
    }

    /// The floor's share of the time, 1 at best.
    #[must_use]
    pub fn share(&self) -> f64 {
        self.floor_us / self.us
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let over =
            self.base_us.filter(|_| self.adapters > 0).map(|base| format!("{:+.1} %", 100.0 * (self.us / base - 1.0)));
        write!(
            f,
            "{:<16} {:>5} {:>3} {:>3} {:>8.1} {:>5.1}% {:>8.1} {:>7.0} {:>9} {:>9} {:>10} {:>11}",
            self.model,
            self.tokens,
            self.adapters,
            self.rank,
            self.us,
            100.0 * self.share(),
            self.touched.flops as f64 / self.us * 1e-6,
            self.touched.bytes as f64 / self.us * 1e-3,
            self.path,
            self.launches,
            over.unwrap_or_default(),
            self.rel_err.map_or_else(String::new, |e| format!("{e:.2e}")),
        )?;
        if self.slots > self.adapters {
            write!(f, "  {} slots", self.slots)?;
        }
        self.stages.iter().try_for_each(|s| write!(f, "\n    {:<40} {:>8.1}", s.kernel, s.us))
    }
}

/// Batch sizes that summaries put together.
#[must_use]
pub fn bands() -> [(&'static str, std::ops::RangeInclusive<usize>); 6] {
    [
        ("T=1", 1..=1),
        ("4..16", 4..=16),
        ("64..256", 64..=256),
        ("1024", 1024..=1024),
        ("4096..8192", 4096..=8192),
        ("all", 0..=usize::MAX),
    ]
}

/// The geometric mean, `None` of nothing.
pub fn geometric_mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (count, sum) = values.into_iter().fold((0, 0.0), |(count, sum), v| (count + 1, sum + v.ln()));
    (count > 0).then(|| (sum / f64::from(count)).exp())
}

impl Run {
    /// The run as a reader of a terminal wants it at its end: geometric means of the share of the floor.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut text = format!("{:<34}", "share of the floor, geometric mean");
        text.extend(bands().map(|(name, _)| format!("{name:>12}")));
        for (name, lora) in [("with LoRA", true), ("base only", false)] {
            text += &format!("\n{name:<34}");
            for (_, band) in bands() {
                let rows = self.rows.iter().filter(|r| (r.adapters > 0) == lora && band.contains(&r.tokens));
                let mean = geometric_mean(rows.map(Row::share));
                text += &mean.map_or_else(|| format!("{:>12}", "-"), |m| format!("{:>11.1}%", 100.0 * m));
            }
        }
        text
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row(model: &str, adapters: usize, tokens: usize, us: f64) -> Row {
        Row {
            model: model.to_owned(),
            sizes: [4, 2, 16, 8],
            dtype: "bf16".to_owned(),
            adapters,
            rank: 16,
            slots: adapters,
            base_share: 0.0,
            tokens,
            us,
            floor_us: us / 2.0,
            base_us: Some(0.8 * us),
            path: "portable".to_owned(),
            launches: 6,
            rel_err: Some(2.5e-3),
            touched: Touched::default(),
            stages: Vec::new(),
        }
    }

    pub(crate) fn run(rows: Vec<Row>) -> Run {
        let ceilings = Ceilings { read_tb_s: 3.0, peak_tflop_s: 800.0 };
        let card = Card { name: "a card".to_owned(), driver: "13.0".to_owned(), ceilings };
        Run { about: "a test".to_owned(), card, rows }
    }

    #[test]
    fn rows_come_back_from_json_and_fit_the_table() {
        let run = run(vec![row("m", 1, 4, 100.0), row("m", 0, 4, 80.0)]);
        let text = serde_json::to_string(&run).unwrap();
        assert_eq!(serde_json::from_str::<Run>(&text).unwrap(), run);
        assert_eq!(run.rows[0].to_string().len(), Row::header().len());
        assert!(run.rows[0].to_string().contains(" 50.0%") && run.rows[0].to_string().contains("+25.0 %"));
        assert!(!run.rows[1].to_string().contains("+25.0 %"));
        assert!(run.summary().contains("50.0%") && run.summary().contains('-'));
    }

    #[test]
    fn means() {
        assert_eq!(geometric_mean([2.0, 8.0]), Some(4.0));
        assert_eq!(geometric_mean([]), None);
    }
}
