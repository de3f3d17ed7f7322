//! Which algorithm was fastest, kept in the user's cache folder for the next process.
//!
//! One JSON file for each card, library version and precision. It is a cache and nothing more: a file that cannot be read
//! or written is as good as none, and another process that writes at the same time costs a repeated measurement.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// An algorithm as cuBLASLt describes it to itself.
type Algorithm = [u64; 8];

/// The file and what it holds.
pub(super) struct Tuned {
    path: Option<PathBuf>,
    algorithms: BTreeMap<String, Algorithm>,
}

impl Tuned {
    /// The timings for `key`: card, library and precision in words.
    pub(super) fn open(key: &str) -> Self {
        Self::at(folder().map(|folder| folder.join(format!("{}.json", file_name(key)))))
    }

    fn at(path: Option<PathBuf>) -> Self {
        let text = path.as_ref().and_then(|path| std::fs::read(path).ok());
        let algorithms = text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { path, algorithms }
    }

    pub(super) fn get(&self, product: &str) -> Option<Algorithm> {
        self.algorithms.get(product).copied()
    }

    /// Remembers an algorithm, for this process and if possible for others.
    pub(super) fn put(&mut self, product: String, algorithm: Algorithm) {
        self.algorithms.insert(product, algorithm);
        let Some(path) = &self.path else { return };
        let write = || -> std::io::Result<()> {
            let folder = path.parent().unwrap_or(path);
            std::fs::create_dir_all(folder)?;
            let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
            std::fs::write(&temporary, serde_json::to_vec(&self.algorithms)?)?;
            std::fs::rename(&temporary, path)
        };
        // A cache that cannot be written only costs the next process its timings.
        let _ = write();
    }
}

/// `$XDG_CACHE_HOME/capsieve`, or `~/.cache/capsieve`.
fn folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
    Some(cache.join("capsieve"))
}

fn file_name(key: &str) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    key.chars().map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::{Tuned, file_name};

    #[test]
    fn what_was_put_is_there_in_the_next_process() {
        let folder = std::env::temp_dir().join(format!("capsieve-tuned-{}", std::process::id()));
        let path = folder.join("card.json");
        let mut tuned = Tuned::at(Some(path.clone()));
        assert_eq!(tuned.get("a"), None);
        tuned.put("a".to_owned(), [7; 8]);
        assert_eq!(Tuned::at(Some(path.clone())).get("a"), Some([7; 8]));
        std::fs::write(&path, "no json").expect("a writable file");
        assert_eq!(Tuned::at(Some(path)).get("a"), None);
        std::fs::remove_dir_all(folder).expect("our own folder");
        Tuned::at(None).put("a".to_owned(), [0; 8]);
    }

    #[test]
    fn names_are_safe() {
        assert_eq!(file_name("NVIDIA H100/../x f16"), "nvidia-h100----x-f16");
    }
}
