//! The small JSON file beside each output shard.

use bytes::Bytes;
use object_store::ObjectStoreExt;
use serde::{Deserialize, Serialize};

use crate::partial::Partial;
use crate::{Error, Location, Result};

/// Bytes of statistics at most, which are a few hundred.
const STATS_BYTES_MAX: u64 = 1 << 20;

/// What all statistics of ours have.
#[derive(Deserialize)]
#[allow(dead_code, reason = "only whether they are there matters")]
struct Ours {
    version: String,
    input: String,
    output: String,
}

/// `NAME.stats.json` for the shard `NAME.parquet`; any other name is kept whole.
pub fn stats_location(shard: &Location) -> Location {
    let name = shard.file_name();
    shard.sibling(&format!("{}.stats.json", name.strip_suffix(".parquet").unwrap_or(name)))
}

/// What has the name of a shard's statistics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FoundStats {
    /// Nothing.
    Absent,
    /// Statistics of ours, as JSON.
    Ours(Bytes),
    /// Something else, of this name.
    Foreign(String),
}

/// What is there that [`write_stats`] would replace.
///
/// # Errors
/// When the store cannot say.
pub async fn read_stats(shard: &Location) -> Result<FoundStats> {
    let location = stats_location(shard);
    let foreign = || Ok(FoundStats::Foreign(location.uri().to_owned()));
    // A pipe would keep a reader waiting, and a link may lead where nothing may be read.
    let meta = location.as_file().and_then(|file| file.symlink_metadata().ok());
    if meta.is_some_and(|meta| !meta.is_file()) {
        return foreign();
    }
    match whole(&location).await {
        Ok(bytes) if serde_json::from_slice::<Ours>(&bytes).is_ok() => Ok(FoundStats::Ours(bytes)),
        Ok(_) | Err(Error::TooLarge { .. }) => foreign(),
        Err(Error::NotFound { .. }) => Ok(FoundStats::Absent),
        Err(error) => Err(error),
    }
}

/// The object as it is now, in one request.
async fn whole(location: &Location) -> Result<Bytes> {
    let failed = |source| Error::store(location.uri(), source);
    let found = location.store().get(&location.path()).await.map_err(failed)?;
    match found.meta.size {
        size if size > STATS_BYTES_MAX => {
            Err(Error::TooLarge { uri: location.to_string(), size, limit: STATS_BYTES_MAX })
        }
        _ => found.bytes().await.map_err(failed),
    }
}

/// Removes a shard's statistics, if there are any.
///
/// # Errors
/// When they cannot be removed.
pub async fn remove_stats(shard: &Location) -> Result<()> {
    match stats_location(shard).delete().await {
        Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes the statistics of `shard` at once, replacing older ones, and returns where.
///
/// # Errors
/// When they are not JSON or cannot be stored.
pub async fn write_stats(shard: &Location, stats: &impl Serialize) -> Result<Location> {
    let location = stats_location(shard);
    let json = serde_json::to_vec_pretty(stats);
    let mut json = json.map_err(|source| Error::Stats { uri: location.uri().to_owned(), source })?;
    json.push(b'\n');
    let json = Bytes::from(json);
    let partial = Partial::new(&location);
    let Some(hidden) = partial.to_rename() else {
        location.put(json).await?;
        return Ok(location);
    };
    // A file is written under a name that is known for a killed run's, and gets its own by a rename.
    let written = async {
        hidden.put(json.clone()).await?;
        let renamed = location.store().rename(&hidden.path(), &location.path()).await;
        renamed.map_err(|source| Error::store(location.uri(), source))
    };
    match written.await {
        // Another run of the same shard took it for a leftover.
        Err(Error::NotFound { .. }) => location.put(json).await?,
        other => other?,
    }
    Ok(location)
}
