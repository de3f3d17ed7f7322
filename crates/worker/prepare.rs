//! Rows to model input: decode and resize the image, tokenise the captions. A row that cannot be prepared gets a status
//! and a reason instead; nothing here ends a job.

use std::collections::HashMap;
use std::panic::catch_unwind;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arrow_array::RecordBatch;
use bytes::Bytes;
use capsieve_engine::{Heads, PairScore};
use capsieve_prep::{DecodeLimits, ImageSpec, Tokenizer};
use capsieve_store::{CaptionCell, CaptionScore, Columns, ImageCell, InputRow, RowScore};
use sha2::{Digest, Sha256};

use crate::limits::{BATCH_TOKENS, CAPTION_BYTES_MAX, CAPTIONS_MAX, IMAGE_PIXELS_MAX, PART_PAIRS, REASON_BYTES_MAX};
use crate::pipeline::{Chunk, Prepared};
use crate::threads::{Done, Threads, Turn};
use crate::{Error, Result};

/// What to do with captions and images the model or the user's limits do not take.
#[derive(Clone, Copy, Debug)]
pub struct CaptionPolicy {
    /// Longer captions are cut to this many tokens; without it they are errors of their rows.
    pub tokens_max: Option<usize>,
    /// Larger images are errors of their rows.
    pub image_pixels_max: u64,
}

impl Default for CaptionPolicy {
    fn default() -> Self {
        Self { tokens_max: None, image_pixels_max: IMAGE_PIXELS_MAX }
    }
}

/// Every status of a row but "ok".
pub const STATUSES: [&str; 9] = [
    "null_image",
    "decode_failed",
    "image_too_large",
    "fetch_failed",
    "null_caption",
    "caption_too_long",
    "caption_failed",
    "too_many_captions",
    "not_finite",
];

/// Why a row or a caption has no score.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) status: &'static str,
    pub(crate) reason: String,
}

impl Fault {
    pub(crate) fn new(status: &'static str, reason: impl Into<String>) -> Self {
        debug_assert!(STATUSES.contains(&status), "{status}");
        let mut reason = reason.into();
        reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
        Self { status, reason }
    }

    pub(crate) fn into_row(self) -> RowScore {
        RowScore { status: self.status, error: Some(self.reason), scores: Vec::new() }
    }
}

/// SHA-256 of an encoded image: what is equal is decoded and encoded once. No weaker hash will do, for strangers make images.
pub(crate) type Content = [u8; 32];

/// A row ready for the engine: at least one of its captions can be scored.
#[derive(Debug)]
pub(crate) struct ReadyRow {
    /// Of the image.
    pub(crate) content: Content,
    /// `[S, S, 3]` u8.
    pub(crate) pixels: Bytes,
    /// Token ids of each caption of the row, or why it has no score.
    pub(crate) captions: Vec<Result<Vec<u32>, Fault>>,
}

impl ReadyRow {
    /// Captions that are scored.
    pub(crate) fn pairs(&self) -> usize {
        self.captions.iter().flatten().count()
    }

    /// Of these captions.
    pub(crate) fn tokens(&self) -> usize {
        self.captions.iter().flatten().map(Vec::len).sum()
    }

    /// The same captions in parts that fit a batch, each with the image and at least one that can be scored. Nearly always
    /// one part: another one costs another pass of the image.
    pub(crate) fn parts(self) -> Vec<Self> {
        let Self { content, pixels, captions } = self;
        let part = || Self { content, pixels: pixels.clone(), captions: Vec::new() };
        let mut parts = vec![part()];
        let (mut pairs, mut tokens) = (0, 0);
        for caption in captions {
            if let Ok(caption) = &caption {
                if pairs == PART_PAIRS || pairs > 0 && tokens + caption.len() > BATCH_TOKENS {
                    parts.push(part());
                    (pairs, tokens) = (0, 0);
                }
                (pairs, tokens) = (pairs + 1, tokens + caption.len());
            }
            parts.last_mut().expect("it begins with one").captions.push(caption);
        }
        parts
    }
}

/// Rows, where in them is what, and the images that some of them had.
pub(crate) struct Input {
    pub(crate) batch: RecordBatch,
    columns: Columns,
    decoded: Decoded,
}

impl Input {
    pub(crate) fn new(batch: RecordBatch, columns: &Columns) -> Self {
        Self { batch, columns: columns.clone(), decoded: Decoded::default() }
    }
}

/// The image of an address.
pub(crate) type Fetched = Result<Bytes, Fault>;
/// A row that was prepared ahead of its chunk, or what becomes of it without the engine, and how long that took.
pub(crate) type Early = (Result<ReadyRow, RowScore>, Duration);

/// Prepares rows on threads of its own, which all jobs share.
pub(crate) struct Preparer {
    threads: Threads,
    recipe: Arc<Recipe>,
}

/// What is done to each row.
struct Recipe {
    image: ImageSpec,
    tokenizer: Tokenizer,
    /// Longest caption of the model, in tokens.
    positions: usize,
    policy: CaptionPolicy,
}

impl Preparer {
    pub(crate) fn new(
        threads: usize,
        (image, tokenizer): (ImageSpec, Tokenizer),
        positions: usize,
        policy: CaptionPolicy,
    ) -> Result<Self> {
        let threads = Threads::start(threads).map_err(|source| Error::Threads { source })?;
        Ok(Self { threads, recipe: Arc::new(Recipe { image, tokenizer, positions, policy }) })
    }

    /// Bytes of an image as the model takes it.
    pub(crate) fn pixel_bytes(&self) -> usize {
        self.recipe.image.size * self.recipe.image.size * 3
    }

    /// Threads that prepare.
    pub(crate) fn threads(&self) -> usize {
        self.threads.count()
    }

    /// A job's place among those that share the threads.
    pub(crate) fn join(&self) -> Turn {
        self.threads.join()
    }

    /// Prepares a row of a chunk ahead of the others, from the bytes of its image that were fetched.
    pub(crate) async fn row(&self, turn: &Turn, input: &Arc<Input>, index: usize, image: Fetched) -> Result<Early> {
        let task = self.task(input, index, Some(image));
        finished(self.threads.run(turn, std::iter::once(task)).pop().expect("one for one")).await
    }

    fn task(
        &self,
        input: &Arc<Input>,
        index: usize,
        image: Option<Fetched>,
    ) -> impl FnOnce() -> Result<Result<ReadyRow, Fault>> + Send + use<> {
        let (recipe, input) = (Arc::clone(&self.recipe), Arc::clone(input));
        move || {
            let row = capsieve_store::row(&input.batch, &input.columns, index)?;
            Ok(recipe.row(&row, image.as_ref(), &input.decoded))
        }
    }

    /// Prepares every row of a chunk that is not prepared yet, on all threads at once where no other job wants them. Gives the
    /// seconds it would have taken alone.
    pub(crate) async fn chunk(&self, turn: &Turn, chunk: Chunk, columns: &Columns) -> Result<(Prepared, f64)> {
        let Chunk { batch, early, held, ticket } = chunk;
        let input = Arc::new(Input::new(batch, columns));
        let others = early.iter().enumerate().filter(|(_, early)| early.is_none());
        let mut others = self.threads.run(turn, others.map(|(index, _)| self.task(&input, index, None))).into_iter();
        let (mut rows, mut seconds) = (Vec::with_capacity(input.batch.num_rows()), 0.0);
        for early in early {
            let (row, taken) = match early {
                Some(early) => early,
                None => finished(others.next().expect("a task for each of the others")).await?,
            };
            rows.push(row);
            seconds += taken.as_secs_f64();
        }
        let prepared = Prepared { batch: input.batch.clone(), rows, held, ticket };
        Ok((prepared, seconds / self.threads.count() as f64))
    }
}

/// The images of a chunk, each decoded by the first row that has it while others with the same one wait.
#[derive(Default)]
struct Decoded(Mutex<HashMap<Content, Pixels>>);

/// Of one image, once they are there.
type Pixels = Arc<OnceLock<Result<Bytes, Fault>>>;

impl Decoded {
    fn get(&self, content: Content, decode: impl FnOnce() -> Result<Bytes, Fault>) -> Result<Bytes, Fault> {
        let mut images = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let image = Arc::clone(images.entry(content).or_default());
        drop(images);
        image.get_or_init(decode).clone()
    }
}

async fn finished(done: Done<Result<Result<ReadyRow, Fault>>>) -> Result<Early> {
    // What other people's code makes of odd bytes is a bad row, not the end of the job.
    let broken = || (Ok(Err(Fault::new("decode_failed", "the preparation broke down on this row"))), Duration::ZERO);
    let (row, taken) = done.await.unwrap_or_else(|_| broken());
    Ok((row?.map_err(Fault::into_row), taken))
}

impl Recipe {
    fn row(
        &self,
        row: &InputRow<'_>,
        fetched: Option<&Result<Bytes, Fault>>,
        decoded: &Decoded,
    ) -> Result<ReadyRow, Fault> {
        let bytes = match (&row.image, fetched) {
            (_, Some(fetched)) => fetched.as_ref().map_err(Fault::clone)?,
            (ImageCell::Bytes(bytes), None) => *bytes,
            (ImageCell::Null | ImageCell::Uri(_), None) => return Err(Fault::new("null_image", "the image is null")),
        };
        // Captions first: they cost nothing beside an image that would be decoded in vain.
        let captions = self.captions(&row.captions)?;
        let content = Sha256::digest(bytes).into();
        let pixels = decoded.get(content, || self.image(bytes))?;
        Ok(ReadyRow { content, pixels, captions })
    }

    fn image(&self, bytes: &[u8]) -> Result<Bytes, Fault> {
        let limits = DecodeLimits { pixels_max: self.policy.image_pixels_max };
        // The decoders are other people's code on anybody's bytes: what breaks them is a bad row, not the end of the job.
        let pixels = catch_unwind(|| capsieve_prep::prepare_image(bytes, &self.image, &limits));
        let pixels = pixels.map_err(|_| Fault::new("decode_failed", "the decoder broke down on this image"))?;
        pixels.map(Bytes::from).map_err(|error| Fault::new(error.status(), chain(&error)))
    }

    /// The captions of a row. A list needs one caption that can be scored; its others are then without a score.
    fn captions(&self, cell: &CaptionCell<'_>) -> Result<Vec<Result<Vec<u32>, Fault>>, Fault> {
        let null = || Fault::new("null_caption", "the caption is null");
        match cell {
            CaptionCell::Null => Err(null()),
            CaptionCell::One(text) => Ok(vec![Ok(self.caption(text)?)]),
            CaptionCell::List(texts) if texts.len() > CAPTIONS_MAX => {
                let reason = format!("the row has {} captions, at most {CAPTIONS_MAX} are scored", texts.len());
                Err(Fault::new("too_many_captions", reason))
            }
            CaptionCell::List(texts) => {
                let caption = |text: &Option<&str>| text.ok_or_else(null).and_then(|text| self.caption(text));
                let captions: Vec<_> = texts.iter().map(caption).collect();
                if captions.iter().any(Result::is_ok) {
                    return Ok(captions);
                }
                let empty = || Fault::new("null_caption", "the list of captions is empty");
                Err(captions.into_iter().find_map(Result::err).unwrap_or_else(empty))
            }
        }
    }

    fn caption(&self, text: &str) -> Result<Vec<u32>, Fault> {
        if text.len() > CAPTION_BYTES_MAX {
            let reason = format!("the caption has {} bytes, at most {CAPTION_BYTES_MAX} are tokenised", text.len());
            return Err(Fault::new("caption_too_long", reason));
        }
        let tokens = match self.policy.tokens_max {
            Some(max) => self.tokenizer.encode_truncated(text, max.min(self.positions)),
            None => self.tokenizer.encode(text),
        };
        let tokens = tokens.map_err(|error| Fault::new("caption_failed", chain(&error)))?;
        if tokens.len() > self.positions {
            let (count, max) = (tokens.len(), self.positions);
            let reason = format!(
                "the caption has {count} tokens, the model takes {max}; --max-caption-tokens {max} would cut it"
            );
            return Err(Fault::new("caption_too_long", reason));
        }
        Ok(tokens)
    }
}

/// A row's scores; none where a caption was not scored, and none at all where the engine's arithmetic overflowed.
pub(crate) fn row_score(scores: Vec<Result<PairScore, &'static str>>, heads: Heads) -> RowScore {
    let finite = |s: &PairScore| (!heads.itm || s.itm.is_finite()) && (!heads.cosine || s.cosine.is_finite());
    if !scores.iter().flatten().all(finite) {
        let reason = "the score is not a number: the model overflows on this row, try --precision bf16 or f32";
        return Fault::new("not_finite", reason).into_row();
    }
    let score = |scored: Result<PairScore, _>| match scored {
        Ok(s) => {
            CaptionScore { itm: heads.itm.then_some(s.itm), cosine: heads.cosine.then_some(s.cosine), fault: None }
        }
        Err(fault) => CaptionScore { fault: Some(fault), ..CaptionScore::default() },
    };
    RowScore { status: "ok", error: None, scores: scores.into_iter().map(score).collect() }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn an_image_is_decoded_once_and_others_beside_it() {
        let (decoded, calls, both) = (Decoded::default(), AtomicUsize::new(0), Barrier::new(2));
        let get = |content: u8| {
            let decode = || {
                calls.fetch_add(1, Ordering::Relaxed);
                // Two images are being decoded at this moment.
                both.wait();
                if content == 0 { Ok(Bytes::from_static(b"pixels")) } else { Err(Fault::new("decode_failed", "bad")) }
            };
            decoded.get([content; 32], decode)
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = [0, 1, 0, 1, 0].map(|content| scope.spawn(move || (content, get(content)))).into();
            for thread in threads {
                let (content, pixels) = thread.join().unwrap();
                assert_eq!(pixels.is_ok(), content == 0, "{pixels:?}");
            }
        });
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    }
}
