//! Text for people: standard output, tables, sizes.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

/// Prints a result. A reader that has seen enough (`| head`) is no error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| anyhow::Error::new(error).context("cannot write to standard output")),
    }
}

/// Lines `name   value`, values in one column.
pub(crate) fn pairs(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    lines.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

/// "12.3 MB".
pub(crate) fn bytes(count: u64) -> String {
    let (mut value, mut unit) = (count as f64, "B");
    for next in ["kB", "MB", "GB", "TB"] {
        if value < 999.5 {
            break;
        }
        (value, unit) = (value / 1000.0, next);
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

/// `text` on one line of at most `columns` characters.
pub(crate) fn shortened(text: &str, columns: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= columns {
        return line;
    }
    line.chars().take(columns.saturating_sub(3)).chain("...".chars()).collect()
}

/// A number with three decimals, or a dash.
pub(crate) fn share(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"))
}

/// "2 rows", "1 row".
pub(crate) fn count(number: impl Display + PartialEq<u64>, noun: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_one_decimal() {
        let found: Vec<String> = [0, 999, 1000, 1_234_567, 999_960, 1_900_000_000].map(bytes).into();
        assert_eq!(found, ["0 B", "999 B", "1.0 kB", "1.2 MB", "1.0 MB", "1.9 GB"]);
    }

    #[test]
    fn long_and_broken_lines_fit() {
        assert_eq!(shortened("a\n b\tc", 10), "a b c");
        assert_eq!(shortened("äöü äöü äöü", 8), "äöü ä...");
    }

    #[test]
    fn columns_line_up() {
        assert_eq!(pairs(&[("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2\n");
    }
}
