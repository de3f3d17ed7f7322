//! A request's deadline, counted from the moment its headers are here: the time in which it arrives is a part of it.

use std::time::{Duration, Instant};

use http::HeaderMap;

/// tonic has a timer of its own for the time until an answer begins, and answers CANCELLED. Ours is over before it.
const EARLIER: Duration = Duration::from_millis(1);
/// Digits of the header's number at most, see gRPC over HTTP/2.
const DIGITS_MAX: usize = 8;

/// When the whole call must be over. Travels in the request's extensions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(pub(crate) Instant);

/// As the client has set it.
pub(crate) fn of(headers: &HeaderMap) -> Option<Deadline> {
    let timeout = parse(headers.get("grpc-timeout")?.to_str().ok()?)?;
    Instant::now().checked_add(timeout.saturating_sub(EARLIER)).map(Deadline)
}

/// A number of at most eight digits and a unit.
fn parse(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok().filter(|_| number.len() <= DIGITS_MAX)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_of_grpc() {
        for (text, milliseconds) in [
            ("2H", 7_200_000),
            ("3M", 180_000),
            ("4S", 4000),
            ("150m", 150),
            ("7000u", 7),
            ("99999999n", 99),
            ("0m", 0),
            ("99999999H", 359_999_996_400_000),
        ] {
            assert_eq!(parse(text).unwrap().as_millis(), milliseconds, "{text}");
        }
        for text in ["", "S", "5", "5s", "-1S", "1.5S", "123456789S", "000000001S", "1 S", "1SS", "1é", "é"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
