//! Places for connections. Whoever has not shown yet that it may call holds one only as long as nobody else needs it: those
//! without a token could otherwise keep out all others by opening connections again and again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::activity::{Activity, Patience};

/// Everybody has so long for a handshake and a first request, however many others come: who is far away needs some of it.
const UNDISTURBED: Duration = Duration::from_millis(500);

/// All places of a port.
#[derive(Debug)]
pub(crate) struct Places {
    most: usize,
    patience: Patience,
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
    pub(crate) fn new(most: usize, patience: Patience) -> Arc<Self> {
        Arc::new(Self { most, patience, now: Mutex::default(), free: Notify::new() })
    }

    /// A place for another connection. Where there is none, the one closes that is without an accepted request for longest;
    /// if all have made one, this waits.
    pub(crate) async fn take(self: &Arc<Self>) -> Place {
        loop {
            // Only one task takes places, so what is given back before it waits is remembered for it.
            match self.try_take(Instant::now()) {
                Ok(place) => return place,
                Err(None) => self.free.notified().await,
                Err(Some(wait)) => drop(tokio::time::timeout(wait, self.free.notified()).await),
            }
        }
    }

    /// If there is none: when one can be taken from another, unless it makes a request by then.
    fn try_take(self: &Arc<Self>, at: Instant) -> Result<Place, Option<Duration>> {
        let mut now = self.now();
        let mut given_up = None;
        if now.taken.len() >= self.most {
            let unproven = now.taken.iter().find_map(|(number, other)| Some((*number, other, other.unproven(at)?)));
            let (number, longest, age) = unproven.ok_or(None)?;
            if age < UNDISTURBED || !longest.give_up() {
                return Err(Some(UNDISTURBED.saturating_sub(age)));
            }
            given_up = now.taken.remove(&number);
        }
        let (number, activity) = (now.begun, Activity::new(self.patience));
        now.begun += 1;
        now.taken.insert(number, Arc::clone(&activity));
        // A task that ends gives its place back: never under the lock.
        drop(now);
        if let Some(given_up) = given_up {
            given_up.close();
        }
        Ok(Place { places: Arc::clone(self), number, activity })
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
    activity: Arc<Activity>,
}

impl Place {
    /// What the requests of the connection say about it.
    pub(crate) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }
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
    use super::*;
    use crate::activity::Kind;

    #[test]
    fn the_longest_without_a_request_makes_room() {
        let long = Duration::from_secs(600);
        let places = Places::new(3, Patience { first: long, idle: long, life: None });
        let soon = Instant::now();
        let later = soon + Duration::from_secs(1);
        let mut held = [(); 3].map(|()| Some(places.try_take(soon).unwrap()));
        let all = held.each_ref().map(|one| Arc::clone(one.as_ref().unwrap().activity()));
        // The first is proven, so the second goes, but not at once.
        drop(all[0].accept(Kind::Other));
        let wait = places.try_take(soon).unwrap_err().unwrap();
        assert!(wait > Duration::ZERO && wait <= UNDISTURBED, "{wait:?}");
        let fourth = places.try_take(later).unwrap();
        assert_eq!(all.each_ref().map(|one| one.given_up()), [false, true, false]);
        // What it gives back later is not its own any more.
        held[1] = None;
        for one in [&all[2], fourth.activity()] {
            drop(one.accept(Kind::Other));
        }
        assert_eq!(places.try_take(later).unwrap_err(), None, "all have made a request");
        assert!(!all[2].given_up() && !fourth.activity().given_up());
        drop(fourth);
        assert!(places.try_take(soon).is_ok());
    }
}
