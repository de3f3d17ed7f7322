//! Counters of a running job, read by whoever shows them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Counters of a running job; a clone shows the same ones.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    rows_total: AtomicU64,
    rows: AtomicU64,
    pairs: AtomicU64,
    failed: AtomicU64,
    shards: AtomicU32,
    shards_total: AtomicU32,
    shards_opened: AtomicU32,
    shards_skipped: AtomicU32,
}

impl Progress {
    /// Rows of the shards that were opened so far.
    pub fn rows_total(&self) -> u64 {
        self.0.rows_total.load(Ordering::Relaxed)
    }

    /// Rows that have their scores, or failed.
    pub fn rows(&self) -> u64 {
        self.0.rows.load(Ordering::Relaxed)
    }

    /// Pairs scored.
    pub fn pairs(&self) -> u64 {
        self.0.pairs.load(Ordering::Relaxed)
    }

    /// Rows without a score.
    pub fn failed(&self) -> u64 {
        self.0.failed.load(Ordering::Relaxed)
    }

    /// Shows what a worker elsewhere says of its progress: rows, of these without a score, rows of its shards, pairs.
    pub fn show(&self, rows: u64, failed: u64, rows_total: u64, pairs: u64) {
        let Counters { rows_total: total, rows: done, pairs: scored, failed: without, .. } = &*self.0;
        for (counter, value) in [(total, rows_total), (done, rows), (scored, pairs), (without, failed)] {
            counter.store(value, Ordering::Relaxed);
        }
    }

    /// Shards that are done, and all; both 0 where there is just one.
    pub fn shards(&self) -> (u32, u32) {
        (self.0.shards.load(Ordering::Relaxed), self.0.shards_total.load(Ordering::Relaxed))
    }

    /// Rows of all shards that are scored, of which only some were opened: the others are taken to be like them.
    pub fn rows_expected(&self) -> u64 {
        let (rows, (_, total)) = (self.rows_total(), self.shards());
        let opened = self.0.shards_opened.load(Ordering::Relaxed);
        let scored = total.saturating_sub(self.0.shards_skipped.load(Ordering::Relaxed));
        match opened {
            0 => rows,
            opened => rows.max(rows.saturating_mul(u64::from(scored)) / u64::from(opened)),
        }
    }

    /// A shard was complete already.
    pub(crate) fn skip_shard(&self) {
        self.0.shards_skipped.fetch_add(1, Ordering::Relaxed);
    }

    /// So many shards are done of so many.
    pub fn show_shards(&self, done: u32, total: u32) {
        self.0.shards.store(done, Ordering::Relaxed);
        self.0.shards_total.store(total, Ordering::Relaxed);
    }

    pub(crate) fn start(&self, rows: u64) {
        self.0.rows_total.fetch_add(rows, Ordering::Relaxed);
        self.0.shards_opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_pairs(&self, pairs: u64) {
        self.0.pairs.fetch_add(pairs, Ordering::Relaxed);
    }

    pub(crate) fn add_row(&self, scored: bool) {
        self.0.rows.fetch_add(1, Ordering::Relaxed);
        self.0.failed.fetch_add(u64::from(!scored), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_that_were_not_opened_are_taken_to_be_like_the_others() {
        let progress = Progress::default();
        assert_eq!(progress.rows_expected(), 0);
        progress.start(400);
        assert_eq!(progress.rows_expected(), 400, "there is one");
        progress.show_shards(0, 10);
        progress.start(200);
        assert_eq!(progress.rows_expected(), 3000);
        (0..4).for_each(|_| progress.skip_shard());
        assert_eq!(progress.rows_expected(), 1800, "four of the ten have their scores already");
        (0..6).for_each(|_| progress.skip_shard());
        assert_eq!(progress.rows_expected(), 600, "never fewer than were seen");
    }
}
