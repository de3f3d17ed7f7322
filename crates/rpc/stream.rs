//! The messages of a call: events of the worker, progress on a timer, and an end that always has a reason.
//!
//! Whatever the client does, the call ends: at its deadline, when the client is gone or takes nothing for long, when a drain runs
//! out. Nothing but its own call waits for a slow client.

use std::time::{Duration, Instant};

use capsieve_worker::{Event, Events, Progress, ShardDone};
use tokio::sync::watch;
use tonic::{Code, Status};
use tracing::{Instrument, Span};

use crate::chunks::{Format, chunks};
use crate::gate::Admitted;
use crate::outbox::{self, Messages, Outbox, outbox};
use crate::serve::Phase;
use crate::v1::score_batch_response::Event as Message;
use crate::{status, v1};

/// Bytes of the shards' names in a message; what is longer goes on in another one.
const SHARDS_BYTES_MAX: usize = 48 << 10;
/// How long the last messages of a call that failed wait for its client.
const FAILED_PATIENCE: Duration = Duration::from_secs(10);

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
}

impl Driver {
    /// Begins to send.
    pub(crate) fn start(self, place: Admitted) -> Messages {
        let (patience, request_id) = (self.stall_timeout, self.request_id.clone());
        let (outbox, messages) = outbox(place, patience);
        let work = async move {
            let Err(status) = self.run(&outbox).await else {
                // Done is what the client has.
                ended(outbox.end(None, patience).await.err().as_ref());
                return;
            };
            ended(Some(&status));
            let patience = match outbox::is_stalled(&status) {
                true => Duration::ZERO,
                false => patience.map_or(FAILED_PATIENCE, |patience| patience.min(FAILED_PATIENCE)),
            };
            // What it was that he did not hear is said already.
            drop(outbox.end(Some(status::for_request(status, &request_id)), Some(patience)).await);
        };
        tokio::spawn(work.in_current_span());
        messages
    }

    /// Ends with the call; what it worked with is gone by then.
    async fn run(mut self, outbox: &Outbox) -> Result<(), Status> {
        let (mut phase, deadline) = (self.phase.clone(), self.deadline);
        let stop = async {
            tokio::select! {
                () = expired(deadline) => status::late("the call's deadline passed"),
                _ = phase.wait_for(|phase| *phase == Phase::Cut) => status::draining(),
                () = outbox.closed() => Status::cancelled("the client is gone"),
            }
        };
        tokio::select! {
            // First: a call that is done is done, whatever else happens at the same moment.
            biased;
            sent = self.send_all(outbox) => sent,
            status = stop => Err(status),
        }
    }

    async fn send_all(&mut self, outbox: &Outbox) -> Result<(), Status> {
        let begun = Instant::now();
        for started in started(std::mem::take(&mut self.started)) {
            outbox.send(Message::Started(started)).await?;
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
                            outbox.send(Message::Chunk(chunk)).await?;
                        }
                    }
                    Some(Ok(Event::ShardDone(done))) => {
                        let done = shard_done(done);
                        add(&mut summary, &done);
                        outbox.send(Message::ShardDone(done)).await?;
                    }
                },
                _ = ticks.tick() => outbox.send(Message::Progress(self.now(&summary))).await?,
            }
        }
        summary.pairs = self.progress.pairs();
        summary.seconds = begun.elapsed().as_secs_f64();
        outbox.send(Message::Summary(summary)).await?;
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

/// Returns at the deadline, if there is one.
pub(crate) async fn expired(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// The message that a call was accepted, or several where the list of shards is long, made one at a time.
fn started(mut whole: v1::ScoreStarted) -> impl Iterator<Item = v1::ScoreStarted> {
    let mut shards = std::mem::take(&mut whole.shards).into_iter().peekable();
    let mut first = true;
    std::iter::from_fn(move || {
        let (mut part, mut bytes) = (v1::ScoreStarted { shards: Vec::new(), ..whole.clone() }, 0);
        while let Some(shard) =
            shards.next_if(|shard| part.shards.is_empty() || bytes + shard.len() <= SHARDS_BYTES_MAX)
        {
            bytes += shard.len();
            part.shards.push(shard);
        }
        (std::mem::take(&mut first) || !part.shards.is_empty()).then_some(part)
    })
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
    for (status, rows) in &done.errors {
        *summary.errors.entry(status.clone()).or_default() += rows;
    }
    summary.rows += done.rows;
    summary.scored += done.scored;
    summary.failed += done.rows - done.scored;
    summary.shards += 1;
}
