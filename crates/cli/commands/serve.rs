//! `capsieve serve`.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use capsieve_rpc::{Limits, ServeError, ServeOptions, TlsFiles, Tokens};
use capsieve_worker::{Access, CaptionPolicy, EngineChoice, LoadedModel, Worker, WorkerOptions};

use super::terminated;
use crate::args::{ServeArgs, heads};

/// Buffers of so many bytes are the system's again when they are dropped: a worker lives for days.
const LARGE_BYTES: usize = 1 << 20;

pub(super) async fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    capsieve_worker::give_large_buffers_back(LARGE_BYTES);
    let access = Access::only(&args.allow_uri)?;
    let tokens = args.token_file.as_deref().map(|path| Tokens::open(path).with_context(|| path.display().to_string()));
    let tls = args.tls_cert.clone().zip(args.tls_key.clone());
    let options = ServeOptions {
        listen: args.listen,
        metrics: args.metrics_listen,
        limits: limits(&args),
        tokens: tokens.transpose()?,
        open_health: args.open_health,
        tls: tls.map(|(certificate, key)| TlsFiles { certificate, key, client_roots: args.tls_client_ca.clone() }),
    };
    if access.is_nothing() {
        tracing::info!("only images that come with a call are scored: --allow-uri PREFIX opens storage");
    }
    if options.tokens.is_none() && !args.listen.ip().is_loopback() {
        tracing::warn!("everybody who can reach {} may call: --token-file FILE asks for a token", args.listen);
    }
    let load = load(args, access);
    capsieve_rpc::serve(options, load, terminated, |address| tracing::info!("listening on {address}")).await?;
    Ok(ExitCode::SUCCESS)
}

/// Opens the model, from the hub if need be, and starts the worker. Health checks are answered meanwhile.
async fn load(args: ServeArgs, access: Access) -> Result<Arc<Worker>, ServeError> {
    let model = LoadedModel::open(&args.model).await?;
    model.notes.iter().for_each(|note| tracing::warn!("{note}"));
    let options = WorkerOptions {
        heads: heads(&args.heads),
        itm_token: args.itm_token.into(),
        policy: CaptionPolicy { tokens_max: args.max_caption_tokens, image_pixels_max: args.max_image_pixels },
        engine: EngineChoice { fetches_per_host: args.fetches.fetches_per_host, ..args.engine.into() },
        latency: Duration::from_millis(args.batch_latency_ms as u64),
        memory_bytes: args.memory_limit,
        access,
    };
    Ok(tokio::task::spawn_blocking(move || Worker::start(&model, options)).await??)
}

fn limits(args: &ServeArgs) -> Limits {
    Limits {
        calls: args.max_calls,
        message_bytes: args.max_message_bytes,
        connections: args.max_connections,
        handshake_timeout: Duration::from_secs_f64(args.handshake_timeout),
        request_timeout: Duration::from_secs_f64(args.request_timeout),
        idle_timeout: Duration::from_secs_f64(args.idle_timeout),
        keepalive: Duration::from_secs_f64(args.keepalive),
        connection_age: (args.max_connection_age > 0.0).then(|| Duration::from_secs_f64(args.max_connection_age)),
        stall_timeout: (args.stall_timeout > 0.0).then(|| Duration::from_secs_f64(args.stall_timeout)),
        progress_interval: Duration::from_secs_f64(args.progress_interval.max(0.01)),
        drain_timeout: Duration::from_secs_f64(args.drain_timeout),
    }
}
