//! Why a submission failed: who, which code, in whose words, and what to do.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::trials::{Name, words};

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
    /// Pairs that come with the call have no positions: a cut call could not go on.
    #[error("only shards can be submitted: send pairs by a call of ScoreBatch")]
    Pairs,
    /// The worker refused or failed, and asking again would not help.
    #[error("{endpoint} answers {}: {message}: {advice}", Name(*code))]
    Refused {
        /// The worker.
        endpoint: String,
        /// Its code.
        code: Code,
        /// Its words.
        message: String,
        /// What to do.
        advice: String,
    },
    /// Nothing answers at the endpoint.
    #[error("{endpoint} could not be reached for {patience:?}: {message}: check the address, and that the worker runs")]
    Unreachable {
        /// Where the worker should be.
        endpoint: String,
        /// How long it was tried.
        patience: Duration,
        /// What the last attempt met.
        message: String,
    },
    /// The worker answers, but nothing came of it for too long.
    #[error(
        "{endpoint} showed no sign of life for {patience:?}, its last answer is {}: {message}: see the worker's log, or \
         have more --patience",
        Name(*code)
    )]
    Lost {
        /// The worker.
        endpoint: String,
        /// How long it was tried.
        patience: Duration,
        /// Code of the last attempt.
        code: Code,
        /// Its words.
        message: String,
    },
    /// The worker accepts the call and is cut before it gets on, again and again.
    #[error(
        "{endpoint} was cut {attempts} times in a row without getting on, the last time with {}: {message}: see the \
         worker's log",
        Name(*code)
    )]
    Stuck {
        /// The worker.
        endpoint: String,
        /// Attempts that brought nothing.
        attempts: u32,
        /// Code of the last one.
        code: Code,
        /// Its words.
        message: String,
    },
    /// The worker's messages contradict each other.
    #[error("{endpoint} breaks the contract: {what}: is it a worker of this version?")]
    Contract {
        /// The worker.
        endpoint: String,
        /// How.
        what: &'static str,
    },
    /// What came could not be handed on; the call was cancelled.
    #[error("the scores cannot be handed on")]
    Output(#[source] std::io::Error),
}

/// What to do about a refusal, and by which name the worker's log knows the request.
pub(super) fn advice(status: &Status) -> String {
    let advice = match status.code() {
        Code::InvalidArgument => "change what it names and submit again",
        Code::NotFound => "check the name as the worker sees it, and that it was not removed meanwhile",
        Code::AlreadyExists => "choose another output, or have it overwritten",
        Code::PermissionDenied => "the worker opens only what it was started with --allow-uri for",
        Code::Unauthenticated => "give a token that the worker knows by --token-file",
        Code::FailedPrecondition => "mend what it names, then submit anew",
        Code::ResourceExhausted => "name fewer shards, or their prefix",
        Code::OutOfRange => "a message is larger than this client takes",
        Code::Aborted => "see what it names, then submit anew",
        Code::Unimplemented => "check that a capsieve worker is at this address, and its version",
        _ => "see the worker's log",
    };
    match status.get_details_request_info() {
        Some(info) if !info.request_id.is_empty() => format!("{advice} (request {})", info.request_id),
        _ => advice.to_owned(),
    }
}

/// The refusal of `status`.
pub(super) fn refused(endpoint: String, status: &Status) -> SubmitError {
    SubmitError::Refused { endpoint, code: status.code(), message: words(status), advice: advice(status) }
}
