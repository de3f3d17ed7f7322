//! A running job as a person sees it: a bar on a terminal, a log line now and then elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use capsieve_worker::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const BAR_INTERVAL: Duration = Duration::from_millis(200);
const LOG_INTERVAL: Duration = Duration::from_secs(10);
const BAR: &str = "{bar:32} {pos}/{len} rows, {msg}, {elapsed} gone, {eta} to go";

/// Runs `job` to its end and shows `progress` meanwhile.
pub(crate) async fn shown<T>(progress: &Progress, job: impl Future<Output = T>) -> T {
    tokio::pin!(job);
    let bar = stderr().is_terminal().then(bar);
    let start = Instant::now();
    let mut ticks = tokio::time::interval(if bar.is_some() { BAR_INTERVAL } else { LOG_INTERVAL });
    // The first tick comes at once, when there is nothing to show.
    ticks.tick().await;
    loop {
        tokio::select! {
            ended = &mut job => {
                if let Some(bar) = &bar {
                    bar.finish_and_clear();
                }
                return ended;
            }
            _ = ticks.tick() => match &bar {
                Some(bar) => draw(bar, progress, start),
                None => log(progress, start),
            },
        }
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
}

/// Nothing is shown before the shard is open.
fn draw(bar: &ProgressBar, progress: &Progress, start: Instant) {
    if progress.rows_total() > 0 {
        bar.set_length(progress.rows_total());
        bar.set_position(progress.rows());
        bar.set_message(format!("{:.1} pairs/s, {} without a score", pairs_per_second(progress, start), progress.failed()));
    }
}

fn log(progress: &Progress, start: Instant) {
    let (rows, total) = (progress.rows(), progress.rows_total());
    if total > 0 {
        let pairs_per_second = pairs_per_second(progress, start);
        let left = (rows > 0).then(|| start.elapsed().as_secs_f64() / rows as f64 * total.saturating_sub(rows) as f64);
        let eta_seconds = left.unwrap_or(f64::NAN);
        let failed = progress.failed();
        tracing::info!(rows, total, failed, "{pairs_per_second:.1} pairs/s, {eta_seconds:.0} s to go");
    }
}

fn pairs_per_second(progress: &Progress, start: Instant) -> f64 {
    progress.pairs() as f64 / start.elapsed().as_secs_f64().max(1e-9)
}
