//! A worker's life on the network: listen, load, serve, drain.
//!
//! ```text
//! Loading --model loaded and warm--> Serving --SIGTERM--> Draining --calls over, or --drain-timeout--> Cut --> end
//! ```
//!
//! Health says SERVING in the phase of that name only. Draining takes no new calls; Cut ends those that still run with
//! UNAVAILABLE, and their clients go on elsewhere by their resume tokens.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use capsieve_worker::Worker;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tonic::codec::CompressionEncoding;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::activity::Patience;
use crate::arrivals::Arrivals;
use crate::body::MESSAGE_HEAD_BYTES;
use crate::gate::{Admission, Gate};
use crate::listener::{self, Port};
use crate::service::Scoring;
use crate::tls::{Protocol, Tls, TlsError, TlsFiles};
use crate::tokens::Tokens;
use crate::v1;
use crate::v1::scoring_service_server::ScoringServiceServer;

const SERVICE: &str = "capsieve.v1.ScoringService";
/// Streams of a connection: more calls than a worker takes would be refused anyway.
const STREAMS_MAX: u32 = 256;
/// Requests of calls that arrive at a time, for each call that may run.
const ARRIVING_PER_CALL: usize = 4;
/// Bytes of a request's headers.
const HEADERS_BYTES_MAX: u32 = 16 << 10;
/// Resets of streams that a connection may have in its books, against rapid resets.
const RESETS_MAX: usize = 32;
/// For the last messages of calls that were cut.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Where a worker is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The model is not there yet.
    Loading,
    /// Calls are taken.
    Serving,
    /// Calls are finished, none is taken.
    Draining,
    /// Calls that still run are ended.
    Cut,
}

/// What clients may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Calls at a time.
    pub calls: usize,
    /// Bytes of a request.
    pub message_bytes: usize,
    /// Connections at a time.
    pub connections: usize,
    /// A connection without a request that was accepted by then is closed.
    pub handshake_timeout: Duration,
    /// A connection without a request in flight for so long is closed.
    pub idle_timeout: Duration,
    /// A request that has not arrived by then is refused.
    pub request_timeout: Duration,
    /// A silent connection is asked for a sign of life this often, and closed without one.
    pub keepalive: Duration,
    /// A connection is closed when its calls are over and it is this old; none: never.
    pub connection_age: Option<Duration>,
    /// A call whose client takes nothing for so long is ended; none: never.
    pub stall_timeout: Option<Duration>,
    /// Between two messages about a call's progress.
    pub progress_interval: Duration,
    /// Calls that run when the worker is told to end may go on for so long.
    pub drain_timeout: Duration,
}

/// What a worker is served with.
#[derive(Debug)]
pub struct ServeOptions {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// Address of the metrics; none: nothing is counted.
    pub metrics: Option<SocketAddr>,
    /// What clients may take.
    pub limits: Limits,
    /// Who may call; none: everybody who can connect.
    pub tokens: Option<Tokens>,
    /// Lets health checks through without a token.
    pub open_health: bool,
    /// Certificates; none: no encryption.
    pub tls: Option<TlsFiles>,
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {listen}")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Metrics cannot be counted.
    #[error("the metrics cannot be counted")]
    Metrics(metrics_exporter_prometheus::BuildError),
    /// The TLS files cannot be used.
    #[error("TLS")]
    Tls(#[from] TlsError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Load(#[from] capsieve_worker::Error),
    /// The server failed.
    #[error("the server failed")]
    Server(#[from] tonic::transport::Error),
    /// An engine broke down; running calls were ended.
    #[error("an engine broke down, its own message stands above: start the worker again")]
    EngineGone,
    /// A task of the server panicked.
    #[error("the server broke down, this is a bug")]
    Task(#[from] tokio::task::JoinError),
}

/// Serves a worker until `stop` returns and its calls are over; when it returns again, they are ended. `load` opens and
/// starts the worker; `listening` is told the address before, so that health checks are answered meanwhile.
///
/// # Errors
/// The address, the files or the model cannot be used, or an engine broke down.
pub async fn serve(
    options: ServeOptions,
    load: impl Future<Output = Result<Arc<Worker>, ServeError>>,
    stop: impl AsyncFn(),
    listening: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    let ServeOptions { listen, metrics, limits, tokens, open_health, tls } = options;
    let (tokens, tls) = (tokens.map(Arc::new), tls.as_ref().map(Tls::open).transpose()?);
    let refused = |source| ServeError::Listen { listen, source };
    let listener = listener::bind(listen).map_err(refused)?;
    if let Some(listen) = metrics {
        count(listen, &limits, tokens.clone(), tls.clone()).await?;
    }
    listening(listener.local_addr().map_err(refused)?);
    let (phase, phases) = watch::channel(Phase::Loading);
    let (worker, calls) = (Arc::new(OnceLock::new()), Arc::new(Semaphore::new(limits.calls)));
    let admission = Admission { calls: Arc::clone(&calls), phase: phases.clone() };
    let health = HealthReporter::new();
    set_health(&health, ServingStatus::NotServing).await;
    let mut tasks = renewing(tokens.clone(), tls.clone());
    let (accepting, connections) = listener::accept(listener, port(&limits, tls));
    tasks.push(accepting);
    let gate = gate(&limits, tokens, open_health, admission.clone());
    let scoring = Scoring { worker: Arc::clone(&worker), limits: limits.clone(), phase: phases.clone(), admission };
    let mut over = phases.clone();
    let shutdown = async move { drop(over.wait_for(|phase| *phase == Phase::Cut).await) };
    let router = router(&limits, gate, health.clone(), scoring);
    let mut server = tokio::spawn(router.serve_with_incoming_shutdown(connections, shutdown));
    let ended = async {
        let loaded = tokio::select! {
            // First, so that a signal is heard from the start.
            biased;
            () = stop() => return Ok(()),
            loaded = load => loaded?,
        };
        crate::metrics::build_info(loaded.info());
        let broken = Arc::clone(&loaded);
        drop(worker.set(loaded));
        phase.send_replace(Phase::Serving);
        set_health(&health, ServingStatus::Serving).await;
        tracing::info!("serving");
        tokio::select! {
            () = stop() => {}
            () = broken.broke_down() => return Err(ServeError::EngineGone),
            ended = &mut server => return ended?.map_err(ServeError::Server),
        }
        set_health(&health, ServingStatus::NotServing).await;
        phase.send_replace(Phase::Draining);
        drain(&limits, &calls, stop).await;
        Ok(())
    };
    let ended = ended.await;
    phase.send_replace(Phase::Cut);
    tasks.into_iter().for_each(|task| task.abort());
    if !server.is_finished() && tokio::time::timeout(LAST_WORDS, &mut server).await.is_err() {
        server.abort();
    }
    ended
}

async fn count(
    listen: SocketAddr,
    limits: &Limits,
    tokens: Option<Arc<Tokens>>,
    tls: Option<Arc<Tls>>,
) -> Result<(), ServeError> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let access = crate::metrics::Access { tokens, tls, handshake_timeout: limits.handshake_timeout };
    let address = crate::metrics::start(listen, access).await?;
    tracing::info!("metrics on {scheme}://{address}/metrics");
    Ok(())
}

/// Tasks that look at files which may change.
fn renewing(tokens: Option<Arc<Tokens>>, tls: Option<Arc<Tls>>) -> Vec<JoinHandle<()>> {
    let tokens = tokens.map(|tokens| tokio::spawn(async move { tokens.renew().await }));
    let tls = tls.map(|tls| tokio::spawn(async move { tls.renew().await }));
    tokens.into_iter().chain(tls).collect()
}

fn port(limits: &Limits, tls: Option<Arc<Tls>>) -> Port {
    let patience = Patience { first: limits.handshake_timeout, idle: limits.idle_timeout, life: None };
    Port { protocol: Protocol::Http2, tls, connections: limits.connections, patience }
}

fn gate(limits: &Limits, tokens: Option<Arc<Tokens>>, open_health: bool, admission: Admission) -> Gate {
    let arriving = limits.calls.saturating_mul(ARRIVING_PER_CALL);
    let bytes = limits.calls.saturating_mul(limits.message_bytes + MESSAGE_HEAD_BYTES);
    Gate {
        tokens,
        open_health,
        admission,
        arrivals: Arrivals::new(arriving, bytes),
        request_timeout: limits.request_timeout,
        message_bytes: limits.message_bytes,
    }
}

/// Waits for the calls that run, no longer than is allowed.
async fn drain(limits: &Limits, calls: &Semaphore, stop: impl AsyncFn()) {
    tracing::info!("draining: {} calls are running", limits.calls - calls.available_permits());
    let all = u32::try_from(limits.calls).unwrap_or(u32::MAX);
    tokio::select! {
        _ = calls.acquire_many(all) => {}
        () = tokio::time::sleep(limits.drain_timeout) => {
            tracing::warn!("--drain-timeout is over: the calls that still run are ended");
        }
        () = stop() => tracing::warn!("told to end again: the calls that still run are ended"),
    }
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    // "" is the whole server; tonic would call it serving from the start.
    for service in ["", SERVICE] {
        health.set_service_status(service, status).await;
    }
}

fn router(
    limits: &Limits,
    gate: Gate,
    health: HealthReporter,
    scoring: Scoring,
) -> tonic::transport::server::Router<tower::layer::util::Stack<Gate, tower::layer::util::Identity>> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let health = tonic_health::pb::health_server::HealthServer::new(
        tonic_health::server::HealthService::from_health_reporter(health),
    );
    let scoring = ScoringServiceServer::new(scoring)
        .max_decoding_message_size(limits.message_bytes)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Zstd)
        .send_compressed(CompressionEncoding::Zstd)
        .send_compressed(CompressionEncoding::Gzip);
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(limits.keepalive))
        .http2_keepalive_timeout(Some(limits.keepalive))
        .http2_max_header_list_size(HEADERS_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
        .max_concurrent_streams(STREAMS_MAX);
    if let Some(age) = limits.connection_age {
        server = server.max_connection_age(age);
    }
    server
        .layer(gate)
        .add_service(health)
        .add_service(reflection().build_v1().expect("the descriptors were made with this program"))
        // What Python's client and older tools ask for.
        .add_service(reflection().build_v1alpha().expect("the descriptors were made with this program"))
        .add_service(scoring)
}
