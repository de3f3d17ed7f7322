//! The shards that the URIs of a call name: objects, or all that lies below a prefix. What a prefix holds and cannot be used
//! is an error, never left out in silence; what a call can make us look at and keep is bounded.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::FileType;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use crate::access::blocking;
use crate::location::below;
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
}

impl Listing {
    /// Nothing yet.
    pub fn new(access: Access, limits: ListLimits) -> Self {
        let (shards, known, folders) = (Vec::new(), HashSet::new(), HashSet::new());
        Self { access, limits, shards, known, folders, name_bytes: 0, entries: 0, wanted: Weak::new() }
    }

    /// Adds what `uri` names: one shard, or every `*.parquet` below a prefix that ends in '/', but for hidden ones ('.' or
    /// '_' comes first). Folders behind links are not entered, so there are no loops.
    ///
    /// # Errors
    /// As [`Access::open`]; a prefix without a shard or with one that cannot be used; more than the limits.
    pub async fn add(mut self, uri: &str) -> Result<Self> {
        let (uri, waiting) = (uri.to_owned(), Arc::new(()));
        self.wanted = Arc::downgrade(&waiting);
        // Names are resolved link by link, with calls of the system that block.
        let listed = blocking(move || {
            match uri.ends_with('/') {
                true => self.add_prefix(&uri)?,
                false => self.keep(self.access.open(&uri)?)?,
            }
            Ok(self)
        });
        let listed = listed.await;
        drop(waiting);
        listed
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
        match self.walk(&Prefix { uri, folder: &folder }, &folder, uri)? {
            0 => Err(Error::NoShards { uri: uri.to_owned() }),
            _ => Ok(()),
        }
    }

    /// Adds the shards below `folder`, whose URI is `within`, and counts them.
    fn walk(&mut self, prefix: &Prefix, folder: &Path, within: &str) -> Result<usize> {
        let mut found = 0;
        for (name, kind) in self.entries(prefix, folder)? {
            self.name_bytes -= name.len();
            let (path, uri) = (folder.join(&name), below(within, &name.to_string_lossy()));
            if kind.is_dir() {
                found += self.walk(prefix, &path, &format!("{uri}/"))?;
            } else {
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
            if kind.is_dir() || Path::new(&name).extension().is_some_and(|extension| extension == "parquet") {
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
        if shard.real_file().is_none_or(|file| self.known.insert(file)) {
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
