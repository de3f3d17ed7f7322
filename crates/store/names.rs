//! Names below a prefix, as paths and as URIs.

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

use crate::Location;

/// What a part of a URI's path cannot say as it is (RFC 3986), and what a parser of URIs takes for something else.
const ENCODED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}')
    .add(b'/');

/// The part before `://`, when what precedes it can be a scheme at all.
pub(crate) fn scheme(uri: &str) -> Option<&str> {
    let (scheme, _) = uri.split_once("://")?;
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    (!scheme.is_empty() && scheme.bytes().all(letters)).then_some(scheme)
}

/// The parts of a shard's name below a prefix that it was found by.
pub fn parts_below(prefix: &str, shard: &Location) -> Vec<String> {
    let below = shard.uri().strip_prefix(prefix).unwrap_or(shard.file_name());
    let part = |part: &str| match scheme(prefix) {
        Some(_) => percent_decode_str(part).decode_utf8_lossy().into_owned(),
        None => part.to_owned(),
    };
    below.split('/').map(part).collect()
}

/// The URI of `name` below a prefix that ends in '/': parsed, it is that very file. Paths have no need of encoding.
pub fn below(prefix: &str, name: &str) -> String {
    match scheme(prefix) {
        Some(_) => format!("{prefix}{}", utf8_percent_encode(name, ENCODED)),
        None => format!("{prefix}{name}"),
    }
}
