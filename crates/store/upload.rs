//! One object on its way into a store: equal parts, a few at a time. Not the library's own `WriteMultipart`, because that
//! answers a failed completion with the failure of its clean-up, and so hides a full disk.

use bytes::Bytes;
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload, Result};
use tokio::task::JoinSet;

use crate::Location;

/// Bytes of a part; stores want at least 5 MiB, some want equal parts, and none takes more than 10,000.
const PART_BYTES: usize = 16 << 20;
/// Parts on their way at a time.
const PARTS_MAX: usize = 4;

/// Dropped before [`Upload::finish`], nothing becomes visible.
pub(crate) struct Upload {
    upload: Box<dyn MultipartUpload>,
    tasks: JoinSet<Result<()>>,
    pending: Vec<Bytes>,
    pending_bytes: usize,
}

impl Upload {
    pub(crate) async fn start(location: &Location) -> Result<Self> {
        let upload = location.store().put_multipart(&location.path()).await?;
        Ok(Self { upload, tasks: JoinSet::new(), pending: Vec::new(), pending_bytes: 0 })
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

    /// Completes the object.
    pub(crate) async fn finish(mut self) -> Result<()> {
        if self.pending_bytes > 0 {
            self.send().await?;
        }
        self.wait(0).await?;
        self.upload.complete().await.map(drop)
    }

    async fn send(&mut self) -> Result<()> {
        self.wait(PARTS_MAX - 1).await?;
        self.pending_bytes = 0;
        let payload = PutPayload::from_iter(std::mem::take(&mut self.pending));
        self.tasks.spawn(self.upload.put_part(payload));
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
