//! What is left of the work, and what came of it, over all attempts.
//!
//! The first attempt sends the user's request. From the worker's list of shards on, the work is that list: what a prefix
//! holds may change meanwhile. Later attempts name the unfinished shards, with the tokens of those that were begun.

use std::collections::HashMap;
use std::time::Instant;

use tonic::Status;

use super::SubmitError;
use super::counts::{Counts, OpenRow, WrittenPairs};
use super::trials::is_too_large;
use crate::v1;
use crate::v1::score_batch_request::Source;
use crate::v1::score_batch_response::Event;

/// Bytes of the shards in a request and of their tokens: half of what workers take unless told otherwise, which leaves room
/// for the rest of the request.
const REQUEST_BYTES_MAX: usize = 8 << 20;
/// Shards of a request, as the contract says.
const REQUEST_SHARDS_MAX: usize = capsieve_worker::limits::SHARDS_MAX;
/// Bytes around a string or a token in a message: its field and its length.
const FIELD_BYTES: usize = 6;

/// See the module.
pub(super) struct Work {
    /// As the user gave it.
    request: v1::ScoreBatchRequest,
    /// Empty until the worker's whole list was seen.
    shards: Vec<Shard>,
    places: HashMap<String, usize>,
    shards_done: usize,
    /// Of the model that made the list.
    model: Option<String>,
    request_bytes: usize,
    counts: Counts,
    pairs: WrittenPairs,
    /// Most rows that a progress message showed of the unfinished work: less than that again is no step.
    showed: u64,
    so_far: v1::ScoreProgress,
    attempt: Attempt,
}

/// A shard as the worker lists it.
struct Shard {
    uri: String,
    /// The last one.
    token: bytes::Bytes,
    open: Option<OpenRow>,
    done: bool,
}

/// What only the running attempt's messages mean.
#[derive(Default)]
struct Attempt {
    /// Shards that its request names, and their bytes; 0 in the user's own.
    asked: usize,
    asked_bytes: usize,
    /// Its shards.
    listed: Vec<String>,
    /// Where they are in the work.
    places: Vec<usize>,
    model: String,
    /// No more of the list comes.
    listed_all: bool,
    /// Rows, and those that failed, of all attempts before.
    before: (u64, u64),
    /// Rows of its shards that are done.
    rows_done: u64,
    /// Rows of outputs that were complete, which its progress does not count.
    rows_skipped: u64,
    /// Its scores moved a position on.
    scored: bool,
}

impl Work {
    pub(super) fn new(request: &v1::ScoreBatchRequest) -> Result<Self, SubmitError> {
        if matches!(request.source, Some(Source::Pairs(_))) {
            return Err(SubmitError::Pairs);
        }
        Ok(Self {
            request: request.clone(),
            shards: Vec::new(),
            places: HashMap::new(),
            shards_done: 0,
            model: None,
            request_bytes: REQUEST_BYTES_MAX,
            counts: Counts::default(),
            pairs: WrittenPairs::default(),
            showed: 0,
            so_far: v1::ScoreProgress::default(),
            attempt: Attempt::default(),
        })
    }

    /// The next request, and none when all is done: the user's own, or as many unfinished shards as fit into one.
    pub(super) fn rest(&mut self) -> Option<v1::ScoreBatchRequest> {
        self.end_attempt(None);
        let request = self.request.clone();
        let (Some(_), Some(Source::Shards(given))) = (&self.model, &self.request.source) else { return Some(request) };
        let (mut uris, mut resume_tokens, mut bytes) = (Vec::new(), Vec::new(), 0);
        for shard in self.shards.iter().filter(|shard| !shard.done) {
            let more = shard.uri.len() + shard.token.len() + 2 * FIELD_BYTES;
            if !uris.is_empty() && (bytes + more > self.request_bytes || uris.len() == REQUEST_SHARDS_MAX) {
                break;
            }
            bytes += more;
            uris.push(shard.uri.clone());
            resume_tokens.extend((!shard.token.is_empty()).then(|| shard.token.clone()));
        }
        (self.attempt.asked, self.attempt.asked_bytes) = (uris.len(), bytes);
        let source = Source::Shards(v1::ParquetShards { uris, columns: given.columns.clone(), resume_tokens });
        (self.attempt.asked > 0).then_some(v1::ScoreBatchRequest { source: Some(source), ..request })
    }

    /// Whether a refusal is one of the request's size, and smaller ones can be made: they will be.
    pub(super) fn splits(&mut self, status: &Status) -> bool {
        let splits = is_too_large(status) && self.attempt.asked > 1;
        if splits {
            self.request_bytes = self.attempt.asked_bytes / 2;
        }
        splits
    }

    /// Notes a message; whether it brought the work on. An error says how it breaks the contract.
    pub(super) fn take(&mut self, event: &Event) -> Result<bool, &'static str> {
        match event {
            Event::Started(started) => return self.started(started).map(|()| false),
            _ if !self.attempt.listed_all => self.list()?,
            _ => {}
        }
        let step = match event {
            Event::Chunk(chunk) => self.chunk(chunk).map(|()| true)?,
            Event::ShardDone(done) => self.done(done).map(|()| true)?,
            Event::Progress(progress) => self.progress(progress),
            Event::Summary(summary) => self.summary(summary).map(|()| true)?,
            Event::Started(_) => false,
        };
        self.count_on();
        Ok(step)
    }

    /// The attempt's shards.
    pub(super) fn listed(&self) -> &[String] {
        &self.attempt.listed
    }

    /// How far it is, over all attempts.
    pub(super) fn so_far(&self) -> v1::ScoreProgress {
        self.so_far
    }

    /// Over all attempts.
    pub(super) fn total(self, begun: Instant) -> v1::ScoreSummary {
        let mut total = self.counts.summary;
        if self.request.sink.is_some() {
            total.pairs = self.pairs.before();
        }
        total.shards = count(self.shards_done);
        total.seconds = begun.elapsed().as_secs_f64();
        total
    }
}

/// What the messages of an attempt do.
impl Work {
    fn started(&mut self, started: &v1::ScoreStarted) -> Result<(), &'static str> {
        if self.attempt.listed_all {
            return Err("a list of shards goes on behind other messages");
        }
        self.attempt.model.clone_from(&started.model_hash);
        self.attempt.listed.extend_from_slice(&started.shards);
        Ok(())
    }

    /// The first message behind the list: it is whole. The first list is the work.
    fn list(&mut self) -> Result<(), &'static str> {
        let Attempt { listed, model, .. } = &self.attempt;
        if self.model.is_none() {
            self.model = Some(model.clone());
            for uri in listed {
                let (uri, token) = (uri.clone(), bytes::Bytes::new());
                self.places.insert(uri.clone(), self.shards.len());
                self.shards.push(Shard { uri, token, open: None, done: false });
            }
        }
        if self.model.as_ref() != Some(model) {
            return Err("its model is not the one that began the work");
        }
        let places: Option<Vec<usize>> = listed.iter().map(|uri| self.places.get(uri).copied()).collect();
        self.attempt.places = places.ok_or("it lists a shard that it was not asked for")?;
        self.attempt.listed_all = true;
        Ok(())
    }

    fn chunk(&mut self, chunk: &v1::ScoreChunk) -> Result<(), &'static str> {
        let rows = chunk.row.len();
        let optional = [chunk.itm_score.len(), chunk.cosine_score.len(), chunk.keep.len(), chunk.key.len()];
        if chunk.caption.len() != rows || optional.iter().any(|length| *length != 0 && *length != rows) {
            return Err("the arrays of a chunk have different lengths");
        }
        let shard = shard(&mut self.shards, &self.attempt.places, chunk.shard_index)?;
        self.counts.add(&mut shard.open, chunk);
        shard.token.clone_from(&chunk.resume_token);
        self.attempt.scored = true;
        Ok(())
    }

    fn done(&mut self, done: &v1::ShardDone) -> Result<(), &'static str> {
        let shard = shard(&mut self.shards, &self.attempt.places, done.shard_index)?;
        // Its token has done its service: a shard that is done is not asked for again.
        (shard.done, shard.token) = (true, bytes::Bytes::new());
        self.shards_done += 1;
        self.counts.end_row(&mut shard.open);
        if self.request.sink.is_some() {
            self.counts.add_written(done);
        }
        if done.skipped {
            self.attempt.rows_skipped = self.attempt.rows_skipped.saturating_add(done.rows);
        } else {
            self.attempt.rows_done = self.attempt.rows_done.saturating_add(done.rows);
            self.pairs.shard_done(done.rows);
            self.showed = self.showed.saturating_sub(done.rows);
        }
        Ok(())
    }

    /// A step if it is farther than any attempt at the same work was.
    fn progress(&mut self, progress: &v1::ScoreProgress) -> bool {
        let v1::ScoreProgress { rows, rows_failed, rows_total, pairs, shards_total, .. } = *progress;
        self.pairs.progress(rows, pairs);
        let unfinished = rows.saturating_sub(self.attempt.rows_done);
        let step = unfinished > self.showed;
        self.showed = self.showed.max(unfinished);
        let (before, failed_before) = self.attempt.before;
        let before = before.saturating_add(self.attempt.rows_skipped);
        let so_far = &mut self.so_far;
        so_far.rows_total = so_far.rows_total.max(before.saturating_add(rows_total));
        if self.request.sink.is_some() {
            so_far.rows = so_far.rows.max(before.saturating_add(rows));
            so_far.rows_failed = so_far.rows_failed.max(failed_before.saturating_add(rows_failed));
            so_far.pairs = so_far.pairs.max(self.pairs.before().saturating_add(pairs));
        }
        so_far.shards_total = so_far.shards_total.max(shards_total);
        step
    }

    fn summary(&mut self, summary: &v1::ScoreSummary) -> Result<(), &'static str> {
        if self.attempt.places.iter().any(|place| !self.shards[*place].done) {
            return Err("it says that all is done, but not of each shard");
        }
        self.end_attempt(Some(summary.pairs));
        // What comes next is other work.
        self.showed = 0;
        Ok(())
    }

    /// What is counted row by row shows in the progress at once.
    fn count_on(&mut self) {
        let (so_far, counted) = (&mut self.so_far, &self.counts.summary);
        so_far.rows = so_far.rows.max(counted.rows);
        so_far.rows_failed = so_far.rows_failed.max(counted.failed);
        so_far.pairs = so_far.pairs.max(counted.pairs);
        so_far.rows_total = so_far.rows_total.max(so_far.rows);
        so_far.shards_done = count(self.shards_done);
        so_far.shards_total = so_far.shards_total.max(count(self.shards.len()));
    }

    /// An attempt is over; with `pairs` of its summary, if there was one.
    fn end_attempt(&mut self, pairs: Option<u64>) {
        self.pairs.end_call(pairs);
        if self.attempt.scored {
            self.showed = 0;
        }
        let before = (self.counts.summary.rows, self.counts.summary.failed);
        self.attempt = Attempt { before, ..Attempt::default() };
    }
}

/// The shard of an index, which must not be done.
fn shard<'a>(shards: &'a mut [Shard], places: &[usize], index: u32) -> Result<&'a mut Shard, &'static str> {
    let place = places.get(index as usize).ok_or("it names a shard that it has not listed")?;
    match &mut shards[*place] {
        shard if shard.done => Err("more comes of a shard that is done"),
        shard => Ok(shard),
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
