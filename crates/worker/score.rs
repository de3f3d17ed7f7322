//! The job `score`: one shard in, the same rows with scores out.

use std::sync::Arc;
use std::time::Instant;

use capsieve_engine::{Heads, ItmToken};
use capsieve_store::{
    Access, ColumnOptions, EarlierScores, ObjectInfo, OutputHeads, OutputOptions, OutputRows, Select, ShardReader,
    ShardWriter,
};

use crate::found::{Engine, Found, Places, There};
use crate::identity::Identity;
use crate::limits::{OUTPUT_BYTES, OUTPUT_BYTES_MIN};
use crate::pipeline::{self, Images, Output, Stages};
use crate::prepare::STATUSES;
use crate::rows::ShardRows;
use crate::shared::{LazyEngine, SharedEngine};
use crate::stats::{Counts, Stats};
use crate::{CaptionPolicy, EngineChoice, Error, LoadedModel, Progress, Result, StoreError};

/// How often an output is looked for that appears while it is begun: it, its rejected rows, and then there is one.
const LOOKS: usize = 3;

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
    /// URI for rows that are not kept, where only kept rows go into the output.
    pub rejected: Option<String>,
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
    /// Only kept rows go into the output.
    pub kept_only: bool,
    /// Which captions of its list a kept row is written with.
    pub select: Select,
    /// Leaves the image column out.
    pub drop_images: bool,
    /// Ends the job at the first row without a score.
    pub fail_on_row: bool,
    /// Replaces an output that is there.
    pub overwrite: bool,
    /// Rows of a complete output with one of these statuses are scored again, and the output is replaced.
    pub retry: Vec<&'static str>,
    /// What computes and how.
    pub engine: EngineChoice,
}

/// How a job ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The output is written.
    Done(Box<Stats>),
    /// The output was there already, made from the same input, model and options.
    Complete(Counts),
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
        Opened::Complete(counts, _) => Ok(Outcome::Complete(counts)),
        Opened::New(shard) => shard.score(job, engine.get().await?, &access, progress).await,
    }
}

/// What there is to say of a shard that is done; what is not, or cannot be looked at, is for [`score_shard`] to find out.
pub(crate) async fn complete(engine: &LazyEngine<'_>, job: &ScoreJob) -> Option<Counts> {
    let found = Found::look(job, (&engine.hash, engine.engines.precision), &Access::everything()).await.ok()?;
    match found.there {
        // Without statistics there is something left to do.
        There::Complete(counts, None) => Some(counts),
        _ => None,
    }
}

/// What would become of a shard.
#[derive(Clone, Debug)]
pub enum Outlook {
    /// The output is complete.
    Complete(Counts),
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
    let found = Found::look(job, (&engine.hash, engine.engines.precision), &Access::everything()).await?;
    if let There::Complete(counts, _) = found.there {
        return Ok(Outlook::Complete(counts));
    }
    let reader = found.reader(job).await?;
    let columns = reader.columns();
    let name = |column: usize| reader.schema().field(column).name().clone();
    let (image, caption) = (name(columns.image), name(columns.caption));
    Ok(Outlook::New { rows: reader.rows(), bytes: found.info.size, image, caption })
}

/// A job whose input was looked at.
pub(crate) enum Opened {
    /// The output is there already, made from this version of the input.
    Complete(Counts, ObjectInfo),
    /// Its output was begun.
    New(Box<OpenShard>),
}

/// A shard between opening and scoring.
pub(crate) struct OpenShard {
    places: Places,
    identity: Identity,
    reader: ShardReader,
    writer: ShardWriter,
    /// An output is there that is replaced.
    replaces: bool,
    /// Its scores, where only some of its rows are scored again.
    earlier: Option<EarlierScores>,
}

/// Opens input and output, or finds that the work is done.
pub(crate) async fn open(job: &ScoreJob, engine: Engine<'_>, access: &Access) -> Result<Opened> {
    for _ in 1..LOOKS {
        match open_once(job, engine, access).await {
            // Another run was faster since we looked.
            Err(Error::Store(StoreError::Exists { .. })) if !job.overwrite => {}
            opened => return opened,
        }
    }
    open_once(job, engine, access).await
}

async fn open_once(job: &ScoreJob, engine: Engine<'_>, access: &Access) -> Result<Opened> {
    let found = Found::look(job, engine, access).await?;
    let replaces = match found.there {
        There::Complete(counts, stats) => {
            found.places.restore(stats).await?;
            return Ok(Opened::Complete(counts, found.info));
        }
        There::Nothing => job.overwrite,
        There::Part | There::Retry => true,
    };
    let earlier = match found.there {
        There::Retry => {
            let (fingerprint, heads) = (&*found.identity.fingerprint, output_heads(job));
            Some(EarlierScores::open(&found.places.output, (fingerprint, heads), standing(&job.retry)).await?)
        }
        _ => None,
    };
    let reader = found.reader(job).await?;
    let Found { places, identity, .. } = found;
    let options = OutputOptions { overwrite: replaces, ..output_options(job, &places, &identity) };
    let writer = ShardWriter::create(&places.output, reader.schema(), reader.columns(), &options).await?;
    for column in writer.covered_columns() {
        tracing::warn!(shard = job.input, "its column {column:?} is left out: the output's own has this name");
    }
    Ok(Opened::New(Box::new(OpenShard { places, identity, reader, writer, replaces, earlier })))
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
        let Self { places, identity, reader, writer, replaces, earlier } = self;
        let (rows, columns, info) = (reader.rows(), reader.columns().clone(), reader.object_info().clone());
        let mut input_rows = ShardRows::new(reader, 0, &engine.row_groups)?;
        let bytes = output_bytes(&info, places.rejected.is_some());
        let _held = engine.outputs.take_or(bytes, || input_rows.release()).await;
        progress.start(rows);
        let start = Instant::now();
        let stages = Stages {
            input: input_rows,
            earlier,
            images: Images {
                beside: Some(places.input.clone()),
                access: access.clone(),
                fetcher: Arc::clone(&engine.fetcher),
            },
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
            // Another run of the same job was faster: its output is as good as ours. Or the store has taken ours, and its
            // answer was lost.
            Err(Error::Store(
                error @ (StoreError::Superseded { .. } | StoreError::Exists { .. } | StoreError::Store { .. }),
            )) => {
                let lost = matches!(error, StoreError::Store { .. });
                if lost && replaces {
                    // What is there may well be what was to be replaced.
                    return Err(error.into());
                }
                return match places.there(job, (&engine.hash, engine.precision), &identity).await {
                    Ok(There::Complete(counts, stats)) => {
                        places.restore(stats).await?;
                        Ok(Outcome::Complete(counts))
                    }
                    // It was another job, and this one was to replace what is there: "exists" would be no help.
                    Err(Error::Foreign { .. }) if job.overwrite => Err(error.into()),
                    Ok(There::Nothing) if !lost => Err(Error::Gone { uri: places.output.to_string() }),
                    Ok(_) => Err(error.into()),
                    Err(_) if lost => Err(error.into()),
                    Err(error) => Err(error),
                };
            }
            Err(error) => return Err(error),
        };
        assert_eq!(totals.written.rows, rows, "every row that was read was written");
        let written = &totals.written;
        let made = (Counts::new(&totals, written), written.object.clone(), written.rejected.clone());
        let stats = Stats::new(job, (&engine.hash, engine.precision), &identity.fingerprint, made);
        let stats = stats.timed(&engine.device, &totals, start.elapsed().as_secs_f64());
        capsieve_store::write_stats(&places.output, &stats).await?;
        Ok(Outcome::Done(Box::new(stats)))
    }
}

/// Statuses of rows that are not scored again.
fn standing(retry: &[&str]) -> Vec<&'static str> {
    std::iter::once("ok").chain(STATUSES).filter(|status| !retry.contains(status)).collect()
}

/// What writing the output of this input takes at a time; rows that are rejected have one of their own.
fn output_bytes(input: &ObjectInfo, rejected: bool) -> usize {
    let input = usize::try_from(input.size).unwrap_or(usize::MAX);
    let bytes = OUTPUT_BYTES_MIN.saturating_add(input.saturating_mul(2)).min(OUTPUT_BYTES);
    if rejected { 2 * bytes } else { bytes }
}

fn output_heads(job: &ScoreJob) -> OutputHeads {
    OutputHeads { itm: job.heads.itm, cosine: job.heads.cosine }
}

fn output_options(job: &ScoreJob, places: &Places, identity: &Identity) -> OutputOptions {
    OutputOptions {
        heads: output_heads(job),
        drop_images: job.drop_images,
        min_itm: job.thresholds.min_itm,
        min_cosine: job.thresholds.min_cosine,
        select: job.select,
        rows: if job.kept_only { OutputRows::Kept { rejected: places.rejected.clone() } } else { OutputRows::All },
        metadata: identity.metadata.clone(),
        overwrite: job.overwrite,
    }
}
