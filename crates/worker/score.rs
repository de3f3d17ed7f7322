//! The job `score`: one shard in, the same rows with scores out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use capsieve_engine::{Heads, ItmToken};
use capsieve_store::{
    Access, ColumnOptions, Footer, KEEP, Location, ObjectInfo, OutputHeads, OutputOptions, SCORE_STATUS, ShardReader,
    ShardWriter,
};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::limits::{OUTPUT_BYTES, OUTPUT_BYTES_MIN};
use crate::model::hex;
use crate::pipeline::{self, Images, Output, Stages, Totals};
use crate::rows::ShardRows;
use crate::shared::{LazyEngine, SharedEngine};
use crate::{CaptionPolicy, EngineChoice, Error, LoadedModel, Precision, Progress, Result, StoreError};
use capsieve_store::blocking;

/// Key of the output's metadata by which a rerun recognises its own work.
const FINGERPRINT: &str = "capsieve.fingerprint";

/// The least scores of a row that is kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct Thresholds {
    /// Of `itm_score`.
    pub min_itm: Option<f32>,
    /// Of `cosine_score`.
    pub min_cosine: Option<f32>,
}

/// What to score and how.
#[derive(Clone, Debug)]
pub struct ScoreJob {
    /// URI of the shard.
    pub input: String,
    /// URI of the output.
    pub output: String,
    /// Names of columns, where they are not to be detected.
    pub columns: ColumnOptions,
    /// Which scores.
    pub heads: Heads,
    /// First token of the matching head.
    pub itm_token: ItmToken,
    /// Adds the column `keep`.
    pub thresholds: Thresholds,
    /// What is too long and too large.
    pub policy: CaptionPolicy,
    /// Leaves the image column out.
    pub drop_images: bool,
    /// Ends the job at the first row without a score.
    pub fail_on_row: bool,
    /// Replaces an output that is there.
    pub overwrite: bool,
    /// What computes and how.
    pub engine: EngineChoice,
}

/// What a finished job has to say; also the content of `NAME.stats.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// Version of the program.
    pub version: &'static str,
    /// URI of the input.
    pub input: String,
    /// URI of the output.
    pub output: String,
    /// SHA-256 of the model.
    pub model: String,
    /// SHA-256 of all that decides the output: the input's version, the model, the options.
    pub fingerprint: String,
    /// "cpu (avx512, 2 threads)"; not there where a killed run could not say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub device: String,
    /// "f32"
    pub precision: &'static str,
    /// Rows in and out: scored + failed.
    pub rows: u64,
    /// Rows with a score.
    pub scored: u64,
    /// Rows without one.
    pub failed: u64,
    /// Failed rows by reason.
    pub errors: BTreeMap<String, u64>,
    /// Captions scored.
    pub pairs: u64,
    /// Rows that pass the thresholds, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<u64>,
    /// Bytes of the output.
    pub bytes: u64,
    /// Busy seconds by stage; stages overlap, so they add up to more than `total`. Empty where a killed run could not say.
    pub seconds: BTreeMap<&'static str, f64>,
    /// Pairs by total seconds, the model's loading excluded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs_per_second: Option<f64>,
}

/// How a job ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The output is written.
    Done(Box<Stats>),
    /// The output was there already, made from the same input, model and options.
    Complete {
        /// Its rows.
        rows: u64,
        /// Those without a score.
        failed: u64,
    },
}

/// Scores a shard.
///
/// # Errors
/// Whatever ends the job, see [`Error`]; nothing is then written.
pub async fn score(model: &LoadedModel, job: &ScoreJob, progress: &Progress) -> Result<Outcome> {
    score_shard(&LazyEngine::new(model, job, None)?, job, progress).await
}

/// Scores a shard with an engine that other shards may use too.
pub(crate) async fn score_shard(engine: &LazyEngine<'_>, job: &ScoreJob, progress: &Progress) -> Result<Outcome> {
    let access = Access::everything();
    match open(job, (&engine.hash, engine.engines.precision), &access).await? {
        Opened::Complete(outcome, _) => Ok(outcome),
        Opened::New(shard) => shard.score(job, engine.get().await?, &access, progress).await,
    }
}

/// What would become of a shard.
#[derive(Clone, Debug)]
pub enum Outlook {
    /// The output is complete.
    Complete {
        /// Its rows.
        rows: u64,
        /// Of these, rows without a score.
        failed: u64,
    },
    /// It would be scored.
    New {
        /// Rows of the input.
        rows: u64,
        /// Bytes of the input.
        bytes: u64,
        /// Column of the images.
        image: String,
        /// Column of the captions.
        caption: String,
    },
}

/// Looks at input and output, and begins nothing.
pub(crate) async fn outlook(engine: &LazyEngine<'_>, job: &ScoreJob) -> Result<Outlook> {
    let found = look(job, (&engine.hash, engine.engines.precision), &Access::everything()).await?;
    if let Some(Outcome::Complete { rows, failed }) = found.complete {
        return Ok(Outlook::Complete { rows, failed });
    }
    let (reader, columns) = (&found.reader, found.reader.columns());
    let name = |column: usize| reader.schema().field(column).name().clone();
    let (image, caption) = (name(columns.image), name(columns.caption));
    Ok(Outlook::New { rows: reader.rows(), bytes: reader.object_info().size, image, caption })
}

/// A job whose input was looked at.
pub(crate) enum Opened {
    /// The output is there already, made from this version of the input.
    Complete(Outcome, ObjectInfo),
    /// Its output was begun.
    New(Box<OpenShard>),
}

/// A shard between opening and scoring.
pub(crate) struct OpenShard {
    input: Location,
    output: Location,
    reader: ShardReader,
    writer: ShardWriter,
    fingerprint: String,
}

/// What is there of a job before anything is done.
struct Found {
    input: Location,
    output: Location,
    reader: ShardReader,
    fingerprint: String,
    complete: Option<Outcome>,
}

/// Looks at the input, and whether the work is done.
async fn look(job: &ScoreJob, (hash, precision): (&str, Precision), access: &Access) -> Result<Found> {
    let (access, names) = (access.clone(), (job.input.clone(), job.output.clone()));
    // Names are resolved link by link, with calls of the system that block.
    let (input, output) = blocking(move || {
        let (input, output) = (access.open(&names.0)?, access.open(&names.1)?);
        match input.same_object(&output) {
            true => Err(Error::SameObject { uri: output.to_string() }),
            false => Ok((input, output)),
        }
    })
    .await?;
    let reader = ShardReader::open(&input, &job.columns).await?;
    let fingerprint = fingerprint(job, hash, precision, reader.object_info());
    let complete = match !job.overwrite && output.exists().await? {
        true => Some(complete(job, &output, &fingerprint).await?),
        false => None,
    };
    if !job.overwrite && complete.is_none() {
        capsieve_store::check_stats(&output).await?;
    }
    Ok(Found { input, output, reader, fingerprint, complete })
}

/// Opens input and output, or finds that the work is done.
pub(crate) async fn open(job: &ScoreJob, (hash, precision): (&str, Precision), access: &Access) -> Result<Opened> {
    let Found { input, output, reader, fingerprint, complete } = look(job, (hash, precision), access).await?;
    if let Some(outcome) = complete {
        // Killed between the output and its statistics, a run leaves them to the next one, and what it had not tidied up.
        restore_stats(job, (hash, precision), &fingerprint, &output).await?;
        return Ok(Opened::Complete(outcome, reader.object_info().clone()));
    }
    let options = output_options(job, (hash, precision), &fingerprint, &reader, &input);
    let writer = ShardWriter::create(&output, reader.schema(), reader.columns(), &options).await?;
    Ok(Opened::New(Box::new(OpenShard { input, output, reader, writer, fingerprint })))
}

impl OpenShard {
    /// The input as it is now.
    pub(crate) fn input_info(&self) -> &ObjectInfo {
        self.reader.object_info()
    }

    /// Scores it and publishes the output.
    pub(crate) async fn score(
        self,
        job: &ScoreJob,
        engine: &SharedEngine,
        access: &Access,
        progress: &Progress,
    ) -> Result<Outcome> {
        let Self { input, output, reader, writer, fingerprint } = self;
        let (rows, columns, info) = (reader.rows(), reader.columns().clone(), reader.object_info().clone());
        let mut input_rows = ShardRows::new(reader, 0, &engine.row_groups)?;
        let _held = engine.outputs.take_or(output_bytes(&info), || input_rows.release()).await;
        progress.start(rows);
        let start = Instant::now();
        let stages = Stages {
            input: input_rows,
            images: Images { beside: Some(input), access: access.clone(), fetcher: Arc::clone(&engine.fetcher) },
            columns,
            preparer: Arc::clone(&engine.preparer),
            share: engine.pool.queue().join(job.heads, progress.clone()),
            budget: engine.budget.clone(),
            output: Output::Shard(Box::new(writer)),
            first_row: 0,
            fail_on_row: job.fail_on_row,
        };
        let totals = match pipeline::run(stages).await {
            Ok(totals) => totals,
            // Another run of the same job was faster: its output is as good as ours.
            Err(Error::Store(error @ (StoreError::Superseded { .. } | StoreError::Exists { .. }))) => {
                return match complete(job, &output, &fingerprint).await {
                    // It was another job, and this one was to replace what is there: "exists" would be no help.
                    Err(Error::Foreign { .. }) if job.overwrite => Err(error.into()),
                    // A store may have taken our own output although its answer was lost.
                    Ok(found) => {
                        restore_stats(job, (&engine.hash, engine.precision), &fingerprint, &output).await?;
                        Ok(found)
                    }
                    Err(error) => Err(error),
                };
            }
            Err(error) => return Err(error),
        };
        assert_eq!(totals.written.rows, rows, "every row that was read was written");
        let stats = stats(job, engine, fingerprint, totals, start.elapsed().as_secs_f64());
        capsieve_store::write_stats(&output, &stats).await?;
        Ok(Outcome::Done(Box::new(stats)))
    }
}

/// What writing the output of this input takes at a time.
fn output_bytes(input: &ObjectInfo) -> usize {
    let input = usize::try_from(input.size).unwrap_or(usize::MAX);
    OUTPUT_BYTES_MIN.saturating_add(input.saturating_mul(2)).min(OUTPUT_BYTES)
}

/// An output that is there: ours, or somebody else's?
async fn complete(job: &ScoreJob, output: &Location, fingerprint: &str) -> Result<Outcome> {
    let foreign = || Error::Foreign { uri: output.to_string() };
    // What is no whole Parquet file is no output of ours; a store that does not answer says nothing about it.
    let footer = Footer::read(output).await.map_err(|error| match error {
        StoreError::NotParquet { .. }
        | StoreError::Cut { .. }
        | StoreError::Encrypted { .. }
        | StoreError::Corrupt { .. }
        | StoreError::LongFooter { .. }
        | StoreError::Folder { .. }
        | StoreError::Malformed { .. } => foreign(),
        other => other.into(),
    })?;
    match footer.schema().metadata().get(FINGERPRINT) {
        Some(found) if found == fingerprint => {
            let failed = footer.failed_rows().unwrap_or_default();
            if job.fail_on_row && failed > 0 {
                return Err(Error::RowsFailed { uri: output.to_string(), failed });
            }
            Ok(Outcome::Complete { rows: footer.rows(), failed })
        }
        _ => Err(foreign()),
    }
}

/// The statistics of an output that has none, from what it says itself: how long it took is lost.
async fn restore_stats(
    job: &ScoreJob,
    (hash, precision): (&str, Precision),
    fingerprint: &str,
    output: &Location,
) -> Result<()> {
    if capsieve_store::has_stats(output, fingerprint).await? {
        return Ok(());
    }
    capsieve_store::remove_leftovers(output).await;
    let footer = Footer::read(output).await?;
    let (rows, pairs, bytes) = (footer.rows(), footer.scored_pairs(), footer.object_info().size);
    let kept = capsieve_store::value_counts(footer.clone(), KEEP).await?.map(|kept| kept.get("true").copied());
    let mut errors = capsieve_store::value_counts(footer, SCORE_STATUS).await?.unwrap_or_default();
    let scored = errors.remove("ok").unwrap_or_default();
    let stats = Stats {
        version: env!("CARGO_PKG_VERSION"),
        input: job.input.clone(),
        output: job.output.clone(),
        model: hash.to_owned(),
        fingerprint: fingerprint.to_owned(),
        device: String::new(),
        precision: precision.name(),
        rows,
        scored,
        failed: rows - scored,
        errors,
        pairs: pairs.unwrap_or(scored),
        kept: kept.map(Option::unwrap_or_default),
        bytes,
        seconds: BTreeMap::new(),
        pairs_per_second: None,
    };
    capsieve_store::write_stats(output, &stats).await?;
    Ok(())
}

/// SHA-256 over everything that decides the content of the output.
fn fingerprint(job: &ScoreJob, model: &str, precision: Precision, input: &ObjectInfo) -> String {
    let ScoreJob { columns, heads, itm_token, thresholds, policy, drop_images, .. } = job;
    let identity = (input.size, &input.e_tag, input.modified);
    let all = format!(
        "{model} {precision:?} {identity:?} {columns:?} {heads:?} {itm_token:?} {thresholds:?} {policy:?} {drop_images}"
    );
    hex(&Sha256::digest(all))
}

fn output_options(
    job: &ScoreJob,
    (hash, precision): (&str, Precision),
    fingerprint: &str,
    reader: &ShardReader,
    input: &Location,
) -> OutputOptions {
    let info = reader.object_info();
    let etag = info.e_tag.clone().unwrap_or_default();
    let heads: Vec<&str> = [(job.heads.itm, "itm"), (job.heads.cosine, "cosine")]
        .into_iter()
        .filter_map(|(on, name)| on.then_some(name))
        .collect();
    let token = if job.itm_token == ItmToken::Cls { "cls" } else { "enc" };
    let metadata = [
        ("capsieve.version", env!("CARGO_PKG_VERSION").to_owned()),
        ("capsieve.model", hash.to_owned()),
        ("capsieve.precision", precision.name().to_owned()),
        ("capsieve.heads", heads.join(",")),
        ("capsieve.itm_token", token.to_owned()),
        (
            "capsieve.source",
            serde_json::json!({ "uri": input.to_string(), "size": info.size, "etag": etag }).to_string(),
        ),
        (FINGERPRINT, fingerprint.to_owned()),
    ];
    OutputOptions {
        heads: OutputHeads { itm: job.heads.itm, cosine: job.heads.cosine },
        drop_images: job.drop_images,
        min_itm: job.thresholds.min_itm,
        min_cosine: job.thresholds.min_cosine,
        metadata: metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        overwrite: job.overwrite,
    }
}

fn stats(job: &ScoreJob, engine: &SharedEngine, fingerprint: String, totals: Totals, total: f64) -> Stats {
    let mut errors = totals.statuses;
    let scored = errors.remove("ok").unwrap_or(0);
    let thresholds = job.thresholds.min_itm.is_some() || job.thresholds.min_cosine.is_some();
    let seconds = [
        ("read", totals.read),
        ("decode", totals.prepare),
        ("engine", totals.engine),
        ("write", totals.write),
        ("total", total),
    ];
    Stats {
        version: env!("CARGO_PKG_VERSION"),
        input: job.input.clone(),
        output: job.output.clone(),
        model: engine.hash.clone(),
        fingerprint,
        device: engine.device.clone(),
        precision: engine.precision.name(),
        rows: totals.written.rows,
        scored,
        failed: errors.values().sum(),
        errors: errors.into_iter().map(|(reason, rows)| (reason.to_owned(), rows)).collect(),
        pairs: totals.pairs,
        kept: thresholds.then_some(totals.written.kept),
        bytes: totals.written.bytes,
        seconds: seconds.into_iter().collect(),
        pairs_per_second: Some(totals.pairs as f64 / total.max(1e-9)),
    }
}
