//! Which shards a dataset has, in a stable order, which of them are this worker's, and where their outputs go.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use capsieve_store::{
    Access, ListLimits, Listing, Location, below, is_below, is_flat, is_pattern, is_remote, parts_below, pattern_prefix,
};
use sha2::{Digest, Sha256};

use crate::dataset::DatasetJob;
use crate::{Error, Result, ScoreJob};

/// A dataset lists as many shards as there are; only what is no dataset has more.
const LIMITS: ListLimits = ListLimits { shards: 10_000_000, name_bytes: 4 << 30, entries: 100_000_000 };

/// Worker `index`, from 0, of `count`: every `count`-th shard is its.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// From 0.
    pub index: usize,
    /// Of so many.
    pub count: usize,
}

/// A shard, and what its output is called. There may be millions, and most of them wait for long.
pub(crate) struct Planned {
    input: Box<str>,
    /// Its name below its prefix, part by part.
    below: Box<str>,
}

/// Between the parts of a name, none of which has it.
const BETWEEN_PARTS: char = '\0';

/// The name of an output that may be any.
const ANY: &str = "shard.parquet";

/// Where outputs go.
pub(crate) struct Root {
    /// A prefix that ends in '/', or one output's own URI.
    uri: String,
    /// Whether it is a prefix.
    many: bool,
    /// Its folder, where outputs are files below a prefix.
    folder: Option<PathBuf>,
    /// Where an output could be.
    pub(crate) any: Location,
    /// What the identities of the outputs begin with, or that of the only one.
    identity: String,
}

/// What a run does, in order.
pub(crate) struct Plan {
    pub(crate) shards: Vec<Planned>,
    pub(crate) output: Root,
    pub(crate) rejected: Option<Root>,
    /// The inputs name one shard, not a prefix that may hold one.
    pub(crate) single: bool,
}

impl Planned {
    fn new(input: &Location, prefix: &str) -> Self {
        let below = parts_below(prefix, input).join(&BETWEEN_PARTS.to_string());
        Self { input: input.uri().into(), below: below.into() }
    }

    /// Its own job, of the dataset's options.
    pub(crate) fn job(self, options: &ScoreJob, output: &Root, rejected: Option<&Root>) -> ScoreJob {
        let (output, rejected) = (output.of(&self), rejected.map(|root| root.of(&self)));
        ScoreJob { input: self.input.into(), output, rejected, ..options.clone() }
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
        let any = Location::parse(&if many { below(&uri, ANY) } else { uri.clone() })?;
        any.check_store()?;
        let identity = if many { any.folder_identity() } else { any.identity() };
        Ok(Self { uri, many, folder, any, identity })
    }

    /// Makes the folders of an output below it, where outputs are files.
    pub(crate) async fn make_folders(&self, output: &str) -> Result<()> {
        if let Some(folder) = &self.folder {
            Location::parse(output)?.make_folders(folder).await?;
        }
        Ok(())
    }

    /// What tells the output of a shard from all other objects.
    fn identity_of(&self, shard: &Planned) -> String {
        match self.many {
            true => format!("{}{}", self.identity, shard.below.replace(BETWEEN_PARTS, "/")),
            false => self.identity.clone(),
        }
    }

    /// The output of a shard, which keeps the folders that it has below its prefix.
    fn of(&self, shard: &Planned) -> String {
        if !self.many {
            return self.uri.clone();
        }
        let (folders, name) = shard.below.rsplit_once(BETWEEN_PARTS).unwrap_or(("", &shard.below));
        let folders = folders.split(BETWEEN_PARTS).filter(|folder| !folder.is_empty());
        let folder = folders.fold(self.uri.clone(), |within, part| format!("{}/", below(&within, part)));
        below(&folder, name)
    }
}

impl Plan {
    pub(crate) fn roots(&self) -> impl Iterator<Item = &Root> {
        std::iter::once(&self.output).chain(&self.rejected)
    }
}

/// Lists the shards, takes this worker's share, and says where the outputs go.
pub(crate) async fn plan(job: &DatasetJob) -> Result<Plan> {
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
    if let Some(rejected) = rejected.as_ref().filter(|rejected| output.many && rejected.many) {
        let (rejected, output) = (&rejected.uri, &output.uri);
        if is_below(rejected, output) || is_below(output, rejected) {
            return Err(Error::RejectedInside { rejected: rejected.clone(), output: output.clone() });
        }
    }
    let (inputs, mut shards) = (listing.into_shards(), Vec::new());
    let (mut named, mut prefix) = (HashSet::new(), 0);
    let known: HashSet<Name> = inputs.iter().map(|input| name(&input.identity())).collect();
    for (number, input) in inputs.into_iter().enumerate() {
        while number >= prefixes[prefix].1 {
            prefix += 1;
        }
        let shard = Planned::new(&input, &prefixes[prefix].0);
        for root in std::iter::once(&output).chain(&rejected) {
            let name = name(&root.identity_of(&shard));
            let replaces = known.contains(&name) || !named.insert(name);
            if replaces && !single {
                return Err(Error::SameOutput { input: input.to_string(), output: root.of(&shard) });
            }
        }
        if job.partition.is_none_or(|Partition { index, count }| number % count == index) {
            shards.push(shard);
        }
    }
    Ok(Plan { shards, output, rejected, single })
}

/// A name among others: a million of them would take as much memory as their letters.
type Name = [u8; 16];

fn name(identity: &str) -> Name {
    let mut name = Name::default();
    name.copy_from_slice(&Sha256::digest(identity)[..16]);
    name
}
