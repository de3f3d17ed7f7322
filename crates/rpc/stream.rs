//! The messages of a call: events of the worker, progress on a timer, and an end that always has a reason.
//!
//! Whatever the client does, the call ends: at its deadline, when the client is gone, when a drain runs out. At most
//! [`MESSAGES`] messages wait for a slow client, and nothing but its own call waits for it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use capsieve_worker::{Event, Events, Progress, ShardDone};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::watch;
use tonic::{Code, Status};
use tracing::{Instrument, Span};

use crate::chunks::{Format, chunks};
use crate::gate::Admitted;
use crate::serve::Phase;
use crate::v1::score_batch_response::Event as Message;
use crate::{status, v1};

/// Messages that wait for the client, of at most 2 MiB each.
const MESSAGES: usize = 2;

/// Bytes of the shards' names in a message; what is longer goes on in another one.
const SHARDS_BYTES_MAX: usize = 1 << 20;

/// What a call's task works with.
pub(crate) struct Driver {
    pub(crate) started: v1::ScoreStarted,
    pub(crate) events: Events,
    pub(crate) progress: Progress,
    pub(crate) shards: usize,
    pub(crate) format: Format,
    pub(crate) deadline: Option<Instant>,
    pub(crate) interval: Duration,
    pub(crate) stall_timeout: Option<Duration>,
    pub(crate) phase: watch::Receiver<Phase>,
    pub(crate) request_id: String,
    pub(crate) admitted: Option<Admitted>,
}

/// The stream of a call.
pub(crate) struct Messages {
    received: Receiver<v1::ScoreBatchResponse>,
    /// Why the stream ends, where that is no summary.
    end: Arc<Mutex<Option<Status>>>,
}

impl futures::Stream for Messages {
    type Item = Result<v1::ScoreBatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.received.poll_recv(context).map(|message| match message {
            Some(message) => Some(Ok(message)),
            None => self.end.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take().map(Err),
        })
    }
}

impl Driver {
    /// Begins to send.
    pub(crate) fn start(self) -> Messages {
        let (messages, received) = channel(MESSAGES);
        let end = Arc::new(Mutex::new(None));
        let at_end = Arc::clone(&end);
        let request_id = self.request_id.clone();
        let work = async move {
            let sent = self.run(&messages).await;
            ended(sent.as_ref().err());
            let end = sent.err().map(|status| status::for_request(status, &request_id));
            *at_end.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = end;
            // Only now does the client see the end.
            drop(messages);
        };
        tokio::spawn(work.in_current_span());
        Messages { received, end }
    }

    async fn run(mut self, messages: &Sender<v1::ScoreBatchResponse>) -> Result<(), Status> {
        let (mut phase, deadline) = (self.phase.clone(), self.deadline);
        let stop = async {
            tokio::select! {
                () = expired(deadline) => {
                    status::with_reason(Code::DeadlineExceeded, "DEADLINE", "the call's deadline passed")
                }
                _ = phase.wait_for(|phase| *phase == Phase::Cut) => {
                    let why = "the worker ends: go on with another one by the resume tokens";
                    status::with_reason(Code::Unavailable, "DRAINING", why)
                }
                () = messages.closed() => Status::cancelled("the client is gone"),
            }
        };
        tokio::select! {
            // First: a call that is done is done, whatever else happens at the same moment.
            biased;
            sent = self.send_all(messages) => sent,
            status = stop => Err(status),
        }
    }

    async fn send_all(&mut self, messages: &Sender<v1::ScoreBatchResponse>) -> Result<(), Status> {
        let (begun, messages) = (Instant::now(), &Sending { messages, patience: self.stall_timeout });
        for started in started(std::mem::take(&mut self.started)) {
            send(messages, Message::Started(started)).await?;
        }
        let (mut summary, mut ticks) = (v1::ScoreSummary::default(), tokio::time::interval(self.interval));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            tokio::select! {
                event = self.events.next() => match event {
                    None => break,
                    Some(Err(error)) => return Err(status::of(&error)),
                    Some(Ok(Event::Rows(rows))) => {
                        for chunk in chunks(&rows, self.format) {
                            send(messages, Message::Chunk(chunk)).await?;
                        }
                    }
                    Some(Ok(Event::ShardDone(done))) => {
                        let done = shard_done(done);
                        add(&mut summary, &done);
                        send(messages, Message::ShardDone(done)).await?;
                    }
                },
                _ = ticks.tick() => send(messages, Message::Progress(self.now(&summary))).await?,
            }
        }
        summary.pairs = self.progress.pairs();
        summary.seconds = begun.elapsed().as_secs_f64();
        send(messages, Message::Summary(summary)).await?;
        // A drain waits for this, so not before the summary is on its way.
        self.admitted = None;
        Ok(())
    }

    fn now(&self, summary: &v1::ScoreSummary) -> v1::ScoreProgress {
        v1::ScoreProgress {
            rows: self.progress.rows(),
            rows_failed: self.progress.failed(),
            rows_total: self.progress.rows_total(),
            pairs: self.progress.pairs(),
            shards_done: summary.shards,
            shards_total: u32::try_from(self.shards).unwrap_or(u32::MAX),
        }
    }
}

/// Says how a call ended, in the log and in its span.
pub(crate) fn ended(status: Option<&Status>) {
    let span = Span::current();
    let code = status.map_or(Code::Ok, Status::code);
    span.record("rpc.grpc.status_code", code as i32);
    let Some(status) = status else {
        tracing::info!("call done");
        return;
    };
    // A client that leaves, or asks for what cannot be, is no fault of the worker's (OpenTelemetry's rule for servers).
    if matches!(code, Code::Unknown | Code::DeadlineExceeded | Code::Internal | Code::Unavailable | Code::DataLoss) {
        span.record("otel.status_code", "ERROR").record("otel.status_description", status.message());
    }
    tracing::info!(?code, "call ended: {}", status.message());
}

async fn expired(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Messages to a client that takes them in time.
struct Sending<'a> {
    messages: &'a Sender<v1::ScoreBatchResponse>,
    patience: Option<Duration>,
}

async fn send(to: &Sending<'_>, event: Message) -> Result<(), Status> {
    let sending = to.messages.send(v1::ScoreBatchResponse { event: Some(event) });
    let sent = match to.patience {
        Some(patience) => tokio::time::timeout(patience, sending).await.map_err(|_| {
            let why = "the client takes no messages: go on by the resume tokens when it does";
            status::with_reason(Code::Unavailable, "CLIENT_STALLED", why)
        })?,
        None => sending.await,
    };
    sent.map_err(|_| Status::cancelled("the client is gone"))
}

/// The message that a call was accepted, or several where the list of shards is long.
fn started(whole: v1::ScoreStarted) -> Vec<v1::ScoreStarted> {
    let (mut parts, mut bytes) = (vec![v1::ScoreStarted { shards: Vec::new(), ..whole.clone() }], 0);
    for shard in whole.shards {
        bytes += shard.len() + 6;
        if bytes > SHARDS_BYTES_MAX {
            parts.push(v1::ScoreStarted { shards: Vec::new(), ..parts[0].clone() });
            bytes = shard.len() + 6;
        }
        parts.last_mut().expect("it begins with one").shards.push(shard);
    }
    parts
}

fn shard_done(done: ShardDone) -> v1::ShardDone {
    let ShardDone { shard, output, skipped, rows, errors, e_tag, token } = done;
    let failed: u64 = errors.values().sum();
    v1::ShardDone {
        shard_index: u32::try_from(shard).unwrap_or(u32::MAX),
        rows,
        scored: rows.saturating_sub(failed),
        errors: errors.into_iter().map(|(status, rows)| (status.to_owned(), rows)).collect(),
        etag: e_tag.unwrap_or_default(),
        output_uri: output.unwrap_or_default(),
        skipped,
        resume_token: token.into(),
    }
}

fn add(summary: &mut v1::ScoreSummary, done: &v1::ShardDone) {
    let failed: BTreeMap<&String, &u64> = done.errors.iter().collect();
    for (status, rows) in failed {
        *summary.errors.entry(status.clone()).or_default() += rows;
    }
    summary.rows += done.rows;
    summary.scored += done.scored;
    summary.failed += done.rows - done.scored;
    summary.shards += 1;
}
