//! The system, top to bottom: read, prepare, score, write, over bounded channels.
//!
//! A stage ends when its input ends, when its neighbour is gone, or with an error. An error drops the stage's channels,
//! so all stages end; the first stage of the path that failed gives the job's error. Chunks stay in order by
//! construction: each stage handles them one after another, and only the rows inside a chunk are prepared in parallel.

use std::time::Instant;

use arrow_array::RecordBatch;
use bytes::Bytes;
use capsieve_engine::{Heads, Scorer};
use capsieve_store::{Columns, ImageCell, Location, RowScore, ShardWriter, Written};
use futures::{Stream, StreamExt, pin_mut, stream};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::spawn_blocking;

use crate::batching::Batcher;
use crate::limits::{CHUNKS_PREPARED, CHUNKS_READ, CHUNKS_SCORED, FETCHES, IMAGE_BYTES_MAX};
use crate::prepare::{Fault, Preparer, ReadyRow, chain};
use crate::{Error, Progress, Result};

/// Rows as read. `fetched` has an entry for each row: the image of an address.
pub(crate) struct Chunk {
    pub(crate) batch: RecordBatch,
    pub(crate) fetched: Vec<Option<Result<Bytes, Fault>>>,
}

/// Rows ready for the engine, or why not.
pub(crate) struct Prepared {
    pub(crate) batch: RecordBatch,
    pub(crate) rows: Vec<Result<ReadyRow, Fault>>,
}

/// Rows with their scores.
pub(crate) struct Scored {
    pub(crate) batch: RecordBatch,
    pub(crate) rows: Vec<RowScore>,
}

/// What the stages work with.
pub(crate) struct Stages<S> {
    /// The shard's rows, in batches of at most [`crate::limits::CHUNK_ROWS`].
    pub(crate) batches: S,
    /// Where the shard is: addresses of images may be relative to it.
    pub(crate) input: Location,
    pub(crate) columns: Columns,
    pub(crate) preparer: Preparer,
    /// One for each device.
    pub(crate) scorers: Vec<Box<dyn Scorer>>,
    pub(crate) heads: Heads,
    pub(crate) writer: ShardWriter,
    /// Ends the job at the first row without a score.
    pub(crate) fail_on_row: bool,
    pub(crate) progress: Progress,
}

/// Busy seconds of each stage and what came out.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) read: f64,
    pub(crate) prepare: f64,
    pub(crate) engine: f64,
    pub(crate) write: f64,
    pub(crate) pairs: u64,
    pub(crate) written: Written,
    /// Rows by status, "ok" included.
    pub(crate) statuses: std::collections::BTreeMap<&'static str, u64>,
}

/// Runs a shard through all stages and commits the output.
///
/// # Errors
/// The first failure along the path; nothing is then written.
pub(crate) async fn run<S>(stages: Stages<S>) -> Result<Totals>
where
    S: Stream<Item = capsieve_store::Result<RecordBatch>> + Send,
{
    let Stages { batches, input, columns, preparer, scorers, heads, writer, fail_on_row, progress } = stages;
    let (to_prepare, chunks) = channel(CHUNKS_READ);
    let (to_engine, prepared) = channel(CHUNKS_PREPARED);
    let (to_writer, scored) = channel(CHUNKS_SCORED);
    let reading = read(batches, &input, &columns, to_prepare);
    let (for_prepare, batcher) = (columns.clone(), Batcher::new(scorers, heads, progress));
    let preparing = spawn_blocking(move || prepare(&preparer, &for_prepare, chunks, &to_engine));
    let scoring = spawn_blocking(move || score(batcher, prepared, &to_writer));
    let writing = write(writer, scored, fail_on_row);
    let (read, prepared, scored, written) = tokio::join!(reading, preparing, scoring, writing);
    // A panic of a stage is a bug and goes on as one.
    let (prepared, scored) = (joined(prepared), joined(scored));
    let (read, prepare, (engine, pairs)) = (read?, prepared?, scored?);
    let (writer, mut totals) = written?;
    let start = Instant::now();
    totals.written = writer.commit().await?;
    totals.write += start.elapsed().as_secs_f64();
    Ok(Totals { read, prepare, engine, pairs, ..totals })
}

/// What a thread returned; its panic is a bug and goes on as one.
fn joined<T>(result: std::result::Result<T, tokio::task::JoinError>) -> T {
    result.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Stage 1: batches of rows, with the images of addresses fetched.
async fn read(
    batches: impl Stream<Item = capsieve_store::Result<RecordBatch>>,
    input: &Location,
    columns: &Columns,
    out: Sender<Chunk>,
) -> Result<f64> {
    pin_mut!(batches);
    let mut seconds = 0.0;
    loop {
        let start = Instant::now();
        let Some(batch) = batches.next().await.transpose()? else { return Ok(seconds) };
        let fetched = fetch(&batch, input, columns).await?;
        seconds += start.elapsed().as_secs_f64();
        if out.send(Chunk { batch, fetched }).await.is_err() {
            return Ok(seconds);
        }
    }
}

async fn fetch(batch: &RecordBatch, input: &Location, columns: &Columns) -> Result<Vec<Option<Result<Bytes, Fault>>>> {
    let rows = capsieve_store::rows(batch, columns)?;
    let addresses: Vec<Option<String>> = rows
        .iter()
        .map(|row| match row.image {
            ImageCell::Uri(uri) => Some(uri.to_owned()),
            _ => None,
        })
        .collect();
    let one = |address: Option<String>| async move {
        let address = address?;
        let fetched = async { input.resolve(&address)?.get(IMAGE_BYTES_MAX).await };
        Some(fetched.await.map_err(|error| Fault::new("fetch_failed", chain(&error))))
    };
    Ok(stream::iter(addresses.into_iter().map(one)).buffered(FETCHES).collect().await)
}

/// Stage 2, a thread of its own: model input for every row.
fn prepare(preparer: &Preparer, columns: &Columns, mut chunks: Receiver<Chunk>, out: &Sender<Prepared>) -> Result<f64> {
    let mut seconds = 0.0;
    while let Some(chunk) = chunks.blocking_recv() {
        let start = Instant::now();
        let prepared = preparer.chunk(chunk, columns)?;
        seconds += start.elapsed().as_secs_f64();
        if out.blocking_send(prepared).is_err() {
            break;
        }
    }
    Ok(seconds)
}

/// Stage 3, a thread of its own: batches through the engine.
fn score(mut batcher: Batcher, mut chunks: Receiver<Prepared>, out: &Sender<Scored>) -> Result<(f64, u64)> {
    let mut ended = false;
    while !ended {
        match chunks.blocking_recv() {
            Some(chunk) => batcher.push(chunk)?,
            // Nobody waits for the last batch of a job that was cancelled or could not be written.
            None if out.is_closed() => ended = true,
            None => {
                batcher.finish_all()?;
                ended = true;
            }
        }
        while let Some(done) = batcher.pop() {
            if out.blocking_send(done).is_err() {
                return Ok((batcher.seconds, batcher.pairs));
            }
        }
    }
    Ok((batcher.seconds, batcher.pairs))
}

/// Stage 4: rows with their scores to the output, in input order.
async fn write(
    mut writer: ShardWriter,
    mut chunks: Receiver<Scored>,
    fail_on_row: bool,
) -> Result<(ShardWriter, Totals)> {
    let mut totals = Totals::default();
    let mut first = 0;
    while let Some(Scored { batch, rows }) = chunks.recv().await {
        for (i, row) in rows.iter().enumerate() {
            *totals.statuses.entry(row.status).or_default() += 1;
            if fail_on_row && row.status != "ok" {
                let reason = row.error.clone().unwrap_or_default();
                return Err(Error::Row { row: first + i as u64, status: row.status, reason });
            }
        }
        let start = Instant::now();
        writer.write(&batch, &rows).await?;
        totals.write += start.elapsed().as_secs_f64();
        first += rows.len() as u64;
    }
    Ok((writer, totals))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests;
