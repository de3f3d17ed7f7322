//! What a call will do, before it does anything: its shards, where each of them begins, and that its outputs can be.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use capsieve_store::{Access, ListLimits, Listing, Location, blocking, is_below, is_remote};
use tokio::sync::Semaphore;

use crate::budget::{Budget, Held};
use crate::call::{CallRequest, Sink, Source};
use crate::limits::{LISTINGS_MAX, NAME_COPIES, SHARD_BYTES, SHARD_ENTRIES_MAX, SHARD_NAMES_BYTES_MAX, SHARDS_MAX};
use crate::resume::Position;
use crate::{Error, Result};

/// See the module.
#[derive(Default)]
pub(crate) struct Plan {
    pub(crate) shards: Vec<Location>,
    /// Where earlier calls stopped, by shard.
    pub(crate) tokens: HashMap<String, Position>,
    /// Memory of the names.
    _held: Held,
}

/// Memory for names of shards: one half for the calls that have them, the other for those that list folders.
pub(crate) struct Names {
    held: Budget,
    listings: Semaphore,
    limits: ListLimits,
}

impl Names {
    /// For all calls.
    pub(crate) fn new(bytes: usize) -> Self {
        let each = bytes / 2 / LISTINGS_MAX;
        let limits = ListLimits {
            shards: SHARDS_MAX.min(each / 2 / SHARD_BYTES),
            name_bytes: SHARD_NAMES_BYTES_MAX.min(each / 2 / NAME_COPIES),
            entries: SHARD_ENTRIES_MAX,
        };
        Self { held: Budget::new(bytes / 2), listings: Semaphore::new(LISTINGS_MAX), limits }
    }

    /// The shards of all URIs, and the memory of their names. One that several of them name, by whatever spelling, is there
    /// once.
    async fn list(&self, uris: &[String], access: &Access) -> Result<(Vec<Location>, Held)> {
        // Whoever names shards one by one waits for nobody's folders.
        let folders = uris.iter().any(|uri| uri.ends_with('/'));
        let _turn = if folders { self.listings.acquire().await.ok() } else { None };
        let (mut listing, mut named) = (Listing::new(access.clone(), self.limits), HashSet::new());
        for uri in uris.iter().filter(|uri| named.insert(uri.as_str())) {
            listing = listing.add(uri).await?;
        }
        let shards = listing.into_shards();
        let names: usize = shards.iter().map(|shard| shard.uri().len()).sum();
        // Calls are long: who has a place does not wait for the end of others in it.
        let held = self.held.try_take(shards.len() * SHARD_BYTES + names * NAME_COPIES);
        Ok((shards, held.ok_or(Error::NamesMemory)?))
    }
}

impl Plan {
    /// Lists the shards and checks what can be checked without reading them.
    pub(crate) async fn new(request: &CallRequest, access: &Access, names: &Names) -> Result<Self> {
        let Source::Shards { uris, tokens, .. } = &request.source else {
            return match request.sink {
                Some(_) => Err(Error::Sink { reason: "pairs that come with the call are streamed back: leave it out" }),
                None => Ok(Self::default()),
            };
        };
        let (shards, _held) = names.list(uris, access).await?;
        let tokens = positions(tokens, &shards)?;
        let plan = Self { shards, tokens, _held };
        let Some(sink) = request.sink.clone() else { return Ok(plan) };
        let prefixes: HashSet<String> = uris.iter().filter(|uri| uri.ends_with('/')).cloned().collect();
        let access = access.clone();
        // Names are resolved link by link, with calls of the system that block.
        blocking(move || check_outputs(&sink, prefixes, &plan.shards, &access).map(|()| plan)).await
    }
}

fn positions(tokens: &[Vec<u8>], shards: &[Location]) -> Result<HashMap<String, Position>> {
    if tokens.is_empty() {
        return Ok(HashMap::new());
    }
    let names: HashSet<String> = shards.iter().map(Location::to_string).collect();
    let mut positions = HashMap::with_capacity(tokens.len());
    for token in tokens {
        let position = Position::decode(token)?;
        if !names.contains(&position.uri) {
            return Err(Error::Token { reason: "its shard is none of the call's" });
        }
        if positions.insert(position.uri.clone(), position).is_some() {
            return Err(Error::Token { reason: "two tokens name one shard: send the last one" });
        }
    }
    Ok(positions)
}

/// The output of each shard must be allowed, another one's than the others', and nowhere that the next call would take it for
/// an input.
fn check_outputs(sink: &Sink, prefixes: HashSet<String>, shards: &[Location], access: &Access) -> Result<()> {
    if !sink.uri.ends_with('/') && shards.len() != 1 {
        return Err(Error::Sink { reason: "several shards need a prefix that ends in '/'" });
    }
    let mut names = HashSet::with_capacity(shards.len());
    if !shards.iter().all(|shard| names.insert(shard.file_name())) {
        return Err(Error::Sink { reason: "two shards have the same name: call them one by one" });
    }
    let folder = |input: String| Some((access.folder(&input).ok()?, input));
    if let Some(input) = prefixes.iter().find(|prefix| is_remote(prefix) && is_below(&sink.uri, prefix)) {
        return Err(Error::SinkInside { sink: sink.uri.clone(), input: input.clone() });
    }
    let folders: HashMap<PathBuf, String> = prefixes.into_iter().filter_map(folder).collect();
    for shard in shards {
        let output = access.open(&sink.output(shard)).map_err(|error| Error::SinkUri(Box::new(error)))?;
        let input = output.as_file().and_then(|file| file.ancestors().find_map(|folder| folders.get(folder)));
        if let Some(input) = input {
            return Err(Error::SinkInside { sink: sink.uri.clone(), input: input.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use capsieve_engine::Heads;
    use capsieve_store::ColumnOptions;
    use tempfile::TempDir;

    use super::*;
    use crate::Thresholds;

    const SHARDS: usize = 100;

    fn request(uri: &str) -> CallRequest {
        let (columns, tokens) = (ColumnOptions::default(), Vec::new());
        CallRequest {
            source: Source::Shards { uris: vec![uri.to_owned()], columns, tokens },
            heads: Heads { itm: true, cosine: true },
            thresholds: Thresholds::default(),
            fail_on_row: false,
            sink: None,
        }
    }

    /// A folder of shards with names of 108 letters, and its URI.
    fn folder() -> (TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        for shard in 0..SHARDS {
            std::fs::write(folder.path().join(format!("{shard:0100}.parquet")), "").unwrap();
        }
        let uri = format!("{}/", folder.path().display());
        (folder, uri)
    }

    async fn plan(uri: &str, names: &Names) -> Result<Plan> {
        Plan::new(&request(uri), &Access::everything(), names).await
    }

    #[tokio::test]
    async fn calls_hold_memory_for_the_names_they_have() {
        let (_folder, uri) = folder();
        let names = Names::new(1 << 20);
        let free = names.held.free().unwrap();
        let first = plan(&uri, &names).await.unwrap();
        assert_eq!(first.shards.len(), SHARDS);
        let each = free - names.held.free().unwrap();
        let name = uri.len() + 108;
        assert!((SHARDS * 3 * name..SHARDS * (3 * name + 300)).contains(&each), "{each} bytes for names of {name}");
        let mut plans = vec![first];
        let refused = loop {
            match plan(&uri, &names).await {
                Ok(plan) => plans.push(plan),
                Err(error) => break error,
            }
        };
        assert!(matches!(refused, Error::NamesMemory), "{refused}");
        assert!(plans.len() >= (1 << 18) / each, "{} calls", plans.len());
        assert_eq!(
            plan(&format!("{uri}{:0100}.parquet", 7), &names).await.unwrap().shards.len(),
            1,
            "a name is little"
        );
        drop(plans);
        assert_eq!(names.held.free(), Some(free), "all is given back");
    }

    #[tokio::test]
    async fn more_names_than_one_call_may_have_are_an_error() {
        let (_folder, uri) = folder();
        let error = plan(&uri, &Names::new(64 << 10)).await.err().unwrap();
        assert!(matches!(error, Error::Store(capsieve_store::Error::TooManyShards { .. })), "{error}");
    }
}
