//! Which error becomes which status. The same table, in words, opens `proto/capsieve/v1/scoring.proto`.

use std::collections::HashMap;
use std::time::Duration;

use capsieve_worker::{Error, StoreError};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Of every ErrorInfo.
pub const DOMAIN: &str = "capsieve";
/// Bytes of a status's message, and of what it says about a field, at most. Both travel in a header, the message twice and
/// once with up to three bytes for each of its own; clients give up on headers of more than 8 KiB (grpcio on 16).
const WORDS_BYTES_MAX: usize = 1024;
/// Where words were left out.
const CUT: &str = "\u{2026}";
/// When a worker that has no room may be asked again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The status of what ended a call.
pub fn of(error: &Error) -> Status {
    if let Error::NamesMemory = error {
        return exhausted(error.to_string());
    }
    let (code, reason) = code(error);
    let mut details = reasoned(reason);
    if let (Code::InvalidArgument, Some(field)) = (code, field(error)) {
        details.add_bad_request_violation(field, cut(chain(error)));
    }
    Status::with_error_details(code, cut(chain(error)), details)
}

/// The field of the request that an error is about.
fn field(error: &Error) -> Option<&'static str> {
    match error {
        Error::Token { .. } => Some("shards.resume_tokens"),
        Error::Sink { .. } | Error::SinkUri(_) | Error::SinkInside { .. } | Error::SameObject { .. } => {
            Some("sink.uri")
        }
        Error::Store(_) => Some("shards.uris"),
        _ => None,
    }
}

/// What tonic says of a request that did not get as far as a service: it gives no details, and calls what cannot be read
/// INTERNAL, as if it were the worker's fault.
pub(crate) fn of_transport(status: Status) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    match (status.code(), status.message()) {
        (Code::OutOfRange, why) => too_large(why),
        (Code::Internal, why) => with_reason(Code::InvalidArgument, "REQUEST_MALFORMED", why),
        (Code::Unimplemented, "") => with_reason(Code::Unimplemented, "NOT_IMPLEMENTED", "there is no such method"),
        (Code::Unimplemented, why) => with_reason(Code::Unimplemented, "NOT_IMPLEMENTED", why),
        _ => status,
    }
}

/// The status with the name of the request it ends, so that its lines in the worker's log are found.
pub(crate) fn for_request(status: Status, request_id: &str) -> Status {
    let mut details = status.get_error_details();
    details.set_request_info(request_id, "");
    Status::with_error_details_and_metadata(status.code(), status.message(), details, status.metadata().clone())
}

/// The table.
fn code(error: &Error) -> (Code, &'static str) {
    match error {
        Error::Store(error) => of_store(error),
        Error::SinkUri(error) => of_store(error),
        Error::Token { .. } => (Code::InvalidArgument, "RESUME_TOKEN_INVALID"),
        Error::Stale { .. } => (Code::FailedPrecondition, "RESUME_TOKEN_STALE"),
        Error::HeadNotLoaded => (Code::FailedPrecondition, "HEAD_NOT_LOADED"),
        Error::Sink { .. } | Error::SinkInside { .. } | Error::SameObject { .. } => {
            (Code::InvalidArgument, "SINK_INVALID")
        }
        Error::RowGroup { .. } => (Code::FailedPrecondition, "ROW_GROUP_TOO_LARGE"),
        Error::Foreign { .. } => (Code::AlreadyExists, "OUTPUT_EXISTS"),
        Error::Gone { .. } => (Code::Aborted, "OUTPUT_SUPERSEDED"),
        Error::Row { .. } | Error::RowsFailed { .. } => (Code::Aborted, "ROW_FAILED"),
        Error::Scoring(_) | Error::EngineGone | Error::Engine(_) => (Code::Internal, "ENGINE_FAILED"),
        _ => (Code::Internal, "INTERNAL"),
    }
}

fn of_store(error: &StoreError) -> (Code, &'static str) {
    match error {
        StoreError::NotAllowed { .. } => (Code::PermissionDenied, "URI_NOT_ALLOWED"),
        StoreError::Permission { .. } => (Code::PermissionDenied, "STORAGE_DENIED"),
        StoreError::NotFound { .. } | StoreError::NoShards { .. } => (Code::NotFound, "NOT_FOUND"),
        StoreError::NoFolder { .. } => (Code::NotFound, "OUTPUT_FOLDER_NOT_FOUND"),
        StoreError::Uri { .. } | StoreError::Folder { .. } => (Code::InvalidArgument, "URI_INVALID"),
        StoreError::Unusable { .. } => (Code::FailedPrecondition, "PREFIX_UNUSABLE"),
        StoreError::TooManyShards { .. } => (Code::InvalidArgument, "TOO_MANY_SHARDS"),
        StoreError::ThresholdWithoutHead { .. } => (Code::InvalidArgument, "THRESHOLD_WITHOUT_HEAD"),
        StoreError::Exists { .. } => (Code::AlreadyExists, "OUTPUT_EXISTS"),
        StoreError::Changed { .. } => (Code::Aborted, "SHARD_CHANGED"),
        StoreError::Superseded { .. } => (Code::Aborted, "OUTPUT_SUPERSEDED"),
        StoreError::NotParquet { .. }
        | StoreError::Cut { .. }
        | StoreError::Encrypted { .. }
        | StoreError::Corrupt { .. }
        | StoreError::LongFooter { .. }
        | StoreError::Malformed { .. } => (Code::FailedPrecondition, "SHARD_UNREADABLE"),
        StoreError::MetadataOnly { .. }
        | StoreError::NoColumn { .. }
        | StoreError::MissingColumn { .. }
        | StoreError::AmbiguousColumn { .. }
        | StoreError::ColumnType { .. } => (Code::FailedPrecondition, "SHARD_COLUMNS"),
        StoreError::StorageFull { .. } | StoreError::Store { .. } => (Code::Unavailable, "STORAGE_FAILED"),
        _ => (Code::Internal, "INTERNAL"),
    }
}

/// A field of the request that cannot be.
pub(crate) fn bad_field(field: &str, why: impl Into<String>) -> Status {
    let why = cut(why.into());
    let details = ErrorDetails::with_bad_request_violation(field, why.clone());
    Status::with_error_details(Code::InvalidArgument, cut(format!("{field}: {why}")), details)
}

/// No room for another call.
pub(crate) fn exhausted(why: impl Into<String>) -> Status {
    let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
    Status::with_error_details(Code::ResourceExhausted, why, details)
}

/// A request that no worker takes: asking again is in vain, so nothing says when.
pub(crate) fn too_large(why: impl Into<String>) -> Status {
    Status::resource_exhausted(why)
}

/// A status with a reason that programs can tell apart.
pub(crate) fn with_reason(code: Code, reason: &str, why: impl Into<String>) -> Status {
    Status::with_error_details(code, cut(why.into()), reasoned(reason))
}

/// A call whose deadline passed.
pub(crate) fn late(why: impl Into<String>) -> Status {
    with_reason(Code::DeadlineExceeded, "DEADLINE", why)
}

/// A call that the worker's end cuts.
pub(crate) fn draining() -> Status {
    let why = "the worker ends: go on with another one by the resume tokens";
    with_reason(Code::Unavailable, "DRAINING", why)
}

fn reasoned(reason: &str) -> ErrorDetails {
    ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new())
}

/// An error and its causes in one line, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let words = inner.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = inner.source();
    }
    text.replace(['\n', '\r'], " ")
}

/// Words as a header takes them. Their middle is left out: what failed is said first, and why at the end.
fn cut(mut words: String) -> String {
    if words.len() > WORDS_BYTES_MAX {
        let half = (WORDS_BYTES_MAX - CUT.len()) / 2;
        let (start, end) = (words.floor_char_boundary(half), words.ceil_char_boundary(words.len() - half));
        words.replace_range(start..end, CUT);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_words_fit_a_header() {
        // One byte that becomes three, and characters of two, three and four bytes.
        for (letter, offset) in [("%", ""), ("\u{e9}", "a"), ("\u{732b}", "ab"), ("\u{1f431}", "abc")] {
            let name = format!("{offset}{}", letter.repeat(5000));
            let error = StoreError::NotAllowed { uri: name.clone() };
            for status in [
                of(&Error::SinkUri(Box::new(error))),
                bad_field("pairs.items[16383].image_uri", name.clone()),
                with_reason(Code::Aborted, "ROW_FAILED", name.clone()),
            ] {
                let status = for_request(status, &"\u{e9}".repeat(128));
                let mut headers = http::HeaderMap::new();
                status.add_header(&mut headers).unwrap();
                let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
                assert!(bytes < 8 << 10, "{bytes} bytes of {letter}");
                assert!(status.message().contains(CUT) && status.message().len() <= WORDS_BYTES_MAX);
            }
        }
        let most = "x".repeat(WORDS_BYTES_MAX);
        assert_eq!(cut(most.clone()), most);
        let cut = cut(format!("first {most} last"));
        assert!(cut.starts_with("first ") && cut.ends_with(" last") && cut.contains(CUT), "{cut}");
    }
}
