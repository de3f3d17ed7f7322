//! `capsieve submit`.

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use capsieve_rpc::v1::score_batch_response::Event;
use capsieve_rpc::{Submission, SubmitError, Update, v1};
use capsieve_worker::Progress;
use tokio::task::{JoinSet, block_in_place};

use super::ROWS_WITHOUT_SCORE;
use crate::args::{Head, OnError, SubmitArgs};
use crate::progress::shown;
use crate::text;

pub(super) async fn run(args: SubmitArgs) -> anyhow::Result<ExitCode> {
    let submission = submission(&args)?;
    let progress = Progress::default();
    let counted = progress.clone();
    // A task of its own, which ends with us: a reader that stalls our output must not make Ctrl-C wait.
    let mut job = JoinSet::new();
    job.spawn(async move {
        let on = |update: &Update<'_>| {
            let now = update.so_far;
            counted.show(now.rows, now.rows_failed, now.rows_total, now.pairs);
            counted.show_shards(now.shards_done, now.shards_total);
            match update.event {
                Event::Chunk(chunk) => block_in_place(|| print(update.shards, chunk)),
                _ => Ok(()),
            }
        };
        capsieve_rpc::submit(&submission, on).await
    });
    let ended = shown(&progress, job.join_next()).await;
    let summary = ended.context("the job is gone")?.context("the job broke down")?.map_err(failed)?;
    let line = self::summary(&summary, args.output.as_deref());
    // Standard output holds the scores where they are streamed.
    match args.output {
        Some(_) => text::print(&line)?,
        None => tracing::info!("{}", line.trim_end()),
    }
    Ok(if summary.failed == 0 { ExitCode::SUCCESS } else { ROWS_WITHOUT_SCORE.into() })
}

/// What a person reads of a job that failed.
fn failed(error: SubmitError) -> anyhow::Error {
    match error {
        SubmitError::Output(error) if error.kind() == ErrorKind::BrokenPipe => {
            anyhow!("standard output was closed before all scores were printed: the job was stopped")
        }
        SubmitError::Output(error) => anyhow!(error).context("the scores cannot be printed: the job was stopped"),
        error => error.into(),
    }
}

fn submission(args: &SubmitArgs) -> anyhow::Result<Submission> {
    let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
    let token = match &args.token_file {
        None => None,
        Some(path) => {
            let text = String::from_utf8(read(path)?).with_context(|| path.display().to_string())?;
            let token = capsieve_rpc::token_lines(&text).next().map(str::to_owned);
            Some(token.with_context(|| format!("{}: it holds no token: one in a line is expected", path.display()))?)
        }
    };
    let identity = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
        _ => None,
    };
    Ok(Submission {
        endpoint: args.endpoint.clone(),
        root: args.tls_ca.as_deref().map(read).transpose()?,
        identity,
        token,
        request: request(args),
        patience: Duration::from_secs_f64(args.patience),
        delay_max: Submission::DELAY_MAX,
    })
}

fn request(args: &SubmitArgs) -> v1::ScoreBatchRequest {
    let name = |name: &Option<String>| name.clone().unwrap_or_default();
    let columns = v1::ColumnMapping {
        image: name(&args.columns.image_column),
        caption: name(&args.columns.caption_column),
        key: name(&args.columns.key_column),
    };
    let shards = v1::ParquetShards { uris: args.input.clone(), columns: Some(columns), resume_tokens: Vec::new() };
    let head = |head: &Head| match head {
        Head::Itm => v1::Head::Itm.into(),
        Head::Cosine => v1::Head::Cosine.into(),
    };
    let policy = match args.output_rows.on_error {
        OnError::Null => v1::ErrorPolicy::Null,
        OnError::Fail => v1::ErrorPolicy::Fail,
    };
    v1::ScoreBatchRequest {
        source: Some(v1::score_batch_request::Source::Shards(shards)),
        heads: args.heads.iter().map(head).collect(),
        thresholds: Some(v1::Thresholds { min_itm: args.output_rows.min_itm, min_cosine: args.output_rows.min_cosine }),
        sink: args.output.clone().map(|uri| v1::ParquetSink {
            uri,
            drop_images: args.output_rows.drop_images,
            overwrite: args.output_rows.overwrite,
        }),
        request_id: args.request_id.clone(),
        on_error: policy.into(),
    }
}

/// A chunk as lines of JSON, one a caption.
fn print(shards: &[String], chunk: &v1::ScoreChunk) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut errors = chunk.errors.iter().peekable();
    let score = |scores: &[f32], i: usize| scores.get(i).filter(|score| score.is_finite()).copied();
    for (i, row) in chunk.row.iter().enumerate() {
        let mut line = serde_json::json!({
            "shard": shards.get(chunk.shard_index as usize),
            "row": row,
            "caption": chunk.caption[i],
        });
        if let Some(key) = chunk.key.get(i) {
            line["key"] = key.as_str().into();
        }
        for (name, scores) in [("itm_score", &chunk.itm_score), ("cosine_score", &chunk.cosine_score)] {
            if !scores.is_empty() {
                line[name] = score(scores, i).into();
            }
        }
        if let Some(keep) = chunk.keep.get(i) {
            line["keep"] = (*keep).into();
        }
        let error = errors.next_if(|error| error.index as usize == i);
        line["score_status"] = error.map_or("ok", |error| &error.status).into();
        if let Some(error) = error {
            line["score_error"] = error.message.as_str().into();
        }
        writeln!(out, "{line}")?;
    }
    out.flush()
}

fn summary(summary: &v1::ScoreSummary, output: Option<&str>) -> String {
    let v1::ScoreSummary { rows, scored, failed, errors, pairs, shards, seconds } = summary;
    let mut reasons: Vec<String> = errors.iter().map(|(reason, rows)| format!("{reason} {rows}")).collect();
    reasons.sort_unstable();
    let without = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
    let to = output.map(|output| format!(" to {output}")).unwrap_or_default();
    format!(
        "{shards} shards{to}: {rows} rows, {scored} scored, {failed} without a score{without}; {pairs} pairs in {seconds:.1} s\n"
    )
}
