//! A URI and the store behind it. Every byte this crate reads or writes goes through [`object_store::ObjectStore`]. Owns no
//! Parquet.

use std::fmt;
use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use bytes::Bytes;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt};
use percent_encoding::percent_decode_str;

use crate::access::blocking;
use crate::buckets::{self, Object};
use crate::names::{below, scheme};
use crate::paths::{file_path, resolve_folder, same_file};
use crate::{Error, Result};

/// Bytes of a file's name at most, on every common file system.
const NAME_BYTES_MAX: usize = 255;

const SCHEMES: &str = "its scheme is unknown, expected a path, file://, s3://, gs://, az://, abfs:// or http(s)://";

/// What a URI of a file looks like.
const FILE_URI: &str = "expected file:///absolute/path, where '?', '#', '\\', '%' and what cannot be seen are written as %3F, %23, %5C, %25 and so on";

/// All local files are in one store.
static LOCAL_FILES: LazyLock<Arc<LocalFileSystem>> =
    LazyLock::new(|| Arc::new(LocalFileSystem::new().with_fsync(true)));

/// One object: where it is and how to reach it. Displays as the user gave it.
#[derive(Clone)]
pub struct Location {
    uri: Arc<str>,
    place: Place,
}

/// Calls list a hundred thousand locations: each keeps its name once.
#[derive(Clone)]
enum Place {
    /// A file that the store of all local files can name, with the folder's symbolic links resolved.
    File(Arc<FsPath>),
    /// An object of another store.
    Object(Object),
}

/// What a store says about an object without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Bytes.
    pub size: u64,
    /// The store's name for this content, if it has one.
    pub e_tag: Option<String>,
    /// When it was last written.
    pub modified: SystemTime,
}

impl ObjectInfo {
    /// Whether an answer may be of this version.
    fn is_same(&self, answer: &ObjectMeta) -> bool {
        let same = match (&self.e_tag, &answer.e_tag) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => self.modified == SystemTime::from(answer.last_modified),
        };
        same && self.size == answer.size
    }
}

impl Location {
    /// Makes sense of a path or a URI. Nothing is opened; a relative path counts from the working directory.
    ///
    /// # Errors
    /// When the URI is malformed, names a folder, or has an unknown scheme.
    pub fn parse(uri: &str) -> Result<Self> {
        let bad = |reason| Error::Uri { uri: uri.to_owned(), reason };
        if uri.is_empty() {
            return Err(bad("it is empty"));
        }
        let path = match scheme(uri) {
            None => PathBuf::from(uri),
            Some("file") => file_path(uri).ok_or_else(|| bad(FILE_URI))?,
            Some(scheme) if buckets::is_scheme(scheme) => return Self::remote(uri),
            Some(_) => return Err(bad(SCHEMES)),
        };
        if path.components().any(|part| part.as_os_str().len() > NAME_BYTES_MAX) {
            return Err(bad("a part of it is longer than any file system's names"));
        }
        if uri.ends_with('/') || path.file_name().is_none() {
            return Err(Error::Folder { uri: uri.trim_end_matches('/').to_owned() });
        }
        Self::local(uri, &path).ok_or_else(|| bad("its file name has characters that cannot be used"))
    }

    fn remote(uri: &str) -> Result<Self> {
        let object = buckets::find(uri)?;
        if uri.ends_with('/') || object.path.is_root() {
            return Err(Error::Folder { uri: uri.trim_end_matches('/').to_owned() });
        }
        Ok(Self::of_object(uri, object))
    }

    /// An object of a store, displayed as `uri`.
    pub(crate) fn of_object(uri: &str, object: Object) -> Self {
        Self { uri: uri.into(), place: Place::Object(object) }
    }

    fn local(uri: &str, path: &FsPath) -> Option<Self> {
        Self::of_file(uri, resolve_folder(path)?)
    }

    /// A file whose folder has no links and dots, displayed as `uri`. None where the store would open another one: it leaves
    /// some characters out, and keeps some names (those that end in '#' and digits) for itself.
    pub(crate) fn of_file(uri: &str, file: PathBuf) -> Option<Self> {
        let path = Path::from_absolute_path(&file).ok()?;
        let same = LOCAL_FILES.path_to_filesystem(&path).is_ok_and(|opened| opened == file);
        same.then(|| Self { uri: uri.into(), place: Place::File(file.into()) })
    }

    /// An object of a store that the caller brings, displayed as `uri`: for tests, and for stores we do not know.
    pub fn in_store(store: Arc<dyn ObjectStore>, path: Path, uri: &str) -> Self {
        Self::of_object(uri, Object { store, path, root: "".into() })
    }

    /// The object called `name` beside this one.
    pub fn sibling(&self, name: &str) -> Self {
        let (folder, last) = self.uri.split_at(self.uri.rfind('/').map_or(0, |slash| slash + 1));
        let own = match scheme(&self.uri) {
            Some(_) => percent_decode_str(last).decode_utf8().is_ok_and(|last| last == self.file_name()),
            None => last == self.file_name(),
        };
        // What a link leads to has its siblings elsewhere.
        let uri = if own { below(folder, name) } else { name.to_owned() };
        let place = match &self.place {
            Place::File(file) => Place::File(file.with_file_name(name).into()),
            Place::Object(object) => {
                let parent = object.path.parent().unwrap_or_default();
                // As it is: joined to a path, a name would be encoded once more.
                let path = Path::parse(format!("{parent}/{name}")).unwrap_or_else(|_| parent.join(name));
                Place::Object(Object { path, ..object.clone() })
            }
        };
        Self { uri: uri.into(), place }
    }

    /// The same object by the file it really is; it still displays as the user gave it. None where that has no name.
    pub(crate) fn at_file(&self, file: &FsPath) -> Option<Self> {
        Self::local(&self.uri, file)
    }

    /// What a cell of this shard names: an absolute URI, or a path relative to the shard.
    ///
    /// # Errors
    /// As [`Location::parse`].
    pub fn resolve(&self, reference: &str) -> Result<Self> {
        if scheme(reference).is_some() {
            return Self::parse(reference);
        }
        let found = match &self.place {
            Place::File(file) => file.parent().and_then(|folder| Self::local(reference, &folder.join(reference))),
            Place::Object(object) => {
                let folder = object.path.parent().unwrap_or_default();
                let path = Path::parse(format!("{folder}/{reference}")).ok();
                path.map(|path| Self::of_object(reference, Object { path, ..object.clone() }))
            }
        };
        let found = found.filter(|_| !reference.is_empty() && !reference.ends_with('/'));
        found.ok_or_else(|| Error::Uri { uri: reference.to_owned(), reason: "it names no file" })
    }

    /// The last part of the path, such as `00000.parquet`.
    pub fn file_name(&self) -> &str {
        let name = match &self.place {
            Place::File(file) => file.file_name().and_then(|name| name.to_str()),
            Place::Object(object) => object.path.filename(),
        };
        name.unwrap_or_default()
    }

    /// The file behind it, where it is one.
    pub fn as_file(&self) -> Option<&FsPath> {
        match &self.place {
            Place::File(file) => Some(file),
            Place::Object(_) => None,
        }
    }

    /// Sees whether its store is one that is written to, without asking it.
    ///
    /// # Errors
    /// When it is not.
    pub fn check_store(&self) -> Result<()> {
        match self.as_object().is_some_and(|object| object.root.starts_with("http")) {
            true => Err(Error::Uri { uri: self.to_string(), reason: "a web server is read, not written to" }),
            false => Ok(()),
        }
    }

    /// Its bucket or web server ("s3://bucket"), where it is no file.
    pub fn root(&self) -> Option<&str> {
        self.as_object().map(|object| &*object.root)
    }

    /// The object behind it, where it is no file.
    pub(crate) fn as_object(&self) -> Option<&Object> {
        match &self.place {
            Place::File(_) => None,
            Place::Object(object) => Some(object),
        }
    }

    /// The file behind it with all links resolved: two spellings of one path have the same.
    pub(crate) fn real_file(&self) -> Option<Arc<FsPath>> {
        let Place::File(file) = &self.place else { return None };
        Some(file.canonicalize().ok().filter(|real| **real != **file).map_or_else(|| Arc::clone(file), Arc::from))
    }

    /// What the identities of all objects in its folder, or below, begin with.
    pub fn folder_identity(&self) -> String {
        match &self.place {
            // The empty name adds the slash where there is none.
            Place::File(file) => format!("file:{}", file.parent().unwrap_or(file).join("").display()),
            Place::Object(object) => {
                let folder = object.path.parent().unwrap_or_default();
                let slash = if folder.is_root() { "" } else { "/" };
                format!("{}/{folder}{slash}", object.store_name())
            }
        }
    }

    /// Tells the object from all others, however it is spelt: the file it really is, or the store and the name there.
    pub fn identity(&self) -> String {
        match (self.real_file(), self.as_object()) {
            (_, Some(object)) => format!("{}/{}", object.store_name(), object.path),
            (Some(file), None) => format!("file:{}", file.display()),
            (None, None) => self.uri.to_string(),
        }
    }

    /// Whether both are one object, also through symbolic or hard links and other spellings of a path.
    pub fn same_object(&self, other: &Self) -> bool {
        match (&self.place, &other.place) {
            (Place::File(ours), Place::File(theirs)) => same_file(ours, theirs),
            (Place::Object(ours), Place::Object(theirs)) => {
                ours.path == theirs.path && ours.store_name() == theirs.store_name()
            }
            _ => false,
        }
    }

    /// Whether there is such an object.
    ///
    /// # Errors
    /// When the store cannot say.
    pub async fn exists(&self) -> Result<bool> {
        match self.head().await {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Size, entity tag and time.
    ///
    /// # Errors
    /// When there is no such object, or it is a folder.
    pub async fn head(&self) -> Result<ObjectInfo> {
        self.check_regular()?;
        let meta = self.store().head(&self.path()).await.map_err(|source| Error::store(&self.uri, source))?;
        Ok(ObjectInfo { size: meta.size, e_tag: meta.e_tag, modified: meta.last_modified.into() })
    }

    /// Sees whether what is there, if it is in the file system, can be a shard: whoever opened a pipe would wait for its other end.
    pub(crate) fn check_regular(&self) -> Result<()> {
        match self.as_file().and_then(|file| file.metadata().ok()) {
            Some(meta) if meta.is_dir() => Err(Error::Folder { uri: self.to_string() }),
            Some(meta) if !meta.is_file() => Err(Error::Uri { uri: self.to_string(), reason: "it is no regular file" }),
            _ => Ok(()),
        }
    }

    /// Size, entity tag and time, when the object has at most `bytes_max` bytes.
    ///
    /// # Errors
    /// As [`Self::head`], or it is larger.
    pub async fn head_within(&self, bytes_max: u64) -> Result<ObjectInfo> {
        let info = self.head().await?;
        if info.size > bytes_max {
            return Err(Error::TooLarge { uri: self.to_string(), size: info.size, limit: bytes_max });
        }
        Ok(info)
    }

    /// The whole object in this version.
    ///
    /// # Errors
    /// When it cannot be read, or was replaced meanwhile.
    pub async fn get(&self, version: &ObjectInfo) -> Result<Bytes> {
        self.get_range(0..version.size, version).await
    }

    /// Bytes of this version; another one is [`Error::Changed`], never a mix of both. Where a server has no entity tags, the size
    /// and the time tell versions apart.
    pub(crate) async fn get_range(&self, range: Range<u64>, version: &ObjectInfo) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            if_match: version.e_tag.clone(),
            ..GetOptions::default()
        };
        let failed = |source| Error::store(&self.uri, source);
        let found = self.store().get_opts(&self.path(), options).await.map_err(failed)?;
        // Not every server knows conditions.
        if !version.is_same(&found.meta) {
            return Err(Error::changed(&self.uri));
        }
        found.bytes().await.map_err(failed)
    }

    /// Removes the object.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn delete(&self) -> Result<()> {
        self.store().delete(&self.path()).await.map_err(|source| Error::store(&self.uri, source))
    }

    /// Replaces the object by `bytes` at once: a reader sees the old ones or the new ones.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn put(&self, bytes: Bytes) -> Result<()> {
        self.check_folder()?;
        let put = self.store().put(&self.path(), bytes.into()).await;
        put.map(drop).map_err(|source| Error::store(&self.uri, source))
    }

    /// Makes the folders between a local output's prefix and itself; the prefix's own where that is the last one missing.
    ///
    /// # Errors
    /// When they cannot be made.
    pub async fn make_folders(&self, prefix: &FsPath) -> Result<()> {
        let Some(folder) = self.as_file().and_then(FsPath::parent).map(FsPath::to_owned) else { return Ok(()) };
        let (uri, prefix) = (self.uri.to_string(), prefix.to_owned());
        blocking(move || {
            let above = prefix.parent().unwrap_or(&prefix);
            if !above.is_dir() {
                return Err(Error::NoFolder { uri, folder: above.display().to_string() });
            }
            let failed = |source: std::io::Error| {
                Error::store(&uri, object_store::Error::Generic { store: "local files", source: Box::new(source) })
            };
            std::fs::create_dir_all(folder).map_err(failed)
        })
        .await
    }

    /// Stores make missing folders silently, which turns a misspelt output into a new tree of folders.
    pub(crate) fn check_folder(&self) -> Result<()> {
        let folder = self.as_file().and_then(FsPath::parent);
        match folder.filter(|folder| !folder.is_dir()) {
            Some(folder) => Err(Error::NoFolder { uri: self.to_string(), folder: folder.display().to_string() }),
            None => Ok(()),
        }
    }

    /// As the user gave it.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    pub(crate) fn store(&self) -> Arc<dyn ObjectStore> {
        match &self.place {
            Place::File(_) => Arc::clone(&*LOCAL_FILES) as Arc<dyn ObjectStore>,
            Place::Object(object) => Arc::clone(&object.store),
        }
    }

    /// Its name in the store.
    pub(crate) fn path(&self) -> Path {
        match &self.place {
            // Only of a sibling's name is it not known before that the store can say it; no name is the root's, which fails.
            Place::File(file) => Path::from_absolute_path(file).unwrap_or_default(),
            Place::Object(object) => object.path.clone(),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.uri)
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Location({})", self.uri)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn versions_are_told_apart_by_tags_or_else_by_times_and_always_by_sizes() {
        let (now, later) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        let version = |size, tag: Option<&str>, modified| ObjectInfo { size, e_tag: tag.map(str::to_owned), modified };
        let is_same = |one: &ObjectInfo, other: &ObjectInfo| {
            one.is_same(&ObjectMeta {
                location: Path::default(),
                last_modified: other.modified.into(),
                size: other.size,
                e_tag: other.e_tag.clone(),
                version: None,
            })
        };
        for (one, other, same) in [
            (version(1, Some("a"), now), version(1, Some("a"), later), true),
            (version(1, Some("a"), now), version(1, Some("b"), now), false),
            (version(1, Some("a"), now), version(2, Some("a"), now), false),
            (version(1, None, now), version(1, None, now), true),
            (version(1, None, now), version(1, None, later), false),
            (version(1, Some("a"), now), version(1, None, later), false),
            (version(1, Some("a"), now), version(1, None, now), true),
        ] {
            assert_eq!(is_same(&one, &other), same, "{one:?} {other:?}");
        }
    }
}
