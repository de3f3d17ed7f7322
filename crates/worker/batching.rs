//! Continuous batching: the rows of successive chunks fill one engine batch after another, and a chunk is done when its
//! last row is.

use std::collections::VecDeque;
use std::time::Instant;

use capsieve_engine::{Batch, Config, Heads, ItmToken, Options, PairScore, Scorer};
use capsieve_store::{CaptionScore, RowScore};

use crate::limits::{BATCH_TOKENS, CHUNK_ROWS, CHUNKS_OPEN};
use crate::pipeline::{Prepared, Scored};
use crate::prepare::ReadyRow;
use crate::{Progress, Result};

/// Images of a batch where the user does not say: enough rows that every product runs at full speed and the weights are
/// read once for several images; more only takes memory (0.25 MB a token row of the large model).
const IMAGES_LARGE: usize = 8;
const IMAGES_SMALL: usize = 32;
/// Width from which a model counts as large.
const LARGE_FROM: usize = 512;

/// The engine's options for a model of this shape; `batch_size` 0 chooses one.
pub fn engine_options(
    config: &Config,
    batch_size: usize,
    threads: usize,
    heads: Heads,
    itm_token: ItmToken,
) -> Options {
    let auto = if config.vision.hidden >= LARGE_FROM { IMAGES_LARGE } else { IMAGES_SMALL };
    let images_max = if batch_size == 0 { auto } else { batch_size };
    Options { threads, images_max, tokens_max: config.text.positions, heads, itm_token }
}

/// Gathers rows into batches and hands out finished chunks in order.
pub(crate) struct Batcher {
    scorer: Box<dyn Scorer>,
    heads: Heads,
    progress: Progress,
    batch: Batch,
    /// For each image of the batch: its chunk (counted from the first ever), its row there, and which of the row's
    /// captions are in the batch.
    places: Vec<(u64, usize, Vec<bool>)>,
    open: VecDeque<OpenChunk>,
    /// Number of the first open chunk.
    first_open: u64,
    scores: Vec<PairScore>,
    /// Time spent in the engine.
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
    pub(crate) fn new(scorer: Box<dyn Scorer>, heads: Heads, progress: Progress) -> Self {
        let batch = Batch::new(scorer.info().config.vision.image_size);
        Self {
            scorer,
            heads,
            progress,
            batch,
            places: Vec::new(),
            open: VecDeque::new(),
            first_open: 0,
            scores: Vec::new(),
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
        if self.open.len() > CHUNKS_OPEN + self.scorer.info().images_max / CHUNK_ROWS {
            self.flush()?;
        }
        Ok(())
    }

    fn add(&mut self, chunk: u64, row: usize, ready: ReadyRow) -> Result<()> {
        self.batch.push_image(&ready.pixels);
        for tokens in ready.captions.iter().flatten() {
            self.batch.push_caption(tokens);
        }
        self.places.push((chunk, row, ready.captions.iter().map(Option::is_some).collect()));
        if self.batch.images() == self.scorer.info().images_max || self.batch.tokens() >= BATCH_TOKENS {
            self.flush()?;
        }
        Ok(())
    }

    /// Scores what is in the batch.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.places.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        self.scorer.score(&self.batch, &mut self.scores)?;
        self.seconds += start.elapsed().as_secs_f64();
        self.pairs += self.scores.len() as u64;
        self.progress.add_pairs(self.scores.len() as u64);
        self.batch.clear();
        let (places, scores) = (std::mem::take(&mut self.places), std::mem::take(&mut self.scores));
        let mut next = scores.iter();
        for (chunk, row, captions) in places {
            let heads = self.heads;
            let mut score = |scored: bool| match scored.then(|| next.next().expect("a score for each caption")) {
                None => CaptionScore::default(),
                Some(score) => {
                    CaptionScore { itm: heads.itm.then_some(score.itm), cosine: heads.cosine.then_some(score.cosine) }
                }
            };
            let scores = captions.into_iter().map(&mut score).collect();
            self.finish(chunk, row, RowScore { status: "ok", error: None, scores });
        }
        assert!(next.next().is_none(), "a caption for each score");
        self.scores = scores;
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
