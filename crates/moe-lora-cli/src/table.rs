//! Aligned tables for terminals.

/// Prints rows under a header; columns are as wide as their widest cell, numbers flush right.
pub(crate) fn print(header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let numeric = |c: usize| {
        rows.iter().all(|r| r.get(c).is_some_and(|cell| cell.starts_with(|x: char| x.is_ascii_digit() || x == '-')))
    };
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (c, cell) in cells.enumerate() {
            let pad = " ".repeat(widths[c].saturating_sub(cell.chars().count()));
            let (left, right) = if numeric(c) { (pad.as_str(), "") } else { ("", pad.as_str()) };
            text.extend([left, cell, right, "  "]);
        }
        println!("{}", text.trim_end());
    };
    line(&mut header.iter().copied());
    line(&mut widths.iter().map(|&w| "-".repeat(w)).collect::<Vec<_>>().iter().map(String::as_str));
    rows.iter().for_each(|row| line(&mut row.iter().map(String::as_str)));
}

/// Prints `name  value` lines with aligned values.
pub(crate) fn print_fields(fields: &[(&str, String)]) {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    fields.iter().for_each(|(name, value)| println!("{name:width$}  {value}"));
}

/// A byte count for people.
pub(crate) fn bytes(count: usize) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (count as f64, "B");
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    #[test]
    fn byte_counts_read_well() {
        assert_eq!(super::bytes(0), "0 B");
        assert_eq!(super::bytes(1536), "1.5 KiB");
        assert_eq!(super::bytes(8 << 30), "8.0 GiB");
    }
}
