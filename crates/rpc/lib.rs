//! The worker over gRPC: the service, its client, and what stands between a network and a worker: credentials, limits, TLS,
//! draining. Thin: what a call does is the worker's business.
//!
//! ```text
//! socket -> Listener (TLS, connections) -> Gate (token, arrivals, deadline) -> Codec (size in memory)
//!        -> Scoring (a call's place; request -> call -> messages) -> worker
//! ```
//!
//! One table says which error becomes which status: [`status`].
#![forbid(unsafe_code)]

mod activity;
mod arrivals;
mod body;
mod chunks;
mod client;
mod codec;
mod deadline;
mod gate;
mod listener;
mod metrics;
mod outbox;
mod places;
mod refusal;
mod request;
mod serve;
mod service;
pub mod status;
mod stream;
mod tls;
mod tokens;
mod trace;

pub use client::{Submission, SubmitError, Update, submit};
pub use serve::{Limits, Phase, ServeError, ServeOptions, serve};
pub use tls::TlsFiles;
pub use tokens::{Tokens, token_lines};
pub use trace::Traces;

/// The contract, generated from `proto/capsieve/v1/scoring.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated; the contract holds the words"
)]
pub mod v1 {
    tonic::include_proto!("capsieve.v1");

    /// The contract's descriptors, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
