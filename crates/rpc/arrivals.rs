//! Requests that are arriving, apart from the calls that run: so many, and so many bytes. Beyond that the one that has been
//! arriving longest is given up, so that requests which are begun and never finished cannot keep others out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// All that are arriving.
#[derive(Debug)]
pub(crate) struct Arrivals {
    requests_max: usize,
    bytes_max: usize,
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    /// By their order.
    requests: BTreeMap<u64, One>,
    begun: u64,
    bytes: usize,
}

#[derive(Debug, Default)]
struct One {
    bytes: usize,
    /// Of the task that waits for more of it.
    waker: Option<Waker>,
}

impl Arrivals {
    /// Room for so many requests, and so many bytes of all together: at least those of one.
    pub(crate) fn new(requests_max: usize, bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { requests_max, bytes_max, now: Mutex::default() })
    }

    /// Another one begins.
    pub(crate) fn begin(self: &Arc<Self>) -> Arriving {
        let mut now = self.now();
        let number = now.begun;
        now.begun += 1;
        now.requests.insert(number, One::default());
        self.make_room(now);
        Arriving { arrivals: Arc::clone(self), number }
    }

    fn make_room(&self, mut now: MutexGuard<'_, Now>) {
        let mut given_up = Vec::new();
        while now.requests.len() > self.requests_max || now.bytes > self.bytes_max {
            let Some((_, longest)) = now.requests.pop_first() else { break };
            now.bytes -= longest.bytes;
            given_up.extend(longest.waker);
        }
        drop(now);
        given_up.into_iter().for_each(Waker::wake);
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that is arriving, until it is dropped.
#[derive(Debug)]
pub(crate) struct Arriving {
    arrivals: Arc<Arrivals>,
    number: u64,
}

impl Arriving {
    /// Whether it was given up; if not, `waker` is woken when it is.
    pub(crate) fn given_up(&self, waker: &Waker) -> bool {
        let mut now = self.arrivals.now();
        let Some(one) = now.requests.get_mut(&self.number) else { return true };
        let last = one.waker.replace(waker.clone());
        // A waker may be what a task ends with, and that would come back here: never under the lock.
        drop(now);
        drop(last);
        false
    }

    /// More of it is here.
    pub(crate) fn add(&self, bytes: usize) {
        let mut now = self.arrivals.now();
        if let Some(one) = now.requests.get_mut(&self.number) {
            one.bytes += bytes;
            now.bytes += bytes;
        }
        self.arrivals.make_room(now);
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let mut now = self.arrivals.now();
        let one = now.requests.remove(&self.number);
        now.bytes -= one.as_ref().map_or(0, |one| one.bytes);
        drop(now);
        drop(one);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_longest_is_given_up_and_told() {
        let arrivals = Arrivals::new(2, 100);
        let woken = Arc::new(Count::default());
        let (waker, idle) = (Waker::from(Arc::clone(&woken)), Waker::noop());
        let (first, second) = (arrivals.begin(), arrivals.begin());
        assert!(!first.given_up(&waker) && !second.given_up(idle));
        let third = arrivals.begin();
        assert!(first.given_up(idle) && !second.given_up(idle) && !third.given_up(idle));
        assert_eq!(woken.0.load(Ordering::SeqCst), 1);
        // What it had, and still sends, is not counted any more.
        first.add(1000);
        drop(first);
        assert!(!second.given_up(idle));
        // Bytes count over all.
        second.add(60);
        third.add(40);
        assert!(!second.given_up(idle));
        third.add(1);
        assert!(second.given_up(idle) && !third.given_up(idle));
        assert_eq!(arrivals.now().bytes, 41);
        drop((second, third));
        let now = arrivals.now();
        assert_eq!((now.bytes, now.requests.len()), (0, 0));
    }

    #[test]
    fn one_that_is_too_large_for_all_is_given_up_itself() {
        let arrivals = Arrivals::new(2, 100);
        let one = arrivals.begin();
        one.add(101);
        assert!(one.given_up(Waker::noop()));
        assert_eq!(arrivals.now().bytes, 0);
    }
}
