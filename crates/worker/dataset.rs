//! The job `score` over a dataset: many shards, a few of them at a time through one engine.
//!
//! ```text
//! inputs -> every shard, in a stable order -> this worker's share -> open -> complete? skip : score -> output, statistics
//! ```
//!
//! A shard's output is there whole or not at all, and says what it was made from: the same command, killed or not, does what is
//! left. A shard that fails costs the others nothing. What would fail on every shard (the engine, a full disk) ends the run.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use capsieve_store::{
    Access, ListLimits, Listing, Location, below, is_below, is_flat, is_pattern, is_remote, parts_below, pattern_prefix,
};
use futures::{StreamExt, stream};

use crate::limits::{SHARDS_IN_FLIGHT, SHARDS_LOOKED_AT};
use crate::prepare::chain;
use crate::score::{Outlook, outlook, score_shard};
use crate::shared::LazyEngine;
use crate::{Error, LoadedModel, Outcome, Progress, Result, ScoreJob, StoreError};

/// A dataset lists as many shards as there are; only what is no dataset has more.
const LIMITS: ListLimits = ListLimits { shards: 10_000_000, name_bytes: 4 << 30, entries: 100_000_000 };
/// Shards that failed and are named at the end.
const FAILURES_NAMED: usize = 100;

/// What to score.
#[derive(Clone, Debug)]
pub struct DatasetJob {
    /// Shards, prefixes (folders, or what ends in '/') and patterns.
    pub inputs: Vec<String>,
    /// A prefix, under which shards keep their names, or the output of a single shard.
    pub output: String,
    /// How each shard is scored; its input and output are filled in.
    pub shard: ScoreJob,
    /// This worker's share; none: everything.
    pub partition: Option<Partition>,
    /// Bytes that shards hold together beside the model.
    pub memory_bytes: u64,
}

/// Worker `index`, from 0, of `count`: every `count`-th shard is its.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// From 0.
    pub index: usize,
    /// Of so many.
    pub count: usize,
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
    /// Shards that have no output, and why; the first hundred.
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
    /// Rows kept in this run, where there are thresholds.
    pub kept: Option<u64>,
    /// Bytes written in this run.
    pub bytes: u64,
    /// Of this run.
    pub seconds: f64,
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
    /// What is there, or why nothing can come of it.
    pub outlook: Result<Outlook>,
}

/// A shard, and where its output goes.
struct Planned {
    input: Location,
    output: String,
}

/// What a run does, in order.
struct Plan {
    shards: Vec<Planned>,
    /// Where an output could be.
    any: Location,
    /// The folder of the outputs, where they are files below a prefix.
    folder: Option<PathBuf>,
    /// The inputs name one shard, not a prefix that may hold one.
    single: bool,
}

/// Scores a dataset.
///
/// # Errors
/// What makes the whole run impossible. What a single shard fails with is in the report.
pub async fn score_dataset(model: &LoadedModel, job: &DatasetJob, progress: &Progress) -> Result<DatasetReport> {
    let start = Instant::now();
    let plan = plan(job).await?;
    capsieve_store::check_writable(&plan.any).await?;
    let engine = LazyEngine::new(model, &job.shard, Some(job.memory_bytes))?;
    let mut report = DatasetReport { shards: plan.shards.len() as u64, ..DatasetReport::default() };
    let total = u32::try_from(report.shards).unwrap_or(u32::MAX);
    progress.show_shards(0, if plan.single { 0 } else { total });
    let score = |shard: Planned| {
        let (engine, folder) = (&engine, plan.folder.as_deref());
        async move {
            let job = ScoreJob { input: shard.input.to_string(), output: shard.output, ..job.shard.clone() };
            let scored = async {
                if let Some(folder) = folder {
                    Location::parse(&job.output)?.make_folders(folder).await?;
                }
                score_shard(engine, &job, progress).await
            };
            (job.input.clone(), scored.await)
        }
    };
    let mut running = stream::iter(plan.shards).map(score).buffer_unordered(SHARDS_IN_FLIGHT);
    while let Some((input, outcome)) = running.next().await {
        let outcome = match outcome {
            Err(error) if plan.single || ends_all(&error) => return Err(error),
            other => other,
        };
        if matches!(outcome, Ok(Outcome::Complete { .. })) {
            progress.skip_shard();
        }
        report.add(input, outcome, plan.single);
        if !plan.single {
            progress.show_shards(u32::try_from(report.done()).unwrap_or(u32::MAX), total);
        }
    }
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Looks what [`score_dataset`] would do, and does nothing. In the order of the shards.
///
/// # Errors
/// As [`score_dataset`].
pub async fn look_at_dataset(model: &LoadedModel, job: &DatasetJob) -> Result<Vec<Prospect>> {
    let plan = plan(job).await?;
    let engine = LazyEngine::new(model, &job.shard, None)?;
    let look = |shard: Planned| {
        let engine = &engine;
        async move {
            let job = ScoreJob { input: shard.input.to_string(), output: shard.output, ..job.shard.clone() };
            let outlook = outlook(engine, &job).await;
            Prospect { input: job.input, output: job.output, outlook }
        }
    };
    Ok(stream::iter(plan.shards).map(look).buffered(SHARDS_LOOKED_AT).collect().await)
}

impl DatasetReport {
    fn done(&self) -> u64 {
        self.complete + self.failed_shards + self.scored_shards
    }

    fn add(&mut self, input: String, outcome: Result<Outcome>, single: bool) {
        match &outcome {
            Ok(Outcome::Complete { rows, failed }) => {
                tracing::debug!(shard = input, rows, failed, "complete already");
                self.complete += 1;
                self.rows += rows;
                self.failed += failed;
                self.count("earlier", *failed);
            }
            Ok(Outcome::Done(stats)) => {
                let (rows, failed, seconds) = (stats.rows, stats.failed, stats.seconds.get("total"));
                tracing::debug!(shard = input, output = stats.output, rows, failed, seconds, "scored");
                self.scored_shards += 1;
                self.rows += rows;
                self.failed += failed;
                stats.errors.iter().for_each(|(reason, rows)| self.count(reason, *rows));
                self.pairs += stats.pairs;
                self.bytes += stats.bytes;
                self.kept = stats.kept.map(|kept| self.kept.unwrap_or_default() + kept).or(self.kept);
            }
            Err(error) => {
                tracing::error!(shard = input, "no output: {}", chain(error));
                self.failed_shards += 1;
            }
        }
        match outcome {
            Ok(outcome) if single => self.single = Some(outcome),
            Err(error) if self.failures.len() < FAILURES_NAMED => self.failures.push((input, error)),
            _ => {}
        }
    }

    fn count(&mut self, reason: &str, rows: u64) {
        if rows > 0 {
            *self.errors.entry(reason.to_owned()).or_default() += rows;
        }
    }
}

/// What every other shard would fail with too.
fn ends_all(error: &Error) -> bool {
    let engine = matches!(error, Error::Scoring(_) | Error::Engine(_) | Error::EngineGone | Error::Threads { .. });
    engine || matches!(error, Error::Store(StoreError::StorageFull { .. } | StoreError::NoFolder { .. }))
}

/// Lists the shards, takes this worker's share, and says where the outputs go.
async fn plan(job: &DatasetJob) -> Result<Plan> {
    let access = Access::everything();
    let mut listing = Listing::new(access.clone(), LIMITS);
    // Each input's prefix, and the number of shards with it.
    let mut prefixes: Vec<(String, usize)> = Vec::new();
    let mut single = job.inputs.len() == 1;
    for input in &job.inputs {
        let (pattern, folder) = (is_pattern(input), Path::new(input).is_dir());
        let prefix = match input {
            pattern_input if pattern => pattern_prefix(pattern_input).to_owned(),
            folder_input if folder && !folder_input.ends_with('/') => format!("{folder_input}/"),
            other if other.ends_with('/') => other.clone(),
            shard => shard[..shard.rfind('/').map_or(0, |slash| slash + 1)].to_owned(),
        };
        let many = pattern || folder || input.ends_with('/');
        single &= !many;
        listing = match (pattern, many) {
            (true, _) => listing.add_matching(input).await?,
            (false, true) => listing.add(&prefix).await?,
            (false, false) => listing.add(input).await?,
        };
        // What a pattern names beside the outputs, it does not name below them.
        let flat = pattern && is_flat(input);
        if many && is_below(&job.output, &prefix) && (!flat || is_below(&prefix, &job.output)) {
            // The next reader of the inputs would take the outputs for some of them.
            return Err(Error::SinkInside { sink: job.output.clone(), input: prefix });
        }
        prefixes.push((prefix, listing.len()));
    }
    let below_prefix = job.output.ends_with('/') || (!single && Path::new(&job.output).is_dir());
    if !single && !below_prefix {
        return Err(Error::OutputPrefix { output: job.output.clone() });
    }
    let root = if job.output.ends_with('/') { job.output.clone() } else { format!("{}/", job.output) };
    let any = Location::parse(&if below_prefix { below(&root, "shard.parquet") } else { job.output.clone() })?;
    any.check_store()?;
    let (inputs, mut shards) = (listing.into_shards(), Vec::new());
    let (mut named, mut prefix) = (HashSet::new(), 0);
    let known: HashSet<String> = inputs.iter().map(Location::to_string).collect();
    for (number, input) in inputs.into_iter().enumerate() {
        while number >= prefixes[prefix].1 {
            prefix += 1;
        }
        let output = if below_prefix { output_below(&root, &prefixes[prefix].0, &input) } else { job.output.clone() };
        let replaces = known.contains(&output) && !single;
        if replaces || !named.insert(output.clone()) {
            return Err(Error::SameOutput { input: input.to_string(), output });
        }
        if job.partition.is_none_or(|Partition { index, count }| number % count == index) {
            shards.push(Planned { input, output });
        }
    }
    let folder = if below_prefix && !is_remote(&root) { Some(access.folder(&root)?) } else { None };
    Ok(Plan { shards, any, folder, single })
}

/// A shard keeps the folders that it has below its prefix.
fn output_below(root: &str, prefix: &str, shard: &Location) -> String {
    let parts = parts_below(prefix, shard);
    let (name, folders) = parts.split_last().expect("a name has a last part");
    let folder = folders.iter().fold(root.to_owned(), |within, part| format!("{}/", below(&within, part)));
    below(&folder, name)
}
