//! What a call will do, before it does anything: its shards, where each of them begins, and where its output goes.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use capsieve_store::{Access, ListLimits, Listing, Location, below};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::call::{CallRequest, Source};
use crate::limits::{LISTINGS_MAX, SHARD_ENTRIES_MAX, SHARD_NAMES_BYTES_MAX, SHARDS_MAX};
use crate::resume::Position;
use crate::{Error, Result};

const LIST_LIMITS: ListLimits =
    ListLimits { shards: SHARDS_MAX, name_bytes: SHARD_NAMES_BYTES_MAX, entries: SHARD_ENTRIES_MAX };

/// See the module.
#[derive(Default)]
pub(crate) struct Plan {
    pub(crate) shards: Vec<Location>,
    /// Where earlier calls stopped, by shard.
    pub(crate) tokens: HashMap<String, Position>,
    /// Of each shard, where there is a sink.
    pub(crate) outputs: Vec<String>,
}

/// Calls that list folders at a time: what is found is held until it is known to be too much.
static LISTINGS: Semaphore = Semaphore::const_new(LISTINGS_MAX);

impl Plan {
    /// Lists the shards and checks what can be checked without reading them.
    pub(crate) async fn new(request: &CallRequest, access: &Access) -> Result<Self> {
        let Source::Shards { uris, tokens, .. } = &request.source else {
            return match request.sink {
                Some(_) => Err(Error::Sink { reason: "pairs that come with the call are streamed back: leave it out" }),
                None => Ok(Self::default()),
            };
        };
        let shards = list(uris, access).await?;
        let tokens = positions(tokens, &shards)?;
        let Some(sink) = request.sink.clone() else { return Ok(Self { shards, tokens, outputs: Vec::new() }) };
        let prefixes: HashSet<String> = uris.iter().filter(|uri| uri.ends_with('/')).cloned().collect();
        let access = access.clone();
        // Names are resolved link by link, with calls of the system that block.
        let checking = spawn_blocking(move || {
            let outputs = outputs(&sink.uri, prefixes, &shards, &access)?;
            Ok(Self { shards, tokens, outputs })
        });
        checking.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }
}

/// The shards of all URIs. One that several of them name, by whatever spelling, is there once.
async fn list(uris: &[String], access: &Access) -> Result<Vec<Location>> {
    // Whoever names shards one by one waits for nobody's folders.
    let folders = uris.iter().any(|uri| uri.ends_with('/'));
    let _turn = if folders { LISTINGS.acquire().await.ok() } else { None };
    let (mut listing, mut named) = (Listing::new(access.clone(), LIST_LIMITS), HashSet::new());
    for uri in uris.iter().filter(|uri| named.insert(uri.as_str())) {
        listing = listing.add(uri).await?;
    }
    Ok(listing.into_shards())
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

/// The output of each shard: allowed, different from each other, and nowhere that the next call would take them for inputs.
fn outputs(sink: &str, prefixes: HashSet<String>, shards: &[Location], access: &Access) -> Result<Vec<String>> {
    let outputs: Vec<String> = match sink.ends_with('/') {
        true => shards.iter().map(|shard| below(sink, shard.file_name())).collect(),
        false if shards.len() == 1 => vec![sink.to_owned()],
        false => return Err(Error::Sink { reason: "several shards need a prefix that ends in '/'" }),
    };
    if outputs.iter().collect::<HashSet<_>>().len() < outputs.len() {
        return Err(Error::Sink { reason: "two shards have the same name: call them one by one" });
    }
    let open = |output: &String| access.open(output).map_err(|error| Error::SinkUri(Box::new(error)));
    let opened = outputs.iter().map(open).collect::<Result<Vec<_>>>()?;
    let folder = |input: String| Some((access.folder(&input).ok()?, input));
    let folders: HashMap<PathBuf, String> = prefixes.into_iter().filter_map(folder).collect();
    let inside = |output: &Location| output.as_file()?.ancestors().find_map(|folder| folders.get(folder));
    match opened.iter().find_map(inside) {
        Some(input) => Err(Error::SinkInside { sink: sink.to_owned(), input: input.clone() }),
        None => Ok(outputs),
    }
}
