//! The system, top to bottom: read, prepare, score, write, over bounded channels.
//!
//! A stage ends when its input ends, when its neighbour is gone, or with an error. An error drops the stage's channels,
//! so all stages end; the first stage of the path that failed gives the job's error. Chunks stay in order by
//! construction: each stage hands them on one after another, and only the rows inside a chunk are prepared in parallel. Images of
//! addresses are fetched for several chunks at a time (see [`crate::fetch`]).
//! A chunk has a ticket from the moment it is read to the moment its scores are written or taken. Tickets bound a job's memory,
//! and see to it that memory other jobs wait for never waits for a slow reader: who has no ticket reads nothing, and what was
//! read always finds room behind the engine.
//! Reading is `pipeline/read.rs`, the other stages are here. Jobs share engines through the [`crate::queue`]; everything else a job has to itself.

mod read;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use capsieve_store::{Access, Columns, EarlierScores, Location, RowScore, ShardWriter, Written, key_texts};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use self::read::{Source, read};
use crate::budget::{Budget, Held};
use crate::fetch::Fetcher;
use crate::limits::{CHUNKS_PREPARED, CHUNKS_READ, chunks_max, chunks_open};
use crate::prepare::{Early, Preparer, ReadyRow};
use crate::queue::Share;
use crate::rows::Rows;
use crate::scores::Scores;
use crate::stats::Counts;
use crate::threads::Turn;
use crate::{Error, Result};

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

/// Rows as read. `early` has an entry for each row: those whose image was fetched are prepared already, and those that have their
/// scores from an earlier run need no more.
pub(crate) struct Chunk {
    pub(crate) batch: RecordBatch,
    pub(crate) early: Vec<Option<Early>>,
    pub(crate) held: Held,
    pub(crate) ticket: Ticket,
}

/// Rows ready for the engine, or what becomes of them without it.
pub(crate) struct Prepared {
    pub(crate) batch: RecordBatch,
    pub(crate) rows: Vec<Result<ReadyRow, RowScore>>,
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
    /// Who fetches them.
    pub(crate) fetcher: Arc<Fetcher>,
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
    /// What an earlier run made of them.
    pub(crate) earlier: Option<EarlierScores>,
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
    let Stages { input, earlier, images, columns, preparer, share, budget, output, first_row, fail_on_row } = stages;
    let chunks_max = chunks_max(share.images_max());
    let tickets = Arc::new(Semaphore::new(chunks_max));
    let (to_prepare, chunks) = channel(CHUNKS_READ);
    let (to_engine, prepared) = channel(CHUNKS_PREPARED);
    // Room for every chunk there can be: the engine's stage never waits for the one behind it.
    let (to_writer, scored) = channel(chunks_max);
    let turn = &preparer.join();
    let source = Source { images: &images, columns: &columns, preparer: (&preparer, turn), budget: &budget };
    let reading = read((input, earlier), tickets, &source, to_prepare);
    // The input's columns go no further than this where nobody writes them.
    let kept: Option<Vec<usize>> = matches!(output, Output::Rows(_)).then(|| columns.key.into_iter().collect());
    let preparing = prepare((&preparer, turn), &columns, kept, chunks, to_engine);
    let scoring = score(&share, prepared, to_writer);
    let writing = write(output, scored, first_row, fail_on_row);
    let (read, prepared, scored, written) = tokio::join!(reading, preparing, scoring, writing);
    let (read, prepare) = (read?, prepared?);
    scored?;
    let (output, mut totals) = written?;
    let (engine, pairs) = share.spent();
    totals = Totals { read, prepare, engine, pairs, ..totals };
    if let Output::Shard(writer) = output {
        let start = Instant::now();
        let counts = Counts::new(&totals, writer.written());
        totals.written = writer.commit(&counts.notes()).await?;
        totals.write += start.elapsed().as_secs_f64();
    }
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

/// Stage 2: model input for every row, a chunk at a time. `kept` are the columns that go on, if not all do.
async fn prepare(
    (preparer, turn): (&Preparer, &Turn),
    columns: &Columns,
    kept: Option<Vec<usize>>,
    mut chunks: Receiver<Chunk>,
    out: Sender<Prepared>,
) -> Result<f64> {
    let mut seconds = 0.0;
    while let Some(chunk) = chunks.recv().await {
        let (mut prepared, taken) = preparer.chunk(turn, chunk, columns).await?;
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
