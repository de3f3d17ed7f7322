//! The pipeline through files: every row comes out once, in order, with the score it has alone, whatever batches,
//! chunks and row groups it went through. Scores are compared with PyTorch's in `cli`; here with each other.

use std::path::{Path, PathBuf};

use arrow::array::{RecordBatch, UInt32Array};
use arrow::compute::take_record_batch;
use capsieve_store::ColumnOptions;
use capsieve_worker::{
    CaptionPolicy, DeviceChoice, EngineChoice, Heads, ItmToken, LoadedModel, Outcome, Progress, ScoreJob, Select,
    Stats, Thresholds, score,
};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::support::{floats, list_shard, names, picture, read_parquet, shard, texts, write_parquet};

/// A batch of another size sums in another order; measured 2e-7.
const BATCHING_TOLERANCE: f32 = 2e-5;
const CAPTIONS: [&str; 5] =
    ["a red circle", "two blue squares on a green ground", "", "a dog", "a photograph of a very small cat by the sea"];

/// A folder with one shard and its scores.
struct Job {
    folder: TempDir,
    job: ScoreJob,
}

impl Job {
    fn new(batch: &RecordBatch, group_rows: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        write_parquet(Path::new(&path("in.parquet")), batch, group_rows);
        let job = ScoreJob {
            input: path("in.parquet"),
            output: path("out.parquet"),
            columns: ColumnOptions::default(),
            heads: Heads { itm: true, cosine: true },
            itm_token: ItmToken::Cls,
            thresholds: Thresholds::default(),
            policy: CaptionPolicy::default(),
            rejected: None,
            kept_only: false,
            select: Select::All,
            drop_images: false,
            fail_on_row: false,
            overwrite: false,
            retry: Vec::new(),
            engine: EngineChoice { device: DeviceChoice::Cpu, ..EngineChoice::default() },
        };
        Self { folder, job }
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("out.parquet")
    }

    fn run(&self) -> (RecordBatch, Stats) {
        match runtime().block_on(score(&model(), &self.job, &Progress::default())).unwrap() {
            Outcome::Done(stats) => (read_parquet(&self.output()), *stats),
            Outcome::Complete { .. } => panic!("nothing was there before"),
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn model() -> LoadedModel {
    runtime().block_on(LoadedModel::open("synthetic:tiny:3")).unwrap()
}

/// `count` different rows.
fn rows(count: usize) -> Vec<(Option<Vec<u8>>, Option<&'static str>)> {
    (0..count).map(|row| (Some(picture(row as u64)), Some(CAPTIONS[row % CAPTIONS.len()]))).collect()
}

fn assert_close(found: &RecordBatch, expected: &RecordBatch, context: &str) {
    ["itm_score", "cosine_score"].iter().for_each(|name| assert_column_close(found, expected, name, context));
}

fn assert_column_close(found: &RecordBatch, expected: &RecordBatch, name: &str, context: &str) {
    let (found, expected) = (floats(found, name), floats(expected, name));
    assert_eq!(found.len(), expected.len(), "{context}: {name}");
    for (row, pair) in found.iter().zip(&expected).enumerate() {
        let close = match pair {
            (Some(found), Some(expected)) => (found - expected).abs() <= BATCHING_TOLERANCE,
            (found, expected) => found == expected,
        };
        assert!(close, "{context}: {name} of row {row}: {pair:?}");
    }
}

#[test]
fn batches_chunks_and_row_groups_do_not_show() {
    let batch = shard(&rows(75));
    let (expected, _) = Job::new(&batch, 1000).run();
    let scores = floats(&expected, "itm_score");
    assert!(scores.windows(2).any(|pair| pair[0] != pair[1]), "the rows have different scores");
    for (batch_size, group_rows, threads) in [(1, 1000, 0), (3, 7, 1), (7, 75, 2), (32, 1, 3), (100, 33, 0)] {
        let mut job = Job::new(&batch, group_rows);
        (job.job.engine.batch_size, job.job.engine.threads) = (batch_size, threads);
        let (found, stats) = job.run();
        assert_close(&found, &expected, &format!("batches of {batch_size}, row groups of {group_rows}"));
        assert_eq!(texts(&found, "key"), texts(&batch, "key"), "input order");
        assert_eq!((stats.counts.rows, stats.counts.scored, stats.counts.failed, stats.counts.pairs), (75, 75, 0, 75));
    }
}

#[test]
fn what_comes_again_has_the_scores_it_has_alone() {
    // Nine images and five captions, so that pairs come again, too; an image that cannot be decoded among them.
    let image = |row: usize| match row * row % 11 {
        4 => b"no image".to_vec(),
        image => picture(image as u64),
    };
    let rows = |alone: bool| -> Vec<_> {
        // What stands behind an image is none of a decoder's business, but it makes another image of it.
        let behind = |row: usize| if alone { (row as u32).to_le_bytes().to_vec() } else { vec![] };
        (0..100).map(|row| (Some([image(row), behind(row)].concat()), Some(CAPTIONS[row % CAPTIONS.len()]))).collect()
    };
    let mut alone = Job::new(&shard(&rows(true)), 1000);
    alone.job.engine.batch_size = 1;
    let (expected, stats) = alone.run();
    assert!(stats.counts.failed > 5 && stats.counts.scored > 50);
    for (batch_size, heads) in [(2, [true, true]), (32, [true, true]), (100, [true, false]), (7, [false, true])] {
        let mut job = Job::new(&shard(&rows(false)), 33);
        job.job.engine.batch_size = batch_size;
        job.job.heads = Heads { itm: heads[0], cosine: heads[1] };
        let (found, again) = job.run();
        assert_eq!(again.counts.errors, stats.counts.errors);
        assert_eq!(again.counts.pairs, stats.counts.pairs, "a pair that comes again is one all the same");
        for (name, on) in [("itm_score", heads[0]), ("cosine_score", heads[1])] {
            if on {
                assert_column_close(&found, &expected, name, &format!("batches of {batch_size}"));
            }
        }
    }
}

#[test]
fn two_runs_write_the_same_bytes() {
    let batch = shard(&rows(40));
    let mut job = Job::new(&batch, 16);
    job.run();
    let first = std::fs::read(job.output()).unwrap();
    job.job.overwrite = true;
    job.run();
    assert!(first == std::fs::read(job.output()).unwrap(), "the same job gives the same file");
}

#[test]
fn shuffled_rows_give_shuffled_scores() {
    let batch = shard(&rows(50));
    let order: UInt32Array = (0..50).map(|row| row * 37 % 50).collect::<Vec<u32>>().into();
    let shuffled = take_record_batch(&batch, &order).unwrap();
    let (expected, _) = Job::new(&batch, 1000).run();
    let (found, _) = Job::new(&shuffled, 1000).run();
    assert_close(&found, &take_record_batch(&expected, &order).unwrap(), "shuffled");
}

#[test]
fn lists_of_captions_score_as_single_rows() {
    let list = |row: usize| -> Vec<Option<&str>> {
        CAPTIONS.iter().cycle().skip(row).take(row % 6).map(|c| Some(*c)).collect()
    };
    let lists: Vec<_> = (0..40).map(|row| (Some(picture(row as u64)), Some(list(row)))).collect();
    let single: Vec<_> =
        lists.iter().flat_map(|(image, list)| list.iter().flatten().map(|caption| (image.clone(), *caption))).collect();
    let (found, stats) = Job::new(&list_shard(&lists), 1000).run();
    let (expected, _) = Job::new(&shard(&single), 1000).run();
    assert_close(&found, &expected, "lists");
    let empty = (0..40).filter(|row| row % 6 == 0).count() as u64;
    assert_eq!((stats.counts.pairs, stats.counts.failed), (single.len() as u64, empty), "an empty list has no score");
    assert_eq!(stats.counts.errors.get("null_caption"), Some(&empty));
}

#[test]
fn one_bad_caption_of_a_list_costs_itself_only() {
    let long = "word ".repeat(600);
    let captions = |list: &[Option<&str>]| Some(list.iter().map(|c| c.map(str::to_owned)).collect::<Vec<_>>());
    let lists = [
        (Some(picture(0)), captions(&[Some("a dog"), None, Some(&long), Some("a cat")])),
        (Some(picture(0)), captions(&[None, None])),
        (Some(picture(0)), captions(&[Some(&long)])),
        (Some(picture(0)), None),
    ];
    let (found, _) = Job::new(&list_shard(&lists), 1000).run();
    let statuses: Vec<_> = texts(&found, "score_status").into_iter().flatten().collect();
    assert_eq!(statuses, ["ok", "null_caption", "caption_too_long", "null_caption"]);
    let scored: Vec<bool> = floats(&found, "itm_score").iter().map(Option::is_some).collect();
    assert_eq!(scored, [true, false, false, true], "the lists of rows without a score are null");
}

#[test]
fn many_bad_rows_behind_a_good_one_keep_their_order() {
    let mut rows: Vec<(Option<Vec<u8>>, Option<&str>)> = vec![(None, Some("a dog")); 700];
    (rows[0].0, rows[699].0) = (Some(picture(1)), Some(picture(1)));
    let (found, stats) = Job::new(&shard(&rows), 1000).run();
    let scores = floats(&found, "itm_score");
    assert_eq!((stats.counts.scored, stats.counts.errors.get("null_image")), (2, Some(&698)));
    assert!(scores[0].is_some() && scores[699].is_some() && scores[1..699].iter().all(Option::is_none));
}

#[test]
fn a_cancelled_job_leaves_nothing() {
    let job = Job::new(&shard(&rows(3000)), 100);
    let progress = Progress::default();
    let runtime = runtime();
    runtime.block_on(async {
        let (model, task) = (model_in(), progress.clone());
        let model = model.await;
        let running = score(&model, &job.job, &task);
        let some_rows = async {
            while progress.rows() < 64 {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            ended = running => panic!("3000 rows ended before 64 of them: {ended:?}"),
            () = some_rows => {}
        }
    });
    drop(runtime);
    assert_eq!(names(job.folder.path()), ["in.parquet"]);
}

async fn model_in() -> LoadedModel {
    LoadedModel::open("synthetic:tiny:3").await.unwrap()
}

/// A row of a random shard.
#[derive(Clone, Debug)]
enum Kind {
    Good(u64),
    NullImage,
    Empty,
    Garbage(Vec<u8>),
    Cut(u64, usize),
    NullCaption,
    LongCaption,
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        // Few pictures, so that there are duplicates.
        4 => (0..6u64).prop_map(Kind::Good),
        1 => Just(Kind::NullImage),
        1 => Just(Kind::Empty),
        1 => prop::collection::vec(any::<u8>(), 1..64).prop_map(Kind::Garbage),
        1 => (0..6u64, 1..60usize).prop_map(|(number, bytes)| Kind::Cut(number, bytes)),
        1 => Just(Kind::NullCaption),
        1 => Just(Kind::LongCaption),
    ]
}

impl Kind {
    fn row(&self) -> (Option<Vec<u8>>, Option<String>) {
        let caption = || Some("a red circle".to_owned());
        match self {
            Self::Good(number) => (Some(picture(*number)), caption()),
            Self::NullImage => (None, caption()),
            Self::Empty => (Some(Vec::new()), caption()),
            Self::Garbage(bytes) => (Some(bytes.clone()), caption()),
            Self::Cut(number, bytes) => (Some(picture(*number)[..*bytes].to_vec()), caption()),
            Self::NullCaption => (Some(picture(0)), None),
            Self::LongCaption => (Some(picture(0)), Some("word ".repeat(600))),
        }
    }

    fn status(&self) -> &'static str {
        match self {
            Self::Good(_) => "ok",
            Self::NullImage => "null_image",
            Self::Empty | Self::Garbage(_) | Self::Cut(..) => "decode_failed",
            Self::NullCaption => "null_caption",
            Self::LongCaption => "caption_too_long",
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_row_comes_out_once_whatever_is_in_it(
        kinds in prop::collection::vec(kinds(), 0..90),
        batch_size in 1..40usize,
        group_rows in 1..90usize,
    ) {
        let batch = shard(&kinds.iter().map(Kind::row).collect::<Vec<_>>());
        let mut job = Job::new(&batch, group_rows);
        job.job.engine.batch_size = batch_size;
        let (found, stats) = job.run();
        for name in ["key", "caption"] {
            prop_assert_eq!(texts(&found, name), texts(&batch, name));
        }
        prop_assert_eq!(found.column_by_name("image"), batch.column_by_name("image"));
        let expected: Vec<_> = kinds.iter().map(|kind| Some(kind.status().to_owned())).collect();
        prop_assert_eq!(texts(&found, "score_status"), expected);
        prop_assert_eq!(stats.counts.rows, kinds.len() as u64);
        prop_assert_eq!(stats.counts.scored + stats.counts.failed, stats.counts.rows);
        let (scores, errors) = (floats(&found, "itm_score"), texts(&found, "score_error"));
        let mut by_picture = std::collections::HashMap::new();
        for (row, kind) in kinds.iter().enumerate() {
            prop_assert_eq!(scores[row].is_some(), kind.status() == "ok");
            prop_assert_eq!(errors[row].is_none(), kind.status() == "ok");
            prop_assert!(errors[row].as_deref().is_none_or(|error| !error.is_empty() && error.lines().count() == 1));
            if let (Kind::Good(number), Some(score)) = (kind, scores[row]) {
                let first: f32 = *by_picture.entry(*number).or_insert(score);
                prop_assert!((first - score).abs() <= BATCHING_TOLERANCE, "duplicates score alike");
            }
        }
    }
}
