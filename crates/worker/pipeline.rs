//! The system, top to bottom: read, prepare, score, write, over bounded channels.
//!
//! A stage ends when its input ends, when its neighbour is gone, or with an error. An error drops the stage's channels,
//! so all stages end; the first stage of the path that failed gives the job's error. Chunks stay in order by
//! construction: each stage hands them on one after another, and only the rows inside a chunk are prepared in parallel.
//! A chunk has a ticket from the moment it is read to the moment its scores are written or taken. Tickets bound a job's memory,
//! and see to it that memory other jobs wait for never waits for a slow reader: who has no ticket reads nothing, and what was
//! read always finds room behind the engine.
//! Jobs share engines through the [`crate::queue`]; everything else a job has to itself.

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use bytes::Bytes;
use capsieve_store::{
    Access, CaptionCell, Columns, ImageCell, InputRow, Location, ObjectInfo, RowScore, ShardWriter, Written, key_texts,
};
use futures::{StreamExt, stream};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::budget::{Budget, Held};
use crate::limits::{
    CAPTION_BYTES, CHUNKS_PREPARED, CHUNKS_READ, FETCHES, IMAGE_BYTES_MAX, READER_STALLS, TOKENS_MAX, chunks_max,
    chunks_open,
};
use crate::prepare::{Fault, Preparer, ReadyRow, chain};
use crate::queue::Share;
use crate::rows::Rows;
use crate::scores::Scores;
use crate::{Error, Result};
use capsieve_store::blocking;

mod alone;
pub(crate) use alone::prepare_alone;

/// The right to have a chunk between reading and whoever takes its scores.
#[derive(Debug)]
pub struct Ticket(#[allow(dead_code, reason = "held, and given back by being dropped")] Option<OwnedSemaphorePermit>);

impl Ticket {
    /// One that nothing waits for, for rows that come from no pipeline.
    pub fn free() -> Self {
        Self(None)
    }
}

/// Rows as read. `fetched` has an entry for each row: the image of an address.
pub(crate) struct Chunk {
    pub(crate) batch: RecordBatch,
    pub(crate) fetched: Vec<Option<Result<Bytes, Fault>>>,
    pub(crate) held: Held,
    pub(crate) ticket: Ticket,
    /// Memory of what was fetched, until it is decoded.
    pub(crate) _fetching: Held,
}

/// Rows ready for the engine, or why not.
pub(crate) struct Prepared {
    pub(crate) batch: RecordBatch,
    pub(crate) rows: Vec<Result<ReadyRow, Fault>>,
    pub(crate) held: Held,
    pub(crate) ticket: Ticket,
}

/// Rows with their scores.
pub(crate) struct Scored {
    /// The input's columns where they are written, its key alone where scores are streamed.
    pub(crate) batch: RecordBatch,
    pub(crate) rows: Vec<RowScore>,
    /// Given back when the columns are written.
    _held: Held,
    pub(crate) ticket: Ticket,
}

/// Where the images of addresses are.
#[derive(Clone)]
pub(crate) struct Images {
    /// The shard: addresses may be relative to it.
    pub(crate) beside: Option<Location>,
    /// What may be read.
    pub(crate) access: Access,
}

/// Where scores go.
pub(crate) enum Output {
    /// With the input's columns into a shard.
    Shard(Box<ShardWriter>),
    /// To whoever asked.
    Rows(Sender<Scored>),
}

/// What the stages work with.
pub(crate) struct Stages<R> {
    /// The shard's rows.
    pub(crate) input: R,
    pub(crate) images: Images,
    pub(crate) columns: Columns,
    pub(crate) preparer: Arc<Preparer>,
    /// The job's place in the queue for the engines.
    pub(crate) share: Share,
    /// Memory for chunks.
    pub(crate) budget: Budget,
    pub(crate) output: Output,
    /// Number of the first row.
    pub(crate) first_row: u64,
    /// Ends the job at the first row without a score.
    pub(crate) fail_on_row: bool,
}

/// Busy seconds of each stage and what came out.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) read: f64,
    pub(crate) prepare: f64,
    pub(crate) engine: f64,
    pub(crate) write: f64,
    pub(crate) pairs: u64,
    pub(crate) rows: u64,
    /// What was committed, where there is a shard.
    pub(crate) written: Written,
    /// Rows by status, "ok" included.
    pub(crate) statuses: BTreeMap<&'static str, u64>,
}

/// Runs a shard through all stages and commits the output.
///
/// # Errors
/// The first failure along the path; nothing is then written.
pub(crate) async fn run<R: Rows>(stages: Stages<R>) -> Result<Totals> {
    let Stages { input, images, columns, preparer, share, budget, output, first_row, fail_on_row } = stages;
    let chunks_max = chunks_max(share.images_max());
    let tickets = Arc::new(Semaphore::new(chunks_max));
    let (to_prepare, chunks) = channel(CHUNKS_READ);
    let (to_engine, prepared) = channel(CHUNKS_PREPARED);
    // Room for every chunk there can be: the engine's stage never waits for the one behind it.
    let (to_writer, scored) = channel(chunks_max);
    let memory = (&budget, preparer.pixel_bytes());
    let reading = read(input, tickets, (&images, &columns), memory, to_prepare);
    // The input's columns go no further than this where nobody writes them.
    let kept: Option<Vec<usize>> = matches!(output, Output::Rows(_)).then(|| columns.key.into_iter().collect());
    let preparing = prepare(&preparer, &columns, kept, chunks, to_engine);
    let scoring = score(&share, prepared, to_writer);
    let writing = write(output, scored, first_row, fail_on_row);
    let (read, prepared, scored, written) = tokio::join!(reading, preparing, scoring, writing);
    let (read, prepare) = (read?, prepared?);
    scored?;
    let (output, mut totals) = written?;
    if let Output::Shard(writer) = output {
        let start = Instant::now();
        totals.written = writer.commit().await?;
        totals.write += start.elapsed().as_secs_f64();
    }
    let (engine, pairs) = share.spent();
    let totals = Totals { read, prepare, engine, pairs, ..totals };
    record(&totals);
    Ok(totals)
}

/// For the trace of the shard, where there is one.
fn record(totals: &Totals) {
    let span = tracing::Span::current();
    // OpenTelemetry has signed numbers only.
    span.record("rows", totals.rows.cast_signed()).record("pairs", totals.pairs.cast_signed());
    span.record("read_seconds", totals.read).record("decode_seconds", totals.prepare);
    span.record("engine_seconds", totals.engine).record("write_seconds", totals.write);
}

/// Counts what a stage took.
pub(crate) fn stage(name: &'static str, seconds: f64) {
    metrics::histogram!("capsieve_stage_seconds", "stage" => name).record(seconds);
}

/// Stage 1: batches of rows, with the images of addresses fetched.
async fn read(
    mut input: impl Rows,
    tickets: Arc<Semaphore>,
    (images, columns): (&Images, &Columns),
    (budget, pixel_bytes): (&Budget, usize),
    out: Sender<Chunk>,
) -> Result<f64> {
    let mut seconds = 0.0;
    loop {
        let ticket = ticket(&tickets, &mut input).await;
        let start = Instant::now();
        let batch = tokio::select! {
            batch = input.next() => batch?,
            () = out.closed() => return Ok(seconds),
        };
        let Some(batch) = batch else { return Ok(seconds) };
        let (addresses, captions) = look(&batch, columns)?;
        let found = locate(addresses, images).await;
        let looking = start.elapsed().as_secs_f64();
        // Not the reader's time: memory is short because the engines are busy.
        let fetching = found.iter().map(Found::bytes).sum::<usize>();
        // Asked for at once: who holds a part and waits for another could wait for ever.
        let bytes = batch.num_rows() * pixel_bytes + batch.get_array_memory_size() + captions;
        let mut held = tokio::select! {
            held = budget.take(bytes + fetching) => held,
            // What comes behind has failed: that is not to wait for memory which nobody will use.
            () = out.closed() => return Ok(seconds),
        };
        let fetching = held.split(fetching);
        let start = Instant::now();
        let fetched = stream::iter(found.into_iter().map(Found::fetch)).buffered(FETCHES).collect().await;
        let taken = looking + start.elapsed().as_secs_f64();
        stage("read", taken);
        seconds += taken;
        if out.send(Chunk { batch, fetched, held, ticket, _fetching: fetching }).await.is_err() {
            return Ok(seconds);
        }
    }
}

/// Waits for a chunk's ticket; for long only where nobody takes the scores.
async fn ticket(tickets: &Arc<Semaphore>, input: &mut impl Rows) -> Ticket {
    let mut waiting = pin!(Arc::clone(tickets).acquire_owned());
    loop {
        match tokio::time::timeout(READER_STALLS, waiting.as_mut()).await {
            Ok(ticket) => return Ticket(Some(ticket.expect("the semaphore is never closed"))),
            Err(_) => input.pause(),
        }
    }
}

/// Where the images are that are not in the shard, and the bytes that its captions take once they are tokens.
fn look(batch: &RecordBatch, columns: &Columns) -> Result<(Vec<Option<String>>, usize)> {
    let rows = capsieve_store::rows(batch, columns)?;
    let address = |row: &InputRow<'_>| match row.image {
        ImageCell::Uri(uri) => Some(uri.to_owned()),
        _ => None,
    };
    // A token is a byte of text at least, but for the two markers.
    let tokens = |text: &str| size_of::<u32>() * (text.len().min(TOKENS_MAX) + 2);
    let captions = |row: &InputRow<'_>| match &row.captions {
        CaptionCell::Null => 0,
        CaptionCell::One(text) => CAPTION_BYTES + tokens(text),
        CaptionCell::List(texts) => texts.iter().map(|text| CAPTION_BYTES + text.map_or(0, tokens)).sum(),
    };
    Ok((rows.iter().map(address).collect(), rows.iter().map(captions).sum()))
}

/// An image that is not in the shard: not there, or found, or why it cannot be had.
struct Found(Option<Result<(Location, ObjectInfo), Fault>>);

/// Looks where the images are and how large.
async fn locate(addresses: Vec<Option<String>>, images: &Images) -> Vec<Found> {
    if addresses.iter().all(Option::is_none) {
        return addresses.into_iter().map(|_| Found(None)).collect();
    }
    // Names are resolved link by link, with calls of the system that block.
    let images = images.clone();
    let resolving = blocking(move || {
        let resolve = |address: Option<String>| Some(images.access.resolve(images.beside.as_ref(), &address?));
        addresses.into_iter().map(resolve).collect::<Vec<_>>()
    });
    let resolved = resolving.await;
    let look = |location: Option<capsieve_store::Result<Location>>| async move {
        let found = async {
            let location = location?;
            Some(match location {
                Ok(location) => location.head_within(IMAGE_BYTES_MAX).await.map(|info| (location, info)),
                Err(error) => Err(error),
            })
        };
        Found(found.await.map(|found| found.map_err(|error| fetch_failed(&error))))
    };
    stream::iter(resolved.into_iter().map(look)).buffered(FETCHES).collect().await
}

impl Found {
    fn bytes(&self) -> usize {
        let size = |(_, info): &(Location, ObjectInfo)| usize::try_from(info.size).unwrap_or(usize::MAX);
        self.0.as_ref().and_then(|found| found.as_ref().ok()).map_or(0, size)
    }

    async fn fetch(self) -> Option<Result<Bytes, Fault>> {
        Some(match self.0? {
            Ok((location, info)) => location.get(&info).await.map_err(|error| fetch_failed(&error)),
            Err(fault) => Err(fault),
        })
    }
}

fn fetch_failed(error: &capsieve_store::Error) -> Fault {
    Fault::new("fetch_failed", chain(error))
}

/// Stage 2: model input for every row, a chunk at a time. `kept` are the columns that go on, if not all do.
async fn prepare(
    preparer: &Preparer,
    columns: &Columns,
    kept: Option<Vec<usize>>,
    mut chunks: Receiver<Chunk>,
    out: Sender<Prepared>,
) -> Result<f64> {
    let (mut seconds, turn) = (0.0, preparer.join());
    while let Some(chunk) = chunks.recv().await {
        let (mut prepared, taken) = preparer.chunk(&turn, chunk, columns).await?;
        if let Some(kept) = &kept {
            prepared.batch = texts(&prepared.batch, kept);
        }
        stage("decode", taken);
        seconds += taken;
        if out.send(prepared).await.is_err() {
            break;
        }
    }
    Ok(seconds)
}

/// Columns as texts of bounded length, for those who hold them long.
fn texts(batch: &RecordBatch, columns: &[usize]) -> RecordBatch {
    let text = |column: &usize| {
        let texts: StringArray = key_texts(batch.column(*column)).into_iter().map(Some).collect();
        (batch.schema_ref().field(*column).name().clone(), Arc::new(texts) as ArrayRef)
    };
    if columns.is_empty() {
        return batch.project(&[]).expect("no columns are a part of any");
    }
    RecordBatch::try_from_iter(columns.iter().map(text)).expect("columns of one batch are equally long")
}

/// A chunk in the engines' queue.
struct Open {
    batch: RecordBatch,
    scores: Scores,
    held: Held,
    ticket: Ticket,
}

/// Stage 3: rows through the engines, chunks on in their order.
async fn score(share: &Share, mut chunks: Receiver<Prepared>, out: Sender<Scored>) -> Result<()> {
    let open_max = chunks_open(share.images_max());
    let (mut open, mut ended) = (VecDeque::<Open>::new(), false);
    loop {
        let takes = !ended && open.len() < open_max && share.has_room();
        if ended && open.is_empty() {
            return Ok(());
        }
        // Rows without a score fill no batch: those that wait must not wait for more than may come.
        if ended || open.len() == open_max {
            share.hurry();
        }
        tokio::select! {
            biased;
            // Nobody waits for the last batch of a job that was cancelled or could not be written.
            () = out.closed() => return Ok(()),
            scores = first(&mut open) => {
                let rows = scores?;
                let Open { batch, held, ticket, .. } = open.pop_front().expect("its scores are here");
                if out.send(Scored { batch, rows, _held: held, ticket }).await.is_err() {
                    return Ok(());
                }
            }
            chunk = chunks.recv(), if takes => match chunk {
                Some(Prepared { batch, rows, mut held, ticket }) => {
                    // Where no columns go on, the pixels are all there is to hold.
                    let pixels = if batch.num_columns() <= 1 { std::mem::take(&mut held) } else { Held::default() };
                    open.push_back(Open { batch, scores: share.submit(rows, pixels), held, ticket });
                }
                None => ended = true,
            },
            () = share.room(), if !takes && !ended => {}
        }
    }
}

/// The scores of the oldest chunk; waits for ever where there is none.
async fn first(open: &mut VecDeque<Open>) -> Result<Vec<RowScore>> {
    match open.front_mut() {
        Some(first) => first.scores.wait().await,
        None => std::future::pending().await,
    }
}

/// Stage 4: rows with their scores to the output, in input order.
async fn write(
    mut output: Output,
    mut chunks: Receiver<Scored>,
    first_row: u64,
    fail_on_row: bool,
) -> Result<(Output, Totals)> {
    let mut totals = Totals::default();
    while let Some(chunk) = chunks.recv().await {
        for (i, row) in chunk.rows.iter().enumerate() {
            *totals.statuses.entry(row.status).or_default() += 1;
            if fail_on_row && row.status != "ok" {
                let reason = row.error.clone().unwrap_or_default();
                return Err(Error::Row { row: first_row + totals.rows + i as u64, status: row.status, reason });
            }
        }
        totals.rows += chunk.rows.len() as u64;
        match &mut output {
            Output::Shard(writer) => {
                let start = Instant::now();
                writer.write(&chunk.batch, &chunk.rows).await?;
                let taken = start.elapsed().as_secs_f64();
                stage("write", taken);
                totals.write += taken;
            }
            Output::Rows(out) if out.send(chunk).await.is_err() => break,
            Output::Rows(_) => {}
        }
    }
    Ok((output, totals))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests;
