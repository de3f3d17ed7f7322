//! Refusals as they leave the worker. Every request for a call has a name before anything of it is read; whatever it is refused
//! for, its client is told the name, and the log has it too.

use std::hash::{BuildHasher, Hasher, RandomState};

use http::Response;
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::status;

/// The worker's name for a call whose client has given it none, or none that is known yet. Travels in the request's extensions.
#[derive(Clone, Debug)]
pub(crate) struct CallName(pub(crate) String);

impl CallName {
    pub(crate) fn new() -> Self {
        // The standard library's source of random bits.
        Self(format!("{:016x}", RandomState::new().build_hasher().finish()))
    }
}

/// The answer, with all that a refusal must have; `call` is the name of a request for a call.
pub(crate) fn complete(mut answer: Response<Body>, call: Option<&CallName>) -> Response<Body> {
    // Only a refusal has its status here: that of a stream comes at its end.
    let Some(status) = Status::from_header_map(answer.headers()).filter(|status| status.code() != Code::Ok) else {
        return answer;
    };
    let status = status::of_transport(status);
    let status = match call {
        // One that has its name was logged where it got it.
        Some(CallName(name)) if status.get_details_request_info().is_none() => {
            let status = status::for_request(status, name);
            log(&status, name);
            status
        }
        _ => status,
    };
    // Over what is there; headers that say more, such as the encodings that are taken, stay.
    if let Err(error) = status.add_header(answer.headers_mut()) {
        tracing::warn!("a refusal has lost its words: {error}");
    }
    answer
}

fn log(status: &Status, request_id: &str) {
    let (code, why) = (status.code(), status.message());
    match code {
        // Whoever can connect could fill the disk.
        Code::Unauthenticated => tracing::debug!(request_id, ?code, "call refused: {why}"),
        _ => tracing::info!(request_id, ?code, "call refused: {why}"),
    }
}
