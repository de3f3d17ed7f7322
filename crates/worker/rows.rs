//! Where a job's rows come from, and the memory that reading a shard takes.
//!
//! A row group is held as it is stored while its rows are read. Calls take turns with that memory: one whose scores nobody
//! takes gives it up, and so does one that has had it for long while another waits. What was given up is read again later, the
//! footer too. The shards of one job take no turns: who waits loses nothing, and reading again costs all of them.

use std::time::Instant;

use arrow_array::RecordBatch;
use capsieve_store::{Batches, ShardReader};
use futures::{Stream, StreamExt};

use crate::budget::{Budget, Held};
use crate::limits::{CHUNK_CAPTIONS, CHUNK_ROWS, ROW_GROUP_TURN, ROW_GROUP_TURN_FETCHES};
use crate::{Error, Result};

/// Rows in batches of at most [`CHUNK_ROWS`].
pub(crate) trait Rows: Send {
    /// The next rows; none at the end.
    fn next(&mut self) -> impl Future<Output = Result<Option<RecordBatch>>> + Send;

    /// Nothing was asked for in a while: gives back memory that others wait for.
    fn pause(&mut self) {}
}

/// Rows that are in memory anyway.
pub(crate) struct Ready<S>(pub(crate) S);

impl<S: Stream<Item = capsieve_store::Result<RecordBatch>> + Send + Unpin> Rows for Ready<S> {
    async fn next(&mut self) -> Result<Option<RecordBatch>> {
        Ok(self.0.next().await.transpose()?)
    }
}

/// The rows of a shard.
pub(crate) struct ShardRows {
    batches: Batches,
    budget: Budget,
    /// What reading takes.
    bytes: usize,
    /// Held, and until when it is this one's turn, once there are rows.
    held: Option<(Held, Option<Instant>)>,
    takes_turns: bool,
}

impl ShardRows {
    /// The rows from `first` on; `budget` is for the memory of row groups.
    pub(crate) fn new(reader: ShardReader, first: u64, budget: &Budget) -> Result<Self> {
        let rows = CHUNK_ROWS.min(reader.rows_with_captions(CHUNK_CAPTIONS));
        let bytes = reader.reading_bytes(rows);
        if let Some(limit) = budget.bytes_max().filter(|limit| bytes > *limit as u64) {
            return Err(Error::RowGroup { uri: reader.uri().to_owned(), bytes, limit: limit as u64 });
        }
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        Ok(Self {
            batches: reader.into_batches_from(first, rows),
            budget: budget.clone(),
            bytes,
            held: None,
            takes_turns: false,
        })
    }

    /// Gives memory up that others wait for.
    #[must_use]
    pub(crate) fn taking_turns(self) -> Self {
        Self { takes_turns: true, ..self }
    }

    /// Gives up all memory, the footer's too.
    pub(crate) fn release(&mut self) {
        self.batches.pause();
        self.held = None;
    }
}

impl Rows for ShardRows {
    async fn next(&mut self) -> Result<Option<RecordBatch>> {
        if self.held.as_ref().is_some_and(|(_, until)| until.is_some_and(|until| until <= Instant::now())) {
            self.pause();
        }
        if self.held.is_none() {
            let held = self.budget.take_or(self.bytes, || self.batches.pause()).await;
            self.held = Some((held, None));
        }
        let asked = Instant::now();
        let batch = self.batches.next().await?;
        if let Some((_, until @ None)) = &mut self.held {
            let turn = ROW_GROUP_TURN.max(ROW_GROUP_TURN_FETCHES * asked.elapsed());
            *until = Instant::now().checked_add(turn);
        }
        Ok(batch)
    }

    fn pause(&mut self) {
        // What nobody waits for may as well stay: reading it again is not free.
        if self.takes_turns && self.budget.is_wanted() {
            self.release();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use std::time::Duration;

    use capsieve_store::{ColumnOptions, Location};
    use tempfile::TempDir;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    async fn reader(folder: &TempDir) -> ShardReader {
        let path = folder.path().join("demo.parquet");
        std::fs::write(&path, crate::demo::SHARD).unwrap();
        let location = Location::parse(path.to_str().unwrap()).unwrap();
        ShardReader::open(&location, &ColumnOptions::default()).await.unwrap()
    }

    /// A shard, and memory for one who reads it.
    async fn for_one(folder: &TempDir) -> (ShardReader, Budget) {
        let reader = reader(folder).await;
        let bytes = usize::try_from(reader.reading_bytes(CHUNK_ROWS)).unwrap();
        (reader, Budget::new(bytes + 3 * bytes / 4))
    }

    async fn all(rows: &mut ShardRows, pauses: bool) -> Vec<RecordBatch> {
        let mut batches = Vec::new();
        while let Some(batch) = rows.next().await.unwrap() {
            batches.push(batch);
            if pauses {
                rows.release();
            }
        }
        batches
    }

    #[tokio::test]
    async fn rows_are_the_same_with_pauses() {
        let folder = tempfile::tempdir().unwrap();
        let (reader, budget) = for_one(&folder).await;
        let free = budget.free();
        for first in [0, 1, 45, reader.rows()] {
            let rows = || ShardRows::new(reader.clone(), first, &budget).unwrap();
            let whole = all(&mut rows(), false).await;
            let paused = all(&mut rows(), true).await;
            let count = |batches: &[RecordBatch]| batches.iter().map(RecordBatch::num_rows).sum::<usize>() as u64;
            assert_eq!((count(&whole), count(&paused)), (reader.rows() - first, reader.rows() - first));
            let join = |batches: &[RecordBatch]| {
                batches.first().map(|batch| arrow_select::concat::concat_batches(batch.schema_ref(), batches).unwrap())
            };
            assert!(join(&whole) == join(&paused), "from row {first}");
        }
        assert_eq!(budget.free(), free, "all is given back");
    }

    #[tokio::test]
    async fn calls_take_turns_with_the_memory_of_row_groups() {
        let folder = tempfile::tempdir().unwrap();
        let (reader, budget) = for_one(&folder).await;
        let new = || ShardRows::new(reader.clone(), 0, &budget).unwrap().taking_turns();
        let (mut first, mut second) = (new(), new());
        first.next().await.unwrap();
        let mut waiting = Box::pin(second.next());
        assert!(futures::poll!(&mut waiting).is_pending());
        // Its turn is not over.
        first.next().await.unwrap();
        assert!(futures::poll!(&mut waiting).is_pending());
        let left = first.held.as_ref().unwrap().1.unwrap().duration_since(Instant::now());
        assert!(left > ROW_GROUP_TURN - TIMEOUT / 4 && left <= ROW_GROUP_TURN, "{left:?}");
        first.held.as_mut().unwrap().1 = Some(Instant::now());
        let mut again = Box::pin(first.next());
        // The first gives its memory up and stands behind the second.
        assert!(futures::poll!(&mut again).is_pending());
        tokio::time::timeout(TIMEOUT, waiting).await.expect("it is the second one's turn").unwrap().unwrap();
        assert!(futures::poll!(&mut again).is_pending());
        second.pause();
        let again = tokio::time::timeout(TIMEOUT, again).await.expect("it is the first one's turn");
        assert!(again.unwrap().is_some());
    }

    #[tokio::test]
    async fn shards_of_one_job_keep_their_row_groups() {
        let folder = tempfile::tempdir().unwrap();
        let (reader, budget) = for_one(&folder).await;
        let new = || ShardRows::new(reader.clone(), 0, &budget).unwrap();
        let (mut first, mut second) = (new(), new());
        first.next().await.unwrap();
        let mut waiting = Box::pin(second.next());
        assert!(futures::poll!(&mut waiting).is_pending());
        first.held.as_mut().unwrap().1 = Some(Instant::now());
        first.pause();
        let next = tokio::time::timeout(TIMEOUT, first.next()).await;
        next.expect("reading it again would cost both").unwrap();
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(first);
        tokio::time::timeout(TIMEOUT, waiting).await.expect("there is memory now").unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_row_group_that_never_fits_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = ShardRows::new(reader(&folder).await, 0, &Budget::new(10_000)).err().unwrap();
        assert!(matches!(&error, Error::RowGroup { uri, .. } if uri.ends_with("demo.parquet")), "{error}");
    }
}
