//! The queue between calls and engines: rows of every call wait here, batches are filled fairly from all of them, and each
//! row's scores go back to the chunk it came from.
//!
//! Fairness is deficit round robin (Shreedhar and Varghese, 1995) with pairs as the cost: each call in turn may spend
//! [`QUANTUM_PAIRS`] more, so that a call of ten pairs waits for its turn and not for the ten million of another. A row of many
//! captions waits in parts, each with the image, so that no batch grows with it. A batch goes to an engine when it is full,
//! when a row has waited for the latency bound, when somebody waits for memory that waiting rows may hold, or when a call says that
//! nothing more comes before its rows are scored.
//!
//! A call that is dropped takes its waiting rows with it. What an engine has begun is finished: at most the batch in its
//! hands, and on a card the one behind it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use capsieve_engine::{Batch, Heads, Info, PairScore};
use capsieve_store::RowScore;
use tokio::sync::Notify;

use crate::Progress;
use crate::budget::{Budget, Held};
use crate::limits::{BATCH_TOKENS, QUANTUM_PAIRS};
use crate::prepare::{Content, Fault, ReadyRow};
use crate::scores::{Awaited, CaptionResult, Scores};

/// Rows of all calls that wait for an engine.
pub(crate) struct Queue {
    state: Mutex<State>,
    /// Rows came, an engine is free, or the queue was closed.
    changed: Condvar,
    info: Info,
    /// How long a row waits for others to share its batch with; none: until the batch is full or its call is in a hurry.
    latency: Option<Duration>,
    /// What the waiting rows hold.
    memory: Budget,
    next_call: AtomicU64,
    /// An engine panicked or its device is lost: nothing is scored any more.
    broken: Notify,
}

#[derive(Default)]
struct State {
    /// Calls with waiting rows; the front is the next to be served.
    calls: VecDeque<Waiting>,
    /// Of all calls. An image that several rows of a call have counts once.
    images: usize,
    tokens: usize,
    /// Batches that engines have asked for.
    wanted: usize,
    closed: bool,
}

/// The rows of a call that wait.
struct Waiting {
    call: Arc<Call>,
    rows: VecDeque<QueuedRow>,
    /// How many of them have each image.
    images: HashMap<Content, usize>,
    /// Pairs it may still spend in this round.
    deficit: usize,
    /// Nothing more comes before these rows are scored.
    hurry: bool,
}

/// A row, or a part of its captions, on its way to an engine.
struct QueuedRow {
    row: ReadyRow,
    place: Place,
    since: Instant,
}

/// Where scores go: to the captions of a row from this one on.
struct Place {
    chunk: Arc<Awaited>,
    row: usize,
    caption: usize,
}

/// What a call and its rows share.
pub(crate) struct Call {
    number: u64,
    pub(crate) heads: Heads,
    pub(crate) progress: Progress,
    dropped: AtomicBool,
    /// Its waiting rows became fewer.
    room: Notify,
    /// Its share of the engines' time.
    nanoseconds: AtomicU64,
    pairs: AtomicU64,
}

/// A batch and where its rows came from: which captions of which row of which chunk.
pub(crate) struct Job {
    pub(crate) batch: Batch,
    places: Vec<(Place, Captions)>,
}

/// For each caption of a row why it is not scored, if it is not.
type Captions = Vec<Option<&'static str>>;

impl Queue {
    pub(crate) fn new(info: Info, latency: Option<Duration>, memory: Budget) -> Self {
        let state = Mutex::new(State::default());
        let (changed, next_call, broken) = (Condvar::new(), AtomicU64::new(0), Notify::new());
        Self { state, changed, info, latency, memory, next_call, broken }
    }

    pub(crate) fn info(&self) -> &Info {
        &self.info
    }

    /// A call that may submit rows, until it is dropped.
    pub(crate) fn join(self: &Arc<Self>, heads: Heads, progress: Progress) -> Share {
        let call = Call {
            number: self.next_call.fetch_add(1, Ordering::Relaxed),
            heads,
            progress,
            dropped: AtomicBool::new(false),
            room: Notify::new(),
            nanoseconds: AtomicU64::new(0),
            pairs: AtomicU64::new(0),
        };
        Share { queue: Arc::clone(self), call: Arc::new(call) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in here would be a bug of ours; what it left is still a queue.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Images that wait, of all calls.
    pub(crate) fn depth(&self) -> usize {
        self.lock().images
    }

    /// An engine can take a batch.
    pub(crate) fn want(&self, batches: usize) {
        self.lock().wanted += batches;
        self.changed.notify_one();
    }

    /// Ends the queue: what waits is dropped, and so are its calls' hopes. `broken`: for lack of an engine.
    pub(crate) fn close(&self, broken: bool) {
        let mut state = self.lock();
        state.closed = true;
        state.calls.clear();
        (state.images, state.tokens) = (0, 0);
        drop(state);
        self.changed.notify_all();
        if broken {
            self.broken.notify_one();
        }
    }

    /// Returns when an engine broke down.
    pub(crate) async fn broke_down(&self) {
        self.broken.notified().await;
    }

    /// Waits for a batch that an engine wants and is worth its time; none once the queue is closed.
    pub(crate) fn next_batch(&self, spare: Batch) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let wait = if state.wanted == 0 || state.images == 0 { None } else { Some(self.wait(&state)) };
            state = match wait {
                Some(Some(Duration::ZERO)) => break,
                Some(Some(left)) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0
                }
                Some(None) | None => self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner),
            };
        }
        state.wanted -= 1;
        let rows = state.gather(self.info.images_max);
        depth(&state);
        drop(state);
        Some(fill(spare, rows))
    }

    /// How long the waiting rows may still wait for others; none: until something changes.
    fn wait(&self, state: &State) -> Option<Duration> {
        let full = state.images >= self.info.images_max || state.tokens >= BATCH_TOKENS;
        // Company may never come to rows that hold the memory which it needs.
        if full || self.memory.is_wanted() || state.calls.iter().any(|call| call.hurry) {
            return Some(Duration::ZERO);
        }
        let oldest = state.calls.iter().filter_map(|call| call.rows.front()).map(|row| row.since).min()?;
        self.latency.map(|latency| latency.saturating_sub(oldest.elapsed()))
    }
}

fn depth(state: &State) {
    metrics::gauge!("capsieve_queue_depth", "queue" => "engine").set(state.images as f64);
}

impl State {
    /// Rows for one batch, in turn from all calls: at least one where any wait. Rows with the same image share its place.
    fn gather(&mut self, images_max: usize) -> Vec<QueuedRow> {
        let (mut rows, mut images, mut tokens) = (Vec::new(), HashSet::new(), 0);
        let mut full = false;
        while !full && let Some(mut call) = self.calls.pop_front() {
            call.deficit += QUANTUM_PAIRS;
            while let Some(QueuedRow { row, .. }) = call.rows.front().filter(|row| row.row.pairs() <= call.deficit) {
                let crowded = !rows.is_empty() && tokens + row.tokens() > BATCH_TOKENS;
                full = crowded || (images.len() == images_max && !images.contains(&row.content));
                if full {
                    break;
                }
                call.deficit -= row.pairs();
                tokens += row.tokens();
                images.insert(row.content);
                self.images -= call.forget(row.content);
                rows.extend(call.rows.pop_front());
            }
            call.call.room.notify_one();
            let more = call.rows.front().is_some_and(|row| images.contains(&row.row.content));
            match call.rows.front() {
                None => {}
                // It did not fit behind the others: first in the next batch, or it might never.
                Some(_) if full && images.len() < images_max => {
                    call.deficit = call.deficit.saturating_sub(QUANTUM_PAIRS);
                    self.calls.push_front(call);
                }
                Some(_) => self.calls.push_back(call),
            }
            full |= images.len() == images_max && !more;
        }
        self.tokens -= tokens;
        rows
    }
}

impl Waiting {
    /// Adds rows; gives the number of images that no row had that waits.
    fn extend(&mut self, rows: VecDeque<QueuedRow>) -> usize {
        let before = self.images.len();
        rows.iter().for_each(|row| *self.images.entry(row.row.content).or_default() += 1);
        self.rows.extend(rows);
        self.images.len() - before
    }

    /// A row with this image waits no longer; gives 1 where it was the last one with it.
    fn forget(&mut self, content: Content) -> usize {
        match self.images.get_mut(&content) {
            Some(rows) if *rows > 1 => {
                *rows -= 1;
                0
            }
            _ => usize::from(self.images.remove(&content).is_some()),
        }
    }
}

/// Rows with the same image stand side by side, and the image goes into the batch once.
fn fill(mut batch: Batch, mut rows: Vec<QueuedRow>) -> Job {
    batch.clear();
    let mut first = HashMap::with_capacity(rows.len());
    rows.iter().enumerate().for_each(|(i, row)| _ = first.entry(row.row.content).or_insert(i));
    rows.sort_by_key(|row| first[&row.row.content]);
    let mut last = None;
    let place = |QueuedRow { row, place, .. }: QueuedRow| {
        if last.replace(row.content) != Some(row.content) {
            batch.push_image(&row.pixels);
        }
        for tokens in row.captions.iter().flatten() {
            batch.push_caption(tokens);
        }
        let fault = |caption: Result<_, Fault>| caption.err().map(|fault| fault.status);
        (place, row.captions.into_iter().map(fault).collect())
    };
    let places = rows.into_iter().map(place).collect();
    Job { batch, places }
}

impl Job {
    /// Whether nobody waits for any of it.
    pub(crate) fn in_vain(&self) -> bool {
        self.places.iter().all(|(place, _)| place.chunk.call.dropped.load(Ordering::Relaxed))
    }

    /// Hands the scores to the rows' chunks; gives back the batch for its memory.
    pub(crate) fn deliver(self, scores: Result<Vec<PairScore>, capsieve_engine::Error>, taken: Duration) -> Batch {
        let Self { batch, places } = self;
        let scores = match scores {
            Ok(scores) => scores,
            Err(error) => {
                let error = Arc::new(error);
                places.iter().for_each(|(place, _)| place.chunk.fail(&error));
                return batch;
            }
        };
        let pair_nanoseconds = taken.as_nanos() as u64 / scores.len().max(1) as u64;
        let mut scores = scores.into_iter();
        for (place, captions) in places {
            let score = |fault: Option<_>| fault.map_or_else(|| Ok(scores.next().expect("a score a caption")), Err);
            let captions: Vec<CaptionResult> = captions.into_iter().map(score).collect();
            let (call, pairs) = (&place.chunk.call, captions.iter().flatten().count() as u64);
            call.nanoseconds.fetch_add(pair_nanoseconds * pairs, Ordering::Relaxed);
            call.pairs.fetch_add(pairs, Ordering::Relaxed);
            call.progress.add_pairs(pairs);
            metrics::counter!("capsieve_pairs_scored_total").increment(pairs);
            if call.dropped.load(Ordering::Relaxed) {
                metrics::counter!("capsieve_pairs_wasted_total").increment(pairs);
            }
            place.chunk.score(place.row, place.caption, captions);
        }
        assert!(scores.next().is_none(), "a caption for each score");
        batch
    }
}

/// A call's place in the queue. Dropping it takes its waiting rows out.
pub(crate) struct Share {
    queue: Arc<Queue>,
    call: Arc<Call>,
}

impl Share {
    /// Queues the rows that can be scored; resolves to one score for each row. Never waits: see [`Self::room`]. `held` is
    /// dropped with the last row's pixels.
    pub(crate) fn submit(&self, rows: Vec<Result<ReadyRow, RowScore>>, held: Held) -> Scores {
        let (chunk, scores) = Awaited::new(&self.call, rows.len(), held);
        let (mut ready, since) = (VecDeque::with_capacity(rows.len()), Instant::now());
        for (row, prepared) in rows.into_iter().enumerate() {
            let prepared = match prepared {
                Ok(prepared) => prepared,
                Err(score) => {
                    chunk.finish(row, score);
                    continue;
                }
            };
            let mut caption = 0;
            chunk.expect(row, prepared.captions.len());
            for part in prepared.parts() {
                let place = Place { chunk: Arc::clone(&chunk), row, caption };
                caption += part.captions.len();
                ready.push_back(QueuedRow { row: part, place, since });
            }
        }
        chunk.end_if_done();
        if !ready.is_empty() {
            self.enqueue(ready);
        }
        scores
    }

    fn enqueue(&self, rows: VecDeque<QueuedRow>) {
        let mut state = self.queue.lock();
        if state.closed {
            return;
        }
        state.tokens += rows.iter().map(|row| row.row.tokens()).sum::<usize>();
        state.images += match state.calls.iter_mut().find(|waiting| waiting.call.number == self.call.number) {
            Some(waiting) => {
                waiting.hurry = false;
                waiting.extend(rows)
            }
            None => {
                let (call, images) = (Arc::clone(&self.call), HashMap::new());
                let mut waiting = Waiting { call, rows: VecDeque::new(), images, deficit: 0, hurry: false };
                let images = waiting.extend(rows);
                state.calls.push_back(waiting);
                images
            }
        };
        depth(&state);
        drop(state);
        self.queue.changed.notify_one();
    }

    /// Most images of a batch.
    pub(crate) fn images_max(&self) -> usize {
        self.queue.info.images_max
    }

    /// Whether less than a batch of this call waits.
    pub(crate) fn has_room(&self) -> bool {
        let state = self.queue.lock();
        let waiting = state.calls.iter().find(|waiting| waiting.call.number == self.call.number);
        waiting.is_none_or(|waiting| {
            let tokens = || waiting.rows.iter().map(|row| row.row.tokens()).sum::<usize>();
            waiting.images.len() < self.queue.info.images_max && tokens() < BATCH_TOKENS
        })
    }

    /// Returns when rows of this call were taken since the last time.
    pub(crate) async fn room(&self) {
        self.call.room.notified().await;
    }

    /// Nothing more comes before the waiting rows are scored: they need not wait for others.
    pub(crate) fn hurry(&self) {
        let mut state = self.queue.lock();
        if let Some(waiting) = state.calls.iter_mut().find(|waiting| waiting.call.number == self.call.number) {
            waiting.hurry = true;
            drop(state);
            self.queue.changed.notify_one();
        }
    }

    /// Seconds of the engines that went into this call's pairs, and their number.
    pub(crate) fn spent(&self) -> (f64, u64) {
        let nanoseconds = self.call.nanoseconds.load(Ordering::Relaxed);
        (nanoseconds as f64 * 1e-9, self.call.pairs.load(Ordering::Relaxed))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.call.dropped.store(true, Ordering::Relaxed);
        let mut state = self.queue.lock();
        let place = state.calls.iter().position(|waiting| waiting.call.number == self.call.number);
        if let Some(waiting) = place.and_then(|place| state.calls.remove(place)) {
            state.images -= waiting.images.len();
            state.tokens -= waiting.rows.iter().map(|row| row.row.tokens()).sum::<usize>();
        }
        depth(&state);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests;
