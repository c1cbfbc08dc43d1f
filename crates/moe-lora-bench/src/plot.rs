//! Plots of a run, as plain SVG.

use crate::compare::{OURS, System};
use crate::{Peers, Row, Run};
use std::collections::BTreeSet;
use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
/// Left, top, right and bottom of the frame's distance from the picture's edges.
const MARGINS: [f64; 4] = [64.0, 36.0, 150.0, 44.0];
const COLOURS: [&str; 7] = ["#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989"];

struct Series {
    name: String,
    /// T and value.
    points: Vec<(f64, f64)>,
    dashed: bool,
}

/// One plot of time and one of the share of the floor for each layer of a run: file names and contents.
#[must_use]
pub fn plots(run: &Run) -> Vec<(String, String)> {
    let mut models: Vec<&str> = run.rows.iter().map(|r| r.model.as_str()).collect();
    models.dedup();
    let mut files = Vec::new();
    for model in models {
        let rows: Vec<&Row> = run.rows.iter().filter(|r| r.model == model).collect();
        let mut sets: Vec<(usize, usize)> = rows.iter().map(|r| (r.adapters, r.rank)).collect();
        sets.sort_unstable();
        sets.dedup();
        let (mut times, mut shares, mut floor) = (Vec::new(), Vec::new(), None);
        for &(adapters, rank) in &sets {
            let name = if adapters == 0 { "base".to_owned() } else { format!("{adapters} x rank {rank}") };
            let of_set = || rows.iter().filter(|r| (r.adapters, r.rank) == (adapters, rank));
            let line = |value: fn(&Row) -> f64| of_set().map(|r| (r.tokens as f64, value(r))).collect();
            times.push(Series { name: name.clone(), points: line(|r| r.us), dashed: false });
            shares.push(Series { name, points: line(|r| 100.0 * r.share()), dashed: false });
            if adapters == 0 {
                floor = Some(Series { name: "base, floor".to_owned(), points: line(|r| r.floor_us), dashed: true });
            }
        }
        // Last, so that a set has one colour in both plots.
        times.extend(floor);
        let on = |what: &str| format!("{model}: {what}, {}", run.card.name);
        files.push((format!("{model}-time.svg"), chart(&on("microseconds of a forward"), true, &times)));
        files.push((format!("{model}-share.svg"), chart(&on("share of the floor, %"), false, &shares)));
    }
    files
}

/// One plot for each layer of ours: everybody's share of the floor with `adapters` adapters of rank `rank`.
#[must_use]
pub fn plots_beside(ours: &Peers, others: &[Peers], adapters: usize, rank: usize) -> Vec<(String, String)> {
    let models: BTreeSet<&str> = ours.rows.iter().map(|r| r.model.as_str()).collect();
    let us = [System { label: OURS.to_owned(), name: OURS, file: ours }];
    let systems: Vec<System<'_>> = us.into_iter().chain(System::all(others)).collect();
    let series = |model: &str| -> Vec<Series> {
        let of = |system: &System<'_>| {
            let rows = system
                .file
                .rows
                .iter()
                .filter(|r| r.peer == system.name && r.model == model && (r.adapters, r.rank) == (adapters, rank));
            let share = |us, floor| 100.0 * floor / us;
            let ceilings = &system.file.card.ceilings;
            let points = rows.map(|r| (r.tokens as f64, share(r.us, r.touched.floor_us(ceilings)))).collect();
            Series { name: system.label.clone(), points, dashed: system.file.stored.is_some() }
        };
        systems.iter().map(of).collect()
    };
    let title = |model| format!("{model}, {adapters} adapters of rank {rank}: share of the floor, %");
    models.iter().map(|m| (format!("{m}-beside.svg"), chart(&title(m), false, &series(m)))).collect()
}

/// Lines over T, which is logarithmic. Values are logarithmic too, or from 0 to 100.
fn chart(title: &str, logarithmic: bool, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|s| &s.points);
    let most = |value: fn(&(f64, f64)) -> f64| points().map(value).fold(1.0, f64::max);
    let least = points().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let decades = (least.max(1.0).log10().floor(), most(|p| p.1).log10().ceil());
    let [left, top, right, bottom] = MARGINS;
    let (width, height) = (WIDTH - left - right, HEIGHT - top - bottom);
    let first = points().map(|p| p.0).fold(f64::INFINITY, f64::min).log2();
    let x = |tokens: f64| left + width * (tokens.log2() - first) / (most(|p| p.0).log2() - first).max(1.0);
    let y = |value: f64| {
        let part = match logarithmic {
            true => (value.max(1e-3).log10() - decades.0) / (decades.1 - decades.0).max(1.0),
            false => value / 100.0,
        };
        top + height * (1.0 - part)
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{left}\" y=\"22\" font-size=\"14\">{}</text>\n",
        escape(title)
    );
    let line = |x1: f64, y1: f64, x2: f64, y2: f64| {
        format!("<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#d0d7de\"/>\n")
    };
    let marks: Vec<f64> = match logarithmic {
        true => (decades.0 as i32..=decades.1 as i32).map(|p| 10_f64.powi(p)).collect(),
        false => (0..=5).map(|i| f64::from(i) * 20.0).collect(),
    };
    for mark in marks {
        svg += &line(left, y(mark), left + width, y(mark));
        let _ =
            writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{mark}</text>", left - 6.0, y(mark) + 4.0);
    }
    let mut tokens: Vec<f64> = points().map(|p| p.0).collect();
    tokens.sort_by(f64::total_cmp);
    tokens.dedup();
    if tokens.len() > 12 {
        tokens.retain(|tokens| tokens.log2().fract() == 0.0);
    }
    for tokens in tokens {
        svg += &line(x(tokens), top, x(tokens), top + height);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tokens}</text>",
            x(tokens),
            top + height + 18.0
        );
    }
    for (i, (s, colour)) in series.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let mut points = s.points.clone();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let path: Vec<String> = points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let dash = if s.dashed { " stroke-dasharray=\"5 4\"" } else { "" };
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
            path.join(" ")
        );
        let (at, from) = (top + 14.0 + 18.0 * i as f64, left + width + 10.0);
        let _ = writeln!(
            svg,
            "<line x1=\"{from}\" y1=\"{:.1}\" x2=\"{}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>\n\
             <text x=\"{}\" y=\"{at:.1}\">{}</text>",
            at - 4.0,
            from + 22.0,
            at - 4.0,
            from + 28.0,
            escape(&s.name)
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">tokens</text>\n</svg>",
        left + width / 2.0,
        HEIGHT - 8.0
    );
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::{row, run};

    #[test]
    fn every_system_has_a_line_beside_ours() {
        let ours = run(vec![row("m", 8, 1, 40.0), row("m", 8, 64, 90.0)]);
        let ours: Peers = serde_json::from_str(&serde_json::to_string(&ours).unwrap()).unwrap();
        let mut theirs = Peers { stored: Some("Monday".to_owned()), ..ours.clone() };
        theirs.rows.iter_mut().for_each(|r| r.peer = "a".to_owned());
        let rank = ours.rows[0].rank;
        let files = plots_beside(&ours, &[theirs], 8, rank);
        assert_eq!((files.len(), files[0].0.as_str()), (1, "m-beside.svg"));
        assert!(files[0].1.matches("<polyline").count() == 2 && files[0].1.contains(">a*<"));
        assert!(files[0].1.split("points=\"").skip(1).all(|l| l.split('"').next().unwrap().contains(' ')));
    }

    #[test]
    fn two_plots_a_layer_with_every_point_inside_the_picture() {
        let rows = [1, 16, 8192].into_iter().flat_map(|t| [row("a<b", 0, t, 40.0 * t as f64), row("a<b", 8, t, 50.0)]);
        let files = plots(&run(rows.collect()));
        assert_eq!(files.iter().map(|f| f.0.as_str()).collect::<Vec<_>>(), ["a<b-time.svg", "a<b-share.svg"]);
        for (_, svg) in files {
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.contains("a&lt;b"));
            assert!(svg.matches("<polyline").count() >= 2);
            let numbers = svg.split("points=\"").skip(1).flat_map(|l| l.split('"').next().unwrap().split([' ', ',']));
            let numbers: Vec<f64> = numbers.map(|n| n.parse().unwrap()).collect();
            assert!(numbers.chunks(2).all(|p| (0.0..=WIDTH).contains(&p[0]) && (0.0..=HEIGHT).contains(&p[1])));
        }
    }
}
