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
use sha2::{Digest, Sha256};

use crate::limits::{SHARDS_IN_FLIGHT, SHARDS_LOOKED_AT};
use crate::prepare::chain;
use crate::score::{Outlook, outlook, score_shard};
use crate::shared::LazyEngine;
use crate::{Counts, Error, LoadedModel, Outcome, Progress, Result, ScoreJob, StoreError};

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
    /// The same for rows that are not kept, where only kept ones go into the outputs.
    pub rejected: Option<String>,
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
    /// Rows that are kept, where there are thresholds.
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
    /// Where its rejected rows go.
    pub rejected: Option<String>,
    /// What is there, or why nothing can come of it.
    pub outlook: Result<Outlook>,
}

/// A shard, and where its output goes.
struct Planned {
    input: Location,
    output: String,
    rejected: Option<String>,
}

/// Where outputs go.
struct Root {
    /// A prefix that ends in '/', or one output's own URI.
    uri: String,
    /// Whether it is a prefix.
    many: bool,
    /// Its folder, where outputs are files below a prefix.
    folder: Option<PathBuf>,
}

/// What a run does, in order.
struct Plan {
    shards: Vec<Planned>,
    output: Root,
    rejected: Option<Root>,
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
    for root in plan.roots() {
        capsieve_store::check_writable(&root.any()?).await?;
    }
    let engine = LazyEngine::new(model, &job.shard, Some(job.memory_bytes))?;
    let mut report = DatasetReport { shards: plan.shards.len() as u64, ..DatasetReport::default() };
    let total = u32::try_from(report.shards).unwrap_or(u32::MAX);
    progress.show_shards(0, if plan.single { 0 } else { total });
    let Plan { shards, output, rejected, single } = plan;
    let roots: Vec<Root> = std::iter::once(output).chain(rejected).collect();
    let score = |shard: Planned| {
        let (engine, roots) = (&engine, &roots);
        async move {
            let job = shard.job(&job.shard);
            let scored = async {
                for (root, output) in roots.iter().zip(std::iter::once(&job.output).chain(&job.rejected)) {
                    if let Some(folder) = &root.folder {
                        Location::parse(output)?.make_folders(folder).await?;
                    }
                }
                score_shard(engine, &job, progress).await
            };
            (job.input.clone(), scored.await)
        }
    };
    let mut running = stream::iter(shards).map(score).buffer_unordered(SHARDS_IN_FLIGHT);
    while let Some((input, outcome)) = running.next().await {
        let outcome = match outcome {
            Err(error) if single || ends_all(&error) => return Err(error),
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
            let job = shard.job(&job.shard);
            let outlook = outlook(engine, &job).await;
            Prospect { input: job.input, output: job.output, rejected: job.rejected, outlook }
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

impl Planned {
    /// Its own job, of the dataset's options.
    fn job(self, options: &ScoreJob) -> ScoreJob {
        let Self { input, output, rejected } = self;
        ScoreJob { input: input.to_string(), output, rejected, ..options.clone() }
    }
}

impl Root {
    /// Of the outputs of one input that is a shard, or of many.
    fn new(uri: &str, single: bool) -> Result<Self> {
        let many = uri.ends_with('/') || (!single && Path::new(uri).is_dir());
        if !single && !many {
            return Err(Error::OutputPrefix { output: uri.to_owned() });
        }
        let uri = if many && !uri.ends_with('/') { format!("{uri}/") } else { uri.to_owned() };
        let folder = if many && !is_remote(&uri) { Some(Access::everything().folder(&uri)?) } else { None };
        let root = Self { uri, many, folder };
        root.any()?.check_store()?;
        Ok(root)
    }

    /// Where an output could be.
    fn any(&self) -> Result<Location> {
        let any = if self.many { below(&self.uri, "shard.parquet") } else { self.uri.clone() };
        Ok(Location::parse(&any)?)
    }

    /// The output of a shard, which keeps the folders that it has below its prefix.
    fn of(&self, prefix: &str, shard: &Location) -> String {
        if !self.many {
            return self.uri.clone();
        }
        let parts = parts_below(prefix, shard);
        let (name, folders) = parts.split_last().expect("a name has a last part");
        let folder = folders.iter().fold(self.uri.clone(), |within, part| format!("{}/", below(&within, part)));
        below(&folder, name)
    }
}

impl Plan {
    fn roots(&self) -> impl Iterator<Item = &Root> {
        std::iter::once(&self.output).chain(&self.rejected)
    }
}

/// Lists the shards, takes this worker's share, and says where the outputs go.
async fn plan(job: &DatasetJob) -> Result<Plan> {
    let mut listing = Listing::new(Access::everything(), LIMITS);
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
        let inside = |output: &&String| is_below(output, &prefix) && (!flat || is_below(&prefix, output));
        // The next reader of the inputs would take the outputs for some of them.
        if let Some(sink) = std::iter::once(&job.output).chain(&job.rejected).find(inside).filter(|_| many) {
            return Err(Error::SinkInside { sink: sink.clone(), input: prefix });
        }
        prefixes.push((prefix, listing.len()));
    }
    let output = Root::new(&job.output, single)?;
    let rejected = job.rejected.as_ref().map(|rejected| Root::new(rejected, single)).transpose()?;
    let (inputs, mut shards) = (listing.into_shards(), Vec::new());
    let (mut named, mut prefix) = (HashSet::new(), 0);
    let known: HashSet<Name> = inputs.iter().map(|input| name(input.uri())).collect();
    for (number, input) in inputs.into_iter().enumerate() {
        while number >= prefixes[prefix].1 {
            prefix += 1;
        }
        let output = output.of(&prefixes[prefix].0, &input);
        let rejected = rejected.as_ref().map(|root| root.of(&prefixes[prefix].0, &input));
        for output in std::iter::once(&output).chain(&rejected) {
            let replaces = known.contains(&name(output)) || !named.insert(name(output));
            if replaces && !single {
                return Err(Error::SameOutput { input: input.to_string(), output: output.clone() });
            }
        }
        if job.partition.is_none_or(|Partition { index, count }| number % count == index) {
            shards.push(Planned { input, output, rejected });
        }
    }
    Ok(Plan { shards, output, rejected, single })
}

/// A name among others: a million of them would take as much memory as their letters.
type Name = [u8; 16];

fn name(uri: &str) -> Name {
    let mut name = Name::default();
    name.copy_from_slice(&Sha256::digest(uri)[..16]);
    name
}
