//! The job `score` over a dataset: many shards, a few of them at a time through one engine.
//!
//! ```text
//! inputs -> every shard, in a stable order -> this worker's share -> open -> complete? skip : score -> output, statistics
//! ```
//!
//! A shard's output is there whole or not at all, and says what it was made from: the same command, killed or not, does what is
//! left. A shard that fails costs the others nothing. What would fail on every shard (the engine, a full disk) ends the run.

use std::collections::BTreeMap;
use std::time::Instant;

use futures::future::join_all;
use futures::{StreamExt, stream};
use tokio::sync::mpsc::{Sender, channel};

use crate::limits::{SHARDS_IN_FLIGHT, SHARDS_LOOKED_AT};
use crate::prepare::chain;
use crate::score::{Outlook, complete, outlook, score_shard};
use crate::shards::{Partition, Plan, Planned, plan};
use crate::shared::LazyEngine;
use crate::{Counts, Error, LoadedModel, Outcome, Progress, Result, ScoreJob, StoreError};

/// Shards that failed and are named at the end.
const FAILURES_NAMED: usize = 100;

/// What to score.
#[derive(Clone, Debug)]
pub struct DatasetJob {
    /// Shards, prefixes (folders, or what ends in '/') and patterns.
    pub inputs: Vec<String>,
    /// A prefix, under which shards keep their names, or the output of a single shard.
    pub output: String,
    /// The same for rows that are not kept, where only kept ones go into the outputs.
    pub rejected: Option<String>,
    /// How each shard is scored; its input and output are filled in.
    pub shard: ScoreJob,
    /// This worker's share; none: everything.
    pub partition: Option<Partition>,
    /// Bytes that shards hold together beside the model.
    pub memory_bytes: u64,
}

/// What became of a run.
#[derive(Debug, Default)]
pub struct DatasetReport {
    /// Shards of this worker's share.
    pub shards: u64,
    /// Of these, outputs that were complete already.
    pub complete: u64,
    /// Outputs that were written.
    pub scored_shards: u64,
    /// Shards that nothing was written for, and why; the first hundred.
    pub failures: Vec<(String, Error)>,
    /// All of them.
    pub failed_shards: u64,
    /// Rows of the outputs: scored + failed.
    pub rows: u64,
    /// Rows without a score.
    pub failed: u64,
    /// These by reason.
    pub errors: BTreeMap<String, u64>,
    /// Captions scored in this run.
    pub pairs: u64,
    /// Rows that are kept, where there are thresholds.
    pub kept: Option<u64>,
    /// Bytes written in this run.
    pub bytes: u64,
    /// Of this run.
    pub seconds: f64,
    /// What ended the run before all shards had their turn: it would have ended every one.
    pub ended: Option<Error>,
    /// What became of the shard, where the inputs named just one.
    pub single: Option<Outcome>,
}

/// What a run would do with a shard.
#[derive(Debug)]
pub struct Prospect {
    /// The shard.
    pub input: String,
    /// Where its output goes.
    pub output: String,
    /// Where its rejected rows go.
    pub rejected: Option<String>,
    /// What is there, or why nothing can come of it.
    pub outlook: Result<Outlook>,
}

/// Scores a dataset.
///
/// # Errors
/// What makes the whole run impossible. What a single shard fails with is in the report.
pub async fn score_dataset(model: &LoadedModel, job: &DatasetJob, progress: &Progress) -> Result<DatasetReport> {
    let start = Instant::now();
    let plan = plan(job).await?;
    for root in plan.roots() {
        capsieve_store::check_writable(&root.any).await?;
    }
    let engine = LazyEngine::new(model, &job.shard, Some(job.memory_bytes))?;
    let mut report = DatasetReport { shards: plan.shards.len() as u64, ..DatasetReport::default() };
    let total = u32::try_from(report.shards).unwrap_or(u32::MAX);
    let Plan { shards, output, rejected, single } = plan;
    progress.show_shards(0, if single { 0 } else { total });
    let (output, rejected) = (&output, rejected.as_ref());
    let (looked, to_score) = channel(1);
    let jobs = shards.into_iter().map(|shard| shard.job(&job.shard, output, rejected));
    let looking = look_ahead(&engine, jobs, if single { 0 } else { SHARDS_LOOKED_AT }, looked);
    let score = |(job, complete): (ScoreJob, Option<Counts>)| {
        let engine = &engine;
        async move {
            let scored = async {
                if let Some(counts) = complete {
                    return Ok(Outcome::Complete(counts));
                }
                output.make_folders(&job.output).await?;
                if let Some((rejected, uri)) = rejected.zip(job.rejected.as_ref()) {
                    rejected.make_folders(uri).await?;
                }
                score_shard(engine, &job, progress).await
            };
            (job.input.clone(), scored.await)
        }
    };
    let to_score = stream::unfold(to_score, |mut jobs| async { Some((jobs.recv().await?, jobs)) });
    let mut running = Box::pin(to_score.map(score).buffer_unordered(SHARDS_IN_FLIGHT));
    let scoring = async {
        while let Some((input, outcome)) = running.next().await {
            let outcome = match outcome {
                Err(error) if single => return Err(error),
                Err(error) if ends_all(&error) => {
                    report.ended = Some(error);
                    break;
                }
                other => other,
            };
            if matches!(outcome, Ok(Outcome::Complete(_))) {
                progress.skip_shard();
            }
            report.add(input, outcome, single);
            if !single {
                progress.show_shards(u32::try_from(report.done()).unwrap_or(u32::MAX), total);
            }
        }
        // Nobody takes what is looked at any more.
        drop(running);
        Ok(())
    };
    let ((), scored) = tokio::join!(looking, scoring);
    scored?;
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Sends every job on, in order, with its counts where it is done: `at_once` of them are looked at together, for most of a run
/// that is begun again is done already, and a look is some requests. What cannot be said here is said when the job is done.
async fn look_ahead(
    engine: &LazyEngine<'_>,
    mut jobs: impl Iterator<Item = ScoreJob>,
    at_once: usize,
    out: Sender<(ScoreJob, Option<Counts>)>,
) {
    loop {
        // All answers are here before the first is sent on: a request that nobody waits for would run out of time.
        let group: Vec<ScoreJob> = jobs.by_ref().take(at_once.max(1)).collect();
        let looks =
            group.iter().map(|job| async move { if at_once == 0 { None } else { complete(engine, job).await } });
        let found = join_all(looks).await;
        if group.is_empty() {
            return;
        }
        for looked in group.into_iter().zip(found) {
            if out.send(looked).await.is_err() {
                return;
            }
        }
    }
}

/// Looks what [`score_dataset`] would do, and does nothing: calls `show` in the order of the shards.
///
/// # Errors
/// As [`score_dataset`], and those of `show`.
pub async fn look_at_dataset<E: From<Error>>(
    model: &LoadedModel,
    job: &DatasetJob,
    mut show: impl FnMut(Prospect) -> Result<(), E>,
) -> Result<(), E> {
    let plan = plan(job).await?;
    let engine = LazyEngine::new(model, &job.shard, None)?;
    let (output, rejected) = (&plan.output, plan.rejected.as_ref());
    let look = |shard: Planned| {
        let engine = &engine;
        async move {
            let job = shard.job(&job.shard, output, rejected);
            let outlook = outlook(engine, &job).await;
            Prospect { input: job.input, output: job.output, rejected: job.rejected, outlook }
        }
    };
    let mut prospects = stream::iter(plan.shards).map(look).buffered(SHARDS_LOOKED_AT);
    while let Some(prospect) = prospects.next().await {
        show(prospect)?;
    }
    Ok(())
}

impl DatasetReport {
    fn done(&self) -> u64 {
        self.complete + self.failed_shards + self.scored_shards
    }

    fn add(&mut self, input: String, outcome: Result<Outcome>, single: bool) {
        match &outcome {
            Ok(Outcome::Complete(counts)) => {
                tracing::debug!(shard = input, counts.rows, counts.failed, "complete already");
                self.complete += 1;
                self.count(counts);
            }
            Ok(Outcome::Done(stats)) => {
                let (counts, seconds) = (&stats.counts, stats.seconds.get("total"));
                tracing::debug!(shard = input, output = stats.output, counts.rows, counts.failed, seconds, "scored");
                self.scored_shards += 1;
                self.count(counts);
                self.pairs += counts.pairs;
                self.bytes += stats.bytes + stats.rejected.as_ref().map_or(0, |rejected| rejected.bytes);
            }
            Err(error) => {
                tracing::error!(shard = input, "nothing written: {}", chain(error));
                self.failed_shards += 1;
            }
        }
        match outcome {
            Ok(outcome) if single => self.single = Some(outcome),
            Err(error) if self.failures.len() < FAILURES_NAMED => self.failures.push((input, error)),
            _ => {}
        }
    }

    fn count(&mut self, counts: &Counts) {
        self.rows += counts.rows;
        self.failed += counts.failed;
        counts.errors.iter().for_each(|(reason, rows)| *self.errors.entry(reason.clone()).or_default() += rows);
        self.kept = counts.kept.map(|kept| self.kept.unwrap_or_default() + kept).or(self.kept);
    }
}

/// What every other shard would fail with too.
fn ends_all(error: &Error) -> bool {
    let engine = matches!(error, Error::Scoring(_) | Error::Engine(_) | Error::EngineGone | Error::Threads { .. });
    engine || matches!(error, Error::Store(StoreError::StorageFull { .. } | StoreError::NoFolder { .. }))
}
