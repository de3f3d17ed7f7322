//! A call of a worker from the other side: sent again with the resume tokens whenever the stream is cut, until every row has
//! come exactly once.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use tonic::codec::CompressionEncoding;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use crate::v1;
use crate::v1::score_batch_request::Source;
use crate::v1::score_batch_response::Event;
use crate::v1::scoring_service_client::ScoringServiceClient;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A silent connection is asked for a sign of life this often: a worker that vanished is noticed.
const KEEPALIVE: Duration = Duration::from_secs(20);
const DELAY_MIN: Duration = Duration::from_millis(200);
const DELAY_MAX: Duration = Duration::from_secs(10);
/// Bytes of a message from the worker: a chunk has two million at most.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

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
    /// The request, without tokens.
    pub request: v1::ScoreBatchRequest,
    /// A cut stream is given up when nothing came for so long.
    pub patience: Duration,
}

/// Why a submission failed.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The endpoint is no address.
    #[error("{endpoint} is no endpoint: expected http://HOST:PORT or https://HOST:PORT")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// Why.
        source: tonic::transport::Error,
    },
    /// The token has characters that no header can carry.
    #[error("the bearer token has characters that cannot be sent")]
    Token,
    /// The worker refused or failed, and asking again would not help or did not.
    #[error("{endpoint} answers {}: {message}", name(*code))]
    Refused {
        /// The worker.
        endpoint: String,
        /// Its code.
        code: Code,
        /// Its words.
        message: String,
    },
}

/// Sends the request until the worker has answered it whole. `on` sees every message once.
///
/// # Errors
/// The worker refuses the request, or cannot be reached for as long as the submission has patience.
pub async fn submit(
    submission: &Submission,
    mut on: impl FnMut(&[String], &Event),
) -> Result<v1::ScoreSummary, SubmitError> {
    let mut client = client(submission)?;
    let (mut attempt, begun) = (Attempt::default(), Instant::now());
    let mut delays = delays();
    let mut alive = Instant::now();
    loop {
        let before = attempt.steps;
        let status = match attempt.once(&mut client, submission, &mut on).await {
            Ok(last) => {
                let seconds = begun.elapsed().as_secs_f64();
                return Ok(v1::ScoreSummary { seconds, ..attempt.total(submission.request.sink.is_some(), last) });
            }
            Err(status) => status,
        };
        if attempt.steps > before {
            (alive, delays) = (Instant::now(), self::delays());
        }
        if !retries(&status) || alive.elapsed() >= submission.patience {
            let (endpoint, message) = (submission.endpoint.clone(), status.message().to_owned());
            return Err(SubmitError::Refused { endpoint, code: status.code(), message });
        }
        let asked = status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or_default();
        let delay = delays.next().unwrap_or(DELAY_MAX).max(asked);
        tracing::warn!("{}: {}, again in {delay:.1?}", name(status.code()), status.message());
        tokio::time::sleep(delay).await;
    }
}

/// Delays between attempts: they grow, and differ between clients.
fn delays() -> backon::ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(DELAY_MIN)
        .with_max_delay(DELAY_MAX)
        .with_jitter()
        .without_max_times()
        .build()
}

/// What another attempt, perhaps on another worker, may mend.
fn retries(status: &Status) -> bool {
    let too_large = status.code() == Code::ResourceExhausted && status.get_details_retry_info().is_none();
    let transport =
        matches!(status.code(), Code::Unknown | Code::Internal) && status.get_details_error_info().is_none();
    matches!(status.code(), Code::Unavailable | Code::ResourceExhausted | Code::Cancelled) && !too_large || transport
}

/// What is known between attempts.
#[derive(Default)]
struct Attempt {
    /// The last token of each shard.
    tokens: HashMap<String, Vec<u8>>,
    /// Messages that brought the work on.
    steps: u64,
    /// What was streamed so far.
    counts: Counts,
    /// Shards that are done, as the attempt that did them says.
    done: HashMap<String, v1::ShardDone>,
}

impl Attempt {
    async fn once(
        &mut self,
        client: &mut ScoringServiceClient<Channel>,
        submission: &Submission,
        on: &mut impl FnMut(&[String], &Event),
    ) -> Result<v1::ScoreSummary, Status> {
        let mut request = submission.request.clone();
        if let Some(Source::Shards(shards)) = &mut request.source {
            shards.resume_tokens = self.tokens.values().map(|token| token.clone().into()).collect();
        }
        let mut request = Request::new(request);
        if let Some(token) = &submission.token {
            let value = AsciiMetadataValue::try_from(format!("Bearer {token}"));
            request.metadata_mut().insert("authorization", value.map_err(|_| Status::unauthenticated("bad token"))?);
        }
        let mut stream = client.score_batch(request).await?.into_inner();
        let mut shards = Vec::new();
        while let Some(message) = stream.message().await? {
            let Some(event) = message.event else { continue };
            if let Event::Started(started) = &event {
                shards.clone_from(&started.shards);
            }
            self.note(&shards, &event);
            match event {
                Event::Summary(summary) => return Ok(summary),
                event => on(&shards, &event),
            }
        }
        Err(Status::unavailable("the stream ended without a summary"))
    }

    fn note(&mut self, shards: &[String], event: &Event) {
        let (index, token) = match event {
            Event::Chunk(chunk) => {
                self.counts.add(chunk);
                (chunk.shard_index, &chunk.resume_token)
            }
            Event::ShardDone(done) => {
                self.counts.end_row();
                (done.shard_index, &done.resume_token)
            }
            _ => return,
        };
        self.steps += 1;
        let Some(uri) = shards.get(index as usize) else { return };
        if !token.is_empty() {
            self.tokens.insert(uri.clone(), token.to_vec());
        }
        if let Event::ShardDone(done) = event {
            // An attempt that finds the work done knows less than the one that did it.
            let first = self.done.entry(uri.clone()).or_insert_with(|| done.clone());
            if first.skipped {
                first.clone_from(done);
            }
        }
    }

    /// Over all attempts.
    fn total(self, sink: bool, last: v1::ScoreSummary) -> v1::ScoreSummary {
        let mut total =
            if sink { v1::ScoreSummary { pairs: last.pairs, ..Default::default() } } else { self.counts.summary };
        total.shards = last.shards;
        for done in self.done.into_values().filter(|_| sink) {
            total.rows += done.rows;
            total.scored += done.scored;
            total.failed += done.rows - done.scored;
            for (status, rows) in done.errors {
                *total.errors.entry(status).or_default() += rows;
            }
        }
        total
    }
}

/// Rows of the stream, whose entries may come in several chunks.
#[derive(Default)]
struct Counts {
    summary: v1::ScoreSummary,
    row: Option<OpenRow>,
}

struct OpenRow {
    shard: u32,
    row: u64,
    scored: bool,
    status: String,
}

impl Counts {
    fn add(&mut self, chunk: &v1::ScoreChunk) {
        let mut errors = chunk.errors.iter().peekable();
        for (i, row) in chunk.row.iter().enumerate() {
            let error = errors.next_if(|error| error.index as usize == i);
            if self.row.as_ref().is_none_or(|open| (open.shard, open.row) != (chunk.shard_index, *row)) {
                self.end_row();
                let status = error.map(|error| error.status.clone()).unwrap_or_default();
                self.row = Some(OpenRow { shard: chunk.shard_index, row: *row, scored: false, status });
            }
            if let Some(open) = self.row.as_mut().filter(|_| error.is_none()) {
                open.scored = true;
                self.summary.pairs += 1;
            }
        }
    }

    fn end_row(&mut self) {
        let Some(OpenRow { scored, status, .. }) = self.row.take() else { return };
        self.summary.rows += 1;
        if scored {
            self.summary.scored += 1;
        } else {
            self.summary.failed += 1;
            *self.summary.errors.entry(status).or_default() += 1;
        }
    }
}

fn client(submission: &Submission) -> Result<ScoringServiceClient<Channel>, SubmitError> {
    let bad = |source| SubmitError::Endpoint { endpoint: submission.endpoint.clone(), source };
    let endpoint = Endpoint::from_shared(submission.endpoint.clone()).map_err(bad)?;
    let mut endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    if submission.endpoint.starts_with("https://") {
        let mut tls = ClientTlsConfig::new();
        tls = match &submission.root {
            Some(root) => tls.ca_certificate(Certificate::from_pem(root)),
            None => tls.with_enabled_roots(),
        };
        if let Some((certificate, key)) = &submission.identity {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        endpoint = endpoint.tls_config(tls).map_err(bad)?;
    }
    if submission.token.as_ref().is_some_and(|token| AsciiMetadataValue::try_from(token.as_str()).is_err()) {
        return Err(SubmitError::Token);
    }
    let client = ScoringServiceClient::new(endpoint.connect_lazy())
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .accept_compressed(CompressionEncoding::Zstd);
    Ok(client)
}

/// "UNAVAILABLE", as people search for it.
fn name(code: Code) -> String {
    let words = format!("{code:?}");
    let mut name = String::new();
    for letter in words.chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}
