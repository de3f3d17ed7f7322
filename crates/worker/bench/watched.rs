//! An engine whose hours are kept: when it worked, and so when it had nothing to do.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use capsieve_engine::{Batch, Error, Info, PairScore, Scorer};

/// Scores as the engine in it does.
pub(super) struct Watched {
    scorer: Box<dyn Scorer>,
    hours: Hours,
}

/// When an engine worked; a clone is the same.
#[derive(Clone, Default)]
pub(super) struct Hours(Arc<Mutex<Option<Worked>>>);

/// From the first batch to the last.
#[derive(Clone, Copy)]
struct Worked {
    first: Instant,
    last: Instant,
    busy: Duration,
}

impl Watched {
    pub(super) fn new(scorer: Box<dyn Scorer>) -> (Self, Hours) {
        let hours = Hours::default();
        (Self { scorer, hours: hours.clone() }, hours)
    }
}

impl Hours {
    fn add(&self, start: Instant, end: Instant) {
        let mut worked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = worked.unwrap_or(Worked { first: start, last: start, busy: Duration::ZERO });
        *worked = Some(Worked { last: end, busy: before.busy + (end - start), ..before });
    }

    /// The part of the time between the beginning of the first batch and the end of the last in which there was none.
    pub(super) fn idle_share(&self) -> f64 {
        let worked = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        worked.map_or(0.0, |Worked { first, last, busy }| 1.0 - busy.as_secs_f64() / (last - first).as_secs_f64())
    }
}

impl Scorer for Watched {
    fn info(&self) -> &Info {
        self.scorer.info()
    }

    fn score(&mut self, batch: &Batch, out: &mut Vec<PairScore>) -> Result<(), Error> {
        let start = Instant::now();
        let scored = self.scorer.score(batch, out);
        self.hours.add(start, Instant::now());
        scored
    }

    fn score_ahead(&mut self, batch: &Batch, next: &Batch, out: &mut Vec<PairScore>) -> Result<(), Error> {
        let start = Instant::now();
        let scored = self.scorer.score_ahead(batch, next, out);
        self.hours.add(start, Instant::now());
        scored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_between_batches_is_idle_and_what_is_around_them_is_not() {
        let (hours, start) = (Hours::default(), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert!(hours.idle_share().abs() < 1e-9, "nothing was done");
        hours.add(at(100), at(102));
        assert!(hours.idle_share().abs() < 1e-9, "one batch has nothing between");
        hours.add(at(103), at(104));
        hours.clone().add(at(109), at(110));
        assert!((hours.idle_share() - 0.6).abs() < 1e-9, "{}", hours.idle_share());
    }
}
