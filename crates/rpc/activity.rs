//! What a connection is good for: whether somebody who may call is there, and when he last did.
//!
//! Keep-alive pings are no sign of that: whoever holds a connection open for nothing answers them as well.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;

/// Health checks of a connection that are answered at a time, and as many streams of reflection: both may stay open for long,
/// and what one client holds of them must not be missing for another.
const FEW: usize = 8;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `grpc.health.v1`.
    Health,
    /// The contract's descriptors.
    Reflection,
    /// All else: a connection may have as many as it has streams.
    Other,
}

/// How long connections may stay.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Until the first request that is accepted.
    pub(crate) first: Duration,
    /// Without a request in flight.
    pub(crate) idle: Duration,
    /// Altogether; none: no limit.
    pub(crate) life: Option<Duration>,
}

/// Of one connection. tonic puts it into the extensions of every request.
#[derive(Debug)]
pub(crate) struct Activity {
    /// No other connection's.
    number: u64,
    patience: Patience,
    opened: Instant,
    seen: Mutex<Seen>,
    /// Its place went to another connection.
    given_up: AtomicBool,
    /// Of the task that has the connection.
    waker: AtomicWaker,
}

#[derive(Debug)]
struct Seen {
    accepted: bool,
    in_flight: usize,
    health: usize,
    reflection: usize,
    last: Instant,
}

impl Seen {
    /// Requests of a kind that are answered now, where they are bounded.
    fn few(&mut self, kind: Kind) -> Option<&mut usize> {
        match kind {
            Kind::Health => Some(&mut self.health),
            Kind::Reflection => Some(&mut self.reflection),
            Kind::Other => None,
        }
    }

    fn take(&mut self, kind: Kind) -> Option<()> {
        if let Some(few) = self.few(kind) {
            *few = Some(*few + 1).filter(|few| *few <= FEW)?;
        }
        Some(())
    }
}

impl Activity {
    pub(crate) fn new(patience: Patience) -> Arc<Self> {
        static OPENED: AtomicU64 = AtomicU64::new(0);
        let number = OPENED.fetch_add(1, Ordering::Relaxed);
        let opened = Instant::now();
        let seen = Seen { accepted: false, in_flight: 0, health: 0, reflection: 0, last: opened };
        let (given_up, waker) = (AtomicBool::new(false), AtomicWaker::new());
        Arc::new(Self { number, patience, opened, seen: Mutex::new(seen), given_up, waker })
    }

    /// Tells connections apart.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// A request of somebody who may call; it is in flight until the guard is dropped. None if the connection has as many of
    /// the kind as it gets.
    pub(crate) fn accept(self: &Arc<Self>, kind: Kind) -> Option<InFlight> {
        let mut seen = self.seen();
        seen.accepted = true;
        seen.last = Instant::now();
        seen.take(kind)?;
        seen.in_flight += 1;
        Some(InFlight { activity: Arc::clone(self), kind, stranger: false })
    }

    /// A request that is answered whoever asks: it keeps no connection alive.
    pub(crate) fn accept_stranger(self: &Arc<Self>, kind: Kind) -> Option<InFlight> {
        self.seen().take(kind)?;
        Some(InFlight { activity: Arc::clone(self), kind, stranger: true })
    }

    /// How long the connection has been there, as long as no request of it was accepted.
    pub(crate) fn unproven(&self, now: Instant) -> Option<Duration> {
        (!self.seen().accepted).then(|| now.saturating_duration_since(self.opened))
    }

    /// Gives the connection up unless a request of it was accepted; says whether it does. [`Self::close`] comes next.
    pub(crate) fn give_up(&self) -> bool {
        let seen = self.seen();
        self.given_up.fetch_or(!seen.accepted, Ordering::AcqRel);
        !seen.accepted
    }

    /// Tells the task of a connection that was given up.
    pub(crate) fn close(&self) {
        self.waker.wake();
    }

    /// Whether the connection is to be closed for another one.
    pub(crate) fn given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    /// The same; if not, the task is woken when it is.
    pub(crate) fn poll_given_up(&self, context: &Context<'_>) -> Poll<()> {
        self.waker.register(context.waker());
        if self.given_up() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// When the connection must be looked at again; none: it is to be closed.
    pub(crate) fn next_look(&self, now: Instant) -> Option<Instant> {
        let Patience { first, idle, life } = self.patience;
        let seen = self.seen();
        let end = match (seen.accepted, seen.in_flight) {
            (false, _) => self.opened + first,
            (true, 0) => seen.last + idle,
            (true, _) => now + idle,
        };
        let end = life.map_or(end, |life| end.min(self.opened + life));
        // Sooner than that if a request comes and goes meanwhile.
        (end > now).then(|| end.min(now + idle))
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request of a connection, until its answer is sent or given up.
#[derive(Debug)]
pub(crate) struct InFlight {
    activity: Arc<Activity>,
    kind: Kind,
    stranger: bool,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut seen = self.activity.seen();
        if let Some(few) = seen.few(self.kind) {
            *few -= 1;
        }
        if !self.stranger {
            seen.in_flight -= 1;
            seen.last = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn activity(life: Option<Duration>) -> (Arc<Activity>, Instant) {
        let activity = Activity::new(Patience { first: seconds(10), idle: seconds(600), life });
        let opened = activity.opened;
        (activity, opened)
    }

    #[test]
    fn without_an_accepted_request_a_connection_ends() {
        let (activity, opened) = activity(None);
        assert_eq!(activity.next_look(opened + seconds(9)), Some(opened + seconds(10)));
        // What is let through without a token changes nothing.
        let _health = activity.accept_stranger(Kind::Health);
        assert_eq!(activity.next_look(opened + seconds(10)), None);
    }

    #[test]
    fn an_idle_connection_ends_and_a_busy_one_stays() {
        let (activity, opened) = activity(None);
        let call = activity.accept(Kind::Other);
        assert!(activity.next_look(opened + seconds(5000)).is_some());
        drop(call);
        let last = activity.seen().last;
        assert_eq!(activity.next_look(last + seconds(599)), Some(last + seconds(600)));
        assert_eq!(activity.next_look(last + seconds(600)), None);
    }

    #[test]
    fn a_life_ends_whatever_happens() {
        let (activity, opened) = activity(Some(seconds(60)));
        let _call = activity.accept(Kind::Other);
        assert_eq!(activity.next_look(opened + seconds(59)), Some(opened + seconds(60)));
        assert_eq!(activity.next_look(opened + seconds(60)), None);
    }

    #[test]
    fn who_was_accepted_meanwhile_is_not_given_up() {
        let ((client, _), (stranger, _)) = (activity(None), activity(None));
        drop(client.accept(Kind::Other));
        assert!(!client.give_up() && !client.given_up());
        drop(stranger.accept_stranger(Kind::Health));
        assert!(stranger.give_up() && stranger.given_up());
    }

    #[test]
    fn what_may_stay_open_is_few() {
        let (activity, _) = activity(None);
        let mut held: Vec<_> = (0..FEW).map(|_| activity.accept_stranger(Kind::Health).unwrap()).collect();
        assert!(activity.accept_stranger(Kind::Health).is_none() && activity.accept(Kind::Health).is_none());
        held.pop();
        held.push(activity.accept(Kind::Health).unwrap());
        assert!(activity.accept_stranger(Kind::Health).is_none());
        // Each kind has its own.
        held.extend((0..FEW).map(|_| activity.accept(Kind::Reflection).unwrap()));
        assert!(activity.accept(Kind::Reflection).is_none());
        held.extend((0..10 * FEW).map(|_| activity.accept(Kind::Other).unwrap()));
        drop(held);
        let seen = activity.seen();
        assert_eq!((seen.in_flight, seen.health, seen.reflection), (0, 0, 0));
    }
}
