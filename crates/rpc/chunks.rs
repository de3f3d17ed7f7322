//! Scored rows as chunks of the stream: an entry for each caption, at most [`CHUNK_BYTES_MAX`] a chunk.

use capsieve_worker::{Heads, RowScore, ScoredRows, Thresholds};

use crate::v1;

/// Bytes of a chunk's entries at most. Far below the 2 MiB that the contract names: a few of them wait for a client that does
/// not read, here and in the connection's buffers.
pub(crate) const CHUNK_BYTES_MAX: usize = 48 << 10;
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

/// The chunks of some rows, in order, made one at a time: a row may have thousands of captions, each with its key.
pub(crate) fn chunks(scored: &ScoredRows, format: Format) -> impl Iterator<Item = v1::ScoreChunk> {
    let mut entries = all(scored).peekable();
    let token =
        |row, caption| scored.position.as_ref().map(|position| position.token(row, caption)).unwrap_or_default();
    std::iter::from_fn(move || {
        let mut builder = Builder::new(scored.shard, format);
        while let Some(entry) = entries.next_if(|entry| builder.takes(entry)) {
            builder.add(entry);
        }
        let end = (scored.first_row + scored.rows.len() as u64, 0);
        let (row, caption) = entries.peek().map_or(end, |next| (next.row, next.caption));
        (!builder.chunk.row.is_empty())
            .then(|| v1::ScoreChunk { resume_token: token(row, caption).into(), ..builder.chunk })
    })
}

/// The entries of all rows but those that an earlier call has sent.
fn all(scored: &ScoredRows) -> impl Iterator<Item = Entry<'_>> {
    scored.rows.iter().enumerate().flat_map(|(i, scores)| {
        let key = scored.keys.as_ref().map(|keys| keys[i].as_str());
        let sent = if i == 0 { scored.first_caption } else { 0 };
        entries(scored.first_row + i as u64, key, scores, sent)
    })
}

/// A caption's scores, or why there are none.
struct Entry<'a> {
    row: u64,
    caption: u64,
    key: Option<&'a str>,
    itm: Option<f32>,
    cosine: Option<f32>,
    error: Option<(&'a str, &'a str)>,
}

/// The entries of a row from caption `sent` on: one for each caption, or one that says why there are no scores.
fn entries<'a>(row: u64, key: Option<&'a str>, scored: &'a RowScore, sent: u64) -> impl Iterator<Item = Entry<'a>> {
    // Stands for all captions that were not sent: an earlier call may have had scores for some, and this one has none.
    let failed = scored.scores.is_empty().then(|| Entry {
        row,
        caption: sent,
        key,
        itm: None,
        cosine: None,
        error: Some((scored.status, cut(scored.error.as_deref().unwrap_or_default()))),
    });
    let sent = usize::try_from(sent).unwrap_or(usize::MAX);
    let of_captions = scored.scores.iter().enumerate().skip(sent).map(move |(i, score)| Entry {
        row,
        caption: i as u64,
        key,
        itm: score.itm,
        cosine: score.cosine,
        error: score.fault.map(|status| (status, "")),
    });
    failed.into_iter().chain(of_captions)
}

impl Entry<'_> {
    /// Encoded, at most.
    fn bytes(&self) -> usize {
        let words = |(status, message): (&str, &str)| status.len() + message.len() + 16;
        ENTRY_BYTES + self.key.map_or(0, |key| key.len() + 6) + self.error.map_or(0, words)
    }
}

struct Builder {
    format: Format,
    bytes: usize,
    chunk: v1::ScoreChunk,
}

impl Builder {
    fn new(shard: usize, format: Format) -> Self {
        let shard_index = u32::try_from(shard).unwrap_or(u32::MAX);
        Self { format, bytes: 0, chunk: v1::ScoreChunk { shard_index, ..v1::ScoreChunk::default() } }
    }

    fn takes(&self, entry: &Entry<'_>) -> bool {
        self.bytes + entry.bytes() <= CHUNK_BYTES_MAX
    }

    fn add(&mut self, entry: Entry<'_>) {
        self.bytes += entry.bytes();
        let chunk = &mut self.chunk;
        if let Some((status, message)) = entry.error {
            let index = u32::try_from(chunk.row.len()).expect("a chunk has less than 2 MiB");
            chunk.errors.push(v1::RowError { index, status: status.to_owned(), message: message.to_owned() });
        }
        chunk.row.push(entry.row);
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
        if let Some(key) = entry.key {
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
    use capsieve_worker::{CaptionScore, Ticket};
    use prost::Message;

    use super::*;

    const FORMAT: Format = Format {
        heads: Heads { itm: true, cosine: true },
        thresholds: Thresholds { min_itm: Some(0.5), min_cosine: None },
    };

    fn failed(message: &str) -> RowScore {
        RowScore { status: "decode_failed", error: Some(message.to_owned()), scores: Vec::new() }
    }

    fn scored(rows: Vec<RowScore>, keys: Option<Vec<String>>, first_caption: u64) -> ScoredRows {
        ScoredRows { shard: 3, first_row: 7, first_caption, keys, rows, position: None, ticket: Ticket::free() }
    }

    #[test]
    fn chunks_stay_below_their_limit_and_lose_no_row() {
        for (key, message) in [(4096, 5000), (0, 0), (4096, 0), (3, 1024)] {
            let rows = vec![failed(&"é".repeat(message / 2)); 2000];
            let keys = Some(vec!["k".repeat(key); 2000]);
            let chunks: Vec<_> = chunks(&scored(rows, keys, 0), FORMAT).collect();
            assert!(chunks.iter().all(|chunk| chunk.encoded_len() <= CHUNK_BYTES_MAX));
            let rows: Vec<u64> = chunks.iter().flat_map(|chunk| chunk.row.clone()).collect();
            assert_eq!(rows, (7..2007).collect::<Vec<_>>());
            for chunk in &chunks {
                assert_eq!(chunk.errors.len(), chunk.row.len());
                assert!(chunk.errors.iter().all(|error| error.message.len() <= MESSAGE_BYTES_MAX));
                assert!(chunk.itm_score.iter().all(|score| score.is_nan()) && !chunk.keep.contains(&true));
            }
        }
    }

    #[test]
    fn captions_that_were_sent_are_not_sent_again() {
        let score = CaptionScore { itm: Some(0.5), cosine: Some(0.25), fault: None };
        let row = |captions| RowScore { status: "ok", error: None, scores: vec![score; captions] };
        let places = |rows, sent| -> Vec<(u64, u32)> {
            let chunks = chunks(&scored(rows, None, sent), FORMAT).collect::<Vec<_>>();
            chunks.iter().flat_map(|chunk| chunk.row.iter().copied().zip(chunk.caption.iter().copied())).collect()
        };
        assert_eq!(places(vec![row(3), row(2)], 2), [(7, 2), (8, 0), (8, 1)]);
        // The row had scores when its first captions were sent; what fails now stands for the others.
        assert_eq!(places(vec![failed("gone"), row(1)], 2), [(7, 2), (8, 0)]);
    }

    #[test]
    fn a_row_of_many_captions_is_cut_between_them() {
        let score = CaptionScore { itm: Some(0.5), cosine: None, fault: None };
        let rows = vec![RowScore { status: "ok", error: None, scores: vec![score; 4096] }];
        let chunks: Vec<_> = chunks(&scored(rows, Some(vec!["k".repeat(4096)]), 0), FORMAT).collect();
        assert!(chunks.len() > 8 && chunks.iter().all(|chunk| chunk.encoded_len() <= CHUNK_BYTES_MAX));
        let captions: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.caption.clone()).collect();
        assert_eq!(captions, (0..4096).collect::<Vec<_>>());
    }
}
