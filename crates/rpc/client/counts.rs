//! What came, each row counted once: its entries may come in several chunks, and in several attempts.

use crate::v1;

/// Rows and pairs that were streamed.
#[derive(Default)]
pub(super) struct Counts {
    /// Rows that are over; `pairs` are all that came.
    pub(super) summary: v1::ScoreSummary,
}

/// The row of a shard whose next caption may still come.
pub(super) struct OpenRow {
    row: u64,
    scored: bool,
    status: String,
}

impl Counts {
    /// A chunk of the shard whose last row is `open`.
    pub(super) fn add(&mut self, open: &mut Option<OpenRow>, chunk: &v1::ScoreChunk) {
        let mut errors = chunk.errors.iter().peekable();
        for (i, row) in chunk.row.iter().enumerate() {
            let error = errors.next_if(|error| error.index as usize == i);
            if open.as_ref().is_none_or(|open| open.row != *row) {
                self.end_row(open);
                let status = error.map(|error| error.status.clone()).unwrap_or_default();
                *open = Some(OpenRow { row: *row, scored: false, status });
            }
            if let Some(open) = open.as_mut().filter(|_| error.is_none()) {
                open.scored = true;
                self.summary.pairs += 1;
            }
        }
    }

    pub(super) fn end_row(&mut self, open: &mut Option<OpenRow>) {
        let Some(OpenRow { scored, status, .. }) = open.take() else { return };
        self.summary.rows += 1;
        if scored {
            self.summary.scored += 1;
        } else {
            self.summary.failed += 1;
            *self.summary.errors.entry(status).or_default() += 1;
        }
    }

    /// A shard whose rows went to a sink.
    pub(super) fn add_written(&mut self, done: &v1::ShardDone) {
        let total = &mut self.summary;
        let failed = done.rows.saturating_sub(done.scored);
        // Numbers from elsewhere: they may be wrong, but must not end us.
        for (sum, more) in [(&mut total.rows, done.rows), (&mut total.scored, done.scored), (&mut total.failed, failed)]
        {
            *sum = sum.saturating_add(more);
        }
        for (status, rows) in &done.errors {
            let sum = total.errors.entry(status.clone()).or_default();
            *sum = sum.saturating_add(*rows);
        }
    }
}

/// Pairs that went to a sink, as progress messages tell. Those of a shard that was cut are scored again, so only what was
/// said when no row of an unfinished shard was among it counts.
#[derive(Default)]
pub(super) struct WrittenPairs {
    /// Of earlier calls.
    before: u64,
    /// Of this call's shards that are done, as far as it is known.
    done: u64,
    /// Rows of this call's shards that are done.
    done_rows: u64,
    /// Rows and pairs of the last message that counts an unfinished shard's.
    ahead: Option<(u64, u64)>,
}

impl WrittenPairs {
    pub(super) fn progress(&mut self, rows: u64, pairs: u64) {
        self.ahead = Some((rows, pairs));
        self.settle();
    }

    pub(super) fn shard_done(&mut self, rows: u64) {
        self.done_rows = self.done_rows.saturating_add(rows);
        self.settle();
    }

    fn settle(&mut self) {
        if let Some((_, pairs)) = self.ahead.take_if(|(rows, _)| *rows <= self.done_rows) {
            self.done = pairs;
        }
    }

    /// The call is over; with `pairs` of its summary, if there was one.
    pub(super) fn end_call(&mut self, summary: Option<u64>) {
        let before = self.before.saturating_add(summary.unwrap_or(self.done));
        *self = Self { before, ..Self::default() };
    }

    /// What earlier calls brought.
    pub(super) fn before(&self) -> u64 {
        self.before
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_a_cut_shard_are_not_counted_twice() {
        let mut pairs = WrittenPairs::default();
        pairs.progress(5, 10);
        pairs.progress(9, 18);
        pairs.shard_done(10);
        // The second shard, which is cut.
        pairs.progress(14, 29);
        pairs.end_call(None);
        assert_eq!(pairs.before(), 18, "the last word before the first shard's end");
        // It is scored again, and this call sees its end.
        pairs.progress(3, 6);
        pairs.end_call(Some(20));
        assert_eq!(pairs.before(), 38);
        // A message behind the shard's end knows all of it.
        pairs.shard_done(10);
        pairs.progress(10, 21);
        pairs.end_call(None);
        assert_eq!(pairs.before(), 59);
    }

    #[test]
    fn a_row_cut_between_its_captions_is_one_row() {
        let (mut counts, mut open) = (Counts::default(), None);
        let chunk = |row: &[u64], failed: &[u32]| v1::ScoreChunk {
            row: row.to_vec(),
            errors: failed
                .iter()
                .map(|index| v1::RowError { index: *index, status: "decode_failed".to_owned(), ..Default::default() })
                .collect(),
            ..Default::default()
        };
        counts.add(&mut open, &chunk(&[0, 1, 1], &[0]));
        counts.add(&mut open, &chunk(&[1, 2], &[1]));
        counts.end_row(&mut open);
        let v1::ScoreSummary { rows, scored, failed, errors, pairs, .. } = counts.summary;
        assert_eq!((rows, scored, failed, pairs), (3, 1, 2, 3));
        assert_eq!(errors.get("decode_failed"), Some(&2));
    }
}
