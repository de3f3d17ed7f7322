//! The small JSON file beside each output shard.

use bytes::Bytes;
use serde::Serialize;

use crate::{Error, Location, Result};

/// `NAME.stats.json` for the shard `NAME.parquet`; any other name is kept whole.
pub fn stats_location(shard: &Location) -> Location {
    let name = shard.file_name();
    shard.sibling(&format!("{}.stats.json", name.strip_suffix(".parquet").unwrap_or(name)))
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
    location.put(Bytes::from(json)).await?;
    Ok(location)
}
