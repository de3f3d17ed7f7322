//! Scored rows as chunks of the stream: an entry for each caption, at most [`CHUNK_BYTES_MAX`] a chunk.

use capsieve_worker::{Heads, RowScore, ScoredRows, Thresholds};

use crate::v1;

/// Encoded bytes of a chunk at most, some below the 2 MiB that the contract names.
const CHUNK_BYTES_MAX: usize = (2 << 20) - (64 << 10);
/// Bytes of an entry without its key and error: two numbers, two scores, a bool, and the fields around them.
const ENTRY_BYTES: usize = 10 + 5 + 4 + 4 + 1 + 8;
/// Bytes of an error's words at most.
const MESSAGE_BYTES_MAX: usize = 1024;

/// How entries look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    pub(crate) heads: Heads,
    pub(crate) thresholds: Thresholds,
}

impl Format {
    fn keeps(&self) -> bool {
        self.thresholds.min_itm.is_some() || self.thresholds.min_cosine.is_some()
    }
}

/// The chunks of some rows, in order.
pub(crate) fn chunks(scored: ScoredRows, format: Format) -> Vec<v1::ScoreChunk> {
    let ScoredRows { shard, first_row, first_caption, keys, rows, position } = scored;
    let token = |row, caption| position.as_ref().map(|position| position.token(row, caption)).unwrap_or_default();
    let mut builder = Builder { format, shard: u32::try_from(shard).unwrap_or(u32::MAX), bytes: 0, chunks: Vec::new() };
    for (i, scores) in rows.iter().enumerate() {
        let row = first_row + i as u64;
        let key = keys.as_ref().map(|keys| keys[i].as_str());
        // Captions that an earlier call has sent.
        let sent = if i == 0 { first_caption } else { 0 };
        for entry in entries(scores).skip(usize::try_from(sent).unwrap_or(usize::MAX)) {
            builder.add(row, key, &entry, &token);
        }
    }
    let mut chunks = builder.chunks;
    if let Some(last) = chunks.last_mut() {
        last.resume_token = token(first_row + rows.len() as u64, 0).into();
    }
    chunks
}

/// A caption's scores, or why there are none.
struct Entry<'a> {
    caption: u64,
    itm: Option<f32>,
    cosine: Option<f32>,
    error: Option<(&'a str, &'a str)>,
}

/// The entries of a row: one for each caption, or one that says why there are no scores.
fn entries(row: &RowScore) -> impl Iterator<Item = Entry<'_>> {
    let failed = row.scores.is_empty().then(|| Entry {
        caption: 0,
        itm: None,
        cosine: None,
        error: Some((row.status, row.error.as_deref().unwrap_or_default())),
    });
    let of_captions = row.scores.iter().enumerate().map(|(i, score)| Entry {
        caption: i as u64,
        itm: score.itm,
        cosine: score.cosine,
        error: score.fault.map(|status| (status, "")),
    });
    failed.into_iter().chain(of_captions)
}

struct Builder {
    format: Format,
    shard: u32,
    /// Of the chunk that is built.
    bytes: usize,
    chunks: Vec<v1::ScoreChunk>,
}

impl Builder {
    fn add(&mut self, row: u64, key: Option<&str>, entry: &Entry<'_>, token: &impl Fn(u64, u64) -> Vec<u8>) {
        let error = entry.error.map(|(status, message)| (status, cut(message)));
        let words = |(status, message): &(&str, &str)| status.len() + message.len() + 16;
        let bytes = ENTRY_BYTES + key.map_or(0, |key| key.len() + 6) + error.as_ref().map_or(0, words);
        if self.chunks.is_empty() || self.bytes + bytes > CHUNK_BYTES_MAX {
            if let Some(full) = self.chunks.last_mut() {
                full.resume_token = token(row, entry.caption).into();
            }
            self.chunks.push(v1::ScoreChunk { shard_index: self.shard, ..v1::ScoreChunk::default() });
            self.bytes = 0;
        }
        self.bytes += bytes;
        let chunk = self.chunks.last_mut().expect("one was just made");
        if let Some((status, message)) = error {
            let index = u32::try_from(chunk.row.len()).expect("a chunk has less than 2 MiB");
            chunk.errors.push(v1::RowError { index, status: status.to_owned(), message: message.to_owned() });
        }
        chunk.row.push(row);
        chunk.caption.push(u32::try_from(entry.caption).unwrap_or(u32::MAX));
        if self.format.heads.itm {
            chunk.itm_score.push(entry.itm.unwrap_or(f32::NAN));
        }
        if self.format.heads.cosine {
            chunk.cosine_score.push(entry.cosine.unwrap_or(f32::NAN));
        }
        if self.format.keeps() {
            let Thresholds { min_itm, min_cosine } = self.format.thresholds;
            let passes = |score: Option<f32>, least: Option<f32>| least.is_none_or(|l| score.is_some_and(|s| s >= l));
            chunk.keep.push(passes(entry.itm, min_itm) && passes(entry.cosine, min_cosine));
        }
        if let Some(key) = key {
            chunk.key.push(key.to_owned());
        }
    }
}

fn cut(message: &str) -> &str {
    let end = (0..=MESSAGE_BYTES_MAX.min(message.len())).rev().find(|end| message.is_char_boundary(*end));
    &message[..end.unwrap_or_default()]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use prost::Message;

    use super::*;

    const FORMAT: Format = Format {
        heads: Heads { itm: true, cosine: true },
        thresholds: Thresholds { min_itm: Some(0.5), min_cosine: None },
    };

    fn failed(message: &str) -> RowScore {
        RowScore { status: "decode_failed", error: Some(message.to_owned()), scores: Vec::new() }
    }

    #[test]
    fn chunks_stay_below_their_limit_and_lose_no_row() {
        for (key, message) in [(4096, 5000), (0, 0), (4096, 0), (3, 1024)] {
            let rows = vec![failed(&"é".repeat(message / 2)); 2000];
            let keys = Some(vec!["k".repeat(key); 2000]);
            let scored = ScoredRows { shard: 3, first_row: 7, first_caption: 0, keys, rows, position: None };
            let chunks = chunks(scored, FORMAT);
            assert!(chunks.iter().all(|chunk| chunk.encoded_len() <= 2 << 20));
            let rows: Vec<u64> = chunks.iter().flat_map(|chunk| chunk.row.clone()).collect();
            assert_eq!(rows, (7..2007).collect::<Vec<_>>());
            for chunk in &chunks {
                assert_eq!(chunk.errors.len(), chunk.row.len());
                assert!(chunk.errors.iter().all(|error| error.message.len() <= MESSAGE_BYTES_MAX));
                assert!(chunk.itm_score.iter().all(|score| score.is_nan()) && !chunk.keep.contains(&true));
            }
        }
    }
}
