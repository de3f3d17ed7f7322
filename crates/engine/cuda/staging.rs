//! Pixels on their way to the card while it computes: pinned memory, a stream of its own, and for each slot two events
//! that keep its copy behind the last work that reads the slot and the next work behind the copy.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::{Address, STAGES};
use super::driver::Context;
use crate::Error;

/// A stretch of pinned host memory whose bytes go to one place on the card.
struct Slot {
    host: *mut u8,
    bytes: usize,
    /// The copy is done.
    copied: sys::CUevent,
    /// The work that reads the place on the card is done.
    released: sys::CUevent,
}

/// The slots of a card.
pub(super) struct Staging {
    context: Arc<Context>,
    stream: sys::CUstream,
    slots: Vec<Slot>,
}

// SAFETY: pinned memory and the handles belong to this value alone and may be used from any thread.
unsafe impl Send for Staging {}

impl Staging {
    /// [`STAGES`] slots of `bytes` bytes. Errors: no pinned memory.
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        const ACTION: &str = "allocate pinned memory";
        context.enter()?;
        let stream = context.check(ACTION, result::stream::create(result::stream::StreamKind::NonBlocking))?;
        // From here on drop cleans up what there is.
        let mut staging = Self { context: Arc::clone(context), stream, slots: Vec::with_capacity(STAGES) };
        for _ in 0..STAGES {
            let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
            let (copied, released) = (context.check(ACTION, event())?, context.check(ACTION, event())?);
            // SAFETY: the context is current; freed in drop.
            let host = context.check(ACTION, unsafe { result::malloc_host(bytes.max(1), 0) })?;
            staging.slots.push(Slot { host: host.cast(), bytes, copied, released });
        }
        Ok(staging)
    }

    /// Begins to copy `bytes` to `to`, after the work that was queued before the slot's last release.
    ///
    /// # Safety
    /// `to` has room for the bytes and is touched by nothing else between [`Self::release`] and [`Self::take`].
    pub(super) unsafe fn bring(&mut self, slot: usize, bytes: &[u8], to: Address) -> Result<(), Error> {
        let slot = &self.slots[slot];
        assert!(bytes.len() <= slot.bytes);
        let done = (|| {
            // SAFETY: the events and the stream are ours. Once the slot's last copy is done nothing reads its host
            // memory, which has room for the bytes; it stays alive until drop has waited for the stream.
            unsafe {
                result::event::synchronize(slot.copied)?;
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), slot.host, bytes.len());
                let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                result::stream::wait_event(self.stream, slot.released, wait)?;
                let pinned = std::slice::from_raw_parts(slot.host, bytes.len());
                result::memcpy_htod_async(to, pinned, self.stream)?;
                result::event::record(slot.copied, self.stream)
            }
        })();
        self.context.check("take images", done)
    }

    /// What is queued on `stream` from here on sees the slot's bytes.
    pub(super) fn take(&self, slot: usize, stream: sys::CUstream) -> Result<(), Error> {
        let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are alive.
        let queued = unsafe { result::stream::wait_event(stream, self.slots[slot].copied, wait) };
        self.context.check("take images", queued)
    }

    /// What was queued on `stream` so far is the last that reads the slot's place on the card.
    pub(super) fn release(&self, slot: usize, stream: sys::CUstream) -> Result<(), Error> {
        // SAFETY: event and stream are alive.
        let queued = unsafe { result::event::record(self.slots[slot].released, stream) };
        self.context.check("take images", queued)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.context.enter().is_err() {
            return;
        }
        // SAFETY: the stream is ours; when it is idle nothing reads the slots any more.
        let _ = unsafe { result::stream::synchronize(self.stream) };
        for slot in &self.slots {
            // SAFETY: made in `new`, destroyed only here.
            unsafe {
                let _ = result::free_host(slot.host.cast());
                let _ = result::event::destroy(slot.copied);
                let _ = result::event::destroy(slot.released);
            }
        }
        // SAFETY: as above.
        let _ = unsafe { result::stream::destroy(self.stream) };
    }
}
