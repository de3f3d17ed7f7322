//! Where a call can go on: a token that the client holds, so that any worker with the same model continues.
//!
//! A token names the question (columns, heads, thresholds), the model, the shard and its version, and the first caption that
//! was not sent. It is no secret and grants nothing: what it names is checked against `--allow-uri` like any other URI. Its
//! checksum guards against damage, not against forgery.

use capsieve_store::ObjectInfo;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::model::hex;
use crate::{Error, Result};

/// Form of the tokens; another one is refused.
const VERSION: u8 = 2;
/// Hexadecimal digits of a hash in a token: 64 bits tell apart what a client mixes up, and a call may bring a token for each
/// of its shards.
const DIGITS: usize = 16;
const CHECKSUM_BYTES: usize = 8;
/// A token holds a URI and some hashes.
const TOKEN_BYTES_MAX: usize = 16 << 10;

/// The first caption that is still to be scored. Its names in a token are one letter long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Of SHA-256 of what decides the scores beside model and shard.
    #[serde(rename = "q")]
    request: String,
    /// Of SHA-256 of the model.
    #[serde(rename = "m")]
    model: String,
    /// The shard as the worker lists it.
    #[serde(rename = "u")]
    pub(crate) uri: String,
    /// Of SHA-256 of its size, entity tag and time.
    #[serde(rename = "v")]
    version: String,
    /// Row in the shard.
    #[serde(rename = "r")]
    pub(crate) row: u64,
    /// Caption in the row.
    #[serde(rename = "c")]
    pub(crate) caption: u64,
    /// All rows are scored.
    #[serde(rename = "d")]
    pub(crate) done: bool,
}

impl Position {
    /// The beginning of a shard. `options` is what decides the scores beside model and shard.
    pub(crate) fn start(options: &str, model: &str, uri: &str, info: &ObjectInfo) -> Self {
        let seconds = info.modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let version = digest(&format!("{} {:?} {seconds}", info.size, info.e_tag));
        let (request, model, uri) = (digest(options), digest(model), uri.to_owned());
        Self { request, model, uri, version, row: 0, caption: 0, done: false }
    }

    /// The token by which a call goes on with this caption.
    pub fn token(&self, row: u64, caption: u64) -> Vec<u8> {
        Self { row, caption, ..self.clone() }.encode()
    }

    pub(crate) fn done_token(&self, rows: u64) -> Vec<u8> {
        Self { row: rows, caption: 0, done: true, ..self.clone() }.encode()
    }

    fn encode(&self) -> Vec<u8> {
        let json = serde_json::to_vec(self).expect("strings and numbers");
        [&[VERSION][..], &checksum(&json), &json].concat()
    }

    pub(crate) fn decode(token: &[u8]) -> Result<Self> {
        let bad = |reason| Err(Error::Token { reason });
        let Some((version, rest)) = token.split_first() else { return bad("it is empty") };
        if token.len() > TOKEN_BYTES_MAX || *version != VERSION {
            return bad("it is none of this version's");
        }
        let Some((sum, json)) = rest.split_at_checked(CHECKSUM_BYTES) else { return bad("it is cut off") };
        if sum != checksum(json) {
            return bad("it is damaged");
        }
        serde_json::from_slice(json).or_else(|_| bad("it is damaged"))
    }

    /// Goes on at `token`'s position, if it belongs to the same work as this one.
    pub(crate) fn resume(&self, token: &Self) -> Result<Self> {
        let stale = |what| Err(Error::Stale { uri: self.uri.clone(), what });
        if token.model != self.model {
            return stale("was given by a worker with another model");
        }
        if token.request != self.request {
            return stale(
                "belongs to a request with other columns, heads or thresholds, or to a worker with other options",
            );
        }
        if token.version != self.version {
            return stale("belongs to another version of the shard, which was replaced meanwhile");
        }
        Ok(token.clone())
    }
}

fn digest(text: &str) -> String {
    hex(&Sha256::digest(text))[..DIGITS].to_owned()
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&Sha256::digest(bytes)[..CHECKSUM_BYTES]);
    sum
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn start(model: &str, tag: &str) -> Position {
        let info = ObjectInfo { size: 7, e_tag: Some(tag.to_owned()), modified: UNIX_EPOCH + Duration::from_secs(9) };
        Position::start("request", model, "a.parquet", &info)
    }

    #[test]
    fn tokens_come_back_as_they_went() {
        let position = start("model", "tag");
        let token = Position::decode(&position.token(12, 3)).unwrap();
        assert_eq!((token.row, token.caption, token.done), (12, 3, false));
        assert_eq!(position.resume(&token).unwrap(), token);
        assert!(Position::decode(&position.done_token(20)).unwrap().done);
    }

    #[test]
    fn damaged_tokens_are_refused_bit_by_bit() {
        let token = start("model", "tag").token(12, 3);
        for bit in 0..token.len() * 8 {
            let mut damaged = token.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(Position::decode(&damaged), Err(Error::Token { .. })), "bit {bit}");
        }
        for end in 0..token.len() {
            assert!(matches!(Position::decode(&token[..end]), Err(Error::Token { .. })), "{end} bytes");
        }
    }

    #[test]
    fn tokens_of_other_work_are_stale() {
        let position = start("model", "tag");
        for other in [start("other", "tag"), start("model", "other")] {
            let token = Position::decode(&other.token(1, 0)).unwrap();
            assert!(matches!(position.resume(&token), Err(Error::Stale { .. })));
        }
    }
}
