//! Places for connections. Whoever has not shown yet that it may call holds one only as long as nobody else needs it: those
//! without a token could otherwise keep out all others by opening connections again and again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::activity::Activity;

/// All places of a port.
#[derive(Debug)]
pub(crate) struct Places {
    most: usize,
    now: Mutex<Now>,
    /// A place was given back.
    free: Notify,
}

#[derive(Debug, Default)]
struct Now {
    /// By the order in which they came.
    taken: BTreeMap<u64, Arc<Activity>>,
    begun: u64,
}

impl Places {
    /// So many.
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, now: Mutex::default(), free: Notify::new() })
    }

    /// A place for another connection. Where there is none, the one closes that is without an accepted request for longest;
    /// if all have made one, this waits.
    pub(crate) async fn take(self: &Arc<Self>, activity: &Arc<Activity>) -> Place {
        loop {
            if let Some(place) = self.try_take(activity) {
                return place;
            }
            // Only one task takes places, so what was given back before it waits is remembered for it.
            self.free.notified().await;
        }
    }

    fn try_take(self: &Arc<Self>, activity: &Arc<Activity>) -> Option<Place> {
        let mut now = self.now();
        let mut given_up = None;
        if now.taken.len() >= self.most {
            let number = *now.taken.iter().find(|(_, other)| other.give_up())?.0;
            given_up = now.taken.remove(&number);
        }
        let number = now.begun;
        now.begun += 1;
        now.taken.insert(number, Arc::clone(activity));
        // A task that ends gives its place back: never under the lock.
        drop(now);
        if let Some(given_up) = given_up {
            given_up.close();
        }
        Some(Place { places: Arc::clone(self), number })
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place, until it is dropped or given to another.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let given_back = self.places.now().taken.remove(&self.number);
        if given_back.is_some() {
            self.places.free.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;
    use crate::activity::{Kind, Patience};

    fn activity() -> Arc<Activity> {
        let long = Duration::from_secs(600);
        Activity::new(Patience { first: long, idle: long, life: None })
    }

    #[test]
    fn the_longest_without_a_request_makes_room() {
        let places = Places::new(3);
        let all = [(); 3].map(|()| activity());
        let mut held = all.each_ref().map(|one| Some(places.take(one).now_or_never().unwrap()));
        // The first is proven, so the second goes.
        drop(all[0].accept(Kind::Other));
        let (fourth, fifth) = (activity(), activity());
        let fourth_place = places.take(&fourth).now_or_never().unwrap();
        assert_eq!(all.each_ref().map(|one| one.given_up()), [false, true, false]);
        // What it gives back later is not its own any more.
        held[1] = None;
        for one in [&all[2], &fourth] {
            drop(one.accept(Kind::Other));
        }
        assert!(places.take(&fifth).now_or_never().is_none(), "all have made a request");
        drop(fourth_place);
        assert!(places.take(&fifth).now_or_never().is_some());
        assert!(!all[2].given_up() && !fourth.given_up() && !fifth.given_up());
    }
}
