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

/// Whether [`write_stats`] would replace nothing but statistics of ours.
///
/// # Errors
/// When something else has their name, or the store cannot say.
pub async fn check_stats(shard: &Location) -> Result<()> {
    let location = stats_location(shard);
    let foreign = || Error::Exists { uri: location.uri().to_owned() };
    // A pipe would keep a reader waiting, and a link may lead where nothing may be read.
    let meta = location.as_file().and_then(|file| file.symlink_metadata().ok());
    if meta.is_some_and(|meta| !meta.is_file()) {
        return Err(foreign());
    }
    let info = match location.head_within(STATS_BYTES_MAX).await {
        Ok(info) => info,
        Err(Error::NotFound { .. }) => return Ok(()),
        Err(Error::TooLarge { .. }) => return Err(foreign()),
        Err(error) => return Err(error),
    };
    let ours = match location.get(&info).await {
        Ok(bytes) => serde_json::from_slice::<Ours>(&bytes).is_ok(),
        // Another run has just written its own.
        Err(Error::Changed { .. } | Error::NotFound { .. }) => true,
        Err(error) => return Err(error),
    };
    if ours { Ok(()) } else { Err(foreign()) }
}

/// Whether a shard has statistics of the job with this fingerprint.
///
/// # Errors
/// When the store cannot say.
pub async fn has_stats(shard: &Location, fingerprint: &str) -> Result<bool> {
    #[derive(Deserialize)]
    struct Known {
        fingerprint: String,
    }
    let location = stats_location(shard);
    let info = match location.head_within(STATS_BYTES_MAX).await {
        Ok(info) => info,
        Err(Error::NotFound { .. } | Error::TooLarge { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    let bytes = match location.get(&info).await {
        Ok(bytes) => bytes,
        Err(Error::NotFound { .. } | Error::Changed { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    Ok(serde_json::from_slice::<Known>(&bytes).is_ok_and(|known| known.fingerprint == fingerprint))
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
    hidden.put(json.clone()).await?;
    match location.store().rename(&hidden.path(), &location.path()).await {
        Ok(()) => {}
        // Another run of the same shard took it for a leftover.
        Err(object_store::Error::NotFound { .. }) => location.put(json).await?,
        Err(source) => return Err(Error::store(location.uri(), source)),
    }
    Ok(location)
}
