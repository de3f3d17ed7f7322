//! `capsieve score`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use capsieve_worker::{CaptionPolicy, LoadedModel, Outcome, Progress, ScoreJob, Stats, Thresholds};
use clap::CommandFactory;
use clap::error::ErrorKind;

use super::{ROWS_WITHOUT_SCORE, columns};
use crate::args::{Args, OnError, ScoreArgs, heads};
use crate::progress::shown;
use crate::text;

pub(super) async fn run(args: ScoreArgs) -> anyhow::Result<ExitCode> {
    check_usage(&args);
    let [input] = args.input.as_slice() else { bail!("--input: {}", ONE_SHARD) };
    if input.ends_with('/') || input.contains('*') || Path::new(input).is_dir() {
        bail!("--input {input}: {ONE_SHARD}");
    }
    let model = LoadedModel::open(&args.model).await?;
    model.notes.iter().for_each(|note| tracing::warn!("{note}"));
    let job = job(args);
    let progress = Progress::default();
    match shown(&progress, capsieve_worker::score(&model, &job, &progress)).await? {
        Outcome::Complete { rows, failed } => {
            let rows = text::count(rows, "row");
            let line = format!("{} is already complete: {rows}, {failed} without a score, nothing to do\n", job.output);
            text::print(&line)?;
            Ok(status(failed))
        }
        Outcome::Done(stats) => {
            text::print(&summary(&stats))?;
            Ok(status(stats.failed))
        }
    }
}

/// The same for the run that scored a shard and for a later one that finds it complete.
fn status(failed: u64) -> ExitCode {
    if failed == 0 { ExitCode::SUCCESS } else { ROWS_WITHOUT_SCORE.into() }
}

const ONE_SHARD: &str = "one shard per run for now: pass one Parquet file, run the command again for the next";

/// What clap cannot see in one option; ends the program with status 2.
fn check_usage(args: &ScoreArgs) {
    let heads = heads(&args.heads);
    for (threshold, head, on) in [("--min-itm", "itm", heads.itm), ("--min-cosine", "cosine", heads.cosine)] {
        let set = if head == "itm" { args.min_itm } else { args.min_cosine };
        if set.is_some() && !on {
            let message = format!("{threshold} needs the head {head}: add it to --heads");
            Args::command().error(ErrorKind::ArgumentConflict, message).exit();
        }
    }
}

fn job(args: ScoreArgs) -> ScoreJob {
    ScoreJob {
        input: args.input.into_iter().next().unwrap_or_default(),
        output: args.output,
        columns: columns(args.columns),
        heads: heads(&args.heads),
        itm_token: args.itm_token.into(),
        thresholds: Thresholds { min_itm: args.min_itm, min_cosine: args.min_cosine },
        policy: CaptionPolicy { tokens_max: args.max_caption_tokens, image_pixels_max: args.max_image_pixels },
        drop_images: args.drop_images,
        fail_on_row: args.on_error == OnError::Fail,
        overwrite: args.overwrite,
        engine: args.engine.into(),
    }
}

fn summary(stats: &Stats) -> String {
    let reasons: Vec<String> = stats.errors.iter().map(|(reason, rows)| format!("{reason} {rows}")).collect();
    let without = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
    let total = stats.seconds.get("total").copied().unwrap_or_default();
    let mut lines = vec![
        ("rows", format!("{}: {} scored, {} without a score{without}", stats.rows, stats.scored, stats.failed)),
        ("pairs", format!("{} in {total:.1} s: {:.1} pairs/s", stats.pairs, stats.pairs_per_second)),
        ("device", format!("{}, {}", stats.device, stats.precision)),
    ];
    lines.extend(stats.kept.map(|kept| ("kept", format!("{kept} of {}", text::count(stats.rows, "row")))));
    lines.push(("output", format!("{} ({})", stats.output, text::bytes(stats.bytes))));
    text::pairs(&lines)
}
