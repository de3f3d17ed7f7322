//! A running job as a person sees it: a bar on a terminal, a log line now and then elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use capsieve_worker::Progress;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

const TICK: Duration = Duration::from_millis(200);
const LOG_INTERVAL: Duration = Duration::from_secs(10);
const BAR: &str = "{wide_bar} {pos}/{len} rows, {msg}";

/// ", 3 of 10 shards", or nothing where there is just one.
fn shards(progress: &Progress) -> String {
    let (done, total) = progress.shards();
    if total == 0 { String::new() } else { format!(", {done} of {total} shards") }
}

/// Runs `job` to its end and shows `progress` meanwhile.
pub(crate) async fn shown<T>(progress: &Progress, job: impl Future<Output = T>) -> T {
    tokio::pin!(job);
    let bar = stderr().is_terminal().then(bar);
    let mut ticks = tokio::time::interval(TICK);
    let mut start = Instant::now();
    let mut logged = start;
    loop {
        tokio::select! {
            ended = &mut job => {
                if let Some(bar) = &bar {
                    bar.finish_and_clear();
                }
                return ended;
            }
            // The clock starts when the shard is open and the model loaded.
            _ = ticks.tick() => match &bar {
                _ if progress.rows_total() == 0 => (start, logged) = (Instant::now(), Instant::now()),
                Some(bar) => State::now(progress, start).draw(bar),
                None if logged.elapsed() >= LOG_INTERVAL => {
                    State::now(progress, start).log();
                    logged = Instant::now();
                }
                None => {}
            },
        }
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
}

struct State {
    rows: u64,
    total: u64,
    failed: u64,
    pairs_per_second: f64,
    /// "1h 2m 3s", or that nobody knows yet.
    left: String,
    shards: String,
}

impl State {
    fn now(progress: &Progress, start: Instant) -> Self {
        let (rows, seconds) = (progress.rows(), start.elapsed().as_secs_f64().max(1e-9));
        let total = progress.rows_expected();
        let left = seconds / rows.max(1) as f64 * total.saturating_sub(rows) as f64;
        // A clock of whole seconds; a shard does not take longer than its cap.
        let left = (rows > 0).then(|| Duration::from_secs(left.min(1e9) as u64));
        Self {
            rows,
            total,
            failed: progress.failed(),
            pairs_per_second: progress.pairs() as f64 / seconds,
            left: left.map_or_else(|| "?".to_owned(), |left| HumanDuration(left).to_string()),
            shards: shards(progress),
        }
    }

    fn draw(&self, bar: &ProgressBar) {
        let Self { rows, total, failed, pairs_per_second, left, shards } = self;
        bar.set_length(*total);
        bar.set_position(*rows);
        bar.set_message(format!("{pairs_per_second:.1} pairs/s, {failed} failed{shards}, {left} left"));
    }

    fn log(&self) {
        let Self { rows, total, failed, pairs_per_second, left, shards } = self;
        let rate = format!("{pairs_per_second:.1} pairs/s");
        tracing::info!("{rows} of {total} rows, {rate}, {failed} without a score{shards}, {left} left");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_show_where_there_are_any() {
        let progress = Progress::default();
        progress.show(100, 0, 400, 100);
        assert_eq!(shards(&progress), "");
        progress.show_shards(3, 10);
        assert_eq!(shards(&progress), ", 3 of 10 shards");
    }
}
