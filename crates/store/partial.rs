//! The name an output has while it is written, and the removal of such files.
//!
//! A local output `NAME` is written to `.NAME.<16 hex digits>.partial` beside it (the store adds `#1` and the like while
//! the file grows) and renamed at the end: readers of the folder skip hidden files, and a rename on one file system is
//! atomic. A dropped writer removes its file. A killed process cannot; the next run that commits the same NAME removes
//! what it left. Buckets need none of this: an upload shows its object only when it is completed.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;

use crate::access::blocking;
use crate::{Location, stats_location};

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

/// Removes what killed runs left of a local output and of its statistics. Best effort: they are in nobody's way. The folder
/// is looked at once, for it may hold many files.
pub async fn remove_leftovers(output: &Location) {
    let prefixes = [output.clone(), stats_location(output)].map(|target| format!(".{}.", target.file_name()));
    let Some(folder) = output.as_file().and_then(Path::parent).map(Path::to_owned) else { return };
    blocking(move || {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if prefixes.iter().any(|prefix| is_partial(&name.to_string_lossy(), prefix)) {
                drop(std::fs::remove_file(entry.path()));
            }
        }
    })
    .await;
}

/// Whether a file is called `prefix`, as many hexadecimal digits as ours have, and the suffix.
fn is_partial(name: &str, prefix: &str) -> bool {
    let Some((random, suffix)) = name.strip_prefix(prefix).and_then(|rest| rest.split_at_checked(RANDOM_DIGITS)) else {
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
        let ours = |name| is_partial(name, ".a.parquet.");
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
