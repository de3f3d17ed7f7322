//! Bearer tokens from a file, one a line; read again when the file changes.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::HeaderValue;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// The file is looked at this often.
const LOOK: Duration = Duration::from_secs(1);
/// Old tokens are valid for so long when the file is gone or empty: one that is being replaced must not lock everybody out,
/// and one that was taken away must.
pub(crate) const GRACE: Duration = Duration::from_secs(10);
/// Bytes of the file at most.
const BYTES_MAX: u64 = 1 << 20;

/// Tokens that are valid now.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    /// SHA-256 of each: comparing hashes in constant time says nothing about the tokens.
    hashes: Vec<[u8; 32]>,
    /// The file that they are from: when it was written, and its length.
    version: Option<Version>,
    looked: Instant,
    /// Since when the file holds no token.
    unusable: Option<Instant>,
}

type Version = (SystemTime, u64);

/// The tokens of a file's text: one a line, without the space around it. Empty lines are none, and neither are those that
/// begin with '#'; the mark that some editors put in front of a text is no part of the first.
pub fn token_lines(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#'))
}

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read or holds no token.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let (hashes, version) = read(path)?;
        let known = Mutex::new(Known { hashes, version, looked: Instant::now(), unusable: None });
        Ok(Self { path: path.to_owned(), known })
    }

    /// Whether a request's `authorization` is one of the tokens.
    pub fn accept(&self, header: Option<&HeaderValue>) -> bool {
        let Some(token) = header.and_then(|value| value.as_bytes().strip_prefix(b"Bearer ")) else { return false };
        let hash = Sha256::digest(token);
        self.look(Instant::now());
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |accepted: Choice, one: &[u8; 32]| accepted | one.ct_eq(hash.as_slice());
        known.hashes.iter().fold(Choice::from(0), same).into()
    }

    /// Looks at the file also while nobody asks, so that the log says in time what became of it.
    pub(crate) async fn renew(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.look(Instant::now());
        }
    }

    fn look(&self, now: Instant) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(known.looked) < LOOK {
            return;
        }
        known.looked = now;
        let path = self.path.display();
        if known.unusable.is_none() && std::fs::metadata(&self.path).is_ok_and(|meta| version(&meta) == known.version) {
            return;
        }
        match (read(&self.path), known.unusable) {
            (Ok((hashes, version)), _) => {
                tracing::info!("{path}: new tokens are in use");
                (known.hashes, known.version, known.unusable) = (hashes, version, None);
            }
            (Err(error), None) => {
                known.unusable = Some(now);
                tracing::warn!("{path}: {error}: the old tokens are valid for {} seconds more", GRACE.as_secs());
            }
            (Err(error), Some(since)) if !known.hashes.is_empty() && now.duration_since(since) >= GRACE => {
                known.hashes.clear();
                tracing::warn!("{path}: {error}: no token is valid any more");
            }
            (Err(_), Some(_)) => {}
        }
    }
}

fn version(meta: &std::fs::Metadata) -> Option<Version> {
    Some((meta.modified().ok()?, meta.len()))
}

fn read(path: &Path) -> std::io::Result<(Vec<[u8; 32]>, Option<Version>)> {
    let meta = std::fs::metadata(path)?;
    if meta.len() > BYTES_MAX {
        return Err(std::io::Error::other("too large for a file of tokens"));
    }
    let text = std::fs::read_to_string(path)?;
    let hashes: Vec<[u8; 32]> = token_lines(&text).map(|token| Sha256::digest(token).into()).collect();
    if hashes.is_empty() {
        return Err(std::io::Error::other("it holds no token: one a line is expected"));
    }
    Ok((hashes, version(&meta)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_file() {
        let text = "\u{feff}first\r\n# a comment\n\n  second \t\n   # another\nthird";
        assert_eq!(token_lines(text).collect::<Vec<_>>(), ["first", "second", "third"]);
        assert_eq!(token_lines("\u{feff}# nobody\n \n").count(), 0);
    }

    /// What is valid at a time, without waiting for it.
    struct At(Tokens, Instant);

    impl At {
        fn new(path: &Path) -> Self {
            let tokens = Tokens::open(path).unwrap();
            let opened = tokens.known.lock().unwrap().looked;
            Self(tokens, opened)
        }

        fn accepts(&self, seconds: u64, token: &str) -> bool {
            self.0.look(self.1 + Duration::from_secs(seconds));
            self.0.accept(Some(&format!("Bearer {token}").parse().unwrap()))
        }
    }

    #[test]
    fn a_file_that_is_taken_away_or_emptied_ends_its_tokens_after_a_grace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let end: [fn(&Path); 3] = [
            |path| std::fs::remove_file(path).unwrap(),
            |path| std::fs::write(path, "").unwrap(),
            |path| std::fs::write(path, "# nobody\n").unwrap(),
        ];
        for end in end {
            std::fs::write(&path, "one\n").unwrap();
            let tokens = At::new(&path);
            assert!(tokens.accepts(1, "one"));
            end(&path);
            assert!(tokens.accepts(2, "one"), "it may be on its way");
            assert!(tokens.accepts(11, "one"));
            assert!(!tokens.accepts(12, "one"), "the grace is over");
            assert!(!tokens.accepts(13, ""), "nobody may call");
            std::fs::write(&path, "two\n").unwrap();
            assert!(tokens.accepts(14, "two") && !tokens.accepts(15, "one"), "it is back");
        }
    }

    #[test]
    fn a_file_that_comes_back_in_time_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let (path, aside) = (folder.path().join("tokens"), folder.path().join("aside"));
        std::fs::write(&path, "one\n").unwrap();
        let tokens = At::new(&path);
        std::fs::rename(&path, &aside).unwrap();
        assert!(tokens.accepts(1, "one"));
        // The very same file: neither its time nor its length tells.
        std::fs::rename(&aside, &path).unwrap();
        assert!(tokens.accepts(2, "one") && tokens.accepts(20, "one"));
    }

    #[test]
    fn a_change_within_the_clock_s_grain_shows_in_the_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        std::fs::write(&path, "one\n").unwrap();
        let tokens = At::new(&path);
        let written = std::fs::metadata(&path).unwrap().modified().unwrap();
        std::fs::write(&path, "another\n").unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(written).unwrap();
        assert!(tokens.accepts(1, "another") && !tokens.accepts(2, "one"));
    }
}
