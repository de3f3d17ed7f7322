//! A URI and the store behind it. Every byte this crate reads or writes goes through [`object_store::ObjectStore`], so
//! that buckets need no more than another arm in [`Location::parse`]. Owns no Parquet.

use std::fmt;
use std::ops::Range;
use std::path::{Component, Path as FsPath, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};

use crate::{Error, Result};

/// Schemes that belong to a store this build does not have; others are spelling mistakes.
const PLANNED: [&str; 11] = ["s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl", "http", "https"];

/// Bytes of a file's name at most, on every common file system.
const NAME_BYTES_MAX: usize = 255;

/// One object: where it is and how to reach it. Displays as the user gave it.
#[derive(Clone)]
pub struct Location {
    uri: String,
    store: Arc<dyn ObjectStore>,
    path: Path,
    /// The file behind it, with the folder's symbolic links resolved; none for objects of a bucket.
    file: Option<PathBuf>,
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

impl Location {
    /// Makes sense of a path or a URI. Nothing is opened; a relative path counts from the working directory.
    ///
    /// # Errors
    /// When the URI is malformed, names a folder, or has a scheme this build does not read.
    pub fn parse(uri: &str) -> Result<Self> {
        let bad = |reason| Error::Uri { uri: uri.to_owned(), reason };
        if uri.is_empty() {
            return Err(bad("it is empty"));
        }
        let path = match scheme(uri) {
            None => PathBuf::from(uri),
            Some("file") => file_path(uri).ok_or_else(|| bad("expected file:///absolute/path"))?,
            Some(scheme) if PLANNED.contains(&scheme.to_ascii_lowercase().as_str()) => {
                return Err(Error::UnsupportedScheme { uri: uri.to_owned(), scheme: scheme.to_owned() });
            }
            Some(_) => return Err(bad("its scheme is unknown, expected a path or file://")),
        };
        if path.components().any(|part| part.as_os_str().len() > NAME_BYTES_MAX) {
            return Err(bad("a part of it is longer than any file system's names"));
        }
        if uri.ends_with('/') || path.file_name().is_none() {
            return Err(Error::Folder { uri: uri.trim_end_matches('/').to_owned() });
        }
        Self::local(uri, &path).ok_or_else(|| bad("its file name has characters that cannot be used"))
    }

    fn local(uri: &str, path: &FsPath) -> Option<Self> {
        let file = resolve_folder(path)?;
        let path = Path::from_absolute_path(&file).ok()?;
        // The store keeps names that end in '#' and digits for itself.
        let (name, number) = path.filename()?.rsplit_once('#').unwrap_or_default();
        if !name.is_empty() && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let store = Arc::new(LocalFileSystem::new().with_fsync(true));
        Some(Self { uri: uri.to_owned(), store, path, file: Some(file) })
    }

    /// An object of a store that the caller brings, displayed as `uri`: for tests, and for stores we do not know.
    pub fn in_store(store: Arc<dyn ObjectStore>, path: Path, uri: &str) -> Self {
        Self { uri: uri.to_owned(), store, path, file: None }
    }

    /// The object called `name` beside this one.
    pub fn sibling(&self, name: &str) -> Self {
        let stem = self.uri.len() - self.file_name().len();
        let given = self.uri.get(..stem).filter(|_| self.uri.ends_with(self.file_name())).unwrap_or_default();
        let parent = self.path.parent().unwrap_or_default();
        Self {
            uri: format!("{given}{name}"),
            store: Arc::clone(&self.store),
            path: parent.join(name),
            file: self.file.as_ref().map(|file| file.with_file_name(name)),
        }
    }

    /// The same object by the file it really is; it still displays as the user gave it. None where that has no name.
    pub(crate) fn at_file(&self, file: &FsPath) -> Option<Self> {
        Self::local(&self.uri, file)
    }

    /// Every Parquet file below this one's folder, sorted, hidden ones left out: at most `limit` are looked for. Folders behind
    /// links are not entered, so there are no loops.
    pub(crate) async fn siblings(&self, limit: usize) -> Result<Vec<Self>> {
        let prefix = self.uri.strip_suffix(self.file_name()).unwrap_or_default().to_owned();
        let Some(folder) = self.file.as_deref().and_then(FsPath::parent).map(FsPath::to_owned) else {
            return Ok(Vec::new());
        };
        let (listed, mut found) = (prefix.clone(), Vec::new());
        let walking = tokio::task::spawn_blocking(move || walk(&folder, &prefix, limit, &mut found).map(|()| found));
        let found = walking.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        found.map_err(|source| {
            Error::store(&listed, object_store::Error::Generic { store: "local files", source: Box::new(source) })
        })
    }

    /// What a cell of this shard names: an absolute URI, or a path relative to the shard.
    ///
    /// # Errors
    /// As [`Location::parse`].
    pub fn resolve(&self, reference: &str) -> Result<Self> {
        if scheme(reference).is_some() {
            return Self::parse(reference);
        }
        let found = match self.file.as_deref().and_then(FsPath::parent) {
            Some(folder) => Self::local(reference, &folder.join(reference)),
            None => self
                .path
                .parent()
                .and_then(|folder| Path::parse(format!("{folder}/{reference}")).ok())
                .map(|path| Self { uri: reference.to_owned(), path, ..self.clone() }),
        };
        let found = found.filter(|_| !reference.is_empty() && !reference.ends_with('/'));
        found.ok_or_else(|| Error::Uri { uri: reference.to_owned(), reason: "it names no file" })
    }

    /// The last part of the path, such as `00000.parquet`.
    pub fn file_name(&self) -> &str {
        self.path.filename().unwrap_or_default()
    }

    /// The file behind it, where it is one.
    pub fn as_file(&self) -> Option<&FsPath> {
        self.file.as_deref()
    }

    /// Names the object: two spellings of one path have the same.
    pub fn identity(&self) -> String {
        match &self.file {
            Some(file) => file.canonicalize().unwrap_or_else(|_| file.clone()).display().to_string(),
            None => format!("{} {}", self.store, self.path),
        }
    }

    /// Whether both are one object, also through symbolic or hard links and other spellings of a path.
    pub fn same_object(&self, other: &Self) -> bool {
        match (&self.file, &other.file) {
            (Some(ours), Some(theirs)) => same_file(ours, theirs),
            (None, None) => self.path == other.path && self.store.to_string() == other.store.to_string(),
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
        if self.file.as_deref().is_some_and(FsPath::is_dir) {
            return Err(Error::Folder { uri: self.uri.clone() });
        }
        let meta = self.store.head(&self.path).await.map_err(|source| Error::store(&self.uri, source))?;
        Ok(ObjectInfo { size: meta.size, e_tag: meta.e_tag, modified: meta.last_modified.into() })
    }

    /// Size, entity tag and time, when the object has at most `bytes_max` bytes.
    ///
    /// # Errors
    /// As [`Self::head`], or it is larger.
    pub async fn head_within(&self, bytes_max: u64) -> Result<ObjectInfo> {
        let info = self.head().await?;
        if info.size > bytes_max {
            return Err(Error::TooLarge { uri: self.uri.clone(), size: info.size, limit: bytes_max });
        }
        Ok(info)
    }

    /// The whole object in this version.
    ///
    /// # Errors
    /// When it cannot be read, or was replaced meanwhile.
    pub async fn get(&self, version: &ObjectInfo) -> Result<Bytes> {
        self.get_range(0..version.size, version.e_tag.as_deref()).await
    }

    /// Bytes of the version that `e_tag` names; another version is [`Error::Changed`], never a mix of both.
    pub(crate) async fn get_range(&self, range: Range<u64>, e_tag: Option<&str>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            if_match: e_tag.map(str::to_owned),
            ..GetOptions::default()
        };
        let answer = async { self.store.get_opts(&self.path, options).await?.bytes().await };
        answer.await.map_err(|source| Error::store(&self.uri, source))
    }

    /// Removes the object.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn delete(&self) -> Result<()> {
        self.store.delete(&self.path).await.map_err(|source| Error::store(&self.uri, source))
    }

    /// Replaces the object by `bytes` at once: a reader sees the old ones or the new ones.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn put(&self, bytes: Bytes) -> Result<()> {
        self.check_folder()?;
        let put = self.store.put(&self.path, bytes.into()).await;
        put.map(drop).map_err(|source| Error::store(&self.uri, source))
    }

    /// Stores make missing folders silently, which turns a misspelt output into a new tree of folders.
    pub(crate) fn check_folder(&self) -> Result<()> {
        let folder = self.file.as_deref().and_then(FsPath::parent);
        match folder.filter(|folder| !folder.is_dir()) {
            Some(folder) => Err(Error::NoFolder { uri: self.uri.clone(), folder: folder.display().to_string() }),
            None => Ok(()),
        }
    }

    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    pub(crate) fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
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

/// The part before `://`, when what precedes it can be a scheme at all.
fn scheme(uri: &str) -> Option<&str> {
    let (scheme, _) = uri.split_once("://")?;
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    (!scheme.is_empty() && scheme.bytes().all(letters)).then_some(scheme)
}

fn file_path(uri: &str) -> Option<PathBuf> {
    url::Url::parse(uri).ok()?.to_file_path().ok()
}

fn walk(folder: &FsPath, prefix: &str, limit: usize, found: &mut Vec<Location>) -> std::io::Result<()> {
    let mut entries = std::fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(['.', '_']) || found.len() >= limit {
            continue;
        }
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), &format!("{prefix}{name}/"), limit, found)?;
        } else if FsPath::new(&name).extension().is_some_and(|extension| extension == "parquet") {
            found.extend(Location::local(&format!("{prefix}{name}"), &entry.path()));
        }
    }
    Ok(())
}

/// An absolute path whose folder is spelt in one way only. A missing folder keeps its spelling: reading from it fails
/// later, with the name the user knows.
fn resolve_folder(path: &FsPath) -> Option<PathBuf> {
    let absolute = std::path::absolute(path).ok()?;
    let name = absolute.file_name()?.to_owned();
    let folder = absolute.parent()?;
    let folder = folder.canonicalize().unwrap_or_else(|_| without_dots(folder));
    Some(folder.join(name))
}

/// `a/../b` without the dots: only used where the folder does not exist, so no symbolic link is stepped over.
fn without_dots(folder: &FsPath) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in folder.components() {
        match part {
            Component::ParentDir => drop(clean.pop()),
            Component::CurDir => {}
            other => clean.push(other),
        }
    }
    clean
}

fn same_file(ours: &FsPath, theirs: &FsPath) -> bool {
    let real = |path: &FsPath| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(ours) == real(theirs) || same_inode(ours, theirs)
}

#[cfg(unix)]
fn same_inode(ours: &FsPath, theirs: &FsPath) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &FsPath| path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    identity(ours).is_some() && identity(ours) == identity(theirs)
}

#[cfg(not(unix))]
fn same_inode(_: &FsPath, _: &FsPath) -> bool {
    false
}
