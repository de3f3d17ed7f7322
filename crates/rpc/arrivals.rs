//! Requests that are arriving, apart from the calls that run: so many, and so many bytes. Beyond that one is given up, of the
//! connection that has most of what is short the one that has been arriving longest: requests which are begun and never
//! finished keep out their own client's, not another's.

use std::collections::{BTreeMap, HashMap};
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
    all: Share,
    /// Of each connection that has any.
    shares: HashMap<u64, Share>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Share {
    requests: usize,
    bytes: usize,
}

#[derive(Debug)]
struct One {
    connection: u64,
    bytes: usize,
    /// Of the task that waits for more of it.
    waker: Option<Waker>,
}

impl Arrivals {
    /// Room for so many requests, and so many bytes of all together: at least those of one.
    pub(crate) fn new(requests_max: usize, bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { requests_max, bytes_max, now: Mutex::default() })
    }

    /// Another one of a connection begins.
    pub(crate) fn begin(self: &Arc<Self>, connection: u64) -> Arriving {
        let mut now = self.now();
        let number = now.begun;
        now.begun += 1;
        now.requests.insert(number, One { connection, bytes: 0, waker: None });
        now.shares.entry(connection).or_default().requests += 1;
        now.all.requests += 1;
        self.make_room(now);
        Arriving { arrivals: Arc::clone(self), number }
    }

    fn make_room(&self, mut now: MutexGuard<'_, Now>) {
        let mut given_up = Vec::new();
        loop {
            let longest = if now.all.requests > self.requests_max {
                now.longest(|share| share.requests)
            } else if now.all.bytes > self.bytes_max {
                now.longest(|share| share.bytes)
            } else {
                break;
            };
            let Some(longest) = longest.and_then(|number| now.remove(number)) else { break };
            given_up.extend(longest.waker);
        }
        drop(now);
        given_up.into_iter().for_each(Waker::wake);
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Now {
    /// The one that has been arriving longest of the connections that have most.
    fn longest(&self, of: impl Fn(&Share) -> usize) -> Option<u64> {
        let most = self.shares.values().map(&of).max()?;
        let has_most = |one: &One| self.shares.get(&one.connection).is_some_and(|share| of(share) == most);
        self.requests.iter().find(|(_, one)| has_most(one)).map(|(number, _)| *number)
    }

    fn remove(&mut self, number: u64) -> Option<One> {
        let one = self.requests.remove(&number)?;
        let less = |share: &mut Share| {
            share.requests -= 1;
            share.bytes -= one.bytes;
            share.requests == 0
        };
        less(&mut self.all);
        if self.shares.get_mut(&one.connection).is_some_and(less) {
            self.shares.remove(&one.connection);
        }
        Some(one)
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
            let connection = one.connection;
            now.shares.entry(connection).or_default().bytes += bytes;
            now.all.bytes += bytes;
        }
        self.arrivals.make_room(now);
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let mut now = self.arrivals.now();
        let one = now.remove(self.number);
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
        let (first, second) = (arrivals.begin(0), arrivals.begin(0));
        assert!(!first.given_up(&waker) && !second.given_up(idle));
        let third = arrivals.begin(0);
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
        assert_eq!(arrivals.now().all, Share { requests: 1, bytes: 41 });
        drop((second, third));
        let now = arrivals.now();
        assert_eq!((now.all, now.requests.len(), now.shares.len()), (Share::default(), 0, 0));
    }

    #[test]
    fn of_the_connection_that_has_most() {
        let arrivals = Arrivals::new(4, 100);
        let begin = |connection: u64, bytes: usize| {
            let one = arrivals.begin(connection);
            one.add(bytes);
            one
        };
        let idle = Waker::noop();
        // Slow and honest, and then a flood that never ends.
        let honest = begin(1, 60);
        let mut flood: Vec<Arriving> = (0..100).map(|_| begin(2, 1)).collect();
        assert!(!honest.given_up(idle));
        assert_eq!(flood.iter().filter(|one| !one.given_up(idle)).count(), 3, "the last ones are there");
        assert!(!flood[99].given_up(idle));
        // By bytes it is another one's turn, though it has fewer requests.
        let large = begin(3, 0);
        large.add(70);
        assert!(large.given_up(idle) && !honest.given_up(idle) && !flood[99].given_up(idle));
        // Where all have the same, the longest.
        flood.drain(..99);
        let others = [4, 5].map(|connection| begin(connection, 0));
        let last = begin(6, 0);
        assert!(honest.given_up(idle) && !others[0].given_up(idle) && !last.given_up(idle));
    }

    #[test]
    fn one_that_is_too_large_for_all_is_given_up_itself() {
        let arrivals = Arrivals::new(2, 100);
        let one = arrivals.begin(0);
        one.add(101);
        assert!(one.given_up(Waker::noop()));
        assert_eq!(arrivals.now().all, Share::default());
    }
}
