//! Memory that jobs share: what a chunk of rows takes is asked for before it is read further, and given back when its pixels
//! and columns are gone. Waiting is first come, first served.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that a permit of the semaphore stands for: it counts to 2^61 at most, and single bytes are nobody's business.
const UNIT_BYTES: usize = 1024;

/// A number of bytes that may be held at a time, or no limit.
#[derive(Clone, Debug, Default)]
pub(crate) struct Budget(Option<(Arc<Semaphore>, u32)>);

/// Bytes that are held; given back when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Held(Option<OwnedSemaphorePermit>);

impl Held {
    /// Takes `bytes` out of it, or what there is.
    pub(crate) fn split(&mut self, bytes: usize) -> Self {
        let Some(permit) = &mut self.0 else { return Self::default() };
        Self(permit.split((bytes / UNIT_BYTES).min(permit.num_permits())))
    }
}

impl Budget {
    /// At most `bytes` at a time.
    pub(crate) fn new(bytes: usize) -> Self {
        let units = u32::try_from(bytes / UNIT_BYTES).unwrap_or(u32::MAX).max(1);
        Self(Some((Arc::new(Semaphore::new(units as usize)), units)))
    }

    /// Waits for `bytes`. What is larger than the whole budget takes all of it: alone it may go on.
    pub(crate) async fn take(&self, bytes: usize) -> Held {
        let Some((semaphore, all)) = &self.0 else { return Held::default() };
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).min(*all);
        Held(Some(Arc::clone(semaphore).acquire_many_owned(units).await.expect("the semaphore is never closed")))
    }

    /// Bytes that nobody holds; none without a limit.
    #[cfg(test)]
    pub(crate) fn free(&self) -> Option<usize> {
        self.0.as_ref().map(|(semaphore, _)| semaphore.available_permits() * UNIT_BYTES)
    }
}
