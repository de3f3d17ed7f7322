//! What a worker counts, in Prometheus' text format on `/metrics`. Behind the same tokens and certificates as everything
//! else, and with limits of its own: whoever can connect gets few connections, for a short time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::{IncomingStream, Listener};
use capsieve_worker::WorkerInfo;
use futures::StreamExt;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_stream::wrappers::ReceiverStream;

use crate::activity::{Activity, Kind, Patience};
use crate::listener::{self, Connection, Port};
use crate::serve::ServeError;
use crate::tls::{Protocol, Tls};
use crate::tokens::Tokens;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// How long each may stay.
const CONNECTION_LIFE: Duration = Duration::from_secs(60);
/// What Prometheus expects.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// Seconds: batches take milliseconds, shards minutes.
const SECONDS: [f64; 16] =
    [0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0];
/// Pairs of a batch.
const PAIRS: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 58.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

struct Endpoint {
    metrics: PrometheusHandle,
    tokens: Option<Arc<Tokens>>,
}

/// Who may see it, and by which means.
pub(crate) struct Access {
    pub(crate) tokens: Option<Arc<Tokens>>,
    pub(crate) tls: Option<Arc<Tls>>,
    /// Until a connection's first request that is answered.
    pub(crate) handshake_timeout: Duration,
}

/// Begins to count, and to answer on `listen`. Gives the address.
pub(crate) async fn start(listen: SocketAddr, access: Access) -> Result<SocketAddr, ServeError> {
    let refused = |source| ServeError::Listen { listen, source };
    let listener = listener::bind(listen).map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Full("capsieve_batch_pairs".to_owned()), &PAIRS));
    let metrics = builder.and_then(PrometheusBuilder::install_recorder).map_err(ServeError::Metrics)?;
    describe();
    let upkeep = metrics.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            upkeep.run_upkeep();
        }
    });
    let Access { tokens, tls, handshake_timeout } = access;
    let patience = Patience { first: handshake_timeout, idle: CONNECTION_LIFE, life: Some(CONNECTION_LIFE) };
    let port = Port { protocol: Protocol::Http1, tls, connections: CONNECTIONS_MAX, patience };
    let (_, connections) = listener::accept(listener, port);
    let routes = axum::Router::new().route("/metrics", get(answer)).with_state(Arc::new(Endpoint { metrics, tokens }));
    let routes = routes.into_make_service_with_connect_info::<Client>();
    tokio::spawn(async move {
        if let Err(error) = axum::serve(Clients { connections, address }, routes).await {
            tracing::error!("the metrics' endpoint failed: {error}");
        }
    });
    Ok(address)
}

/// Connections as axum takes them.
struct Clients {
    connections: ReceiverStream<std::io::Result<Connection>>,
    address: SocketAddr,
}

impl Listener for Clients {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            match self.connections.next().await {
                // Nothing here asks for the client's address.
                Some(Ok(connection)) => return (connection, self.address),
                Some(Err(error)) => tracing::debug!("a connection to the metrics failed: {error}"),
                None => std::future::pending().await,
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        Ok(self.address)
    }
}

#[derive(Clone)]
struct Client(Arc<Activity>);

impl Connected<IncomingStream<'_, Clients>> for Client {
    fn connect_info(stream: IncomingStream<'_, Clients>) -> Self {
        Self(stream.io().activity())
    }
}

async fn answer(
    State(endpoint): State<Arc<Endpoint>>,
    ConnectInfo(client): ConnectInfo<Client>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, StatusCode> {
    let known = |tokens: &Arc<Tokens>| tokens.accept(headers.get(header::AUTHORIZATION));
    if !endpoint.tokens.as_ref().is_none_or(known) {
        return Err(StatusCode::UNAUTHORIZED);
    }
    drop(client.0.accept(Kind::Other));
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], endpoint.metrics.render()))
}

fn describe() {
    metrics::describe_counter!("capsieve_pairs_scored_total", "captions scored");
    metrics::describe_counter!("capsieve_pairs_wasted_total", "captions scored for calls that were gone by then");
    metrics::describe_counter!("capsieve_rows_failed_total", "rows without a score, by reason");
    metrics::describe_histogram!("capsieve_batch_pairs", "captions of a batch");
    metrics::describe_histogram!("capsieve_stage_seconds", "time of a chunk of rows in a stage; engine: of a batch");
    metrics::describe_gauge!("capsieve_queue_depth", "rows that wait for an engine");
    metrics::describe_gauge!("capsieve_calls_in_flight", "calls that run");
    metrics::describe_gauge!("capsieve_build_info", "1, with what is served");
    // There from the start: a rate over what is missing is no number.
    metrics::counter!("capsieve_pairs_scored_total").increment(0);
    metrics::counter!("capsieve_pairs_wasted_total").increment(0);
    metrics::gauge!("capsieve_calls_in_flight").set(0.0);
    metrics::gauge!("capsieve_queue_depth", "queue" => "engine").set(0.0);
}

/// What is served.
pub(crate) fn build_info(info: &WorkerInfo) {
    let labels = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("model", info.hash.clone()),
        ("device", info.device.clone()),
        ("precision", info.precision.to_owned()),
    ];
    metrics::gauge!("capsieve_build_info", &labels).set(1.0);
}
