//! Memory that jobs share: what a chunk of rows takes is asked for before it is read further, and given back when its pixels
//! and columns are gone. Waiting is first come, first served, but for a reserve that only small requests may use: who needs
//! little does not wait for those who need much.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that a permit of the semaphore stands for: it counts to 2^61 at most, and single bytes are nobody's business.
const UNIT_BYTES: usize = 1024;

/// A part of so many is the reserve ...
const RESERVE: u32 = 8;
/// ... and a request is small that asks for no more than a part of so many.
const SMALL: u32 = 64;

/// A number of bytes that may be held at a time, or no limit. A clone is the same budget.
#[derive(Clone, Debug, Default)]
pub(crate) struct Budget(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    room: Arc<Semaphore>,
    /// For small requests alone.
    reserve: Arc<Semaphore>,
    /// Of both.
    units: u32,
    /// Jobs that wait for room.
    waiting: AtomicUsize,
}

/// Bytes that are held; given back when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Held(Option<OwnedSemaphorePermit>);

impl Held {
    /// Takes out of it what is beyond `bytes`.
    pub(crate) fn beyond(&mut self, bytes: usize) -> Self {
        let held = self.0.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        self.split(held.saturating_sub(bytes.div_ceil(UNIT_BYTES)) * UNIT_BYTES)
    }

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
        let reserve = units / RESERVE;
        let semaphore = |units: u32| Arc::new(Semaphore::new(units as usize));
        let (room, reserve) = (semaphore(units - reserve), semaphore(reserve));
        Self(Some(Arc::new(Shared { room, reserve, units, waiting: AtomicUsize::new(0) })))
    }

    /// A part of so many bytes.
    pub(crate) fn part(bytes: u64, parts: u64, of: u64) -> Self {
        Self::new(usize::try_from(bytes / of * parts).unwrap_or(usize::MAX))
    }

    /// The most bytes that one may have; none: no limit.
    pub(crate) fn bytes_max(&self) -> Option<usize> {
        self.0.as_ref().map(|shared| shared.for_all() as usize * UNIT_BYTES)
    }

    /// Waits for `bytes`. What is larger than all that one may have takes all of it: alone it may go on.
    pub(crate) async fn take(&self, bytes: usize) -> Held {
        self.take_or(bytes, || ()).await
    }

    /// The same; calls `waits` first where it is not there at once, for memory that is better not held meanwhile.
    pub(crate) async fn take_or(&self, bytes: usize, waits: impl FnOnce()) -> Held {
        let Some(shared) = &self.0 else { return Held::default() };
        if let Some(held) = self.try_take(bytes) {
            return held;
        }
        waits();
        let units = shared.units_of(bytes);
        let of = |semaphore: &Arc<Semaphore>| Arc::clone(semaphore).acquire_many_owned(units);
        let _waiting = Waiting::new(&shared.waiting);
        let permit = if shared.is_small(units) {
            tokio::select! {
                biased;
                permit = of(&shared.room) => permit,
                permit = of(&shared.reserve) => permit,
            }
        } else {
            of(&shared.room).await
        };
        Held(Some(permit.expect("the semaphores are never closed")))
    }

    /// `bytes`, if they are there now; never before those who wait.
    pub(crate) fn try_take(&self, bytes: usize) -> Option<Held> {
        let Some(shared) = &self.0 else { return Some(Held::default()) };
        let units = shared.units_of(bytes);
        let of = |semaphore: &Arc<Semaphore>| Arc::clone(semaphore).try_acquire_many_owned(units).ok();
        let permit = of(&shared.room).or_else(|| of(&shared.reserve).filter(|_| shared.is_small(units)));
        permit.map(|permit| Held(Some(permit)))
    }

    /// Whether somebody waits for room.
    pub(crate) fn is_wanted(&self) -> bool {
        self.0.as_ref().is_some_and(|shared| shared.waiting.load(Ordering::Relaxed) > 0)
    }

    /// Bytes that nobody holds; none without a limit.
    #[cfg(test)]
    pub(crate) fn free(&self) -> Option<usize> {
        self.0
            .as_ref()
            .map(|shared| (shared.room.available_permits() + shared.reserve.available_permits()) * UNIT_BYTES)
    }
}

impl Shared {
    fn units_of(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).min(self.for_all())
    }

    fn is_small(&self, units: u32) -> bool {
        units <= self.units / SMALL
    }

    fn for_all(&self) -> u32 {
        self.units - self.units / RESERVE
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn what_is_beyond_a_part_is_given_back_alone() {
        let budget = Budget::new(64 << 20);
        // More than all that one may have: the part keeps its own.
        let mut held = budget.take(1 << 40).now_or_never().unwrap();
        drop(held.beyond(50 << 20));
        assert_eq!(budget.free(), Some((64 - 50) << 20));
        drop(held.beyond(60 << 20));
        assert_eq!(budget.free(), Some((64 - 50) << 20), "there is no more");
        drop(held);
        assert_eq!(budget.free(), Some(64 << 20));
    }

    #[test]
    fn who_needs_little_does_not_wait_for_who_needs_much() {
        let budget = Budget::new(64 << 20);
        assert_eq!(budget.bytes_max(), Some(56 << 20));
        let all = budget.take(1 << 40).now_or_never().unwrap();
        let mut large = Box::pin(budget.take(2 << 20));
        assert!((&mut large).now_or_never().is_none() && budget.is_wanted());
        let small: Vec<Held> = (0..8).map(|_| budget.take(1 << 20).now_or_never().unwrap()).collect();
        assert!(budget.take(1 << 20).now_or_never().is_none(), "the reserve has an end too");
        drop(small);
        assert!((&mut large).now_or_never().is_none(), "the reserve is not for all");
        drop(all);
        drop(large.now_or_never().unwrap());
        assert!(!budget.is_wanted());
        assert_eq!(budget.free(), Some(64 << 20));
    }
}
