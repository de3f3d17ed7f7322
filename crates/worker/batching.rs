//! Continuous batching: the rows of successive chunks fill one engine batch after another, and a chunk is done when its
//! last row is.

use std::collections::VecDeque;

use capsieve_engine::{Batch, Config, Device, Heads, ItmToken, Options, PairScore, Scorer};
use capsieve_store::{CaptionScore, RowScore};

use crate::engine::{EngineChoice, Engines, Finished, Places, Pool};
use crate::limits::{BATCH_TOKENS, BATCHES_WAITING, CHUNK_ROWS, CHUNKS_OPEN};
use crate::pipeline::{Prepared, Scored};
use crate::prepare::{Fault, ReadyRow};
use crate::{Progress, Result};

/// Images of a batch where the user does not say: enough rows that every product runs at full speed and the weights are
/// read once for several images; more only takes memory (0.25 MB a token row of the large model).
const IMAGES_LARGE: usize = 8;
const IMAGES_SMALL: usize = 32;
/// Images of a batch on a card: 58 images of 577 tokens fill the 132 multiprocessors of an H100 to 99 % with tiles of
/// 128 x 256; 64 would leave a last wave nearly empty.
const IMAGES_CARD: usize = 58;
/// Caption tokens of a text pass on a card: all captions of a batch in one.
const TOKENS_CARD: usize = BATCH_TOKENS;
/// Width from which a model counts as large.
const LARGE_FROM: usize = 512;

/// The engine's options for a model of this shape on the first of these devices.
pub fn engine_options(
    config: &Config,
    choice: &EngineChoice,
    engines: &Engines,
    heads: Heads,
    itm_token: ItmToken,
) -> Options {
    let EngineChoice { batch_size, threads, .. } = *choice;
    let (device, precision) = (engines.devices[0], engines.precision);
    let (images, tokens_max) = match device {
        Device::Cuda(_) => (IMAGES_CARD, TOKENS_CARD),
        Device::Cpu if config.vision.hidden >= LARGE_FROM => (IMAGES_LARGE, config.text.positions),
        Device::Cpu => (IMAGES_SMALL, config.text.positions),
    };
    let images_max = if batch_size == 0 { images } else { batch_size };
    Options { device, precision, threads, images_max, tokens_max, heads, itm_token }
}

/// Gathers rows into batches and hands out finished chunks in order, whatever the order of the batches.
pub(crate) struct Batcher {
    pool: Pool,
    heads: Heads,
    progress: Progress,
    batch: Batch,
    /// Of the batch that is gathered.
    places: Places,
    /// Batches that were scored, for their memory.
    spare: Vec<Batch>,
    open: VecDeque<OpenChunk>,
    /// Number of the first open chunk.
    first_open: u64,
    /// Time spent in the engines.
    pub(crate) seconds: f64,
    /// Pairs scored.
    pub(crate) pairs: u64,
}

struct OpenChunk {
    prepared: arrow_array::RecordBatch,
    rows: Vec<Option<RowScore>>,
    missing: usize,
}

impl Batcher {
    pub(crate) fn new(scorers: Vec<Box<dyn Scorer>>, heads: Heads, progress: Progress) -> Self {
        let pool = Pool::new(scorers);
        let batch = Batch::new(pool.info().config.vision.image_size);
        Self {
            pool,
            heads,
            progress,
            batch,
            places: Vec::new(),
            spare: Vec::new(),
            open: VecDeque::new(),
            first_open: 0,
            seconds: 0.0,
            pairs: 0,
        }
    }

    /// Takes a chunk's rows; scores whenever a batch is full.
    pub(crate) fn push(&mut self, prepared: Prepared) -> Result<()> {
        let chunk = self.first_open + self.open.len() as u64;
        let count = prepared.rows.len();
        let open = OpenChunk { prepared: prepared.batch, rows: vec![None; count], missing: count };
        self.open.push_back(open);
        for (row, prepared) in prepared.rows.into_iter().enumerate() {
            match prepared {
                Ok(ready) => self.add(chunk, row, ready)?,
                Err(fault) => self.finish(chunk, row, fault.into_row()),
            }
        }
        let batches = self.pool.under_way + 1;
        if self.open.len() > CHUNKS_OPEN + batches * (self.pool.info().images_max / CHUNK_ROWS + 1) {
            self.finish_all()?;
        }
        Ok(())
    }

    fn add(&mut self, chunk: u64, row: usize, ready: ReadyRow) -> Result<()> {
        self.batch.push_image(&ready.pixels);
        for tokens in ready.captions.iter().flatten() {
            self.batch.push_caption(tokens);
        }
        self.places.push((chunk, row, ready.captions.iter().map(Option::is_some).collect()));
        if self.batch.images() == self.pool.info().images_max || self.batch.tokens() >= BATCH_TOKENS {
            self.flush()?;
        }
        Ok(())
    }

    /// Gives the batch to the engines; waits for one where all have enough to do.
    fn flush(&mut self) -> Result<()> {
        if self.places.is_empty() {
            return Ok(());
        }
        while self.pool.full() {
            self.take()?;
        }
        let empty = self.spare.pop().unwrap_or_else(|| Batch::new(self.pool.info().config.vision.image_size));
        let batch = std::mem::replace(&mut self.batch, empty);
        self.pool.submit(batch, std::mem::take(&mut self.places));
        Ok(())
    }

    /// Scores what is in the batch, and waits for all batches.
    pub(crate) fn finish_all(&mut self) -> Result<()> {
        self.flush()?;
        while self.pool.under_way > 0 {
            self.take()?;
        }
        Ok(())
    }

    /// Waits for a batch and hands its scores to their rows.
    fn take(&mut self) -> Result<()> {
        let Finished { mut batch, places, scores, seconds } = self.pool.take();
        let scores = scores?;
        batch.clear();
        if self.spare.len() <= BATCHES_WAITING {
            self.spare.push(batch);
        }
        self.seconds += seconds;
        self.pairs += scores.len() as u64;
        self.progress.add_pairs(scores.len() as u64);
        let mut scores = scores.into_iter();
        for (chunk, row, captions) in places {
            let of_row = captions.into_iter().map(|scored| scored.then(|| scores.next().expect("a score a caption")));
            let score = row_score(of_row.collect(), self.heads);
            self.finish(chunk, row, score);
        }
        assert!(scores.next().is_none(), "a caption for each score");
        Ok(())
    }

    fn finish(&mut self, chunk: u64, row: usize, score: RowScore) {
        self.progress.add_row(score.status == "ok");
        let open = &mut self.open[(chunk - self.first_open) as usize];
        assert!(open.rows[row].replace(score).is_none(), "row {row} was scored twice");
        open.missing -= 1;
    }

    /// The oldest chunk, if all its rows are done.
    pub(crate) fn pop(&mut self) -> Option<Scored> {
        if self.open.front()?.missing > 0 {
            return None;
        }
        let chunk = self.open.pop_front()?;
        self.first_open += 1;
        let rows = chunk.rows.into_iter().map(|row| row.expect("no row is missing")).collect();
        Some(Scored { batch: chunk.prepared, rows })
    }
}

/// A row's scores; none where a caption was not scored, and none at all where the engine's arithmetic overflowed.
fn row_score(scores: Vec<Option<PairScore>>, heads: Heads) -> RowScore {
    let finite = |s: &PairScore| (!heads.itm || s.itm.is_finite()) && (!heads.cosine || s.cosine.is_finite());
    if !scores.iter().flatten().all(finite) {
        let reason = "the score is not a number: the model overflows on this row, try --precision bf16 or f32";
        return Fault::new("not_finite", reason).into_row();
    }
    let score =
        |s: PairScore| CaptionScore { itm: heads.itm.then_some(s.itm), cosine: heads.cosine.then_some(s.cosine) };
    let scores = scores.into_iter().map(|scored| scored.map_or_else(CaptionScore::default, score)).collect();
    RowScore { status: "ok", error: None, scores }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_that_is_not_a_number_is_none() {
        let heads = Heads { itm: true, cosine: true };
        let pair = |itm, cosine| Some(PairScore { itm_logits: [0.0; 2], itm, cosine });
        assert_eq!(row_score(vec![pair(0.5, 0.1), None], heads).status, "ok");
        for bad in [pair(f32::NAN, 0.1), pair(0.5, f32::INFINITY)] {
            let row = row_score(vec![pair(0.5, 0.1), bad], heads);
            assert_eq!((row.status, row.scores.len()), ("not_finite", 0));
        }
        // A head that is off is NaN by contract.
        assert_eq!(row_score(vec![pair(0.5, f32::NAN)], Heads { itm: true, cosine: false }).status, "ok");
    }
}
