//! A model id of the hub to a local folder, in the cache that every Hugging Face program shares. A file that is there is
//! never fetched again; a file that is not whole is never left there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hf_hub::progress::{DownloadEvent, Progress, ProgressEvent, ProgressHandler};
use hf_hub::{HFClient, HFError, HFRepository, RepoTypeModel};

use crate::{Error, Result};

const ENDPOINT: &str = "https://huggingface.co";
const REVISION: &str = "main";
/// Tries for a file whose connection breaks in the middle; the client itself tries again to connect.
const ATTEMPTS: usize = 3;
/// The client waits ten seconds for a file that another process fetches; a large model takes longer. Half an hour in all.
const LOCK_WAITS: usize = 60;
const LOCK_PAUSE: Duration = Duration::from_secs(20);
pub(crate) const CONFIG: &str = "config.json";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Small files a model may have; which of them are needed is for the loader to say.
pub(crate) const SMALL_FILES: [&str; 3] = ["preprocessor_config.json", "tokenizer.json", "vocab.txt"];
/// Weights in one file, best first.
pub(crate) const WEIGHTS: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];
/// What a model has one of.
pub(crate) const WEIGHTS_WANTED: &str = "model.safetensors, model.safetensors.index.json or pytorch_model.bin";

/// Where models come from and where they are kept.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// The server.
    pub endpoint: String,
    /// The cache folder.
    pub cache: PathBuf,
    /// Who asks; without one, the client looks where Hugging Face's programs keep it (`HF_TOKEN`, the file of a login).
    pub token: Option<String>,
    /// Never asks the server.
    pub offline: bool,
}

/// How far the download of one file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileProgress {
    /// Its name in the repository.
    pub file: String,
    /// Bytes received.
    pub bytes: u64,
    /// Bytes announced.
    pub bytes_total: u64,
}

impl HubConfig {
    /// As `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` say.
    ///
    /// # Errors
    /// When `HF_ENDPOINT` is not the address of a web server.
    pub fn from_env() -> Result<Self> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let on = |value: String| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::HubEndpoint { endpoint });
        }
        Ok(Self {
            endpoint,
            cache: hf_hub::resolve_cache_dir(),
            token: None,
            offline: variable("HF_HUB_OFFLINE").is_some_and(on),
        })
    }
}

/// The folder that holds the model `id` (`OWNER/NAME` or `OWNER/NAME@REVISION`), after fetching what is missing.
///
/// # Errors
/// When the id is malformed, the model is not there or not ours to read, or the server or the cache cannot be used.
pub async fn fetch_model(config: &HubConfig, id: &str) -> Result<PathBuf> {
    fetch_model_with(config, id, |_| ()).await
}

/// [`fetch_model`], calling `progress` for each piece that arrives. It must not block.
///
/// # Errors
/// As [`fetch_model`].
pub async fn fetch_model_with(
    config: &HubConfig,
    id: &str,
    progress: impl Fn(FileProgress) + Send + Sync + 'static,
) -> Result<PathBuf> {
    let (name, revision) = parse_id(id).ok_or_else(|| Error::HubId { id: id.to_owned() })?;
    let mut client = HFClient::builder().endpoint(&config.endpoint).cache_dir(&config.cache).retry_max_attempts(2);
    client = client.user_agent(concat!("capsieve/", env!("CARGO_PKG_VERSION")));
    if let Some(token) = &config.token {
        client = client.token(token);
    }
    let (owner, repository) = hf_hub::split_id(name);
    let failed = |source| hub_error(config, id, CONFIG, source);
    let repository = client.build().map_err(failed)?.model(owner, repository);
    let hub = Hub { config, id, repository, progress: Arc::new(progress) };
    hub.fetch(revision).await
}

/// Repository and revision.
fn parse_id(id: &str) -> Option<(&str, &str)> {
    let (name, revision) = id.split_once('@').unwrap_or((id, REVISION));
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(letters);
    let usable = name.split('/').count() <= 2 && name.split('/').all(part);
    // A revision may be a branch such as `refs/pr/1`; it becomes a path in the cache.
    (usable && !name.contains("..") && revision.split('/').all(part)).then_some((name, revision))
}

struct Hub<'a> {
    config: &'a HubConfig,
    id: &'a str,
    repository: HFRepository<RepoTypeModel>,
    progress: Arc<dyn Fn(FileProgress) + Send + Sync>,
}

impl Hub<'_> {
    async fn fetch(&self, revision: &str) -> Result<PathBuf> {
        // The first file pins the commit, so that a push in between cannot mix two versions of a model.
        let config = self.file(CONFIG, revision).await?.ok_or_else(|| self.missing(CONFIG))?;
        let folder = config.parent().map(Path::to_path_buf).unwrap_or_default();
        let commit = folder.file_name().and_then(|name| name.to_str()).unwrap_or(revision);
        for file in SMALL_FILES {
            self.file(file, commit).await?;
        }
        self.weights(commit).await?;
        Ok(folder)
    }

    async fn weights(&self, commit: &str) -> Result<()> {
        let [safetensors, pickle] = WEIGHTS;
        if self.file(safetensors, commit).await?.is_some() {
            return Ok(());
        }
        if let Some(index) = self.file(INDEX, commit).await? {
            for shard in shards(&index)? {
                self.file(&shard, commit).await?.ok_or_else(|| self.missing(&shard))?;
            }
            return Ok(());
        }
        if self.file(pickle, commit).await?.is_some() {
            return Ok(());
        }
        Err(self.missing(WEIGHTS_WANTED))
    }

    /// The path of a file, none where the repository has no such file.
    async fn file(&self, file: &str, revision: &str) -> Result<Option<PathBuf>> {
        // What a commit holds cannot change, what a branch holds can.
        if self.config.offline || is_commit(revision) {
            match self.download(file, revision, true, None).await {
                Ok(path) => return Ok(Some(path)),
                Err(HFError::EntryNotFound { .. }) => return Ok(None),
                Err(_) if self.config.offline => return Ok(None),
                Err(_) => {}
            }
        }
        let (mut attempts, mut waits) = (1, 0);
        loop {
            let watch = Watch::new(file, &self.progress);
            let got = self.download(file, revision, false, Some(Progress::from(Arc::clone(&watch)))).await;
            let announced = watch.bytes_total.load(Ordering::Relaxed);
            match got {
                Ok(path) => match self.check_size(file, &path, announced) {
                    Err(Error::HubCut { .. }) if attempts < ATTEMPTS => attempts += 1,
                    other => return other.map(|()| Some(path)),
                },
                Err(HFError::Request { source, .. })
                    if (source.is_body() || source.is_decode()) && attempts < ATTEMPTS =>
                {
                    attempts += 1;
                }
                // Another process fetches the same file; what it leaves is then ours too.
                Err(HFError::CacheLockTimeout { .. }) if waits < LOCK_WAITS => {
                    waits += 1;
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                Err(HFError::EntryNotFound { .. }) if self.known_absent(file, revision).await => return Ok(None),
                Err(source) => return Err(hub_error(self.config, self.id, file, source)),
            }
        }
    }

    async fn download(
        &self,
        file: &str,
        revision: &str,
        cached: bool,
        progress: Option<Progress>,
    ) -> Result<PathBuf, HFError> {
        let request = self.repository.download_file().filename(file).revision(revision);
        request.local_files_only(cached).maybe_progress(progress).send().await
    }

    /// Whether the server said that the revision exists and has no such file. For a missing model or revision it says
    /// "not found" too, but names no commit, so the client leaves no note in the cache.
    async fn known_absent(&self, file: &str, revision: &str) -> bool {
        matches!(self.download(file, revision, true, None).await, Err(HFError::EntryNotFound { .. }))
    }

    /// A file that is shorter or longer than announced is an error page or a cut download: removes it.
    fn check_size(&self, file: &str, path: &Path, expected: u64) -> Result<()> {
        let cache = |source| Error::HubCache { path: path.display().to_string(), source };
        let blob = path.canonicalize().map_err(cache)?;
        let size = blob.metadata().map_err(cache)?.len();
        // Nothing is announced where nothing was downloaded, and by servers that do not know.
        if expected == 0 || size == expected {
            return Ok(());
        }
        std::fs::remove_file(path).map_err(cache)?;
        if blob != path && blob.exists() {
            std::fs::remove_file(&blob).map_err(cache)?;
        }
        Err(Error::HubCut {
            id: self.id.to_owned(),
            file: file.to_owned(),
            endpoint: self.config.endpoint.clone(),
            size,
            expected,
        })
    }

    fn missing(&self, missing: &str) -> Error {
        let (id, missing) = (self.id.to_owned(), missing.to_owned());
        if self.config.offline {
            return Error::HubOffline { id, missing, cache: self.config.cache.display().to_string() };
        }
        Error::HubIncomplete { id, endpoint: self.config.endpoint.clone(), missing }
    }
}

/// Forty hexadecimal digits name a commit.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The weight files that an index lists, each once.
fn shards(index: &Path) -> Result<Vec<String>> {
    let cache = |source| Error::HubCache { path: index.display().to_string(), source };
    weight_files(&std::fs::read(index).map_err(cache)?).map_err(|source| cache(source.into()))
}

/// The same of an index's text.
pub(crate) fn weight_files(index: &[u8]) -> serde_json::Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index)?;
    let mut files: Vec<String> = index.weight_map.into_values().collect();
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

fn hub_error(config: &HubConfig, id: &str, file: &str, source: HFError) -> Error {
    let source = match source {
        HFError::Io(source) => return Error::HubCache { path: config.cache.display().to_string(), source },
        other => Box::new(other),
    };
    let (id, endpoint) = (id.to_owned(), config.endpoint.clone());
    match source.as_ref() {
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => Error::HubAccess { id, endpoint, source },
        HFError::EntryNotFound { .. } | HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } => {
            Error::HubNotFound { id, endpoint, source }
        }
        _ => Error::Hub { id, file: file.to_owned(), endpoint, source },
    }
}

/// Passes the client's events on, and remembers how many bytes were announced.
struct Watch {
    file: String,
    bytes_total: AtomicU64,
    progress: Arc<dyn Fn(FileProgress) + Send + Sync>,
}

impl Watch {
    fn new(file: &str, progress: &Arc<dyn Fn(FileProgress) + Send + Sync>) -> Arc<Self> {
        Arc::new(Self { file: file.to_owned(), bytes_total: AtomicU64::new(0), progress: Arc::clone(progress) })
    }
}

impl ProgressHandler for Watch {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let bytes = match event {
            DownloadEvent::Start { total_bytes, .. } => {
                self.bytes_total.store(*total_bytes, Ordering::Relaxed);
                0
            }
            DownloadEvent::Progress { files } => files.iter().map(|file| file.bytes_completed).max().unwrap_or(0),
            DownloadEvent::AggregateProgress { bytes_completed, .. } => *bytes_completed,
            DownloadEvent::Complete => return,
        };
        let bytes_total = self.bytes_total.load(Ordering::Relaxed);
        (self.progress)(FileProgress { file: self.file.clone(), bytes, bytes_total });
    }
}

#[cfg(test)]
mod tests {
    use super::parse_id;

    #[test]
    fn ids() {
        assert_eq!(parse_id("Salesforce/blip-itm-base-coco"), Some(("Salesforce/blip-itm-base-coco", "main")));
        assert_eq!(parse_id("gpt2@refs/pr/1"), Some(("gpt2", "refs/pr/1")));
        for bad in
            ["", "/", "a/", "/b", "a/b/c", "a b/c", "../x", "a/..", ".a/b", "a/b@", "a/b@../x", "a/b@x//y", "./a"]
        {
            assert_eq!(parse_id(bad), None, "{bad:?}");
        }
    }
}
