//! What may be read and written: everything for a person at a terminal, a list of prefixes for a server.
//!
//! A location is checked as the object it really is: `..` and symbolic links are resolved first, and the resolved name is
//! what is opened then. What is no regular file (a device, a pipe) is never opened for others. A hard link inside an allowed
//! folder is inside it; who may make links there is the folder's owner's business.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::path::Path as ObjectPath;

use crate::buckets::{Object, find, is_remote};
use crate::web::{Address, WebAddress, is_web};
use crate::{Error, Location, Result};

/// Objects that may be read and written.
#[derive(Clone, Debug)]
pub struct Access {
    /// Folders without links and dots; none: everything.
    folders: Option<Arc<[PathBuf]>>,
    /// Prefixes of buckets: what comes before the path, and the path.
    buckets: Arc<[(Arc<str>, ObjectPath)]>,
}

impl Access {
    /// No limits.
    pub fn everything() -> Self {
        Self { folders: None, buckets: [].into() }
    }

    /// Only what lies within these folders; without any, nothing.
    ///
    /// # Errors
    /// A prefix that is no folder and no bucket.
    pub fn only(prefixes: &[String]) -> Result<Self> {
        let (remote, local): (Vec<&String>, Vec<&String>) = prefixes.iter().partition(|prefix| is_remote(prefix));
        let folders = local.into_iter().map(|prefix| folder(prefix)).collect::<Result<Vec<_>>>()?;
        let buckets = remote.into_iter().map(|prefix| bucket(prefix)).collect::<Result<Vec<_>>>()?;
        Ok(Self { folders: Some(folders.into()), buckets: buckets.into() })
    }

    /// Whether nothing at all is allowed.
    pub fn is_nothing(&self) -> bool {
        self.folders.as_ref().is_some_and(|folders| folders.is_empty()) && self.buckets.is_empty()
    }

    /// The object that `uri` names.
    ///
    /// # Errors
    /// As [`Location::parse`], or it is not allowed.
    pub fn open(&self, uri: &str) -> Result<Location> {
        match &self.folders {
            None => Location::parse(uri),
            // Nothing about what is outside may be learnt from the answer.
            Some(_) => {
                self.refuse_stores(uri)?;
                self.check(Location::parse(uri).map_err(|error| self.hidden(uri, error))?)
            }
        }
    }

    /// What a cell of a shard names: an absolute URI, or a path relative to the shard, if there is one.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn resolve(&self, beside: Option<&Location>, reference: &str) -> Result<Location> {
        self.refuse_stores(reference)?;
        let found = match beside {
            Some(shard) => shard.resolve(reference),
            None if !reference.contains("://") && Path::new(reference).is_relative() => {
                Err(Error::Uri { uri: reference.to_owned(), reason: "there is no shard that it could be relative to" })
            }
            None => Location::parse(reference),
        };
        if self.folders.is_none() { found } else { self.check(found.map_err(|error| self.hidden(reference, error))?) }
    }

    /// Where the image of a cell is: as [`Self::resolve`] says, or on a web server, of which all are open where everything is.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn address(&self, beside: Option<&Location>, reference: &str) -> Result<Address> {
        match self.folders.is_none() && is_web(reference) {
            true => WebAddress::parse(reference).map(Address::Web),
            false => self.resolve(beside, reference).map(Address::Stored),
        }
    }

    /// The folder of a prefix that ends in '/', without links and dots.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn folder(&self, prefix: &str) -> Result<PathBuf> {
        // Any name makes a location of a prefix; whether there is such a file does not matter.
        let location = Location::parse(&format!("{prefix}shard.parquet"));
        let Some(folders) = &self.folders else { return parent(&location?, prefix) };
        let folder = parent(&location.map_err(|error| self.hidden(prefix, error))?, prefix)?;
        let real = folder.canonicalize().unwrap_or(folder);
        match folders.iter().any(|allowed| real.starts_with(allowed)) {
            true => Ok(real),
            false => Err(Error::NotAllowed { uri: prefix.to_owned() }),
        }
    }

    /// The object behind `location`, if it is allowed.
    pub(crate) fn check(&self, location: Location) -> Result<Location> {
        let Some(folders) = &self.folders else { return Ok(location) };
        let denied = || Error::NotAllowed { uri: location.to_string() };
        if let Some(object) = location.as_object() {
            return if self.allows(object) { Ok(location) } else { Err(denied()) };
        }
        let file = location.as_file().ok_or_else(denied)?;
        // Missing files keep their name: the folder's is resolved already.
        let real = file.canonicalize().unwrap_or_else(|_| file.to_owned());
        let inside = folders.iter().any(|folder| real != *folder && real.starts_with(folder));
        let regular = real.symlink_metadata().map_or(true, |meta| meta.is_file() || meta.is_dir());
        if !inside || !regular {
            return Err(denied());
        }
        // A folder that is missed may be spelt so that another look at it leads elsewhere.
        location.at_file(&real).filter(|found| found.as_file() == Some(&*real)).ok_or_else(denied)
    }

    /// A store of which nothing is allowed is not even opened.
    pub(crate) fn refuse_stores(&self, uri: &str) -> Result<()> {
        let rest = |root: &str| uri.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let known = |(root, _): &(Arc<str>, ObjectPath)| rest(root);
        match self.folders.is_some() && is_remote(uri) && !self.buckets.iter().any(known) {
            true => Err(Error::NotAllowed { uri: uri.to_owned() }),
            false => Ok(()),
        }
    }

    /// Whether an object, or a prefix of some, is within a bucket's prefix. A name has no dots and links there.
    pub(crate) fn allows(&self, object: &Object) -> bool {
        let within =
            |(root, prefix): &(Arc<str>, ObjectPath)| *root == object.root && object.path.prefix_matches(prefix);
        self.folders.is_none() || self.buckets.iter().any(within)
    }

    /// Errors that say no more than the name itself does.
    fn hidden(&self, uri: &str, error: Error) -> Error {
        match error {
            Error::Uri { .. } | Error::Folder { .. } => error,
            _ => Error::NotAllowed { uri: uri.to_owned() },
        }
    }
}

fn parent(location: &Location, prefix: &str) -> Result<PathBuf> {
    let folder = location.as_file().and_then(Path::parent).map(Path::to_owned);
    folder.ok_or_else(|| Error::NoShards { uri: prefix.to_owned() })
}

/// A web server's prefix is none: it may lead on to any other place.
fn bucket(prefix: &str) -> Result<(Arc<str>, ObjectPath)> {
    let bad = || Error::AllowedPrefix { prefix: prefix.to_owned() };
    if prefix.starts_with("http") {
        return Err(bad());
    }
    let object = find(prefix).map_err(|_| bad())?;
    Ok((object.root, object.path))
}

/// Whether the prefix `inner` lies within the prefix `outer`, or is it.
pub fn is_below(inner: &str, outer: &str) -> bool {
    let slashed = |uri: &str| format!("{}/", uri.trim_end_matches('/'));
    if is_remote(inner) || is_remote(outer) {
        return match (find(inner), find(outer)) {
            (Ok(inner), Ok(outer)) => {
                inner.store_name() == outer.store_name() && inner.path.prefix_matches(&outer.path)
            }
            _ => false,
        };
    }
    let folder = |uri: &str| Access::everything().folder(&slashed(if uri.is_empty() { "." } else { uri })).ok();
    matches!((folder(inner), folder(outer)), (Some(inner), Some(outer)) if inner.starts_with(&outer))
}

fn folder(prefix: &str) -> Result<PathBuf> {
    let bad = || Error::AllowedPrefix { prefix: prefix.to_owned() };
    // Nothing is no folder, though the root's name is nothing and a slash: a variable that is set to nothing opens nothing.
    if prefix.trim().is_empty() {
        return Err(bad());
    }
    let inside = format!("{}/shard.parquet", prefix.trim_end_matches('/'));
    let location = Location::parse(&inside).map_err(|_| bad())?;
    let folder = location.as_file().and_then(Path::parent).ok_or_else(bad)?;
    let real = folder.canonicalize().map_err(|_| bad())?;
    if real.is_dir() { Ok(real) } else { Err(bad()) }
}

/// Runs what blocks on a thread for such work.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
