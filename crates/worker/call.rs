//! One call on a shared worker: its shards or pairs one after another through the pipeline, what comes out as events.
//!
//! Dropping the events ends the call: its rows leave the engines' queue, and what an engine has begun is the last of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use capsieve_engine::Heads;
use capsieve_store::{ColumnOptions, Columns, Location, ObjectInfo, RowScore, ShardReader, below};
use futures::stream;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::JoinHandle;
use tracing::{Instrument, Span, field};

use crate::limits::chunks_max;
use crate::pairs::{self, Pair};
use crate::pipeline::{self, Images, Output, Scored, Stages, Ticket, Totals};
use crate::plan::Plan;
use crate::resume::Position;
use crate::rows::{Ready, Rows, ShardRows};
use crate::score::{Opened, open};
use crate::service::Worker;
use crate::{Error, Outcome, Progress, Result, ScoreJob, Thresholds};

/// What a call asks for.
#[derive(Clone, Debug)]
pub struct CallRequest {
    /// What to score.
    pub source: Source,
    /// Which scores; those that the worker has not loaded are an error.
    pub heads: Heads,
    /// The least scores to keep.
    pub thresholds: Thresholds,
    /// Ends the call at the first row without a score.
    pub fail_on_row: bool,
    /// Where scored shards go, if they are not to be streamed.
    pub sink: Option<Sink>,
}

/// What to score.
#[derive(Clone, Debug)]
pub enum Source {
    /// Images and captions that came with the call.
    Pairs(Vec<Pair>),
    /// Parquet shards.
    Shards {
        /// Objects, or prefixes that end in '/'.
        uris: Vec<String>,
        /// Names of columns, where they are not to be detected.
        columns: ColumnOptions,
        /// Where an earlier call stopped.
        tokens: Vec<Vec<u8>>,
    },
}

/// Where scored shards go.
#[derive(Clone, Debug)]
pub struct Sink {
    /// An object, or a prefix that ends in '/' under which shards keep their names.
    pub uri: String,
    /// Leaves the image column out.
    pub drop_images: bool,
    /// Replaces outputs that are there.
    pub overwrite: bool,
}

impl Sink {
    /// Where the output of a shard goes.
    pub(crate) fn output(&self, shard: &Location) -> String {
        if self.uri.ends_with('/') { below(&self.uri, shard.file_name()) } else { self.uri.clone() }
    }
}

/// What a call gives, in order.
#[derive(Debug)]
pub enum Event {
    /// Rows with their scores.
    Rows(ScoredRows),
    /// A shard has no more rows.
    ShardDone(ShardDone),
}

/// Rows with their scores.
#[derive(Debug)]
pub struct ScoredRows {
    /// Into the call's list of shards.
    pub shard: usize,
    /// Number of the first row in the shard.
    pub first_row: u64,
    /// First caption of the first row that was not sent by an earlier call.
    pub first_caption: u64,
    /// Keys of the rows, where the shard has them.
    pub keys: Option<Vec<String>>,
    /// The rows.
    pub rows: Vec<RowScore>,
    /// For tokens; none for pairs that came with the call.
    pub position: Option<Arc<Position>>,
    /// Given back, by being dropped, when the rows are sent: no more rows are read for a reader that does not take them.
    pub ticket: Ticket,
}

/// A shard that is done.
#[derive(Clone, Debug)]
pub struct ShardDone {
    /// Into the call's list of shards.
    pub shard: usize,
    /// Where the output is, if there is one.
    pub output: Option<String>,
    /// Nothing was to do: an earlier call did it.
    pub skipped: bool,
    /// Rows that this call went through.
    pub rows: u64,
    /// Of these, rows without a score, by reason.
    pub errors: BTreeMap<String, u64>,
    /// The shard's entity tag.
    pub e_tag: Option<String>,
    /// A resume token that says so; empty for pairs.
    pub token: Vec<u8>,
}

/// A call that was accepted.
pub struct Call {
    worker: Arc<Worker>,
    request: CallRequest,
    plan: Plan,
    progress: Progress,
}

impl Call {
    /// Lists the shards and checks what can be checked without reading them.
    pub(crate) async fn new(worker: Arc<Worker>, request: CallRequest) -> Result<Self> {
        let loaded = worker.info().heads;
        if (request.heads.itm && !loaded.itm) || (request.heads.cosine && !loaded.cosine) {
            return Err(Error::HeadNotLoaded);
        }
        let plan = Plan::new(&request, worker.access(), worker.names()).await?;
        Ok(Self { worker, request, plan, progress: Progress::default() })
    }

    /// The shards, in the order they are scored.
    pub fn shards(&self) -> Vec<String> {
        self.plan.shards.iter().map(Location::to_string).collect()
    }

    /// Counters of the call.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Begins the work.
    pub fn start(self) -> Events {
        // What waits here has tickets, which bound it.
        let (events, received) = channel(chunks_max(self.worker.info().batch_images));
        let work = async move {
            if let Err(error) = self.run(&events).await {
                drop(events.send(Err(error)).await);
            }
        };
        Events { received, task: Some(tokio::spawn(work.in_current_span())) }
    }

    async fn run(mut self, events: &Sender<Result<Event>>) -> Result<()> {
        if let Source::Pairs(pairs) = &mut self.request.source {
            let pairs = std::mem::take(pairs);
            return self.stream_pairs(pairs, events).instrument(shard_span("pairs")).await;
        }
        for (number, shard) in self.plan.shards.iter().enumerate() {
            let span = shard_span(&shard.to_string());
            let scoring = async {
                match &self.request.sink {
                    Some(sink) => self.write_shard(number, sink, events).await,
                    None => self.stream_shard(number, events).await,
                }
            };
            scoring.instrument(span).await?;
        }
        Ok(())
    }

    /// Pairs that came with the call as events.
    async fn stream_pairs(&self, pairs: Vec<Pair>, events: &Sender<Result<Event>>) -> Result<()> {
        self.progress.start(pairs.len() as u64);
        let input = Ready(stream::iter(pairs::batches(pairs)));
        let shard = Shard { number: 0, columns: pairs::columns(), beside: None, first: (0, 0), position: None };
        let totals = self.stream(shard, input, events).await?;
        self.done(events, 0, totals, None, Vec::new()).await;
        Ok(())
    }

    /// The rows of a shard as events.
    async fn stream_shard(&self, number: usize, events: &Sender<Result<Event>>) -> Result<()> {
        let location = &self.plan.shards[number];
        let reader = ShardReader::open(location, self.columns()).await?.narrowed();
        let start = self.position(location, reader.object_info(), None);
        let at = self.resumed(&start)?;
        let (rows, e_tag) = (reader.rows(), reader.object_info().e_tag.clone());
        if at.row > rows {
            return Err(Error::Token { reason: "it points beyond the last row of its shard" });
        }
        if at.done {
            let (output, errors, token) = (None, BTreeMap::new(), at.done_token(at.row));
            let done = ShardDone { shard: number, output, skipped: true, rows: 0, errors, e_tag, token };
            drop(events.send(Ok(Event::ShardDone(done))).await);
            return Ok(());
        }
        self.progress.start(rows - at.row);
        let (columns, beside) = (reader.columns().clone(), Some(location.clone()));
        let input = ShardRows::new(reader, at.row, &self.worker.engine().row_groups)?.taking_turns();
        let position = Some(Arc::new(start));
        let shard = Shard { number, columns, beside, first: (at.row, at.caption), position: position.clone() };
        let totals = self.stream(shard, input, events).await?;
        let token = position.map(|position| position.done_token(rows)).unwrap_or_default();
        self.done(events, number, totals, e_tag, token).await;
        Ok(())
    }

    async fn stream(&self, shard: Shard, input: impl Rows, events: &Sender<Result<Event>>) -> Result<Totals> {
        let (rows, scored) = channel(1);
        let (engine, access) = (self.worker.engine(), self.worker.access().clone());
        let stages = Stages {
            input,
            earlier: None,
            images: Images { beside: shard.beside.clone(), access, fetcher: Arc::clone(&engine.fetcher) },
            columns: shard.columns.clone(),
            preparer: Arc::clone(&engine.preparer),
            share: engine.pool.queue().join(self.request.heads, self.progress.clone()),
            budget: engine.budget.clone(),
            output: Output::Rows(rows),
            first_row: shard.first.0,
            fail_on_row: self.request.fail_on_row,
        };
        let (totals, forwarded) = tokio::join!(pipeline::run(stages), forward(scored, shard, events));
        forwarded?;
        totals
    }

    /// A shard to a scored shard.
    async fn write_shard(&self, number: usize, sink: &Sink, events: &Sender<Result<Event>>) -> Result<()> {
        let (engine, access) = (self.worker.engine(), self.worker.access());
        let location = &self.plan.shards[number];
        let output = &sink.output(location);
        let written = self.plan.tokens.get(&location.to_string()).is_some_and(|token| token.done);
        let mut job = ScoreJob {
            input: location.to_string(),
            output: output.clone(),
            columns: self.columns().clone(),
            heads: self.request.heads,
            thresholds: self.request.thresholds,
            drop_images: sink.drop_images,
            fail_on_row: self.request.fail_on_row,
            // What an earlier attempt of the same call wrote is not written again.
            overwrite: sink.overwrite && !written,
            ..self.worker.job()
        };
        let model = (&*engine.hash, engine.precision);
        let opened = match open(&job, model, access).await {
            Err(Error::Foreign { .. }) if sink.overwrite => {
                job.overwrite = true;
                open(&job, model, access).await?
            }
            opened => opened?,
        };
        let info = match &opened {
            Opened::Complete(_, info) => info,
            Opened::New(shard) => shard.input_info(),
        };
        let start = self.position(location, info, Some((output, sink.drop_images)));
        self.resumed(&start)?;
        let e_tag = info.e_tag.clone();
        let outcome = match opened {
            Opened::Complete(counts, _) => Outcome::Complete(counts),
            Opened::New(shard) => shard.score(&job, engine, access, &self.progress).await?,
        };
        let (rows, errors, skipped) = match outcome {
            Outcome::Complete(counts) => (counts.rows, counts.errors, true),
            Outcome::Done(stats) => (stats.counts.rows, stats.counts.errors, false),
        };
        let (output, token) = (Some(output.clone()), start.done_token(rows));
        let done = ShardDone { shard: number, output, skipped, rows, errors, e_tag, token };
        drop(events.send(Ok(Event::ShardDone(done))).await);
        Ok(())
    }

    fn columns(&self) -> &ColumnOptions {
        match &self.request.source {
            Source::Shards { columns, .. } => columns,
            Source::Pairs(_) => unreachable!("pairs have no shards"),
        }
    }

    /// The beginning of a shard, and all that decides what comes of it; `sink` is where the output goes, and whether without
    /// images.
    fn position(&self, shard: &Location, info: &ObjectInfo, sink: Option<(&String, bool)>) -> Position {
        let ScoreJob { itm_token, policy, .. } = self.worker.job();
        let (columns, heads, thresholds) = (self.columns(), self.request.heads, self.request.thresholds);
        let options = format!("{columns:?} {heads:?} {thresholds:?} {itm_token:?} {policy:?} {sink:?}");
        Position::start(&options, &self.worker.info().hash, &shard.to_string(), info)
    }

    /// Where to begin instead, where an earlier call got further.
    fn resumed(&self, start: &Position) -> Result<Position> {
        self.plan.tokens.get(&start.uri).map_or_else(|| Ok(start.clone()), |token| start.resume(token))
    }

    async fn done(
        &self,
        events: &Sender<Result<Event>>,
        shard: usize,
        totals: Totals,
        e_tag: Option<String>,
        token: Vec<u8>,
    ) {
        let mut errors = totals.statuses;
        errors.remove("ok");
        let errors = errors.into_iter().map(|(reason, rows)| (reason.to_owned(), rows)).collect();
        let done = ShardDone { shard, output: None, skipped: false, rows: totals.rows, errors, e_tag, token };
        drop(events.send(Ok(Event::ShardDone(done))).await);
    }
}

/// What a trace shows of a shard; the pipeline fills it in.
fn shard_span(uri: &str) -> Span {
    tracing::info_span!(
        "shard",
        uri,
        rows = field::Empty,
        pairs = field::Empty,
        read_seconds = field::Empty,
        decode_seconds = field::Empty,
        engine_seconds = field::Empty,
        write_seconds = field::Empty,
    )
}

/// A shard, or the call's own pairs, on the way through the pipeline.
struct Shard {
    number: usize,
    columns: Columns,
    /// What addresses are relative to.
    beside: Option<Location>,
    /// Row and caption to begin with.
    first: (u64, u64),
    position: Option<Arc<Position>>,
}

/// Scored rows from the pipeline's end to the call's events.
async fn forward(mut scored: Receiver<Scored>, shard: Shard, events: &Sender<Result<Event>>) -> Result<()> {
    let Shard { number, columns, first: (mut first_row, mut first_caption), position, .. } = shard;
    while let Some(Scored { batch, rows, ticket, .. }) = scored.recv().await {
        // A row that has none of its scores any more has one entry, whatever its captions were.
        let captions = rows.first().map_or(0, |row| row.scores.len() as u64);
        if captions > 0 && first_caption >= captions {
            return Err(Error::Token { reason: "it points beyond the last caption of its row" });
        }
        // Texts since the rows were prepared.
        let text = |key: Option<&str>| key.unwrap_or_default().to_owned();
        let keys = columns.key.map(|_| batch.column(0).as_string::<i32>().iter().map(text).collect());
        let count = rows.len() as u64;
        let position = position.clone();
        let rows = ScoredRows { shard: number, first_row, first_caption, keys, rows, position, ticket };
        (first_row, first_caption) = (first_row + count, 0);
        if events.send(Ok(Event::Rows(rows))).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// What a call gives. Ends after an error.
pub struct Events {
    received: Receiver<Result<Event>>,
    /// None once its end was seen.
    task: Option<JoinHandle<()>>,
}

impl Events {
    /// The next event; none at the end.
    pub async fn next(&mut self) -> Option<Result<Event>> {
        if let Some(event) = self.received.recv().await {
            return Some(event);
        }
        // A task that panicked sent no error, and must not look like one that is done.
        let ended = self.task.as_mut()?.await;
        self.task = None;
        ended.err().map(|_| Err(Error::BrokeDown))
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::{Error, Event, Events, Result, ScoredRows, Ticket, channel};

    #[tokio::test]
    async fn a_task_that_panics_is_an_error_after_its_events() {
        let (sender, received) = channel::<Result<Event>>(1);
        let task = tokio::spawn(async move {
            let rows = ScoredRows {
                shard: 0,
                first_row: 0,
                first_caption: 0,
                keys: None,
                rows: vec![],
                position: None,
                ticket: Ticket::free(),
            };
            sender.send(Ok(Event::Rows(rows))).await.unwrap();
            panic!("as a stage would");
        });
        let mut events = Events { received, task: Some(task) };
        assert!(matches!(events.next().await, Some(Ok(Event::Rows(_)))));
        assert!(matches!(events.next().await, Some(Err(Error::BrokeDown))));
        assert!(events.next().await.is_none());
    }

    #[tokio::test]
    async fn a_task_that_is_done_ends() {
        let (_, received) = channel(1);
        let mut events = Events { received, task: Some(tokio::spawn(async {})) };
        assert!(events.next().await.is_none());
        assert!(events.next().await.is_none());
    }
}
