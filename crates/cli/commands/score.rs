//! `capsieve score`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::bail;
use capsieve_worker::{
    CaptionPolicy, Counts, DatasetJob, DatasetReport, EngineChoice, LoadedModel, Outcome, Outlook, Progress, Prospect,
    Rejected, STATUSES, ScoreJob, Stats, Thresholds, look_at_dataset, score_dataset,
};
use clap::CommandFactory;
use clap::error::ErrorKind;

use super::{ROWS_WITHOUT_SCORE, columns};
use crate::args::{Args, OnError, OnShardError, ScoreArgs, Selection, heads};
use crate::progress::shown;
use crate::text;

/// Buffers of so many bytes are the system's again when they are dropped. Less would cost a tenth of the rows a second of a small
/// model, for row groups of a few megabytes.
const LARGE_BYTES: usize = 8 << 20;

pub(super) async fn run(args: ScoreArgs) -> anyhow::Result<ExitCode> {
    check_usage(&args);
    capsieve_worker::give_large_buffers_back(LARGE_BYTES);
    capsieve_worker::share_heaps();
    let model = LoadedModel::open(&args.model).await?;
    model.notes.iter().for_each(|note| tracing::warn!("{note}"));
    let (dry_run, on_shard_error, overwrite) = (args.dry_run, args.on_shard_error, args.output_rows.overwrite);
    let job = job(args);
    if dry_run {
        let mut all = Prospects::default();
        look_at_dataset(&model, &job, |prospect| text::print(&all.line(&prospect))).await?;
        text::print(&all.summary())?;
        return Ok(ExitCode::from(u8::from(all.failed > 0)));
    }
    let progress = Progress::default();
    let report = shown(&progress, score_dataset(&model, &job, &progress)).await?;
    match &report.single {
        Some(Outcome::Complete(Counts { rows, failed, .. })) => {
            let (rows, output) = (text::count(*rows, "row"), &job.output);
            text::print(&format!("{output} is already complete: {rows}, {failed} without a score, nothing to do\n"))?;
        }
        Some(Outcome::Done(stats)) => text::print(&summary(stats))?,
        None => text::print(&report_of(&report, &job.output))?,
    }
    if let Some(error) = report.ended {
        return Err(anyhow::Error::new(error).context("the run ended before all shards had their turn"));
    }
    if report.failed_shards > 0 && on_shard_error == OnShardError::Fail {
        let (failed, all) = (report.failed_shards, text::count(report.shards, "shard"));
        let again = if overwrite { "all shards anew" } else { "what is left" };
        bail!("{failed} of {all} failed and nothing was written for them: the same command scores {again}");
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
    let thresholds = args.output_rows.min_itm.is_some() || args.output_rows.min_cosine.is_some();
    let filters = [
        ("--kept-only", args.kept_only),
        ("--rejected", args.rejected.is_some()),
        ("--select matching", args.select == Selection::Matching),
    ];
    if let Some((filter, _)) = filters.into_iter().find(|(_, set)| *set && !thresholds) {
        let message = format!("{filter} needs to know which rows are kept: add --min-itm or --min-cosine");
        Args::command().error(ErrorKind::MissingRequiredArgument, message).exit();
    }
    let others = [
        ("--kept-only", args.kept_only),
        ("--rejected", args.rejected.is_some()),
        ("--select", args.select != Selection::All),
        ("--overwrite", args.output_rows.overwrite),
    ];
    if let Some((other, _)) = others.into_iter().find(|(_, set)| *set && !args.retry_status.is_empty()) {
        let message = format!("--retry-status takes the other rows from the output: it cannot be used with {other}");
        Args::command().error(ErrorKind::ArgumentConflict, message).exit();
    }
}

fn job(args: ScoreArgs) -> DatasetJob {
    let shard = ScoreJob {
        input: String::new(),
        output: String::new(),
        rejected: None,
        kept_only: args.kept_only || args.rejected.is_some(),
        select: args.select.into(),
        columns: columns(args.columns),
        heads: heads(&args.heads),
        itm_token: args.itm_token.into(),
        thresholds: Thresholds { min_itm: args.output_rows.min_itm, min_cosine: args.output_rows.min_cosine },
        policy: CaptionPolicy { tokens_max: args.max_caption_tokens, image_pixels_max: args.max_image_pixels },
        drop_images: args.output_rows.drop_images,
        fail_on_row: args.output_rows.on_error == OnError::Fail,
        overwrite: args.output_rows.overwrite,
        retry: STATUSES.into_iter().filter(|status| args.retry_status.iter().any(|retry| retry == status)).collect(),
        engine: EngineChoice { fetches_per_host: args.fetches.fetches_per_host, ..args.engine.into() },
    };
    DatasetJob {
        inputs: args.input,
        output: args.output,
        rejected: args.rejected,
        shard,
        partition: args.partition.map(|share| share.0),
        memory_bytes: args.memory_limit,
    }
}

fn summary(stats: &Stats) -> String {
    let total = stats.seconds.get("total").copied().unwrap_or_default();
    let Counts { rows, scored, failed, errors, pairs, kept, .. } = &stats.counts;
    let without = reasons(errors);
    let mut lines = vec![
        ("rows", format!("{rows}: {scored} scored, {failed} without a score{without}")),
        ("pairs", format!("{pairs} in {total:.1} s: {:.1} pairs/s", stats.pairs_per_second.unwrap_or_default())),
        ("device", format!("{}, {}", stats.device, stats.precision)),
    ];
    lines.extend(kept.map(|kept| ("kept", format!("{kept} of {}", text::count(*rows, "row")))));
    lines.push(("output", format!("{} ({})", stats.output, text::bytes(stats.bytes))));
    let rejected =
        |to: &Rejected| format!("{} ({}, {})", to.output, text::count(to.rows, "row"), text::bytes(to.bytes));
    lines.extend(stats.rejected.as_ref().map(|to| ("rejected", rejected(to))));
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
    lines.extend(report.kept.map(|kept| ("kept", format!("{kept} of {}", text::count(*rows, "row")))));
    lines.push(("output", format!("{output} ({} written)", text::bytes(report.bytes))));
    lines.extend(report.failures.iter().map(|(shard, _)| ("failed", shard.clone())));
    let unnamed = failed_shards.saturating_sub(report.failures.len() as u64);
    lines.extend((unnamed > 0).then(|| ("", format!("and {unnamed} more, see the log"))));
    text::pairs(&lines)
}

/// What a run would do, in all.
#[derive(Default)]
struct Prospects {
    complete: u64,
    failed: u64,
    new: u64,
    rows: u64,
    bytes: u64,
}

impl Prospects {
    /// Of one shard, which is counted.
    fn line(&mut self, Prospect { input, output, rejected, outlook }: &Prospect) -> String {
        let what = match outlook {
            Ok(Outlook::Complete(Counts { rows, failed, .. })) => {
                self.complete += 1;
                format!("complete, {}, {failed} without a score", text::count(*rows, "row"))
            }
            Ok(Outlook::New { rows, bytes, image, caption }) => {
                (self.new, self.rows, self.bytes) = (self.new + 1, self.rows + rows, self.bytes + bytes);
                let rows = text::count(*rows, "row");
                format!("{rows}, {}, image {image:?}, caption {caption:?}", text::bytes(*bytes))
            }
            Err(error) => {
                self.failed += 1;
                format!("cannot be scored: {}", chain(error))
            }
        };
        let rejected = rejected.as_ref().map(|rejected| format!(", rejected rows {rejected}")).unwrap_or_default();
        format!("{input} -> {output}{rejected}: {what}\n")
    }

    fn summary(&self) -> String {
        let Self { complete, failed, new, rows, bytes } = self;
        let all = text::count(complete + failed + new, "shard");
        let (rows, bytes) = (text::count(*rows, "row"), text::bytes(*bytes));
        format!("{all}: {new} to score ({rows}, {bytes}), {complete} complete already, {failed} that cannot be\n")
    }
}

/// An error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
