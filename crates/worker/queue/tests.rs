//! Fair shares, latency, and what is left of a call that was dropped.

use std::sync::mpsc::{Receiver, Sender, channel};

use capsieve_engine::{Checkpoint, Precision, Scorer, SyntheticSize};

use futures::FutureExt;
use tokio::sync::oneshot;

use super::*;
use crate::engine::Pool;
use crate::limits::PART_PAIRS;
use crate::prepare::row_score;

const BOTH: Heads = Heads { itm: true, cosine: true };
/// Long enough that nothing else happens by chance.
const QUIET: Duration = Duration::from_millis(150);
const TIMEOUT: Duration = Duration::from_secs(20);

/// Scores the first pair ever with 0, the next with 1 and so on; waits for a word before each batch and says how many images
/// it had.
struct Gated {
    info: Info,
    word: Receiver<()>,
    begun: Sender<usize>,
    next: u16,
}

impl Scorer for Gated {
    fn info(&self) -> &Info {
        &self.info
    }

    fn score(&mut self, batch: &Batch, out: &mut Vec<PairScore>) -> Result<(), capsieve_engine::Error> {
        assert!(batch.tokens() <= BATCH_TOKENS, "{} tokens in a batch", batch.tokens());
        self.begun.send(batch.images()).unwrap();
        self.word.recv().unwrap();
        out.clear();
        let first = self.next;
        self.next += u16::try_from(batch.captions()).unwrap();
        let score = |n| PairScore { itm_logits: [0.0; 2], itm: f32::from(n), cosine: 0.5 };
        out.extend((first..self.next).map(score));
        Ok(())
    }
}

/// Dropped from the top: the engine must not wait for a word that never comes.
struct Bench {
    go: Sender<()>,
    begun: Receiver<usize>,
    pool: Pool,
}

fn bench(images_max: usize, latency: Option<Duration>) -> Bench {
    bench_with(images_max, latency, &Budget::default())
}

fn bench_with(images_max: usize, latency: Option<Duration>, memory: &Budget) -> Bench {
    let config = Checkpoint::synthetic(SyntheticSize::Tiny, 0).config().clone();
    let info = Info { config, device: "none".to_owned(), precision: Precision::F32, images_max, tokens_max: 512 };
    let ((go, word), (begin, begun)) = (channel(), channel());
    let pool = Pool::start(vec![Box::new(Gated { info, word, begun: begin, next: 0 })], latency, memory, false);
    Bench { pool, go, begun }
}

impl Bench {
    fn join(&self) -> Share {
        self.pool.queue().join(BOTH, Progress::default())
    }

    /// Images of the batch that an engine has begun.
    fn batch(&self) -> usize {
        self.begun.recv_timeout(TIMEOUT).unwrap()
    }

    fn is_idle(&self) -> bool {
        self.begun.recv_timeout(QUIET).is_err()
    }
}

fn row(content: Content, captions: Vec<Result<Vec<u32>, Fault>>) -> Result<ReadyRow, RowScore> {
    Ok(ReadyRow { content, pixels: vec![0; 64 * 64 * 3].into(), captions })
}

/// The content of another image each time.
fn another() -> Content {
    static IMAGES: AtomicU64 = AtomicU64::new(0);
    let mut content = Content::default();
    content[..8].copy_from_slice(&IMAGES.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    content
}

fn rows(count: usize, captions: usize) -> Vec<Result<ReadyRow, RowScore>> {
    (0..count).map(|_| row(another(), vec![Ok(vec![101, 102]); captions])).collect()
}

fn submit(share: &Share, count: usize) -> Scores {
    share.submit(rows(count, 1), Held::default())
}

fn is_done(scores: &mut Scores) -> bool {
    let give_up = std::time::Instant::now() + QUIET;
    loop {
        match scores.0.try_recv() {
            Ok(rows) => return rows.unwrap().iter().all(|row| row.status == "ok"),
            Err(oneshot::error::TryRecvError::Closed) => panic!("the scores are lost"),
            Err(_) if std::time::Instant::now() > give_up => return false,
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

#[test]
fn a_small_call_does_not_wait_for_a_large_one() {
    let bench = bench(8, Some(Duration::from_secs(60)));
    let (large, small) = (bench.join(), bench.join());
    let _large = submit(&large, 10_000);
    assert_eq!(bench.batch(), 8);
    let mut scores = submit(&small, 4);
    bench.go.send(()).unwrap();
    // The next batch is shared half and half.
    assert_eq!(bench.batch(), 8);
    bench.go.send(()).unwrap();
    assert!(is_done(&mut scores), "the small call is done with the first batch after it came");
    drop(large);
    bench.go.send(()).unwrap();
}

/// A row of so many captions of so many tokens each; every third one has no score.
fn long_row(captions: usize, tokens: usize) -> Vec<Result<ReadyRow, RowScore>> {
    let caption = |i| if i % 3 == 2 { Err(Fault::new("null_caption", "")) } else { Ok(vec![7; tokens]) };
    vec![row(another(), (0..captions).map(caption).collect())]
}

#[test]
fn a_row_of_many_captions_goes_in_parts_and_comes_back_whole() {
    for (captions, tokens) in [(1, 2), (2, 512), (3000, 2), (900, 100), (100, 512), (3 * PART_PAIRS / 2, 2)] {
        let bench = bench(8, Some(Duration::ZERO));
        let (share, other) = (bench.join(), bench.join());
        let mut scores = share.submit(long_row(captions, tokens), Held::default());
        bench.batch();
        let mut small = submit(&other, 1);
        bench.go.send(()).unwrap();
        let mut rows = loop {
            match scores.0.try_recv() {
                Ok(rows) => break rows.unwrap(),
                Err(oneshot::error::TryRecvError::Closed) => panic!("the scores are lost"),
                Err(oneshot::error::TryRecvError::Empty) => {
                    if bench.begun.recv_timeout(Duration::from_millis(5)).is_ok() {
                        bench.go.send(()).unwrap();
                    }
                }
            }
        };
        // The other call's pair took one of the numbers in between.
        let row = rows.pop().unwrap();
        assert_eq!((row.status, row.scores.len()), ("ok", captions));
        let numbers: Vec<f32> = row.scores.iter().filter_map(|score| score.itm).collect();
        assert_eq!(numbers.len(), captions - captions / 3);
        assert!(numbers.is_sorted_by(|a, b| a < b), "in order: {numbers:?}");
        assert!(row.scores.iter().enumerate().all(|(i, score)| score.fault.is_some() == (i % 3 == 2)));
        let _ = bench.go.send(());
        assert!(is_done(&mut small));
    }
}

#[test]
fn rows_with_the_same_image_share_its_place() {
    let bench = bench(4, None);
    let (share, other) = (bench.join(), bench.join());
    let images: Vec<Content> = (0..5).map(|_| another()).collect();
    // Images by turns, three rows each, and a row of a fifth image.
    let order = (0..12).map(|i| images[i % 4]).chain([images[4]]);
    let mut scores = share.submit(order.map(|image| row(image, vec![Ok(vec![101, 102])])).collect(), Held::default());
    assert_eq!(bench.batch(), 4, "thirteen rows of five images make a full batch of four");
    assert_eq!(bench.pool.queue().depth(), 1);
    // An image of another call's rows is a new one to this call, and the same to the batch.
    let mut others = other.submit(vec![row(images[4], vec![Ok(vec![7])])], Held::default());
    assert_eq!(bench.pool.queue().depth(), 2);
    share.hurry();
    bench.go.send(()).unwrap();
    assert_eq!(bench.batch(), 1);
    bench.go.send(()).unwrap();
    assert!(is_done(&mut others));
    let rows = scores.0.try_recv().unwrap().unwrap();
    // The engine counts pairs: those of an image one after another.
    let numbers: Vec<f32> = rows.iter().filter_map(|row| row.scores[0].itm).collect();
    let expected = (0..12).map(|i| (i % 4 * 3 + i / 4) as f32).chain([12.0]);
    assert_eq!(numbers, expected.collect::<Vec<f32>>());
    let state = bench.pool.queue().lock();
    assert_eq!((state.images, state.tokens, state.calls.len()), (0, 0, 0));
}

#[test]
fn a_small_call_does_not_wait_for_a_row_of_many_captions() {
    let bench = bench(8, Some(Duration::ZERO));
    let (large, small) = (bench.join(), bench.join());
    // 1.6 million tokens: four hundred batches.
    let _large = large.submit(long_row(6000, 400), Held::default());
    assert_eq!(bench.batch(), 1);
    let mut scores = submit(&small, 4);
    bench.go.send(()).unwrap();
    for _ in 0..2 {
        bench.batch();
        bench.go.send(()).unwrap();
    }
    assert!(is_done(&mut scores), "within two batches");
    drop(large);
    let _ = bench.go.send(());
}

#[test]
fn what_does_not_fit_behind_others_comes_before_them() {
    let bench = bench(100, Some(Duration::ZERO));
    let shares: Vec<Share> = (0..4).map(|_| bench.join()).collect();
    let _busy = submit(&shares[0], 1);
    bench.batch();
    let _others = [submit(&shares[1], 1000), submit(&shares[2], 1000)];
    // As many tokens as a batch takes: beside any other row it does not fit.
    let mut scores = shares[3].submit(long_row(12, BATCH_TOKENS / 8), Held::default());
    for _ in 0..5 {
        bench.go.send(()).unwrap();
        bench.batch();
    }
    assert!(is_done(&mut scores), "within five batches");
    drop(shares);
    bench.go.send(()).unwrap();
}

#[test]
fn many_calls_share_alike_whatever_their_rows_cost() {
    let bench = bench(12, Some(Duration::from_secs(60)));
    // The engine is busy while they come.
    let first = bench.join();
    let _first = submit(&first, 12);
    bench.batch();
    let shares: Vec<Share> = (0..3).map(|_| bench.join()).collect();
    // A row of the first costs eight times a row of the others.
    let _scores: Vec<Scores> = shares
        .iter()
        .zip([8, 1, 1])
        .map(|(share, captions)| share.submit(rows(300, captions), Held::default()))
        .collect();
    for _ in 0..30 {
        bench.go.send(()).unwrap();
        bench.batch();
    }
    let pairs: Vec<u64> = shares.iter().map(|share| share.spent().1).collect();
    let (least, most) = (*pairs.iter().min().unwrap(), *pairs.iter().max().unwrap());
    assert!(most - least <= 3 * (QUANTUM_PAIRS as u64 + 8), "{pairs:?} pairs were scored");
    drop(shares);
    bench.go.send(()).unwrap();
}

#[test]
fn rows_wait_for_company_no_longer_than_the_latency() {
    let patient = bench(8, None);
    let share = patient.join();
    let mut scores = submit(&share, 3);
    assert!(patient.is_idle(), "without a bound the batch must be full");
    share.hurry();
    assert_eq!(patient.batch(), 3);
    patient.go.send(()).unwrap();
    assert!(is_done(&mut scores));
    let bounded = bench(8, Some(QUIET * 2));
    let share = bounded.join();
    let mut scores = submit(&share, 3);
    assert!(bounded.is_idle(), "others may come");
    assert_eq!(bounded.batch(), 3);
    bounded.go.send(()).unwrap();
    assert!(is_done(&mut scores));
}

#[test]
fn rows_wait_for_no_company_while_somebody_waits_for_memory() {
    let memory = Budget::new(1 << 20);
    let bench = bench_with(8, None, &memory);
    let share = bench.join();
    let all = memory.try_take(1 << 20).unwrap();
    let mut waiting = Box::pin(memory.take(1 << 20));
    assert!((&mut waiting).now_or_never().is_none());
    let mut scores = submit(&share, 3);
    assert_eq!(bench.batch(), 3, "company may need what they hold");
    bench.go.send(()).unwrap();
    assert!(is_done(&mut scores));
    drop((waiting, all));
}

#[test]
fn a_dropped_call_costs_at_most_the_batch_that_was_begun() {
    let bench = bench(8, Some(Duration::from_millis(1)));
    let share = bench.join();
    let scores = submit(&share, 1000);
    assert_eq!(bench.batch(), 8);
    drop((share, scores));
    let queue = bench.pool.queue();
    assert_eq!(queue.depth(), 0, "its rows do not even wait for the engine");
    bench.go.send(()).unwrap();
    assert!(bench.is_idle(), "what nobody waits for is not scored");
    let (tokens, calls) = {
        let state = queue.lock();
        (state.tokens, state.calls.len())
    };
    assert_eq!((tokens, calls), (0, 0));
    // The queue goes on.
    let share = bench.join();
    let mut scores = submit(&share, 2);
    assert_eq!(bench.batch(), 2);
    bench.go.send(()).unwrap();
    assert!(is_done(&mut scores));
}

#[test]
fn memory_is_given_back_with_the_last_pixels() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (bench, budget) = (bench(2, Some(Duration::ZERO)), crate::budget::Budget::new(1 << 20));
    let share = bench.join();
    let held = runtime.block_on(budget.take(1 << 19));
    let mut scores = share.submit(rows(4, 1), held);
    for _ in 0..2 {
        bench.batch();
        assert_eq!(budget.free(), Some(1 << 19), "rows of the chunk still wait");
        bench.go.send(()).unwrap();
    }
    assert!(is_done(&mut scores));
    assert_eq!(budget.free(), Some(1 << 20));
    // A dropped call gives back at once what waits.
    let held = runtime.block_on(budget.take(1 << 20));
    let second = share.submit(rows(4, 1), held);
    bench.batch();
    drop((share, second));
    bench.go.send(()).unwrap();
    assert!(bench.is_idle());
    assert_eq!(budget.free(), Some(1 << 20));
}

#[test]
fn a_score_that_is_not_a_number_is_none() {
    let pair = |itm, cosine| Ok(PairScore { itm_logits: [0.0; 2], itm, cosine });
    assert_eq!(row_score(vec![pair(0.5, 0.1), Err("null_caption")], BOTH).status, "ok");
    for bad in [pair(f32::NAN, 0.1), pair(0.5, f32::INFINITY)] {
        let row = row_score(vec![pair(0.5, 0.1), bad], BOTH);
        assert_eq!((row.status, row.scores.len()), ("not_finite", 0));
    }
    // A head that is off is NaN by contract.
    assert_eq!(row_score(vec![pair(0.5, f32::NAN)], Heads { itm: true, cosine: false }).status, "ok");
}
