//! Stage 1: batches of rows, with the images of addresses fetched, of several chunks at a time.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use capsieve_store::{CaptionCell, Columns, EarlierScores, ImageCell, InputRow, RowScore};
use futures::future::try_join_all;
use futures::stream::{self, FuturesOrdered, StreamExt};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::Sender;

use super::{Chunk, Images, Ticket, stage};
use crate::budget::{Budget, Held};
use crate::fetch::{Found, Memory, reserve};
use crate::limits::{CAPTION_BYTES, CHUNKS_FETCHED, READER_STALLS, TOKENS_MAX};
use crate::prepare::{Input, Preparer};
use crate::rows::Rows;
use crate::threads::Turn;
use crate::{Error, Result};

/// What reading needs to know.
pub(super) struct Source<'a> {
    pub(super) images: &'a Images,
    pub(super) columns: &'a Columns,
    /// With the job's place among those that share it.
    pub(super) preparer: (&'a Preparer, &'a Turn),
    pub(super) budget: &'a Budget,
}

/// Rows as read, and where their images are that are not in the shard.
struct Unfetched {
    batch: RecordBatch,
    /// Scores of an earlier run, of rows that are not scored again; empty where all are scored.
    standing: Vec<Option<RowScore>>,
    found: Vec<Option<Found>>,
    memory: Memory,
    held: Held,
    ticket: Ticket,
    /// What `memory` gives out.
    reserve: Held,
    /// Seconds of reading.
    seconds: f64,
}

/// Runs to the end of the shard, or until nobody takes its chunks. Gives the seconds of reading.
pub(super) async fn read(
    input: (impl Rows, Option<EarlierScores>),
    tickets: Arc<Semaphore>,
    source: &Source<'_>,
    out: Sender<Chunk>,
) -> Result<f64> {
    let mut chunks = pin!(chunks(input, tickets, source));
    let (mut fetching, mut fetched) = (FuturesOrdered::new(), VecDeque::new());
    let (mut reads, mut asks, mut ended, mut seconds, mut until) = (false, 0, false, 0.0, Instant::now());
    loop {
        let count = fetching.len() + fetched.len();
        if ended && count == 0 {
            return Ok(seconds);
        }
        // Reads ahead while the network is what it waits for. What was begun goes on: it may hold memory.
        reads = !ended && (reads || count == 0 || (asks > 0 && count < CHUNKS_FETCHED));
        tokio::select! {
            // What comes behind has failed: nothing is to wait for memory or images which nobody will use.
            () = out.closed() => return Ok(seconds),
            chunk = chunks.next(), if reads => {
                reads = false;
                match chunk.transpose()? {
                    Some(chunk) => {
                        asks += usize::from(chunk.found.iter().any(Option::is_some));
                        fetching.push_back(fetch(chunk, source));
                    }
                    None => ended = true,
                }
            }
            // Also while nobody takes the chunks that are there: a request must not run out of time for that.
            Some(done) = fetching.next(), if !fetching.is_empty() => {
                let (chunk, asked, since, reading) = done?;
                asks -= usize::from(asked);
                // Those that are fetched together count once.
                let taken = reading + Instant::max(since, until).elapsed().as_secs_f64();
                until = Instant::now();
                stage("read", taken);
                seconds += taken;
                fetched.push_back(chunk);
            }
            place = out.reserve(), if !fetched.is_empty() => match (place, fetched.pop_front()) {
                (Ok(place), Some(chunk)) => place.send(chunk),
                _ => return Ok(seconds),
            },
        }
    }
}

/// The chunks of a shard, each with its ticket and its memory.
fn chunks<R: Rows>(
    input: (R, Option<EarlierScores>),
    tickets: Arc<Semaphore>,
    source: &Source<'_>,
) -> impl futures::Stream<Item = Result<Unfetched>> {
    stream::try_unfold(input, move |(mut input, mut earlier)| {
        let tickets = Arc::clone(&tickets);
        async move {
            let ticket = ticket(&tickets, &mut input).await;
            let start = Instant::now();
            let Some(batch) = input.next().await? else { return Ok(None) };
            let (mut addresses, captions) = look(&batch, source.columns)?;
            let standing = match &mut earlier {
                Some(earlier) => earlier.next(batch.num_rows()).await?,
                None => Vec::new(),
            };
            // What is not scored again is not fetched.
            let stands = addresses.iter_mut().zip(&standing).filter(|(_, standing)| standing.is_some());
            stands.for_each(|(address, _)| *address = None);
            let found = source.images.fetcher.locate(addresses, source.images).await;
            // Not the reader's time: memory is short because the engines are busy.
            let seconds = start.elapsed().as_secs_f64();
            // Asked for at once: who holds a part and waits for another could wait for ever.
            let pixels = batch.num_rows() * source.preparer.0.pixel_bytes();
            let (rows, reserve) = (pixels + batch.get_array_memory_size() + captions, reserve(&found));
            let mut held = source.budget.take(rows + reserve).await;
            let memory = Memory::new(reserve, source.budget);
            // Where both are more than all there is, the rows keep theirs: they are held for longer.
            let reserve = held.beyond(rows);
            let chunk = Unfetched { batch, standing, found, memory, held, ticket, reserve, seconds };
            Ok(Some((chunk, (input, earlier))))
        }
    })
}

/// Fetches the images of a chunk and prepares each as it comes, so that only its pixels stay. Gives also whether there were any,
/// since when, and the seconds of reading.
async fn fetch(chunk: Unfetched, source: &Source<'_>) -> Result<(Chunk, bool, Instant, f64)> {
    let (since, fetcher, (preparer, turn)) = (Instant::now(), &source.images.fetcher, source.preparer);
    let Unfetched { batch, standing, found, memory, held, ticket, reserve, seconds } = chunk;
    let (input, asked) = (Arc::new(Input::new(batch, source.columns)), found.iter().any(Option::is_some));
    let rows = found.into_iter().enumerate().map(|(index, found)| {
        let (input, memory) = (&input, &memory);
        async move {
            let Some(found) = found else { return Ok::<_, Error>(None) };
            let (image, _held) = match fetcher.fetch(found, memory).await {
                Ok((bytes, held)) => (Ok(bytes), held),
                Err(fault) => (Err(fault), Held::default()),
            };
            Ok(Some(preparer.row(turn, input, index, image).await?))
        }
    });
    let mut early = try_join_all(rows).await?;
    drop(reserve);
    for (early, standing) in early.iter_mut().zip(standing) {
        *early = standing.map(|score| (Err(score), Duration::ZERO)).or_else(|| early.take());
    }
    Ok((Chunk { batch: input.batch.clone(), early, held, ticket }, asked, since, seconds))
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
