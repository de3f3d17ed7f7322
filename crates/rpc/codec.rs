//! Protobuf as the worker reads it: a request is measured on its wire form before anything of it is allocated.
//!
//! Two bytes on the wire may become a hundred in memory: a message within `--max-message-bytes` of nothing but empty items
//! would take a gigabyte. The walk reads keys and lengths only; images are skipped, so it costs next to nothing.
//! What cannot be decoded is the client's fault and said so; tonic would call it INTERNAL.

#[cfg(test)]
mod tests;

use std::marker::PhantomData;

use bytes::{Buf, Bytes};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use prost::{DecodeError, Message};
use tonic::Status;
use tonic::codec::{BufferSettings, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstEncoder};

use crate::{status, v1};

/// `pairs.items` of a request at most.
pub(crate) const ITEMS_MAX: usize = 16_384;
/// Captions of all its items at most.
pub(crate) const CAPTIONS_MAX: usize = 65_536;
/// `shards.uris` and `shards.resume_tokens` at most, each.
const SHARDS_MAX: usize = capsieve_worker::limits::SHARDS_MAX;
/// `heads` at most; there are two, and naming one twice is no error.
const HEADS_MAX: usize = 16;

/// Numbers of fields in `proto/capsieve/v1/scoring.proto`.
mod tag {
    pub(super) const PAIRS: u32 = 1;
    pub(super) const SHARDS: u32 = 2;
    pub(super) const HEADS: u32 = 3;
    pub(super) const ITEMS: u32 = 1;
    pub(super) const CAPTIONS: u32 = 4;
    pub(super) const URIS: u32 = 1;
    pub(super) const RESUME_TOKENS: u32 = 3;
}

/// What comes from the other side.
pub(crate) trait Incoming: Message + Default + Send + 'static {
    /// Refuses what would be too large in memory.
    fn check(_wire: &[u8]) -> Result<(), Status> {
        Ok(())
    }

    /// What is said of a message that is none.
    fn malformed(error: &DecodeError) -> Status {
        status::bad_field("request", error.to_string())
    }
}

impl Incoming for v1::ScoreBatchRequest {
    fn check(wire: &[u8]) -> Result<(), Status> {
        Counts::default().request(wire).map_err(|refused| match refused {
            Refused::Malformed(error) => Self::malformed(&error),
            Refused::TooMany(field, most) => status::bad_field(field, format!("at most {most}: make several calls")),
        })
    }
}

impl Incoming for v1::GetModelInfoRequest {}

// The client's side: its worker is at fault.
impl Incoming for v1::ScoreBatchResponse {
    fn malformed(error: &DecodeError) -> Status {
        Status::internal(error.to_string())
    }
}

impl Incoming for v1::GetModelInfoResponse {
    fn malformed(error: &DecodeError) -> Status {
        Status::internal(error.to_string())
    }
}

/// The codec of every method, named in `build.rs`.
#[derive(Debug)]
pub(crate) struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + Send + 'static, U: Incoming> tonic::codec::Codec for Codec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = Checked<U>;

    fn encoder(&mut self) -> ProstEncoder<T> {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::default())
    }

    fn decoder(&mut self) -> Checked<U> {
        Checked(PhantomData)
    }
}

/// Measures, then decodes.
#[derive(Debug)]
pub(crate) struct Checked<U>(PhantomData<U>);

impl<U: Incoming> Decoder for Checked<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // Nothing is copied: the bytes are split off, and images become slices of them.
        decode(source.copy_to_bytes(source.remaining())).map(Some)
    }
}

fn decode<U: Incoming>(wire: Bytes) -> Result<U, Status> {
    U::check(&wire)?;
    U::decode(wire).map_err(|error| U::malformed(&error))
}

enum Refused {
    Malformed(DecodeError),
    /// A field, and how many of it are taken.
    TooMany(&'static str, usize),
}

impl From<DecodeError> for Refused {
    fn from(error: DecodeError) -> Self {
        Self::Malformed(error)
    }
}

/// What was seen so far. A field that is there several times adds up, for protobuf merges it, and of a `oneof` whose
/// alternatives take turns all are counted.
#[derive(Default)]
struct Counts {
    items: usize,
    captions: usize,
    uris: usize,
    tokens: usize,
    heads: usize,
}

impl Counts {
    fn request(&mut self, wire: &[u8]) -> Result<(), Refused> {
        fields(wire, |number, field| match (number, field) {
            (tag::PAIRS, Some(pairs)) => self.pairs(pairs),
            (tag::SHARDS, Some(shards)) => self.shards(shards),
            (tag::HEADS, packed) => {
                // A number ends with the byte that has no high bit.
                let numbers = packed.map_or(1, |bytes| bytes.iter().filter(|byte| **byte < 0x80).count());
                count(&mut self.heads, numbers, "heads", HEADS_MAX)
            }
            _ => Ok(()),
        })
    }

    fn pairs(&mut self, wire: &[u8]) -> Result<(), Refused> {
        fields(wire, |number, field| match (number, field) {
            (tag::ITEMS, Some(item)) => {
                count(&mut self.items, 1, "pairs.items", ITEMS_MAX)?;
                self.item(item)
            }
            _ => Ok(()),
        })
    }

    fn item(&mut self, wire: &[u8]) -> Result<(), Refused> {
        fields(wire, |number, _| match number {
            tag::CAPTIONS => count(&mut self.captions, 1, "pairs.items.captions", CAPTIONS_MAX),
            _ => Ok(()),
        })
    }

    fn shards(&mut self, wire: &[u8]) -> Result<(), Refused> {
        fields(wire, |number, _| match number {
            tag::URIS => count(&mut self.uris, 1, "shards.uris", SHARDS_MAX),
            tag::RESUME_TOKENS => count(&mut self.tokens, 1, "shards.resume_tokens", SHARDS_MAX),
            _ => Ok(()),
        })
    }
}

fn count(seen: &mut usize, more: usize, field: &'static str, most: usize) -> Result<(), Refused> {
    *seen += more;
    if *seen > most { Err(Refused::TooMany(field, most)) } else { Ok(()) }
}

/// Calls `each` with every field's number, and its bytes where it has a length. A field that reaches beyond its message is
/// an error here, so prost does not get to see it: prost would go on reading into what follows.
fn fields<'a>(
    mut wire: &'a [u8],
    mut each: impl FnMut(u32, Option<&'a [u8]>) -> Result<(), Refused>,
) -> Result<(), Refused> {
    while wire.has_remaining() {
        let (number, kind) = decode_key(&mut wire)?;
        let start = wire;
        skip_field(kind, number, &mut wire, DecodeContext::default())?;
        let mut field = &start[..start.len() - wire.len()];
        if kind == WireType::LengthDelimited {
            decode_varint(&mut field)?;
            each(number, Some(field))?;
        } else {
            each(number, None)?;
        }
    }
    Ok(())
}
