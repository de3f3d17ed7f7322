//! Paths of local files: one spelling for each file, links and dots resolved.

use std::path::{Component, Path, PathBuf};

/// The path of a `file://` URI, where the parser loses none of it.
pub(crate) fn file_path(uri: &str) -> Option<PathBuf> {
    // The parser would end the path there, make slashes of them, or leave them out.
    let lost = |letter: char| matches!(letter, '?' | '#' | '\\') || letter.is_ascii_control();
    if uri.contains(lost) || uri.ends_with(' ') || uri.to_ascii_lowercase().contains("%2f") {
        return None;
    }
    url::Url::parse(uri).ok()?.to_file_path().ok()
}

/// An absolute path whose folder is spelt in one way only. A missing folder keeps its spelling: reading from it fails
/// later, with the name the user knows.
pub(crate) fn resolve_folder(path: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(path).ok()?;
    let name = absolute.file_name()?.to_owned();
    let folder = absolute.parent()?;
    // A folder that is missed on the way to one that is there (a/none/../b) is no way round the links of the latter.
    let folder = folder.canonicalize().or_else(|_| without_dots(folder).canonicalize());
    let folder = folder.unwrap_or_else(|_| as_far_as_there(&without_dots(absolute.parent().unwrap_or(&absolute))));
    Some(folder.join(name))
}

/// A folder that is missing, below the last one on its way that is there, whose links are resolved.
fn as_far_as_there(folder: &Path) -> PathBuf {
    let found = folder.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
    found.map_or_else(|| folder.to_owned(), |(above, real)| real.join(folder.strip_prefix(above).unwrap_or(folder)))
}

/// `a/../b` without the dots: only used where the folder does not exist.
fn without_dots(folder: &Path) -> PathBuf {
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

/// Whether both are one file, by whatever link.
pub(crate) fn same_file(ours: &Path, theirs: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(ours) == real(theirs) || same_inode(ours, theirs)
}

#[cfg(unix)]
fn same_inode(ours: &Path, theirs: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    identity(ours).is_some() && identity(ours) == identity(theirs)
}

#[cfg(not(unix))]
fn same_inode(_: &Path, _: &Path) -> bool {
    false
}
