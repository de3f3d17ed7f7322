//! The name an output has while it is written, and the removal of such files.
//!
//! A local output `NAME` is written to `.NAME.<16 hex digits>.partial` beside it (the store adds `#1` and the like while
//! the file grows) and renamed at the end: readers of the folder skip hidden files, and a rename on one file system is
//! atomic. A dropped writer removes its file. A killed process cannot; the next run that commits the same NAME removes
//! what it left. Buckets need none of this: an upload shows its object only when it is completed.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::{Path, PathBuf};

use crate::Location;
use crate::access::blocking;

const SUFFIX: &str = ".partial";
const RANDOM_DIGITS: usize = 16;

/// Where the bytes of an output go before it is complete.
pub(crate) struct Partial {
    target: Location,
    /// The hidden sibling of a local file; none in a bucket.
    hidden: Option<Location>,
}

impl Partial {
    pub(crate) fn new(target: &Location) -> Self {
        let random = RandomState::new().build_hasher().finish();
        let name = format!(".{}.{random:0width$x}{SUFFIX}", target.file_name(), width = RANDOM_DIGITS);
        Self { target: target.clone(), hidden: target.as_file().map(|_| target.sibling(&name)) }
    }

    /// Where to write.
    pub(crate) fn location(&self) -> &Location {
        self.hidden.as_ref().unwrap_or(&self.target)
    }

    /// The file to rename to the target, unless the target itself was written.
    pub(crate) fn to_rename(&self) -> Option<&Location> {
        self.hidden.as_ref()
    }

    /// Removes every partial file of the target, those of killed runs too. Best effort: they are in nobody's way.
    pub(crate) fn remove_all(&self) {
        if let Some((folder, file)) = self.target.as_file().and_then(|file| file.parent().zip(file.file_name())) {
            let prefix = format!(".{}.", file.to_string_lossy());
            found(folder, &prefix, RANDOM_DIGITS).for_each(|path| drop(std::fs::remove_file(path)));
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let hidden = self.hidden.as_ref().and_then(Location::as_file);
        let Some(file) = hidden.map(|file| file.as_os_str().to_owned()) else { return };
        // No other run has this name, so the store counts no further than one. Not looked for in the folder, which may hold
        // many files: this may be one of the threads that all calls share.
        for suffix in ["", "#1"] {
            let mut file = file.clone();
            file.push(suffix);
            drop(std::fs::remove_file(file));
        }
    }
}

/// Removes what killed runs left of a local output. Best effort: they are in nobody's way.
pub async fn remove_leftovers(output: &Location) {
    let partial = Partial { target: output.clone(), hidden: None };
    blocking(move || partial.remove_all()).await;
}

/// Files of `folder` called `prefix`, some hexadecimal digits, and the suffix.
fn found(folder: &Path, prefix: &str, digits: usize) -> impl Iterator<Item = PathBuf> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    names
        .filter(move |entry| is_partial(&entry.file_name().to_string_lossy(), prefix, digits))
        .map(|entry| entry.path())
}

fn is_partial(name: &str, prefix: &str, digits: usize) -> bool {
    let Some((random, suffix)) = name.strip_prefix(prefix).and_then(|rest| rest.split_at_checked(digits)) else {
        return false;
    };
    let staged = suffix.strip_prefix(SUFFIX).map(|rest| rest.strip_prefix('#').unwrap_or(rest));
    random.bytes().all(|byte| byte.is_ascii_hexdigit())
        && staged.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::is_partial;

    #[test]
    fn only_our_own_leftovers_match() {
        let ours = |name| is_partial(name, ".a.parquet.", 16);
        assert!(ours(".a.parquet.0123456789abcdef.partial"));
        assert!(ours(".a.parquet.0123456789abcdef.partial#12"));
        for other in [
            "a.parquet",
            ".a.parquet",
            ".a.parquet.partial",
            ".a.parquet.0123456789abcde.partial",
            ".a.parquet.0123456789abcdeg.partial",
            ".a.parquet.0123456789abcdef.partial.gz",
            ".a.parquet.0123456789abcdef.partial#x",
            ".b.parquet.0123456789abcdef.partial",
        ] {
            assert!(!ours(other), "{other}");
        }
    }
}
