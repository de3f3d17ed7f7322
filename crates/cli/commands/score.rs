//! `capsieve score`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::bail;
use capsieve_worker::{
    CaptionPolicy, DatasetJob, DatasetReport, EngineChoice, LoadedModel, Outcome, Outlook, Progress, Prospect,
    ScoreJob, Stats, Thresholds, look_at_dataset, score_dataset,
};
use clap::CommandFactory;
use clap::error::ErrorKind;

use super::{ROWS_WITHOUT_SCORE, columns};
use crate::args::{Args, OnError, OnShardError, ScoreArgs, heads};
use crate::progress::shown;
use crate::text;

pub(super) async fn run(args: ScoreArgs) -> anyhow::Result<ExitCode> {
    check_usage(&args);
    let model = LoadedModel::open(&args.model).await?;
    model.notes.iter().for_each(|note| tracing::warn!("{note}"));
    let (dry_run, on_shard_error) = (args.dry_run, args.on_shard_error);
    let job = job(args);
    if dry_run {
        let prospects = look_at_dataset(&model, &job).await?;
        text::print(&self::prospects(&prospects))?;
        return if prospects.iter().any(|prospect| prospect.outlook.is_err()) { Ok(1.into()) } else { Ok(0.into()) };
    }
    let progress = Progress::default();
    let report = shown(&progress, score_dataset(&model, &job, &progress)).await?;
    match &report.single {
        Some(Outcome::Complete { rows, failed }) => {
            let (rows, output) = (text::count(*rows, "row"), &job.output);
            text::print(&format!("{output} is already complete: {rows}, {failed} without a score, nothing to do\n"))?;
        }
        Some(Outcome::Done(stats)) => text::print(&summary(stats))?,
        None => text::print(&report_of(&report, &job.output))?,
    }
    if report.failed_shards > 0 && on_shard_error == OnShardError::Fail {
        let (failed, all) = (report.failed_shards, text::count(report.shards, "shard"));
        bail!("{failed} of {all} failed and have no output: the same command scores what is left");
    }
    // The same for the run that scored a shard and for a later one that finds it complete.
    let whole = report.failed == 0 && report.failed_shards == 0;
    Ok(if whole { ExitCode::SUCCESS } else { ROWS_WITHOUT_SCORE.into() })
}

/// What clap cannot see in one option; ends the program with status 2.
fn check_usage(args: &ScoreArgs) {
    let heads = heads(&args.heads);
    for (threshold, head, on) in [("--min-itm", "itm", heads.itm), ("--min-cosine", "cosine", heads.cosine)] {
        let set = if head == "itm" { args.output_rows.min_itm } else { args.output_rows.min_cosine };
        if set.is_some() && !on {
            let message = format!("{threshold} needs the head {head}: add it to --heads");
            Args::command().error(ErrorKind::ArgumentConflict, message).exit();
        }
    }
}

fn job(args: ScoreArgs) -> DatasetJob {
    let shard = ScoreJob {
        input: String::new(),
        output: String::new(),
        columns: columns(args.columns),
        heads: heads(&args.heads),
        itm_token: args.itm_token.into(),
        thresholds: Thresholds { min_itm: args.output_rows.min_itm, min_cosine: args.output_rows.min_cosine },
        policy: CaptionPolicy { tokens_max: args.max_caption_tokens, image_pixels_max: args.max_image_pixels },
        drop_images: args.output_rows.drop_images,
        fail_on_row: args.output_rows.on_error == OnError::Fail,
        overwrite: args.output_rows.overwrite,
        engine: EngineChoice { fetches_per_host: args.fetches.fetches_per_host, ..args.engine.into() },
    };
    DatasetJob {
        inputs: args.input,
        output: args.output,
        shard,
        partition: args.partition.map(|share| share.0),
        memory_bytes: args.memory_limit,
    }
}

fn summary(stats: &Stats) -> String {
    let total = stats.seconds.get("total").copied().unwrap_or_default();
    let without = reasons(&stats.errors);
    let mut lines = vec![
        ("rows", format!("{}: {} scored, {} without a score{without}", stats.rows, stats.scored, stats.failed)),
        (
            "pairs",
            format!("{} in {total:.1} s: {:.1} pairs/s", stats.pairs, stats.pairs_per_second.unwrap_or_default()),
        ),
        ("device", format!("{}, {}", stats.device, stats.precision)),
    ];
    lines.extend(stats.kept.map(|kept| ("kept", format!("{kept} of {}", text::count(stats.rows, "row")))));
    lines.push(("output", format!("{} ({})", stats.output, text::bytes(stats.bytes))));
    text::pairs(&lines)
}

/// " (decode_failed 2, null_image 1)", or nothing.
fn reasons<K: std::fmt::Display>(errors: &BTreeMap<K, u64>) -> String {
    let reasons: Vec<String> = errors.iter().map(|(reason, rows)| format!("{reason} {rows}")).collect();
    if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) }
}

fn report_of(report: &DatasetReport, output: &str) -> String {
    let DatasetReport { shards, complete, scored_shards, failed_shards, rows, failed, pairs, seconds, .. } = report;
    let done = format!("{shards}: {scored_shards} scored, {complete} complete already, {failed_shards} failed");
    let without = reasons(&report.errors);
    let rate = *pairs as f64 / seconds.max(1e-9);
    let mut lines = vec![
        ("shards", done),
        ("rows", format!("{rows}: {} scored, {failed} without a score{without}", rows - failed)),
        ("pairs", format!("{pairs} in {seconds:.1} s: {rate:.1} pairs/s")),
    ];
    lines.extend(report.kept.map(|kept| ("kept", format!("{kept} of the rows of this run"))));
    lines.push(("output", format!("{output} ({} written)", text::bytes(report.bytes))));
    lines.extend(report.failures.iter().map(|(shard, _)| ("failed", shard.clone())));
    let unnamed = failed_shards.saturating_sub(report.failures.len() as u64);
    lines.extend((unnamed > 0).then(|| ("", format!("and {unnamed} more, see the log"))));
    text::pairs(&lines)
}

/// What a run would do, shard by shard, and in all.
fn prospects(prospects: &[Prospect]) -> String {
    let (mut text, mut complete, mut failed) = (String::new(), 0_u64, 0_u64);
    let (mut new, mut rows_all, mut bytes_all) = (0_u64, 0, 0);
    for Prospect { input, output, outlook } in prospects {
        let what = match outlook {
            Ok(Outlook::Complete { rows, failed }) => {
                complete += 1;
                format!("complete, {}, {failed} without a score", text::count(*rows, "row"))
            }
            Ok(Outlook::New { rows, bytes, image, caption }) => {
                (new, rows_all, bytes_all) = (new + 1, rows_all + rows, bytes_all + bytes);
                let rows = text::count(*rows, "row");
                format!("{rows}, {}, image {image:?}, caption {caption:?}", text::bytes(*bytes))
            }
            Err(error) => {
                failed += 1;
                format!("cannot be scored: {:#}", anyhow::Error::msg(chain(error)))
            }
        };
        text.push_str(&format!("{input} -> {output}: {what}\n"));
    }
    let (rows, bytes) = (text::count(rows_all, "row"), text::bytes(bytes_all));
    let all = text::count(prospects.len() as u64, "shard");
    text.push_str(&format!(
        "{all}: {new} to score ({rows}, {bytes}), {complete} complete already, {failed} that cannot be\n"
    ));
    text
}

/// An error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
