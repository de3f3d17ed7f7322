//! Counters of a running job, read by whoever shows them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of a running job; a clone shows the same ones.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    rows_total: AtomicU64,
    rows: AtomicU64,
    pairs: AtomicU64,
    failed: AtomicU64,
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
        let Counters { rows_total: total, rows: done, pairs: scored, failed: without } = &*self.0;
        for (counter, value) in [(total, rows_total), (done, rows), (scored, pairs), (without, failed)] {
            counter.store(value, Ordering::Relaxed);
        }
    }

    pub(crate) fn start(&self, rows: u64) {
        self.0.rows_total.fetch_add(rows, Ordering::Relaxed);
    }

    pub(crate) fn add_pairs(&self, pairs: u64) {
        self.0.pairs.fetch_add(pairs, Ordering::Relaxed);
    }

    pub(crate) fn add_row(&self, scored: bool) {
        self.0.rows.fetch_add(1, Ordering::Relaxed);
        self.0.failed.fetch_add(u64::from(!scored), Ordering::Relaxed);
    }
}
