//! The options of `serve` and `submit`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::FalseyValueParser;
use clap::{ArgAction, Args as Group};

use super::{ColumnArgs, EngineArgs, FetchArgs, Head, OutputArgs, Token, caption_tokens, number, pixels};

#[derive(Debug, Group)]
pub(crate) struct ServeArgs {
    /// A checkpoint folder, a bucket's prefix (s3://bucket/model/), a hub id, or synthetic:tiny|base|large[:SEED]
    #[arg(long, env = "CAPSIEVE_MODEL")]
    pub(crate) model: String,
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, env = "CAPSIEVE_LISTEN", value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    pub(crate) listen: SocketAddr,
    /// Address and port of the metrics in Prometheus' format; without it there are none
    #[arg(long, env = "CAPSIEVE_METRICS_LISTEN", value_name = "HOST:PORT")]
    pub(crate) metrics_listen: Option<SocketAddr>,
    /// OpenTelemetry collector that takes traces by OTLP over gRPC, such as http://localhost:4317
    #[arg(long, env = "CAPSIEVE_OTLP_ENDPOINT", value_name = "URL")]
    pub(crate) otlp_endpoint: Option<String>,
    /// Folder, or prefix of a bucket, that calls may read and write below; repeatable, and a comma separates them; without it
    /// only images that come with a call are scored
    #[arg(long, env = "CAPSIEVE_ALLOW_URI", value_name = "PREFIX", value_delimiter = ',')]
    pub(crate) allow_uri: Vec<String>,
    /// File of bearer tokens, one a line; without it everybody who can connect may call
    #[arg(long, env = "CAPSIEVE_TOKEN_FILE", value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Answers health checks without a token
    #[arg(long, env = "CAPSIEVE_OPEN_HEALTH", value_parser = FalseyValueParser::new(), action = ArgAction::SetTrue)]
    pub(crate) open_health: bool,
    /// PEM of the certificate and those that lead to its root: turns TLS on; read again when it changes
    #[arg(long, env = "CAPSIEVE_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// PEM of the certificate's key
    #[arg(long, env = "CAPSIEVE_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// PEM of the roots of the clients' certificates: clients without one are refused
    #[arg(long, env = "CAPSIEVE_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_client_ca: Option<PathBuf>,
    /// Calls at a time; more are told to come again
    #[arg(long, env = "CAPSIEVE_MAX_CALLS", value_name = "N", default_value_t = 64, value_parser = calls)]
    pub(crate) max_calls: usize,
    /// Bytes of a request
    #[arg(long, env = "CAPSIEVE_MAX_MESSAGE_BYTES", value_name = "N", default_value_t = 16 << 20, value_parser = message_bytes)]
    pub(crate) max_message_bytes: usize,
    /// Connections at a time; more wait
    #[arg(long, env = "CAPSIEVE_MAX_CONNECTIONS", value_name = "N", default_value_t = 1024, value_parser = connections)]
    pub(crate) max_connections: usize,
    /// Seconds in which a connection must show a client: a TLS handshake, the opening of HTTP/2, a request that is accepted
    #[arg(long, env = "CAPSIEVE_HANDSHAKE_TIMEOUT", value_name = "SECONDS", default_value_t = 10.0, value_parser = some_seconds)]
    pub(crate) handshake_timeout: f64,
    /// Seconds after which a connection without a request in flight is closed
    #[arg(long, env = "CAPSIEVE_IDLE_TIMEOUT", value_name = "SECONDS", default_value_t = 600.0, value_parser = some_seconds)]
    pub(crate) idle_timeout: f64,
    /// Seconds in which a call's request must have arrived
    #[arg(long, env = "CAPSIEVE_REQUEST_TIMEOUT", value_name = "SECONDS", default_value_t = 120.0, value_parser = some_seconds)]
    pub(crate) request_timeout: f64,
    /// Seconds after which a silent connection is asked for a sign of life, and closed if none comes in as many
    #[arg(long, env = "CAPSIEVE_KEEPALIVE", value_name = "SECONDS", default_value_t = 30.0, value_parser = some_seconds)]
    pub(crate) keepalive: f64,
    /// Connections are closed when their calls are over and they are this old; 0: never
    #[arg(long, env = "CAPSIEVE_MAX_CONNECTION_AGE", value_name = "SECONDS", default_value_t = 0.0, value_parser = any_seconds)]
    pub(crate) max_connection_age: f64,
    /// Seconds after which a call is ended whose client takes nothing; 0: never
    #[arg(long, env = "CAPSIEVE_STALL_TIMEOUT", value_name = "SECONDS", default_value_t = 900.0, value_parser = any_seconds)]
    pub(crate) stall_timeout: f64,
    /// Bytes that all calls hold together beside the model and the requests: half for rows, a quarter for row groups that are
    /// read, the rest for outputs and names of shards
    #[arg(long, env = "CAPSIEVE_MEMORY_LIMIT", value_name = "BYTES", default_value_t = 4 << 30, value_parser = memory)]
    pub(crate) memory_limit: u64,
    /// How long a pair waits for others to share its batch with, in milliseconds
    #[arg(long, env = "CAPSIEVE_BATCH_LATENCY_MS", value_name = "MS", default_value_t = 20, value_parser = milliseconds)]
    pub(crate) batch_latency_ms: usize,
    /// Seconds between two messages about a call's progress
    #[arg(long, env = "CAPSIEVE_PROGRESS_INTERVAL", value_name = "SECONDS", default_value_t = 5.0, value_parser = some_seconds)]
    pub(crate) progress_interval: f64,
    /// Seconds that running calls have to end when the worker is told to
    #[arg(long, env = "CAPSIEVE_DRAIN_TIMEOUT", value_name = "SECONDS", default_value_t = 30.0, value_parser = any_seconds)]
    pub(crate) drain_timeout: f64,
    /// Scores that calls may ask for
    #[arg(long, env = "CAPSIEVE_HEADS", value_delimiter = ',', default_value = "itm,cosine")]
    pub(crate) heads: Vec<Head>,
    /// First token of the matching head: cls as transformers, enc as the published weights were trained
    #[arg(long, env = "CAPSIEVE_ITM_TOKEN", value_name = "TOKEN", default_value = "cls")]
    pub(crate) itm_token: Token,
    /// Cuts longer captions to N tokens, the first and last marker included, instead of refusing them
    #[arg(long, env = "CAPSIEVE_MAX_CAPTION_TOKENS", value_name = "N", value_parser = caption_tokens)]
    pub(crate) max_caption_tokens: Option<usize>,
    /// Images with more pixels are refused before they are decoded
    #[arg(long, env = "CAPSIEVE_MAX_IMAGE_PIXELS", value_name = "N", value_parser = pixels,
          default_value_t = capsieve_worker::limits::IMAGE_PIXELS_MAX)]
    pub(crate) max_image_pixels: u64,
    #[command(flatten)]
    pub(crate) fetches: FetchArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Debug, Group)]
pub(crate) struct SubmitArgs {
    /// The worker: http://HOST:PORT or https://HOST:PORT
    #[arg(long, env = "CAPSIEVE_ENDPOINT", value_name = "URL")]
    pub(crate) endpoint: String,
    /// Shards, or prefixes that end in '/', as the worker sees them
    #[arg(long, env = "CAPSIEVE_INPUT", value_name = "URI", required = true, num_args = 1..)]
    pub(crate) input: Vec<String>,
    /// Where the worker writes scored shards: a prefix that ends in '/', or one object; without it scores come back as lines of JSON
    #[arg(long, env = "CAPSIEVE_OUTPUT", value_name = "URI")]
    pub(crate) output: Option<String>,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
    /// Scores to compute; without it all that the worker has
    #[arg(long, env = "CAPSIEVE_HEADS", value_delimiter = ',')]
    pub(crate) heads: Vec<Head>,
    #[command(flatten)]
    pub(crate) output_rows: OutputArgs,
    /// Name of the job in the worker's logs
    #[arg(long, env = "CAPSIEVE_REQUEST_ID", value_name = "NAME", default_value = "")]
    pub(crate) request_id: String,
    /// File with the bearer token: its first line that is not blank or a comment
    #[arg(long, env = "CAPSIEVE_TOKEN_FILE", value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// PEM of the root that the worker's certificate leads to, if it is none of the system's
    #[arg(long, env = "CAPSIEVE_TLS_CA", value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// PEM of our own certificate, for workers that ask for one
    #[arg(long, env = "CAPSIEVE_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// PEM of its key
    #[arg(long, env = "CAPSIEVE_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Seconds without a sign of life (progress, scores, a shard that is done) after which the job is given up
    #[arg(long, env = "CAPSIEVE_PATIENCE", value_name = "SECONDS", default_value_t = 300.0, value_parser = any_seconds)]
    pub(crate) patience: f64,
}

fn calls(text: &str) -> Result<usize, String> {
    number(text, 1, 10_000)
}

fn connections(text: &str) -> Result<usize, String> {
    number(text, 1, 1_000_000)
}

/// 1 KiB to what tonic can decode.
fn message_bytes(text: &str) -> Result<usize, String> {
    number(text, 1 << 10, 1 << 30)
}

pub(super) fn memory(text: &str) -> Result<u64, String> {
    number(text, 64 << 20, 1 << 46).map(|bytes| bytes as u64)
}

fn milliseconds(text: &str) -> Result<usize, String> {
    number(text, 0, 60_000)
}

fn some_seconds(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.01..=1e7).contains(number));
    number.ok_or_else(|| "expected a number of seconds, at least 0.01".to_owned())
}

fn any_seconds(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=1e7).contains(number));
    number.ok_or_else(|| "expected a number of seconds".to_owned())
}
