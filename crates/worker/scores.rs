//! Rows whose scores are awaited together: the chunk they were prepared in. Scores come back in parts and in any order; the
//! chunk is done when every caption of every row has its score.

use std::sync::{Arc, Mutex, MutexGuard};

use capsieve_engine::PairScore;
use capsieve_store::RowScore;
use tokio::sync::oneshot;

use crate::budget::Held;
use crate::prepare::row_score;
use crate::queue::Call;
use crate::{Error, Result};

/// A caption's score, or the status that says why it has none.
pub(crate) type CaptionResult = Result<PairScore, &'static str>;

/// See the module.
pub(crate) struct Awaited {
    pub(crate) call: Arc<Call>,
    open: Mutex<OpenRows>,
}

struct OpenRows {
    rows: Vec<OpenRow>,
    /// Rows without a result.
    missing: usize,
    done: Option<oneshot::Sender<Result<Vec<RowScore>>>>,
    /// Given back when the pixels are gone.
    held: Held,
}

#[derive(Default)]
struct OpenRow {
    /// Scores that are here, of a row that still waits for others.
    captions: Vec<Option<CaptionResult>>,
    missing: usize,
    result: Option<RowScore>,
}

impl Awaited {
    /// So many rows, and its scores to be. `held` is dropped with the last row's pixels.
    pub(crate) fn new(call: &Arc<Call>, rows: usize, held: Held) -> (Arc<Self>, Scores) {
        let (done, scores) = oneshot::channel();
        let rows: Vec<OpenRow> = std::iter::repeat_with(OpenRow::default).take(rows).collect();
        let open = OpenRows { missing: rows.len(), rows, done: Some(done), held };
        (Arc::new(Self { call: Arc::clone(call), open: Mutex::new(open) }), Scores(scores))
    }

    /// A row will have so many captions.
    pub(crate) fn expect(&self, row: usize, captions: usize) {
        let mut open = self.lock();
        let row = &mut open.rows[row];
        (row.captions, row.missing) = (vec![None; captions], captions);
    }

    /// The captions of a row from `first` on.
    pub(crate) fn score(&self, row: usize, first: usize, captions: Vec<CaptionResult>) {
        let all = {
            let mut open = self.lock();
            let open = &mut open.rows[row];
            open.missing -= captions.len();
            for (place, caption) in open.captions[first..].iter_mut().zip(captions) {
                assert!(place.replace(caption).is_none(), "a caption of row {row} was scored twice");
            }
            if open.missing > 0 {
                return;
            }
            std::mem::take(&mut open.captions)
        };
        let all = all.into_iter().map(|caption| caption.expect("no caption is missing")).collect();
        self.finish(row, row_score(all, self.call.heads));
    }

    /// A row's result.
    pub(crate) fn finish(&self, row: usize, score: RowScore) {
        self.call.progress.add_row(score.status == "ok");
        if score.status != "ok" {
            metrics::counter!("capsieve_rows_failed_total", "reason" => score.status).increment(1);
        }
        let mut open = self.lock();
        assert!(open.rows[row].result.replace(score).is_none(), "row {row} was scored twice");
        open.missing -= 1;
        open.end_if_done();
    }

    /// No rows are done at once.
    pub(crate) fn end_if_done(&self) {
        self.lock().end_if_done();
    }

    /// An engine failed on some of it, and with it the whole.
    pub(crate) fn fail(&self, error: &Arc<capsieve_engine::Error>) {
        let mut open = self.lock();
        open.held = Held::default();
        if let Some(done) = open.done.take() {
            drop(done.send(Err(Error::Scoring(Arc::clone(error)))));
        }
    }

    fn lock(&self) -> MutexGuard<'_, OpenRows> {
        // A panic in here would be a bug of ours; what it left is still a chunk.
        self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl OpenRows {
    fn end_if_done(&mut self) {
        if self.missing > 0 {
            return;
        }
        self.held = Held::default();
        if let Some(done) = self.done.take() {
            let rows = self.rows.drain(..).map(|row| row.result.expect("no row is missing")).collect();
            // Nobody listens where the call was dropped.
            drop(done.send(Ok(rows)));
        }
    }
}

/// The scores of a chunk, once all of its rows have theirs.
pub(crate) struct Scores(pub(crate) oneshot::Receiver<Result<Vec<RowScore>>>);

impl Scores {
    /// Waits for them. Errors: the engine's, or that it broke down.
    pub(crate) async fn wait(&mut self) -> Result<Vec<RowScore>> {
        (&mut self.0).await.unwrap_or(Err(Error::EngineGone))
    }
}
