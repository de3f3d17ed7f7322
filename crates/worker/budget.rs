//! Memory that jobs share: what a chunk of rows takes is asked for before it is read further, and given back when its pixels
//! and columns are gone. Waiting is first come, first served.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that a permit of the semaphore stands for: it counts to 2^61 at most, and single bytes are nobody's business.
const UNIT_BYTES: usize = 1024;

/// A number of bytes that may be held at a time, or no limit. A clone is the same budget.
#[derive(Clone, Debug, Default)]
pub(crate) struct Budget(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    room: Arc<Semaphore>,
    units: u32,
    /// Jobs that wait for room.
    waiting: AtomicUsize,
}

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
        let room = Arc::new(Semaphore::new(units as usize));
        Self(Some(Arc::new(Shared { room, units, waiting: AtomicUsize::new(0) })))
    }

    /// The most bytes at a time; none: no limit.
    pub(crate) fn bytes_max(&self) -> Option<usize> {
        self.0.as_ref().map(|shared| shared.units as usize * UNIT_BYTES)
    }

    /// Waits for `bytes`. What is larger than the whole budget takes all of it: alone it may go on.
    pub(crate) async fn take(&self, bytes: usize) -> Held {
        let Some(shared) = &self.0 else { return Held::default() };
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).min(shared.units);
        let _waiting = Waiting::new(&shared.waiting);
        let permit = Arc::clone(&shared.room).acquire_many_owned(units).await;
        Held(Some(permit.expect("the semaphore is never closed")))
    }

    /// Whether somebody waits for room.
    pub(crate) fn is_wanted(&self) -> bool {
        self.0.as_ref().is_some_and(|shared| shared.waiting.load(Ordering::Relaxed) > 0)
    }

    /// Bytes that nobody holds; none without a limit.
    #[cfg(test)]
    pub(crate) fn free(&self) -> Option<usize> {
        self.0.as_ref().map(|shared| shared.room.available_permits() * UNIT_BYTES)
    }
}

/// Counts who waits, also where the waiting is given up.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
