//! What is there of a job before anything is done: its input, and perhaps its output, whole.
//!
//! An output's statistics are its manifest: written last, they say what the output was made from and which version of it they
//! speak of, so a shard that is done costs a look at its input, its statistics and its output's version. Where a killed run wrote
//! none, or the output is another one, the output's own metadata says the same.

use capsieve_store::{
    Access, Footer, FoundStats, Location, ObjectInfo, ROWS_ALL, ROWS_KEPT, ROWS_REJECTED, ShardReader, WrittenObject,
    blocking, stats_location,
};

use crate::identity::Identity;
use crate::stats::{Counts, Stats};
use crate::{Error, Precision, Result, ScoreJob, StoreError};

/// A model's hash, and the precision of what computes.
pub(crate) type Engine<'a> = (&'a str, Precision);

/// The objects of a job.
pub(crate) struct Places {
    pub(crate) input: Location,
    pub(crate) output: Location,
    /// Where rows go that are not kept.
    pub(crate) rejected: Option<Location>,
}

/// See the module.
pub(crate) struct Found {
    pub(crate) places: Places,
    /// The input as it is now.
    pub(crate) info: ObjectInfo,
    pub(crate) identity: Identity,
    pub(crate) there: There,
}

/// What is there of the output.
pub(crate) enum There {
    /// None, or one that is to be replaced.
    Nothing,
    /// A part: its rejected rows are gone, or are not those of this output, and it is made again.
    Part,
    /// All of it, with rows that are to be scored again.
    Retry,
    /// All of it; its statistics where a killed run wrote none.
    Complete(Counts, Option<Box<Stats>>),
}

impl Found {
    /// Looks at the input, and whether the work is done.
    pub(crate) async fn look(job: &ScoreJob, engine: Engine<'_>, access: &Access) -> Result<Self> {
        let places = Places::open(job, access).await?;
        let info = places.input.head().await?;
        let identity = Identity::new(job, engine, &places.input, &info);
        let there = if job.overwrite { There::Nothing } else { places.there(job, engine, &identity).await? };
        Ok(Self { places, info, identity, there })
    }

    /// The input in the version that was found.
    pub(crate) async fn reader(&self, job: &ScoreJob) -> Result<ShardReader> {
        Ok(ShardReader::open_at(&self.places.input, &self.info, &job.columns).await?)
    }
}

impl Places {
    async fn open(job: &ScoreJob, access: &Access) -> Result<Self> {
        let (access, input, output, rejected) =
            (access.clone(), job.input.clone(), job.output.clone(), job.rejected.clone());
        // Names are resolved link by link, with calls of the system that block.
        blocking(move || {
            let (input, output) = (access.open(&input)?, access.open(&output)?);
            let rejected = rejected.map(|rejected| access.open(&rejected)).transpose()?;
            let stats = stats_location(&output);
            if input.same_object(&output) || input.same_object(&stats) {
                return Err(Error::SameObject { uri: output.to_string() });
            }
            if let Some(rejected) =
                rejected.iter().find(|rejected| [&input, &output, &stats].iter().any(|o| o.same_object(rejected)))
            {
                return Err(Error::SameRejected { uri: rejected.to_string() });
            }
            Ok(Self { input, output, rejected })
        })
        .await
    }

    /// What is there of the output.
    pub(crate) async fn there(&self, job: &ScoreJob, engine: Engine<'_>, identity: &Identity) -> Result<There> {
        let stats = capsieve_store::read_stats(&self.output).await?;
        if let FoundStats::Ours(json) = &stats
            && let Ok(stats) = serde_json::from_slice::<Stats>(json)
            && stats.fingerprint == identity.fingerprint
            && self.is_whole(&stats).await?
        {
            return complete(job, stats.counts, None);
        }
        let rows = if job.kept_only { ROWS_KEPT } else { ROWS_ALL };
        let foreign = |place: &Location, footer: &Footer, rows: &str| {
            Err(Error::Foreign { uri: place.to_string(), difference: identity.difference(footer, rows) })
        };
        let footer = footer_of(&self.output).await?;
        if let Some(footer) = footer.as_ref().filter(|footer| !identity.made(footer, rows)) {
            return foreign(&self.output, footer, rows);
        }
        if let FoundStats::Foreign(uri) = stats {
            return Err(StoreError::Exists { uri }.into());
        }
        let Some(footer) = footer else { return Ok(There::Nothing) };
        let Some(counts) = Counts::of(&footer) else { return foreign(&self.output, &footer, rows) };
        let mut rejected_object = None;
        if let Some(rejected) = &self.rejected {
            match footer_of(rejected).await? {
                Some(footer) if !identity.made(&footer, ROWS_REJECTED) => {
                    return foreign(rejected, &footer, ROWS_REJECTED);
                }
                // Two runs may differ in a row whose score is as good as a threshold.
                Some(footer) if footer.rows() == counts.rows - counts.written => {
                    rejected_object = Some(footer.object_info().into());
                }
                Some(_) | None => return Ok(There::Part),
            }
        }
        let made = (counts.clone(), footer.object_info().into(), rejected_object);
        complete(job, counts, Some(Stats::new(job, engine, &identity.fingerprint, made)))
    }

    /// Tidies up after a run that was killed between an output and its statistics.
    pub(crate) async fn restore(&self, stats: Option<Box<Stats>>) -> Result<()> {
        if let Some(stats) = stats {
            capsieve_store::remove_leftovers(&self.output).await;
            capsieve_store::write_stats(&self.output, &*stats).await?;
        }
        Ok(())
    }

    /// Whether everything is there that the statistics speak of.
    async fn is_whole(&self, stats: &Stats) -> Result<bool> {
        let object = |bytes, etag: &Option<String>| WrittenObject { bytes, e_tag: etag.clone() };
        if !object(stats.bytes, &stats.etag).is_at(&self.output).await? {
            return Ok(false);
        }
        match (&self.rejected, &stats.rejected) {
            (None, _) => Ok(true),
            (Some(rejected), Some(written)) if rejected.uri() == written.output => {
                Ok(object(written.bytes, &written.etag).is_at(rejected).await?)
            }
            (Some(_), _) => Ok(false),
        }
    }
}

fn complete(job: &ScoreJob, counts: Counts, stats: Option<Stats>) -> Result<There> {
    if counts.errors.keys().any(|status| job.retry.iter().any(|retry| retry == status)) {
        return Ok(There::Retry);
    }
    if job.fail_on_row && counts.failed > 0 {
        return Err(Error::RowsFailed { uri: job.output.clone(), failed: counts.failed });
    }
    Ok(There::Complete(counts, stats.map(Box::new)))
}

/// The footer of what is there, if anything is.
async fn footer_of(location: &Location) -> Result<Option<Footer>> {
    match Footer::read(location).await {
        Ok(footer) => Ok(Some(footer)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error @ StoreError::Folder { .. }) => Err(error.into()),
        // What is no whole Parquet file is no output of ours; a store that does not answer says nothing about it.
        Err(error) if error.is_no_shard() => {
            let difference = "it is no Parquet file".to_owned();
            Err(Error::Foreign { uri: location.to_string(), difference })
        }
        Err(error) => Err(error.into()),
    }
}
