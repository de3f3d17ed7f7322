//! One object on its way into a store: in one request where it is small, else in equal parts, a few at a time. Not the library's
//! own `WriteMultipart`, because that answers a failed completion with the failure of its clean-up, and so hides a full disk.

use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use object_store::{Error, MultipartUpload, ObjectStoreExt, PutMode, PutOptions, PutPayload, Result};
use tokio::task::{JoinHandle, JoinSet};

use crate::Location;

/// Bytes of a part; stores want at least 5 MiB, some want equal parts, and none takes more than 10,000.
const PART_BYTES: usize = 16 << 20;
/// Parts on their way at a time.
const PARTS_MAX: usize = 4;
/// How long the program's end waits until the parts of uploads that were given up are removed.
const ABORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Uploads that were given up, and are told so to their stores.
static ABORTS: LazyLock<Mutex<Vec<JoinHandle<()>>>> = LazyLock::new(Mutex::default);

/// Waits until the parts of uploads that were given up are removed, for some seconds at most: stores keep them otherwise, and
/// charge for them, until a lifecycle rule of the bucket removes them.
pub async fn uploads_settled() {
    let aborts = std::mem::take(&mut *ABORTS.lock().unwrap_or_else(PoisonError::into_inner));
    drop(tokio::time::timeout(ABORT_TIMEOUT, futures::future::join_all(aborts)).await);
}

/// Sees whether an output could be written, where a store says so without writing anything.
///
/// # Errors
/// When it could not be.
pub async fn check_writable(output: &Location) -> crate::Result<()> {
    if output.as_file().is_some() {
        return Ok(());
    }
    let probe = async {
        match output.store().put_multipart(&output.path()).await?.abort().await {
            // An answer that was lost on its way makes the store be told twice.
            Err(Error::NotFound { .. }) => Ok(()),
            done => done,
        }
    };
    probe.await.map_err(|source| crate::Error::store(output.uri(), source))
}

/// Dropped before [`Upload::finish`], nothing becomes visible.
pub(crate) struct Upload {
    location: Location,
    /// None while it may still be one request.
    multipart: Option<Box<dyn MultipartUpload>>,
    /// An object that is there is not replaced.
    only_new: bool,
    tasks: JoinSet<Result<()>>,
    pending: Vec<Bytes>,
    pending_bytes: usize,
}

impl Upload {
    pub(crate) async fn start(location: &Location, only_new: bool) -> Result<Self> {
        let (location, tasks) = (location.clone(), JoinSet::new());
        let mut upload = Self { location, multipart: None, only_new, tasks, pending: Vec::new(), pending_bytes: 0 };
        // A file shows at once whether it can be written.
        if upload.location.as_file().is_some() {
            upload.begin().await?;
        }
        Ok(upload)
    }

    async fn begin(&mut self) -> Result<&mut Box<dyn MultipartUpload>> {
        if self.multipart.is_none() {
            self.multipart = Some(self.location.store().put_multipart(&self.location.path()).await?);
        }
        Ok(self.multipart.as_mut().expect("it was just begun"))
    }

    pub(crate) async fn write(&mut self, mut bytes: Bytes) -> Result<()> {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PART_BYTES - self.pending_bytes));
            self.pending_bytes += piece.len();
            self.pending.push(piece);
            if self.pending_bytes == PART_BYTES {
                self.send().await?;
            }
        }
        Ok(())
    }

    /// Completes the object; gives its entity tag.
    pub(crate) async fn finish(mut self) -> Result<Option<String>> {
        if self.multipart.is_none() {
            return self.put().await;
        }
        if self.pending_bytes > 0 {
            self.send().await?;
        }
        self.wait(0).await?;
        // No store completes parts on a condition: this leaves a moment for somebody else, whose object is then replaced by one
        // that is whole too.
        if self.only_new && is_there(self.location.clone()).await? {
            return Err(Error::AlreadyExists {
                path: self.location.to_string(),
                source: "another run was faster".into(),
            });
        }
        // Dropped meanwhile, it is given up as before.
        let done = self.multipart.as_mut().expect("it was begun").complete().await?;
        self.multipart = None;
        Ok(done.e_tag)
    }

    /// All of it in one request, which the store does or refuses as a whole.
    async fn put(&mut self) -> Result<Option<String>> {
        let payload = PutPayload::from_iter(std::mem::take(&mut self.pending));
        let mode = if self.only_new { PutMode::Create } else { PutMode::Overwrite };
        let options = PutOptions::from(mode);
        self.location.store().put_opts(&self.location.path(), payload, options).await.map(|done| done.e_tag)
    }

    async fn send(&mut self) -> Result<()> {
        self.wait(PARTS_MAX - 1).await?;
        self.pending_bytes = 0;
        let payload = PutPayload::from_iter(std::mem::take(&mut self.pending));
        let part = self.begin().await?.put_part(payload);
        self.tasks.spawn(part);
        Ok(())
    }

    /// Until at most `parts` are on their way.
    async fn wait(&mut self, parts: usize) -> Result<()> {
        while self.tasks.len() > parts {
            match self.tasks.join_next().await {
                Some(done) => done??,
                None => break,
            }
        }
        Ok(())
    }
}

async fn is_there(location: Location) -> Result<bool> {
    match location.store().head(&location.path()).await {
        Ok(_) => Ok(true),
        Err(Error::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let multipart = self.multipart.take().filter(|_| self.location.as_file().is_none());
        let (Some(mut multipart), Ok(runtime)) = (multipart, tokio::runtime::Handle::try_current()) else { return };
        let mut parts = std::mem::take(&mut self.tasks);
        let abort = runtime.spawn(async move {
            // A part that arrives later would stay.
            parts.shutdown().await;
            drop(multipart.abort().await);
        });
        let mut aborts = ABORTS.lock().unwrap_or_else(PoisonError::into_inner);
        aborts.retain(|abort| !abort.is_finished());
        aborts.push(abort);
    }
}
