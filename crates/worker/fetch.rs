//! The images of addresses: from web servers with one request each, tried again where that helps; files and objects of buckets
//! bound to the version that was looked at.
//!
//! Memory: a chunk comes with a reserve that holds its largest image, so that it gets to its end whatever others hold; what is
//! free beyond that is taken while it is free, and never waited for. An image gives its bytes back when its pixels are there.
//! Who waits for memory holds no place for requests, and who holds a place waits for the network alone.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use capsieve_store::{Address, Location, ObjectInfo, WebAddress, WebClient, WebError, blocking};
use futures::{StreamExt, stream};
use tokio::sync::OnceCell;

use crate::budget::{Budget, Held};
use crate::hosts::Hosts;
use crate::limits::{
    FETCH_BYTES, FETCH_RETRIES, FETCH_TIMEOUT, FETCHES, FETCHES_PER_HOST, IMAGE_BYTES_MAX, RETRY_AFTER_MAX, RETRY_PAUSE,
};
use crate::pipeline::Images;
use crate::prepare::{Fault, chain};

/// What all jobs of an engine share: connections, and places for requests.
pub(crate) struct Fetcher {
    hosts: Hosts,
    /// Opened by the first address that needs it: it reads the system's certificates.
    web: OnceCell<WebClient>,
}

/// An image that is not in the shard.
pub(crate) enum Found {
    /// Nobody has asked for it yet.
    Web(WebAddress),
    /// It is there, in this version.
    Stored(Location, ObjectInfo),
    /// It cannot be had.
    Not(Fault),
}

/// Memory for the bytes of a chunk's images.
pub(crate) struct Memory {
    /// Of this chunk alone, and held by it.
    reserve: Budget,
    /// Of everybody.
    shared: Budget,
}

impl Memory {
    /// `bytes` are the chunk's own, as [`reserve`] says.
    pub(crate) fn new(bytes: usize, shared: &Budget) -> Self {
        Self { reserve: Budget::new(bytes), shared: shared.clone() }
    }

    fn now(&self, bytes: usize) -> Option<Held> {
        self.reserve.try_take(bytes).or_else(|| self.shared.try_take(bytes))
    }

    /// Waits for other images of the same chunk, which wait for nobody.
    async fn wait(&self, bytes: usize) -> Held {
        match self.now(bytes) {
            Some(held) => held,
            None => self.reserve.take(bytes).await,
        }
    }
}

/// What a chunk needs to fetch these, beside what is free anyway: all they have, where that is known and little.
pub(crate) fn reserve(found: &[Option<Found>]) -> usize {
    let bytes = |found: &Found| match found {
        Found::Web(_) => FETCH_BYTES,
        // A part of a budget is not for all.
        Found::Stored(_, info) => usize::try_from(info.size).map_or(FETCH_BYTES, |size| size + size / 7 + 1024),
        Found::Not(_) => 0,
    };
    found.iter().flatten().map(bytes).fold(0_usize, usize::saturating_add).min(FETCH_BYTES)
}

/// What is left of an image's time on the network, all tries together; waiting for places and memory costs nothing of it.
struct Clock(Mutex<Duration>);

impl Clock {
    fn left(&self) -> Duration {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn limit<T>(&self, work: impl Future<Output = Result<T, WebError>>) -> Result<T, WebError> {
        let start = Instant::now();
        let done = tokio::time::timeout(self.left(), work).await;
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *left = left.saturating_sub(start.elapsed());
        done.unwrap_or(Err(WebError::Slow { seconds: FETCH_TIMEOUT.as_secs() }))
    }
}

impl Fetcher {
    /// So many requests at a time to each host; 0: the usual number.
    pub(crate) fn new(per_host: usize) -> Self {
        let per_host = if per_host == 0 { FETCHES_PER_HOST } else { per_host };
        Self { hosts: Hosts::new(FETCHES, per_host), web: OnceCell::new() }
    }

    /// Looks where images are; of files and objects also how large.
    pub(crate) async fn locate(&self, addresses: Vec<Option<String>>, images: &Images) -> Vec<Option<Found>> {
        if addresses.iter().all(Option::is_none) {
            return addresses.into_iter().map(|_| None).collect();
        }
        // Names are resolved link by link, with calls of the system that block.
        let images = images.clone();
        let resolving = blocking(move || {
            let resolve = |address: Option<String>| Some(images.access.address(images.beside.as_ref(), &address?));
            addresses.into_iter().map(resolve).collect::<Vec<_>>()
        });
        let look = |address: Option<capsieve_store::Result<Address>>| async move {
            Some(match address? {
                Ok(Address::Web(address)) => Found::Web(address),
                Ok(Address::Stored(location)) => self.look(location).await,
                Err(error) => Found::Not(fault(&error)),
            })
        };
        stream::iter(resolving.await.into_iter().map(look)).buffered(FETCHES).collect().await
    }

    async fn look(&self, location: Location) -> Found {
        let place = self.hosts.place(location.root()).await;
        let info = location.head_within(IMAGE_BYTES_MAX).await;
        drop(place);
        match info {
            Ok(info) => Found::Stored(location, info),
            Err(error) => Found::Not(fault(&error)),
        }
    }

    /// The bytes of an image, and the memory that they take.
    pub(crate) async fn fetch(&self, found: Found, memory: &Memory) -> Result<(Bytes, Held), Fault> {
        match found {
            Found::Not(fault) => Err(fault),
            Found::Stored(location, info) => {
                let held = memory.wait(usize::try_from(info.size).unwrap_or(usize::MAX)).await;
                let _place = self.hosts.place(location.root()).await;
                let bytes = location.get(&info).await.map_err(|error| fault(&error))?;
                Ok((bytes, held))
            }
            Found::Web(address) => self.web(&address, memory).await.map_err(|error| {
                let reason = match root(&error) {
                    Some(root) => format!("{address} cannot be fetched: {error}: {root}"),
                    None => format!("{address} cannot be fetched: {error}"),
                };
                Fault::new("fetch_failed", reason.replace(['\n', '\r'], " "))
            }),
        }
    }

    async fn web(&self, address: &WebAddress, memory: &Memory) -> Result<(Bytes, Held), WebError> {
        let client = self.web.get_or_try_init(|| async { WebClient::new() }).await?;
        let clock = Clock(Mutex::new(FETCH_TIMEOUT));
        let pauses = ExponentialBuilder::default().with_min_delay(RETRY_PAUSE).with_factor(3.0).with_jitter();
        (|| self.ask(client, address, memory, &clock))
            .retry(pauses.with_max_times(FETCH_RETRIES))
            .when(WebError::is_transient)
            // A server that wants to be left alone for long gets no second request.
            .adjust(|error, pause| match (error.retry_after(), pause) {
                (Some(after), Some(pause)) => (after <= RETRY_AFTER_MAX).then_some(after.max(pause)),
                (_, pause) => pause,
            })
            .await
    }

    /// One try. Where memory is short the answer is let go, and asked for again when there is memory.
    async fn ask(
        &self,
        client: &WebClient,
        address: &WebAddress,
        memory: &Memory,
        clock: &Clock,
    ) -> Result<(Bytes, Held), WebError> {
        let (host, mut in_hand) = (address.host(), None);
        loop {
            let place = self.hosts.place(Some(&host)).await?;
            let patience = clock.left();
            let answer = clock.limit(client.get(address)).await;
            match &answer {
                // One that says nothing for as long as we wait is as good as one that is not there.
                Err(WebError::Connect(_)) => place.unreachable(),
                Err(WebError::Slow { .. }) if patience >= FETCH_TIMEOUT / 2 => place.unreachable(),
                // What is ours to refuse shows nothing, nor does a silence at the end of our time.
                Err(WebError::Refused(_) | WebError::Slow { .. }) => {}
                _ => place.reached(),
            }
            let answer = answer?;
            let wanted = answer.length().unwrap_or(IMAGE_BYTES_MAX);
            if wanted > IMAGE_BYTES_MAX {
                return Err(WebError::TooLarge { limit: IMAGE_BYTES_MAX });
            }
            let bytes = usize::try_from(wanted).unwrap_or(usize::MAX);
            let enough = in_hand.take().filter(|(for_bytes, _)| *for_bytes >= bytes);
            let Some((for_bytes, mut held)) = enough.or_else(|| Some((bytes, memory.now(bytes)?))) else {
                drop((answer, place));
                in_hand = Some((bytes, memory.wait(bytes).await));
                continue;
            };
            let image = clock.limit(answer.read(wanted)).await?;
            drop(held.split(for_bytes - image.len().min(for_bytes)));
            return Ok((image, held));
        }
    }
}

fn fault(error: &capsieve_store::Error) -> Fault {
    Fault::new("fetch_failed", chain(error))
}

/// What was at the bottom of it, in the system's words; the layers between say nothing more.
fn root(error: &dyn std::error::Error) -> Option<String> {
    let innermost = std::iter::successors(error.source(), |error| error.source()).last();
    innermost.map(ToString::to_string)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use std::time::SystemTime;

    use futures::FutureExt;

    use super::*;

    fn stored(size: u64) -> Option<Found> {
        let info = ObjectInfo { size, e_tag: None, modified: SystemTime::UNIX_EPOCH };
        Some(Found::Stored(Location::parse("a.jpg").unwrap(), info))
    }

    #[test]
    fn a_reserve_holds_all_images_of_known_size_or_the_largest() {
        for sizes in [vec![0], vec![1, 1000, 5 << 20], vec![300 << 10; 32], vec![IMAGE_BYTES_MAX]] {
            let found: Vec<_> = sizes.iter().copied().map(stored).collect();
            let memory = Memory::new(reserve(&found), &Budget::new(0));
            let held: Vec<_> = sizes.iter().map(|size| memory.now(*size as usize)).collect();
            assert!(held.iter().all(Option::is_some), "{sizes:?}");
        }
        let web = || Some(Found::Web(WebAddress::parse("http://host/a.jpg").unwrap()));
        assert_eq!(reserve(&[None, Some(Found::Not(Fault::new("fetch_failed", "gone")))]), 0);
        let many: Vec<_> = (0..32).map(|_| stored(IMAGE_BYTES_MAX)).chain([web()]).collect();
        assert_eq!(reserve(&many), FETCH_BYTES, "no more than the largest image, whatever there is");
        assert_eq!(reserve(&[web()]), FETCH_BYTES);
    }

    #[test]
    fn memory_beyond_the_reserve_is_taken_while_it_is_free_and_never_waited_for() {
        let largest = IMAGE_BYTES_MAX as usize;
        let shared = Budget::new(2 * FETCH_BYTES);
        let (one, other) = (Memory::new(FETCH_BYTES, &shared), Memory::new(FETCH_BYTES, &shared));
        let own = one.now(largest).unwrap();
        let more = one.now(largest).expect("what is free is for all");
        let others = shared.try_take(largest).map(|held| (held, other.now(largest)));
        assert!(one.now(largest).is_none());
        let mut waiting = Box::pin(one.wait(largest));
        assert!((&mut waiting).now_or_never().is_none());
        drop(more);
        assert!((&mut waiting).now_or_never().is_none(), "it waits for its own chunk alone");
        drop(own);
        assert!(waiting.now_or_never().is_some());
        drop(others);
    }
}
