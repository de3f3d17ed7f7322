//! Places for requests: so many at a time in all, and to one host (a web server, a bucket). A host that cannot be reached is left
//! alone for a while, so that a column of dead links costs seconds. Whoever holds a place waits for nothing but the network.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use capsieve_store::WebError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::{HOST_DOWN, HOST_FAILURES, HOST_FAILURES_SPAN, HOSTS_KNOWN};

/// See the module.
pub(crate) struct Hosts {
    all: Arc<Semaphore>,
    per_host: usize,
    known: Mutex<HashMap<String, Arc<Host>>>,
}

struct Host {
    places: Arc<Semaphore>,
    health: Mutex<Health>,
}

/// How a host's connections went.
#[derive(Debug, Default)]
struct Health {
    /// In a row.
    failures: u32,
    /// When the first of them began and the last ended.
    since: Option<(Instant, Instant)>,
}

/// The right to make one request; given back by being dropped.
pub(crate) struct Place {
    /// None: files of this machine, which is up.
    host: Option<Arc<Host>>,
    since: Instant,
    _permits: (Option<OwnedSemaphorePermit>, OwnedSemaphorePermit),
}

/// A host that is left alone after so many failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Down(pub(crate) u32);

impl Hosts {
    /// So many requests at a time, and to each host.
    pub(crate) fn new(all: usize, per_host: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), per_host, known: Mutex::default() }
    }

    /// Waits for a place; first come, first served. Without a host it is one among all.
    pub(crate) async fn place(&self, host: Option<&str>) -> Result<Place, Down> {
        let host = host.map(|name| self.host(name));
        let of_host = match &host {
            Some(host) => Some(acquire(&host.places).await),
            None => None,
        };
        // Before it waits among all, and again after that: what cannot be reached keeps nobody waiting.
        if let Some(host) = &host {
            host.health().check(Instant::now())?;
        }
        let of_all = acquire(&self.all).await;
        if let Some(host) = &host {
            host.health().check(Instant::now())?;
        }
        Ok(Place { host, since: Instant::now(), _permits: (of_host, of_all) })
    }

    fn host(&self, name: &str) -> Arc<Host> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = known.get(name) {
            return Arc::clone(host);
        }
        if known.len() >= HOSTS_KNOWN {
            let now = Instant::now();
            known.retain(|_, host| Arc::strong_count(host) > 1 || host.health().check(now).is_err());
        }
        let host = Arc::new(Host { places: Arc::new(Semaphore::new(self.per_host)), health: Mutex::default() });
        known.insert(name.to_owned(), Arc::clone(&host));
        host
    }
}

async fn acquire(places: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    Arc::clone(places).acquire_owned().await.expect("the semaphores are never closed")
}

impl Host {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// The host answered.
    pub(crate) fn reached(&self) {
        if let Some(host) = &self.host {
            *host.health() = Health::default();
        }
    }

    /// There was no connection.
    pub(crate) fn unreachable(&self) {
        if let Some(host) = &self.host {
            host.health().failed(self.since, Instant::now());
        }
    }
}

impl Health {
    fn failed(&mut self, began: Instant, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        let first = self.since.map_or(began, |(first, _)| first.min(began));
        self.since = Some((first, now));
    }

    /// Whether it may be asked. Refusals at one moment are one event: requests of a chunk fail together.
    fn check(&self, now: Instant) -> Result<(), Down> {
        let Some((first, last)) = self.since else { return Ok(()) };
        let is_down = self.failures >= HOST_FAILURES && last.duration_since(first) >= HOST_FAILURES_SPAN;
        match is_down && now.duration_since(last) < HOST_DOWN {
            true => Err(Down(self.failures)),
            false => Ok(()),
        }
    }
}

impl From<Down> for WebError {
    fn from(Down(failures): Down) -> Self {
        Self::HostDown { failures, seconds: HOST_DOWN.as_secs() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;

    #[test]
    fn a_host_is_down_after_failures_in_a_row_over_some_time() {
        let start = Instant::now();
        let mut health = Health::default();
        (0..100).for_each(|_| health.failed(start, start));
        assert_eq!(health.check(start), Ok(()), "one moment is one event");
        health.failed(start + HOST_FAILURES_SPAN, start + HOST_FAILURES_SPAN);
        let end = start + HOST_FAILURES_SPAN + HOST_DOWN;
        assert_eq!(health.check(end - Duration::from_millis(1)), Err(Down(101)));
        assert_eq!(health.check(end), Ok(()), "it is asked again");
        health.failed(end, end);
        assert_eq!(health.check(end), Err(Down(102)), "and is still down");
        let mut few = Health::default();
        (1..HOST_FAILURES).for_each(|failure| few.failed(start, start + HOST_FAILURES_SPAN * failure));
        assert_eq!(few.check(start + HOST_FAILURES_SPAN * HOST_FAILURES), Ok(()), "too few");
        let mut silent = Health::default();
        (0..HOST_FAILURES).for_each(|_| silent.failed(start, start + HOST_FAILURES_SPAN));
        assert!(silent.check(start + HOST_FAILURES_SPAN).is_err(), "time without an answer counts");
    }

    #[tokio::test]
    async fn a_full_host_leaves_places_to_others() {
        let hosts = Hosts::new(3, 2);
        let one = hosts.place(Some("a")).await.unwrap();
        let _two = hosts.place(Some("a")).await.unwrap();
        let mut third = Box::pin(hosts.place(Some("a")));
        assert!((&mut third).now_or_never().is_none(), "two at a time");
        let other =
            hosts.place(Some("b")).now_or_never().expect("a host that is full takes no place of others").unwrap();
        assert!(hosts.place(None).now_or_never().is_none(), "three in all");
        drop(other);
        assert!(hosts.place(None).now_or_never().is_some());
        drop(one);
        assert!(third.now_or_never().is_some(), "a place that is given back is the next one's");
    }

    #[tokio::test]
    async fn hosts_are_forgotten_that_nobody_asks() {
        let hosts = Hosts::new(8, 2);
        let kept = hosts.place(Some("kept")).await.unwrap();
        for number in 0..3 * HOSTS_KNOWN {
            hosts.place(Some(&number.to_string())).await.unwrap().reached();
        }
        let known = hosts.known.lock().unwrap();
        assert!(known.len() <= HOSTS_KNOWN && known.contains_key("kept"), "{}", known.len());
        drop(kept);
    }
}
