//! What happens when a stage fails, stalls or panics: the job ends with that stage's error, and nothing is written.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::types::Float32Type;
use arrow_array::{ArrayRef, BinaryArray, Int32Array, RecordBatch, StringArray};
use capsieve_engine::{
    Batch, Checkpoint, Device, Heads, Info, ItmToken, Options, PairScore, Precision, Scorer, SyntheticSize,
};
use capsieve_prep::{ImageSpec, Tokenizer};
use capsieve_store::{ColumnOptions, OutputHeads, OutputOptions, ShardReader};
use futures::stream::{self, StreamExt};
use tempfile::TempDir;

use super::*;
use crate::engine::Pool;
use crate::rows::Ready;
use crate::{CaptionPolicy, Progress};

/// A deadlock must fail, not stall the suite.
const TIMEOUT: Duration = Duration::from_secs(60);
const HEADS: Heads = Heads { itm: true, cosine: false };
const ROWS: usize = 5;

/// Gives the first caption ever the score 0, the next 1 and so on, and fails where it is told to.
struct Counting {
    info: Info,
    next: u64,
    behaviour: Behaviour,
}

enum Behaviour {
    Score,
    FailAt(u64),
    PanicAt(u64),
    /// Waits for a word before each batch.
    Wait(Receiver<()>),
}

impl Scorer for Counting {
    fn info(&self) -> &Info {
        &self.info
    }

    fn score(&mut self, batch: &Batch, out: &mut Vec<PairScore>) -> Result<(), capsieve_engine::Error> {
        assert!(batch.images() <= self.info.images_max, "the batch is as large as asked for");
        let after = self.next + batch.captions() as u64;
        match &self.behaviour {
            Behaviour::FailAt(pair) if after > *pair => {
                return Err(capsieve_engine::Error::Batch { reason: "failed on purpose".to_owned() });
            }
            Behaviour::PanicAt(pair) if after > *pair => panic!("on purpose"),
            Behaviour::Wait(word) => word.recv().unwrap(),
            _ => {}
        }
        out.clear();
        out.extend((self.next..after).map(|n| PairScore { itm_logits: [0.0; 2], itm: n as f32, cosine: f32::NAN }));
        self.next = after;
        Ok(())
    }
}

fn scorer(images_max: usize, behaviour: Behaviour) -> Box<dyn Scorer> {
    let config = Checkpoint::synthetic(SyntheticSize::Tiny, 0).config().clone();
    let info = Info { config, device: "none".to_owned(), precision: Precision::F32, images_max, tokens_max: 512 };
    Box::new(Counting { info, next: 0, behaviour })
}

/// A BMP of one pixel, of another colour each time: equal images are one to the engine.
fn image() -> Vec<u8> {
    static COLOURS: AtomicU64 = AtomicU64::new(0);
    coloured(COLOURS.fetch_add(1, Ordering::Relaxed))
}

fn coloured(colour: u64) -> Vec<u8> {
    let mut bytes = b"BM\x3a\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\x18\0".to_vec();
    bytes.resize(54, 0);
    bytes.extend(&colour.to_le_bytes()[..3]);
    bytes.push(0);
    bytes
}

/// Five rows; `number` makes the type of a column that is only carried along.
fn rows(image: fn() -> Option<Vec<u8>>, number: ArrayRef) -> RecordBatch {
    let images: BinaryArray = (0..ROWS).map(|_| image()).collect();
    let captions = StringArray::from(vec!["a dog"; ROWS]);
    let columns: [(&str, ArrayRef, bool); 3] =
        [("image", Arc::new(images), true), ("caption", Arc::new(captions), true), ("number", number, true)];
    RecordBatch::try_from_iter_with_nullable(columns).unwrap()
}

fn good() -> RecordBatch {
    rows(|| Some(image()), Arc::new(Int32Array::from(vec![7; ROWS])))
}

type Read = capsieve_store::Result<RecordBatch>;

/// A job on `read`, whose output is out.parquet of the folder.
struct Job<I> {
    folder: TempDir,
    read: I,
    scorers: Vec<Box<dyn Scorer>>,
    fail_on_row: bool,
}

impl<I: Iterator<Item = Read> + Send + 'static> Job<I> {
    fn new(read: I, scorer: Box<dyn Scorer>) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), read, scorers: vec![scorer], fail_on_row: false }
    }

    fn output(&self) -> Location {
        Location::parse(self.folder.path().join("out.parquet").to_str().unwrap()).unwrap()
    }

    /// Runs it on threads of its own; `None` if it panicked.
    fn run(self) -> (TempDir, Option<Result<Totals>>) {
        let output = self.output();
        let Self { folder, read, scorers, fail_on_row } = self;
        let (ended, end) = channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
            let job = runtime.spawn(async move {
                let columns = Columns::detect(good().schema_ref(), &ColumnOptions::default(), "rows").unwrap();
                let writer = ShardWriter::create(&output, good().schema_ref(), &columns, &options()).await.unwrap();
                let parts = (ImageSpec::blip(64), Tokenizer::bert_uncased());
                let preparer = Preparer::new(1, parts, 512, CaptionPolicy::default()).unwrap();
                let pool = Pool::start(scorers, None, &Budget::default(), false);
                run(Stages {
                    input: Ready(stream::iter(read)),
                    earlier: None,
                    images: Images {
                        beside: Some(output),
                        access: Access::everything(),
                        fetcher: Arc::new(Fetcher::new(0)),
                    },
                    columns,
                    preparer: Arc::new(preparer),
                    share: pool.queue().join(HEADS, Progress::default()),
                    budget: Budget::default(),
                    output: Output::Shard(Box::new(writer)),
                    first_row: 0,
                    fail_on_row,
                })
                .await
            });
            drop(ended.send(runtime.block_on(job).ok()));
        });
        (folder, end.recv_timeout(TIMEOUT).expect("the job ends"))
    }

    fn run_to_error(self) -> Error {
        let (folder, ended) = self.run();
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "nothing is written, found {left:?}");
        ended.expect("an error, no panic").expect_err("the job fails")
    }
}

fn options() -> OutputOptions {
    OutputOptions::new(OutputHeads { itm: true, cosine: false })
}

fn chunks(count: usize) -> impl Iterator<Item = Read> + Send {
    (0..count).map(|_| Ok(good()))
}

fn scores(folder: &TempDir) -> Vec<Option<f32>> {
    let location = Location::parse(folder.path().join("out.parquet").to_str().unwrap()).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let reader = ShardReader::open(&location, &ColumnOptions::default()).await.unwrap();
        let batches: Vec<_> = reader.into_stream(1000).collect().await;
        let scores = |batch: &Read| {
            let column = batch.as_ref().unwrap().column_by_name("itm_score").unwrap().clone();
            column.as_primitive::<Float32Type>().iter().collect::<Vec<_>>()
        };
        batches.iter().flat_map(scores).collect()
    })
}

#[test]
fn rows_stay_in_order_across_chunks_and_batches() {
    for images_max in [1, 3, 5, 12, 1000] {
        let (folder, ended) = Job::new(chunks(9), scorer(images_max, Behaviour::Score)).run();
        let totals = ended.unwrap().unwrap();
        assert_eq!((totals.written.rows, totals.pairs), (45, 45));
        assert_eq!(scores(&folder), (0..45).map(|n| Some(n as f32)).collect::<Vec<_>>(), "batches of {images_max}");
    }
}

#[test]
fn a_failing_reader_ends_the_job() {
    for before in [0, 1, 20] {
        let read = chunks(before).chain([Err(capsieve_store::Error::Cut { uri: "rows".to_owned() })]);
        let error = Job::new(read, scorer(3, Behaviour::Score)).run_to_error();
        assert!(matches!(error, Error::Store(capsieve_store::Error::Cut { .. })), "{error}");
    }
}

#[test]
fn a_failing_engine_ends_the_job() {
    for pair in [0, 7, 99] {
        let error = Job::new(chunks(20), scorer(3, Behaviour::FailAt(pair))).run_to_error();
        assert!(
            matches!(&error, Error::Scoring(source) if matches!(**source, capsieve_engine::Error::Batch { .. })),
            "{error}"
        );
    }
}

#[test]
fn a_failing_writer_ends_the_job_and_the_stages_before_it() {
    let read = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&read);
    // The schema changes: the writer cannot encode these rows.
    let odd = || Ok(rows(|| Some(image()), Arc::new(StringArray::from(vec!["seven"; ROWS]))));
    let endless = std::iter::once(odd()).chain((0..100_000).map(|_| Ok(good()))).inspect(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    let error = Job::new(endless, scorer(3, Behaviour::Score)).run_to_error();
    assert!(matches!(error, Error::Store(capsieve_store::Error::Encode { .. })), "{error}");
    assert!(read.load(Ordering::Relaxed) < 1000, "reading ends with the writer");
}

#[test]
fn a_failing_commit_leaves_what_was_there() {
    let job = Job::new(chunks(3), scorer(3, Behaviour::Score));
    let path = job.folder.path().join("out.parquet");
    let other = path.clone();
    // Somebody else's output appears while the job runs.
    let read = chunks(3).chain(std::iter::once_with(move || {
        std::fs::write(&other, "mine").unwrap();
        Ok(good())
    }));
    let (folder, ended) = Job { folder: job.folder, read, scorers: job.scorers, fail_on_row: false }.run();
    assert!(matches!(ended, Some(Err(Error::Store(capsieve_store::Error::Exists { .. })))), "{ended:?}");
    assert_eq!(std::fs::read(path).unwrap(), b"mine");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file stays");
}

#[test]
fn the_first_bad_row_ends_a_strict_job() {
    let read = chunks(2).chain([Ok(rows(|| None, Arc::new(Int32Array::from(vec![7; ROWS]))))]).chain(chunks(50));
    let job = Job { fail_on_row: true, ..Job::new(read, scorer(3, Behaviour::Score)) };
    let error = job.run_to_error();
    assert!(matches!(error, Error::Row { row: 10, status: "null_image", .. }), "{error}");
}

#[test]
fn a_panic_is_no_deadlock() {
    let error = Job::new(chunks(50), scorer(3, Behaviour::PanicAt(30))).run_to_error();
    assert!(matches!(error, Error::EngineGone), "{error}");
}

#[test]
fn a_slow_engine_holds_the_reader_back() {
    let read = Arc::new(AtomicU64::new(0));
    let (go, word) = channel();
    let count = Arc::clone(&read);
    let batches = chunks(200).inspect(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    let job = Job::new(batches, scorer(ROWS, Behaviour::Wait(word)));
    let running = std::thread::spawn(move || job.run());
    std::thread::sleep(Duration::from_millis(300));
    let ahead = read.load(Ordering::Relaxed) as usize;
    // One in the hands of each stage before the engine, the engine's own, those that wait for it, the channels between.
    assert!(ahead <= CHUNKS_READ + CHUNKS_PREPARED + 5, "{ahead} chunks were read for an engine that waits");
    (0..200).for_each(|_| go.send(()).unwrap());
    assert_eq!(running.join().unwrap().1.unwrap().unwrap().written.rows, 1000);
}

#[test]
fn rows_without_a_score_do_not_pile_up_behind_a_waiting_one() {
    let read = Arc::new(AtomicU64::new(0));
    let (count, seen) = (Arc::clone(&read), Arc::clone(&read));
    let bad = (0..2000).map(|_| Ok(rows(|| None, Arc::new(Int32Array::from(vec![7; ROWS])))));
    let batches = chunks(1).chain(bad).inspect(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    let (go, word) = channel();
    // The one good chunk does not fill the batch; it must be scored long before the rows after it are all read.
    let job = Job::new(batches, scorer(1000, Behaviour::Wait(word)));
    let running = std::thread::spawn(move || job.run());
    std::thread::sleep(Duration::from_millis(500));
    let ahead = seen.load(Ordering::Relaxed);
    go.send(()).unwrap();
    let ended = running.join().unwrap().1;
    assert!(ahead < 200, "{ahead} chunks wait for one batch");
    assert_eq!(ended.unwrap().unwrap().written.rows, 5 * 2001);
}

#[test]
fn several_engines_share_the_batches_and_rows_stay_in_order() {
    let checkpoint = Checkpoint::synthetic(SyntheticSize::Tiny, 3);
    let load = |images_max| {
        let options = Options {
            device: Device::Cpu,
            precision: Precision::F32,
            threads: 1,
            images_max,
            tokens_max: 64,
            heads: HEADS,
            itm_token: ItmToken::Cls,
        };
        capsieve_engine::load(&checkpoint, &ImageSpec::blip(64).pixel_lut(), &options).unwrap()
    };
    let batch = |i: usize| {
        let captions: Vec<String> = (0..ROWS).map(|row| format!("dog number {}", i * ROWS + row)).collect();
        let columns: [(&str, ArrayRef); 3] = [
            ("image", Arc::new((0..ROWS).map(|row| Some(coloured((i * ROWS + row) as u64))).collect::<BinaryArray>())),
            ("caption", Arc::new(StringArray::from(captions))),
            ("number", Arc::new(Int32Array::from(vec![7; ROWS]))),
        ];
        RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true))).unwrap()
    };
    let scores = |scorers: Vec<Box<dyn Scorer>>| {
        let read = (0..30).map(move |i| Ok(batch(i)));
        let mut job = Job::new(read, scorer(1, Behaviour::Score));
        job.scorers = scorers;
        let (folder, ended) = job.run();
        assert_eq!(ended.unwrap().unwrap().written.rows, 30 * ROWS as u64);
        self::scores(&folder)
    };
    let want = scores(vec![load(4)]);
    let got = scores(vec![load(4), load(3), load(7)]);
    assert_eq!(want.len(), 30 * ROWS);
    assert!(want.windows(2).any(|pair| pair[0] != pair[1]), "captions differ, so do scores");
    for (i, (want, got)) in want.iter().zip(&got).enumerate() {
        let (want, got) = (want.unwrap(), got.unwrap());
        assert!((want - got).abs() < 1e-5, "row {i}: {want} and {got}");
    }
}

/// A stream of scores that nobody takes: it ends reading, and holds no memory that others wait for.
#[test]
fn who_does_not_take_scores_holds_no_memory() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let read = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&read);
    let endless = (0..1_000_000).map(|_| Ok(good())).inspect(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    // Room for three chunks.
    let budget = Budget::new(3 * (ROWS * 64 * 64 * 3 + (64 << 10)));
    let whole = budget.free();
    let pool = Pool::start(vec![scorer(3, Behaviour::Score)], Some(Duration::ZERO), &Budget::default(), false);
    let (rows, mut scored) = tokio::sync::mpsc::channel(1);
    let stages = Stages {
        earlier: None,
        input: Ready(stream::iter(endless)),
        images: Images { beside: None, access: Access::everything(), fetcher: Arc::new(Fetcher::new(0)) },
        columns: Columns::detect(good().schema_ref(), &ColumnOptions::default(), "rows").unwrap(),
        preparer: Arc::new(
            Preparer::new(1, (ImageSpec::blip(64), Tokenizer::bert_uncased()), 512, CaptionPolicy::default()).unwrap(),
        ),
        share: pool.queue().join(HEADS, Progress::default()),
        budget: budget.clone(),
        output: Output::Rows(rows),
        first_row: 0,
        fail_on_row: false,
    };
    runtime.block_on(async {
        let job = tokio::spawn(run(stages));
        let until = std::time::Instant::now() + TIMEOUT;
        let chunks = chunks_max(3);
        let rests = || read.load(Ordering::Relaxed) == chunks && budget.free() == whole;
        while !rests() {
            assert!(std::time::Instant::now() < until, "{read:?} chunks read, {:?} bytes free", budget.free());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(rests(), "no chunk is read without a ticket");
        // A chunk that is taken lets the next one in.
        drop(scored.recv().await.unwrap());
        while read.load(Ordering::Relaxed) == chunks {
            assert!(std::time::Instant::now() < until);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(scored);
        assert!(job.await.unwrap().is_ok(), "who does not listen any more is no failure");
    });
}
