//! One call on a shared worker: its shards or pairs one after another through the pipeline, what comes out as events.
//!
//! Dropping the events ends the call: its rows leave the engines' queue, and what an engine has begun is the last of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use arrow_array::RecordBatch;
use capsieve_engine::Heads;
use capsieve_store::{Access, ColumnOptions, Columns, Location, RowScore, ShardReader, key_texts};
use futures::{Stream, stream};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::JoinHandle;
use tracing::{Instrument, Span, field};

use crate::limits::{CHUNK_ROWS, CHUNK_URIS, EVENTS, SHARDS_MAX};
use crate::pairs::{self, Pair};
use crate::pipeline::{self, Images, Output, Scored, Stages, Totals};
use crate::resume::{Position, request_hash};
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
    pub errors: BTreeMap<&'static str, u64>,
    /// The shard's entity tag.
    pub e_tag: Option<String>,
    /// A resume token that says so; empty for pairs.
    pub token: Vec<u8>,
}

/// A call that was accepted.
pub struct Call {
    worker: Arc<Worker>,
    request: CallRequest,
    shards: Vec<Location>,
    tokens: HashMap<String, Position>,
    outputs: Vec<String>,
    progress: Progress,
}

impl Call {
    /// Lists the shards and checks what can be checked without reading them.
    pub(crate) async fn new(worker: Arc<Worker>, request: CallRequest) -> Result<Self> {
        let loaded = worker.info().heads;
        if (request.heads.itm && !loaded.itm) || (request.heads.cosine && !loaded.cosine) {
            return Err(Error::HeadNotLoaded);
        }
        let (mut shards, mut tokens) = (Vec::new(), HashMap::new());
        if let Source::Shards { uris, tokens: given, .. } = &request.source {
            // A shard that two prefixes share is scored once.
            let mut names = HashSet::new();
            for uri in uris {
                let found = worker.access().shards(uri, SHARDS_MAX).await?;
                shards.extend(found.into_iter().filter(|shard| names.insert(shard.to_string())));
                if shards.len() > SHARDS_MAX {
                    return Err(Error::TooManyShards { count: shards.len(), limit: SHARDS_MAX });
                }
            }
            for token in given {
                let position = Position::decode(token)?;
                if !names.contains(&position.uri) {
                    return Err(Error::Token { reason: "its shard is none of the call's" });
                }
                if tokens.insert(position.uri.clone(), position).is_some() {
                    return Err(Error::Token { reason: "two tokens name one shard: send the last one" });
                }
            }
        }
        let outputs = outputs(&request, &shards, worker.access())?;
        Ok(Self { worker, request, shards, tokens, outputs, progress: Progress::default() })
    }

    /// The shards, in the order they are scored.
    pub fn shards(&self) -> Vec<String> {
        self.shards.iter().map(Location::to_string).collect()
    }

    /// Counters of the call.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Begins the work.
    pub fn start(self) -> Events {
        let (events, received) = channel(EVENTS);
        let work = async move {
            if let Err(error) = self.run(&events).await {
                drop(events.send(Err(error)).await);
            }
        };
        Events { received, task: Some(tokio::spawn(work.in_current_span())) }
    }

    async fn run(&self, events: &Sender<Result<Event>>) -> Result<()> {
        match &self.request.source {
            Source::Pairs(pairs) => {
                self.progress.start(pairs.len() as u64);
                let batches = stream::iter(pairs::batches(pairs.clone()));
                let images = Images { beside: None, access: self.worker.access().clone() };
                let shard = Shard { number: 0, columns: pairs::columns(), images, first: (0, 0), position: None };
                let totals = self.stream(shard, batches, events).instrument(shard_span("pairs")).await?;
                self.done(events, 0, totals, None, Vec::new()).await;
            }
            Source::Shards { columns, .. } => {
                for (number, shard) in self.shards.iter().enumerate() {
                    let span = shard_span(&shard.to_string());
                    let scoring = async {
                        match &self.request.sink {
                            Some(sink) => self.write_shard(number, columns, sink, events).await,
                            None => self.stream_shard(number, columns, events).await,
                        }
                    };
                    scoring.instrument(span).await?;
                }
            }
        }
        Ok(())
    }

    /// The rows of a shard as events.
    async fn stream_shard(&self, number: usize, columns: &ColumnOptions, events: &Sender<Result<Event>>) -> Result<()> {
        let location = &self.shards[number];
        let reader = ShardReader::open(location, columns).await?;
        let uri = location.to_string();
        let ScoreJob { itm_token, policy, .. } = self.worker.job();
        let (heads, thresholds) = (self.request.heads, self.request.thresholds);
        let options = format!("{columns:?} {heads:?} {thresholds:?} {itm_token:?} {policy:?}");
        let model = &self.worker.info().hash;
        let start = Position::start(&request_hash(&options), model, &uri, reader.object_info());
        let at = self.tokens.get(&uri).map_or_else(|| Ok(start.clone()), |token| start.resume(token))?;
        let e_tag = reader.object_info().e_tag.clone();
        if at.done {
            let (output, errors, token) = (None, BTreeMap::new(), at.done_token(at.row));
            let done = ShardDone { shard: number, output, skipped: true, rows: 0, errors, e_tag, token };
            drop(events.send(Ok(Event::ShardDone(done))).await);
            return Ok(());
        }
        let (rows, columns) = (reader.rows(), reader.columns().clone());
        self.progress.start(rows.saturating_sub(at.row));
        let images = Images { beside: Some(location.clone()), access: self.worker.access().clone() };
        // Images of addresses may each be large: fewer travel together.
        let chunk_rows = if columns.image_kind == capsieve_store::ImageKind::Uri { CHUNK_URIS } else { CHUNK_ROWS };
        let _held = self.worker.hold_row_group(&uri, reader.reading_bytes(chunk_rows)).await?;
        let batches = reader.into_stream_from(at.row, chunk_rows);
        let (first, position) = ((at.row, at.caption), Some(Arc::new(start)));
        let shard = Shard { number, columns, images, first, position: position.clone() };
        let totals = self.stream(shard, batches, events).await?;
        let token = position.map(|position| position.done_token(rows)).unwrap_or_default();
        self.done(events, number, totals, e_tag, token).await;
        Ok(())
    }

    async fn stream<S>(&self, shard: Shard, batches: S, events: &Sender<Result<Event>>) -> Result<Totals>
    where
        S: Stream<Item = capsieve_store::Result<RecordBatch>> + Send,
    {
        let (rows, scored) = channel(1);
        let Shard { number, columns, images, first, position } = shard;
        let has_keys = columns.key.is_some();
        let engine = self.worker.engine();
        let stages = Stages {
            batches,
            images,
            columns,
            preparer: Arc::clone(&engine.preparer),
            share: engine.pool.queue().join(self.request.heads, self.progress.clone()),
            budget: engine.budget.clone(),
            output: Output::Rows(rows),
            first_row: first.0,
            fail_on_row: self.request.fail_on_row,
        };
        let forwarding = forward(scored, (number, has_keys), first, position, events);
        let (totals, ()) = tokio::join!(pipeline::run(stages), forwarding);
        totals
    }

    /// A shard to a scored shard.
    async fn write_shard(
        &self,
        number: usize,
        columns: &ColumnOptions,
        sink: &Sink,
        events: &Sender<Result<Event>>,
    ) -> Result<()> {
        let (engine, access) = (self.worker.engine(), self.worker.access());
        let job = ScoreJob {
            input: self.shards[number].to_string(),
            output: self.outputs[number].clone(),
            columns: columns.clone(),
            heads: self.request.heads,
            thresholds: self.request.thresholds,
            drop_images: sink.drop_images,
            fail_on_row: self.request.fail_on_row,
            overwrite: sink.overwrite,
            ..self.worker.job()
        };
        let outcome = match open(&job, (&engine.hash, engine.precision), access).await? {
            Opened::Complete(outcome) => outcome,
            Opened::New(shard) => {
                let bytes = shard.reader().reading_bytes(CHUNK_ROWS);
                let _held = self.worker.hold_row_group(&job.input, bytes).await?;
                shard.score(&job, engine, access, &self.progress).await?
            }
        };
        let (rows, errors, skipped) = match outcome {
            Outcome::Complete { rows, failed } => (rows, failed_rows(failed), true),
            Outcome::Done(stats) => (stats.rows, stats.errors, false),
        };
        let output = Some(job.output);
        let done = ShardDone { shard: number, output, skipped, rows, errors, e_tag: None, token: Vec::new() };
        drop(events.send(Ok(Event::ShardDone(done))).await);
        Ok(())
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

/// What of an earlier run is known without reading its rows.
fn failed_rows(failed: u64) -> BTreeMap<&'static str, u64> {
    if failed == 0 { BTreeMap::new() } else { BTreeMap::from([("earlier", failed)]) }
}

/// A shard, or the call's own pairs, on the way through the pipeline.
struct Shard {
    number: usize,
    columns: Columns,
    images: Images,
    /// Row and caption to begin with.
    first: (u64, u64),
    position: Option<Arc<Position>>,
}

/// Scored rows from the pipeline's end to the call's events.
async fn forward(
    mut scored: Receiver<Scored>,
    (shard, has_keys): (usize, bool),
    (mut first_row, mut first_caption): (u64, u64),
    position: Option<Arc<Position>>,
    events: &Sender<Result<Event>>,
) {
    while let Some(Scored { batch, rows, .. }) = scored.recv().await {
        let keys = has_keys.then(|| key_texts(batch.column(0)));
        let count = rows.len() as u64;
        let rows = ScoredRows { shard, first_row, first_caption, keys, rows, position: position.clone() };
        (first_row, first_caption) = (first_row + count, 0);
        if events.send(Ok(Event::Rows(rows))).await.is_err() {
            return;
        }
    }
}

/// The output of each shard, checked to be allowed and different from each other.
fn outputs(request: &CallRequest, shards: &[Location], access: &Access) -> Result<Vec<String>> {
    let Some(sink) = &request.sink else { return Ok(Vec::new()) };
    if matches!(request.source, Source::Pairs(_)) {
        return Err(Error::Sink { reason: "pairs that come with the call are streamed back: leave the sink out" });
    }
    let outputs: Vec<String> = match sink.uri.ends_with('/') {
        true => shards.iter().map(|shard| format!("{}{}", sink.uri, shard.file_name())).collect(),
        false if shards.len() == 1 => vec![sink.uri.clone()],
        false => return Err(Error::Sink { reason: "several shards need a prefix that ends in '/'" }),
    };
    if outputs.iter().collect::<HashSet<_>>().len() < outputs.len() {
        return Err(Error::Sink { reason: "two shards have the same name: call them one by one" });
    }
    outputs
        .iter()
        .try_for_each(|output| access.open(output).map(drop))
        .map_err(|error| Error::SinkUri(Box::new(error)))?;
    Ok(outputs)
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
    use super::{Error, Event, Events, Result, ScoredRows, channel};

    #[tokio::test]
    async fn a_task_that_panics_is_an_error_after_its_events() {
        let (sender, received) = channel::<Result<Event>>(1);
        let task = tokio::spawn(async move {
            let rows =
                ScoredRows { shard: 0, first_row: 0, first_caption: 0, keys: None, rows: vec![], position: None };
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
