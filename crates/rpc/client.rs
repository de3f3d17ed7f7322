//! A call of a worker from the other side: sent again for what is left whenever the stream is cut, until every row has come
//! exactly once.
//!
//! `work.rs` knows what is left and counts what came, `trials.rs` says whether and when another attempt is worth it, and
//! `error.rs` what a person reads when none is.

mod connection;
mod counts;
mod error;
mod trials;
mod work;

use std::time::Duration;

use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status};

pub use error::SubmitError;

use self::trials::{Name, Trials, words};
use self::work::Work;
use crate::v1;
use crate::v1::score_batch_response::Event;
use crate::v1::scoring_service_client::ScoringServiceClient;

/// What to send to whom.
#[derive(Clone, Debug)]
pub struct Submission {
    /// `http://host:port` or `https://host:port`.
    pub endpoint: String,
    /// PEM of the root that the worker's certificate leads to; none: the system's.
    pub root: Option<Vec<u8>>,
    /// PEM of our own certificate and key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
    /// Bearer token.
    pub token: Option<String>,
    /// The request, of shards, without resume tokens.
    pub request: v1::ScoreBatchRequest,
    /// The work is given up when no sign of life (progress, scores, a shard that is done) came for so long.
    pub patience: Duration,
    /// Longest pause between two attempts; [`Submission::DELAY_MAX`] unless there is a reason.
    pub delay_max: Duration,
}

impl Submission {
    /// Long enough that a worker that restarts is not stormed, short enough that nobody waits for nothing.
    pub const DELAY_MAX: Duration = Duration::from_secs(10);
}

/// A message of the worker, and what it comes to.
#[derive(Debug)]
pub struct Update<'a> {
    /// The shards of this attempt: what the event's `shard_index` points into.
    pub shards: &'a [String],
    /// The message; summaries are not shown.
    pub event: &'a Event,
    /// How far the work is, over all attempts: its numbers never fall.
    pub so_far: v1::ScoreProgress,
}

/// Sends the request until the worker has answered it whole. `on` sees every message once; its error ends the call.
///
/// The summary is over all attempts, each row counted once. `pairs` is exact where scores are streamed; with a sink it is
/// what the worker said of shards that it finished: a cut may lose the pairs scored since its last progress message before
/// that shard's end.
///
/// # Errors
/// The worker refuses the request, shows no sign of life for as long as the submission has patience, or is cut again and
/// again without getting on; or `on` fails.
pub async fn submit(
    submission: &Submission,
    mut on: impl FnMut(&Update<'_>) -> std::io::Result<()>,
) -> Result<v1::ScoreSummary, SubmitError> {
    let mut client = connection::client(submission)?;
    let mut work = Work::new(&submission.request)?;
    let mut trials = Trials::new(submission);
    while let Some(request) = work.rest() {
        let status = match once(&mut client, submission, request, (&mut work, &mut trials), &mut on).await {
            Ok(()) => continue,
            Err(End::Final(error)) => return Err(error),
            Err(End::Cut(status)) => status,
        };
        if work.splits(&status) {
            continue;
        }
        let delay = trials.again(&status)?;
        let (code, words) = (Name(status.code()), words(&status));
        tracing::warn!("{}: {code}: {words}, again in {delay:.1?}", submission.endpoint);
        tokio::time::sleep(delay).await;
    }
    Ok(work.total(trials.begun()))
}

/// Why an attempt is over before its summary.
enum End {
    /// Perhaps another one goes on.
    Cut(Status),
    /// None would.
    Final(SubmitError),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Cut(status)
    }
}

/// One call, to its summary.
async fn once(
    client: &mut ScoringServiceClient<Channel>,
    submission: &Submission,
    request: v1::ScoreBatchRequest,
    (work, trials): (&mut Work, &mut Trials),
    on: &mut impl FnMut(&Update<'_>) -> std::io::Result<()>,
) -> Result<(), End> {
    let violation = |what| End::Final(SubmitError::Contract { endpoint: submission.endpoint.clone(), what });
    let mut request = Request::new(request);
    if let Some(token) = &submission.token {
        let value = AsciiMetadataValue::try_from(format!("Bearer {token}"));
        request.metadata_mut().insert("authorization", value.map_err(|_| End::Final(SubmitError::Token))?);
    }
    trials.begin();
    let mut stream = client.score_batch(request).await?.into_inner();
    trials.accepted();
    while let Some(message) = stream.message().await? {
        let Some(event) = message.event else { continue };
        let step = work.take(&event).map_err(violation)?;
        if matches!(event, Event::Summary(_)) {
            return Ok(());
        }
        let update = Update { shards: work.listed(), event: &event, so_far: work.so_far() };
        on(&update).map_err(|error| End::Final(SubmitError::Output(error)))?;
        // Behind `on`: a reader that makes us wait is no silence of the worker's.
        trials.seen(&event, step);
    }
    Err(End::Cut(Status::unavailable("the stream ended without a summary")))
}
