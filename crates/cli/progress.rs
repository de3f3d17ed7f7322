//! A running job as a person sees it: a bar on a terminal, a log line now and then elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use capsieve_worker::Progress;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

const TICK: Duration = Duration::from_millis(200);
const LOG_INTERVAL: Duration = Duration::from_secs(10);
const BAR: &str = "{wide_bar} {pos}/{len} rows, {msg}";

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
}

impl State {
    fn now(progress: &Progress, start: Instant) -> Self {
        let (rows, total, seconds) = (progress.rows(), progress.rows_total(), start.elapsed().as_secs_f64().max(1e-9));
        let left = seconds / rows.max(1) as f64 * total.saturating_sub(rows) as f64;
        // A clock of whole seconds; a shard does not take longer than its cap.
        let left = (rows > 0).then(|| Duration::from_secs(left.min(1e9) as u64));
        Self {
            rows,
            total,
            failed: progress.failed(),
            pairs_per_second: progress.pairs() as f64 / seconds,
            left: left.map_or_else(|| "?".to_owned(), |left| HumanDuration(left).to_string()),
        }
    }

    fn draw(&self, bar: &ProgressBar) {
        let Self { rows, total, failed, pairs_per_second, left } = self;
        bar.set_length(*total);
        bar.set_position(*rows);
        bar.set_message(format!("{pairs_per_second:.1} pairs/s, {failed} failed, {left} left"));
    }

    fn log(&self) {
        let Self { rows, total, failed, pairs_per_second, left } = self;
        tracing::info!("{rows} of {total} rows, {pairs_per_second:.1} pairs/s, {failed} without a score, {left} left");
    }
}
