//! The shards that the URIs of a call name: objects, or all that lies below a prefix. What a prefix holds and cannot be used
//! is an error, never left out in silence; what a call can make us look at and keep is bounded.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::FileType;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use futures::TryStreamExt;
use globset::{GlobBuilder, GlobMatcher};
use object_store::path::Path as ObjectPath;

use crate::access::blocking;
use crate::buckets::{Object, find, is_remote};
use crate::names::below;
use crate::web::is_web;
use crate::{Access, Error, Location, Result};

/// Bytes of a shard's URI at most: of a longer one no call can ask again for what is left of it.
pub const URI_BYTES_MAX: usize = 4096;
const LONG_URI: &str =
    "it is longer than 4096 bytes, letters that a URI has to encode counted three times for each byte";

/// The most that one call lists.
#[derive(Clone, Copy, Debug)]
pub struct ListLimits {
    /// Shards.
    pub shards: usize,
    /// Bytes of their names.
    pub name_bytes: usize,
    /// Files and folders that are looked at.
    pub entries: usize,
}

/// Shards in the order in which they are named; those below a prefix in the order of their names. Each is there once, however
/// often and by whatever spelling it is named.
pub struct Listing {
    access: Access,
    limits: ListLimits,
    shards: Vec<Location>,
    /// The files behind the shards, links resolved.
    known: HashSet<Arc<Path>>,
    known_objects: HashSet<String>,
    /// Folders that were walked, links resolved.
    folders: HashSet<PathBuf>,
    name_bytes: usize,
    entries: usize,
    /// Gone when nobody waits for the listing any more.
    wanted: Weak<()>,
}

/// A prefix, as its errors name it, and its folder.
struct Prefix<'a> {
    uri: &'a str,
    folder: &'a Path,
    /// What names below it must match; none: `*.parquet` anywhere.
    pattern: Option<Pattern>,
}

struct Pattern {
    names: GlobMatcher,
    /// Folders below the prefix that a match can lie in; none: any number.
    depth: Option<usize>,
}

/// Whether a URI is a pattern: `*` and `?` stand for letters of a name, `**` for folders, `[ab]` and `{a,b}` for one of several.
/// A file that is really called so is no pattern.
pub fn is_pattern(uri: &str) -> bool {
    // The address of a web server may have a query, and is never a pattern: there is nothing to list.
    uri.contains(PATTERN_LETTERS) && !is_web(uri) && !Path::new(uri).exists()
}

/// The prefix that all matches of a pattern lie below.
pub fn pattern_prefix(pattern: &str) -> &str {
    match &pattern[..fixed(pattern)] {
        "" => "./",
        prefix => prefix,
    }
}

/// Whether a pattern names files in the folder of its prefix only, and none below.
pub fn is_flat(pattern: &str) -> bool {
    let names = &pattern[fixed(pattern)..];
    !names.contains('/') && !names.contains("**")
}

/// Where the part of a pattern ends that is no pattern.
fn fixed(pattern: &str) -> usize {
    let letters = pattern.find(PATTERN_LETTERS).unwrap_or(pattern.len());
    pattern[..letters].rfind('/').map_or(0, |slash| slash + 1)
}

const PATTERN_LETTERS: [char; 4] = ['*', '?', '[', '{'];

impl Pattern {
    fn new(uri: &str) -> Result<Self> {
        let bad = |source| Error::Pattern { uri: uri.to_owned(), source };
        let below = &uri[fixed(uri)..];
        let glob = GlobBuilder::new(below).literal_separator(true).build().map_err(bad)?;
        let depth = (!below.contains("**")).then(|| below.matches('/').count());
        Ok(Self { names: glob.compile_matcher(), depth })
    }
}

impl Prefix<'_> {
    /// Whether the file of this URI is one of those that are looked for, where that is a question of its name's match.
    fn takes(&self, uri: &str) -> bool {
        let below = uri.strip_prefix(self.uri).unwrap_or(uri);
        self.pattern.as_ref().is_none_or(|pattern| pattern.names.is_match(below))
    }
}

fn is_parquet(name: &Path) -> bool {
    name.extension().is_some_and(|extension| extension == "parquet")
}

impl Listing {
    /// Nothing yet.
    pub fn new(access: Access, limits: ListLimits) -> Self {
        Self {
            access,
            limits,
            shards: Vec::new(),
            known: HashSet::new(),
            known_objects: HashSet::new(),
            folders: HashSet::new(),
            name_bytes: 0,
            entries: 0,
            wanted: Weak::new(),
        }
    }

    /// Adds what `uri` names: one shard, or every `*.parquet` below a prefix that ends in '/', but for hidden ones ('.' or
    /// '_' comes first). Folders behind links are not entered, so there are no loops.
    ///
    /// # Errors
    /// As [`Access::open`]; a prefix without a shard or with one that cannot be used; more than the limits.
    pub async fn add(self, uri: &str) -> Result<Self> {
        if is_web(uri) && uri.ends_with('/') {
            return Err(Error::Uri {
                uri: uri.to_owned(),
                reason: "web servers cannot be listed: name the shards themselves",
            });
        }
        if is_remote(uri) && uri.ends_with('/') {
            return self.add_remote(uri, None, uri).await;
        }
        let uri = uri.to_owned();
        let add = move |listing: &mut Self| match uri.ends_with('/') {
            true => listing.add_prefix(&uri),
            false => listing.keep(listing.access.open(&uri)?),
        };
        self.while_wanted(add).await
    }

    /// Adds files on a thread for such work, for names are resolved link by link, with calls of the system that block; ends
    /// early when nobody waits any more.
    async fn while_wanted(mut self, add: impl FnOnce(&mut Self) -> Result<()> + Send + 'static) -> Result<Self> {
        let waiting = Arc::new(());
        self.wanted = Arc::downgrade(&waiting);
        let listed = blocking(move || add(&mut self).map(|()| self)).await;
        drop(waiting);
        listed
    }

    /// Adds what a pattern names, see [`is_pattern`]; hidden names ('.' or '_' comes first) match nothing.
    ///
    /// # Errors
    /// As [`Self::add`]; what is no pattern.
    pub async fn add_matching(self, pattern: &str) -> Result<Self> {
        if is_remote(pattern) {
            return self.add_remote(pattern_prefix(pattern), Some(Pattern::new(pattern)?), pattern).await;
        }
        let uri = pattern.to_owned();
        let add = move |listing: &mut Self| {
            let within = pattern_prefix(&uri);
            let folder = listing.access.folder(within)?;
            let prefix = Prefix { uri: within, folder: &folder, pattern: Some(Pattern::new(&uri)?) };
            match listing.walk(&prefix, &folder, within, 0)? {
                0 => Err(Error::NoMatch { uri }),
                _ => Ok(()),
            }
        };
        self.while_wanted(add).await
    }

    /// Adds the objects below a prefix; errors are about `asked`.
    async fn add_remote(mut self, within: &str, pattern: Option<Pattern>, asked: &str) -> Result<Self> {
        self.access.refuse_stores(within)?;
        let object = find(within)?;
        if !self.access.allows(&object) {
            return Err(Error::NotAllowed { uri: asked.to_owned() });
        }
        let waiting = Arc::new(());
        self.wanted = Arc::downgrade(&waiting);
        let failed = |source| Error::store(asked, source);
        let mut listed = object.store.list(Some(&object.path));
        let mut found: Vec<(ObjectPath, String)> = Vec::new();
        let mut empty = HashSet::new();
        while let Some(meta) = listed.try_next().await.map_err(failed)? {
            self.entries += 1;
            self.check_limits(asked)?;
            let Some(parts) = meta.location.prefix_match(&object.path) else { continue };
            let parts: Vec<String> = parts.map(|part| part.as_ref().to_owned()).collect();
            let name = parts.join("/");
            let hidden = parts.iter().any(|part| part.starts_with(['.', '_']));
            let takes = match &pattern {
                Some(pattern) => pattern.names.is_match(&name),
                None => is_parquet(Path::new(&name)),
            };
            if takes && !hidden {
                if meta.size == 0 {
                    empty.insert(name.clone());
                }
                self.name_bytes += name.len();
                found.push((meta.location, name));
            }
        }
        // Objects without content that are called like a folder are how some programs write that it is there.
        let above = |(_, name): &(_, String)| {
            let folders = name.match_indices('/').map(|(end, _)| &name[..end]);
            folders.filter(|folder| empty.contains(*folder)).map(str::to_owned).collect::<Vec<_>>()
        };
        let markers: HashSet<String> =
            if empty.is_empty() { HashSet::new() } else { found.iter().flat_map(above).collect() };
        self.name_bytes -= markers.iter().map(String::len).sum::<usize>();
        found.retain(|(_, name)| !markers.contains(name));
        if found.is_empty() {
            let uri = asked.to_owned();
            return Err(if pattern.is_some() { Error::NoMatch { uri } } else { Error::NoShards { uri } });
        }
        // Stores list in the order of bytes, but not all promise it.
        found.sort_unstable();
        for (path, name) in found {
            self.name_bytes -= name.len();
            let uri = name
                .split('/')
                .fold(within.trim_end_matches('/').to_owned(), |uri, part| below(&format!("{uri}/"), part));
            self.keep(Location::of_object(&uri, Object { path, ..object.clone() }))?;
        }
        drop(waiting);
        Ok(self)
    }

    /// How many shards there are so far.
    pub fn len(&self) -> usize {
        self.shards.len()
    }

    /// Whether there are none so far.
    pub fn is_empty(&self) -> bool {
        self.shards.is_empty()
    }

    /// The shards.
    pub fn into_shards(self) -> Vec<Location> {
        self.shards
    }

    fn add_prefix(&mut self, uri: &str) -> Result<()> {
        let folder = self.access.folder(uri)?;
        if !self.folders.insert(folder.clone()) {
            return Ok(());
        }
        match self.walk(&Prefix { uri, folder: &folder, pattern: None }, &folder, uri, 0)? {
            0 => Err(Error::NoShards { uri: uri.to_owned() }),
            _ => Ok(()),
        }
    }

    /// Adds the shards below `folder`, whose URI is `within`, so many folders down, and counts them.
    fn walk(&mut self, prefix: &Prefix, folder: &Path, within: &str, depth: usize) -> Result<usize> {
        if prefix.pattern.as_ref().and_then(|pattern| pattern.depth).is_some_and(|most| depth > most) {
            return Ok(0);
        }
        let mut found = 0;
        for (name, kind) in self.entries(prefix, folder)? {
            self.name_bytes -= name.len();
            let (path, uri) = (folder.join(&name), below(within, &name.to_string_lossy()));
            if kind.is_dir() {
                found += self.walk(prefix, &path, &format!("{uri}/"), depth + 1)?;
            } else if prefix.takes(&uri) {
                self.keep(self.shard(prefix, path, &uri, kind)?)?;
                found += 1;
            }
        }
        Ok(found)
    }

    /// The folders and shards of a folder, sorted. Their names count until they are looked at.
    fn entries(&mut self, prefix: &Prefix, folder: &Path) -> Result<Vec<(OsString, FileType)>> {
        let failed = |source: std::io::Error| {
            Error::store(prefix.uri, object_store::Error::Generic { store: "local files", source: Box::new(source) })
        };
        let mut kept = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            self.entries += 1;
            self.check_limits(prefix.uri)?;
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") || name.as_encoded_bytes().starts_with(b"_") {
                continue;
            }
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() || prefix.pattern.is_some() || is_parquet(Path::new(&name)) {
                self.name_bytes += name.len();
                kept.push((name, kind));
            }
        }
        self.check_limits(prefix.uri)?;
        kept.sort_unstable_by(|(left, _), (right, _)| left.cmp(right));
        Ok(kept)
    }

    /// An entry called `*.parquet` that is no folder.
    fn shard(&self, prefix: &Prefix, path: PathBuf, uri: &str, kind: FileType) -> Result<Location> {
        let entry = format!("{:?}", path.strip_prefix(prefix.folder).unwrap_or(&path));
        let unusable = |reason| Error::Unusable { uri: prefix.uri.to_owned(), entry, reason };
        if !kind.is_file() && !kind.is_symlink() {
            return Err(unusable("is no regular file"));
        }
        let meta = kind.is_symlink().then(|| path.metadata().ok());
        let Some(location) = Location::of_file(uri, path) else {
            return Err(unusable("has a name that no URI can say"));
        };
        // A link that leads out says no more than its own name, not even whether it leads anywhere.
        let location = self.access.check(location)?;
        match meta {
            Some(None) => Err(unusable("is a link that leads to no file")),
            Some(Some(meta)) if meta.is_dir() => Err(unusable("is a link to a folder")),
            Some(Some(meta)) if !meta.is_file() => Err(unusable("is a link to what is no regular file")),
            _ => Ok(location),
        }
    }

    fn keep(&mut self, shard: Location) -> Result<()> {
        if shard.uri().len() > URI_BYTES_MAX {
            return Err(Error::Uri { uri: shard.uri().to_owned(), reason: LONG_URI });
        }
        let new = match (shard.real_file(), shard.as_object()) {
            (Some(file), _) => self.known.insert(file),
            (None, Some(_)) => self.known_objects.insert(shard.identity()),
            (None, None) => true,
        };
        if new {
            self.name_bytes += shard.uri().len();
            self.shards.push(shard);
        }
        self.check_limits(self.shards.last().map(Location::uri).unwrap_or_default())
    }

    fn check_limits(&self, uri: &str) -> Result<()> {
        if self.wanted.strong_count() == 0 {
            return Err(Error::Unwanted { uri: uri.to_owned() });
        }
        let ListLimits { shards, name_bytes, entries } = self.limits;
        let counts = [
            (self.shards.len(), shards, "shards"),
            (self.name_bytes, name_bytes, "bytes of names"),
            (self.entries, entries, "files and folders"),
        ];
        match counts.into_iter().find(|(count, limit, _)| count > limit) {
            Some((_, limit, what)) => Err(Error::TooManyShards { uri: uri.to_owned(), limit, what }),
            None => Ok(()),
        }
    }
}
