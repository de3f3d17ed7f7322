//! Whether another attempt is worth it, and when.

use std::error::Error;
use std::fmt;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::error::refused;
use super::{Submission, SubmitError};
use crate::v1::score_batch_response::Event;

const DELAY_MIN: Duration = Duration::from_millis(200);
/// Attempts in a row that a worker accepted and that brought no step: each may have shown life, so patience does not end them.
const ATTEMPTS_MAX: u32 = 20;

/// The attempts so far.
pub(super) struct Trials {
    endpoint: String,
    patience: Duration,
    delay_max: Duration,
    delays: ExponentialBackoff,
    begun: Instant,
    /// The last sign of life.
    alive: Instant,
    /// Something answered since then, be it a refusal.
    answered: bool,
    /// Accepted attempts in a row without a step.
    fruitless: u32,
    this: Attempt,
}

/// What the running attempt brought.
#[derive(Default)]
struct Attempt {
    accepted: bool,
    lived: bool,
    stepped: bool,
}

impl Trials {
    pub(super) fn new(submission: &Submission) -> Self {
        let Submission { endpoint, patience, delay_max, .. } = submission.clone();
        let (begun, this) = (Instant::now(), Attempt::default());
        let delays = delays(delay_max);
        Self { endpoint, patience, delay_max, delays, begun, alive: begun, answered: false, fruitless: 0, this }
    }

    /// When the first attempt began.
    pub(super) fn begun(&self) -> Instant {
        self.begun
    }

    pub(super) fn begin(&mut self) {
        self.this = Attempt::default();
    }

    /// The worker takes the call.
    pub(super) fn accepted(&mut self) {
        self.this.accepted = true;
    }

    /// A message came; `step` says that it brought the work on.
    pub(super) fn seen(&mut self, event: &Event, step: bool) {
        // An accepted call is no life yet: a worker may accept, and die of it, for ever.
        if matches!(event, Event::Started(_)) {
            return;
        }
        (self.alive, self.answered, self.this.lived) = (Instant::now(), false, true);
        if step {
            (self.fruitless, self.delays, self.this.stepped) = (0, delays(self.delay_max), true);
        }
    }

    /// How long to wait after an attempt that ended with `status`, or why there is none more.
    pub(super) fn again(&mut self, status: &Status) -> Result<Duration, SubmitError> {
        let transport = is_transport(status);
        self.answered |= !self.this.lived && (self.this.accepted || !transport);
        self.fruitless += u32::from(self.this.accepted && !self.this.stepped);
        let (endpoint, code, message) = (self.endpoint.clone(), status.code(), words(status));
        if !retries(status) {
            return Err(refused(endpoint, status));
        }
        if self.fruitless >= ATTEMPTS_MAX {
            return Err(SubmitError::Stuck { endpoint, attempts: self.fruitless, code, message });
        }
        let patience = self.patience;
        let left = patience.saturating_sub(self.alive.elapsed());
        if left.is_zero() {
            return Err(match transport && !self.answered && !self.this.accepted {
                true => SubmitError::Unreachable { endpoint, patience, message },
                false => SubmitError::Lost { endpoint, patience, code, message },
            });
        }
        let asked = status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or_default();
        // The last attempt is made when patience ends, not later.
        Ok(self.delays.next().unwrap_or(self.delay_max).max(asked).min(left))
    }
}

/// Delays between attempts: they grow, and differ between clients.
fn delays(max: Duration) -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(DELAY_MIN.min(max))
        .with_max_delay(max)
        .with_jitter()
        .without_max_times()
        .build()
}

/// What another attempt, perhaps on another worker, may mend: the contract's table, and what lies between us and a worker
/// (a refused or lost connection, a proxy's own answer).
pub(super) fn retries(status: &Status) -> bool {
    let ours = status.get_details_error_info().is_some();
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded => true,
        // Without a delay the message is too large, unless it is HTTP/2 that asks for calm.
        Code::ResourceExhausted => status.get_details_retry_info().is_some() || is_transport(status),
        // What a worker says of itself has an ErrorInfo; without one it is a broken stream or a proxy in trouble.
        Code::Unknown | Code::Internal => !ours,
        _ => false,
    }
}

/// The request is larger than the worker takes.
pub(super) fn is_too_large(status: &Status) -> bool {
    status.code() == Code::ResourceExhausted && !retries(status)
}

/// The connection failed: no answer of anybody's.
fn is_transport(status: &Status) -> bool {
    status.source().is_some() || status.message().starts_with("Service was not ready")
}

/// The words of a status, and what lies below a failed connection.
pub(super) fn words(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = status.source();
    while let Some(inner) = source {
        let words = inner.to_string();
        if !text.contains(&words) {
            text = if text.is_empty() { words } else { format!("{text}: {words}") };
        }
        source = inner.source();
    }
    if text.is_empty() { "it gives no reason".to_owned() } else { text.replace(['\n', '\r'], " ") }
}

/// "UNAVAILABLE", as people search for it.
pub(super) struct Name(pub(super) Code);

impl fmt::Display for Name {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, letter) in format!("{:?}", self.0).chars().enumerate() {
            let gap = if i > 0 && letter.is_uppercase() { "_" } else { "" };
            write!(out, "{gap}{}", letter.to_ascii_uppercase())?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;
    use crate::status;

    #[test]
    fn attempts_follow_the_contract_s_table() {
        let ours = |code| status::with_reason(code, "REASON", "words");
        for (status, again) in [
            (ours(Code::InvalidArgument), false),
            (ours(Code::NotFound), false),
            (ours(Code::AlreadyExists), false),
            (ours(Code::PermissionDenied), false),
            (ours(Code::Unauthenticated), false),
            (ours(Code::FailedPrecondition), false),
            (ours(Code::Aborted), false),
            (ours(Code::Internal), false),
            (ours(Code::DeadlineExceeded), true),
            (ours(Code::Unavailable), true),
            (Status::cancelled("the client went away"), true),
            (status::exhausted("many calls"), true),
            (status::too_large("a large message"), false),
            // Not a worker's words.
            (Status::deadline_exceeded("a proxy's"), true),
            (Status::unavailable("mapped from HTTP status code 503"), true),
            (Status::unknown("mapped from HTTP status code 500"), true),
            (Status::unknown("missing grpc-status trailer"), true),
            (Status::internal("h2 protocol error"), true),
            (Status::unimplemented("mapped from HTTP status code 404"), false),
            (Status::unauthenticated("mapped from HTTP status code 401"), false),
            (Status::out_of_range("decoded message length too large"), false),
            (Status::from_error(Box::new(std::io::Error::other("connection reset"))), true),
        ] {
            assert_eq!(retries(&status), again, "{status:?}");
        }
    }

    #[test]
    fn codes_have_their_usual_names() {
        assert_eq!(Name(Code::DeadlineExceeded).to_string(), "DEADLINE_EXCEEDED");
        assert_eq!(Name(Code::Ok).to_string(), "OK");
    }
}
