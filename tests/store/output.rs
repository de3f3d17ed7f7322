//! Output shards: every input column survives, scores are where they belong, and nothing is visible before it is whole.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, Decimal128Array, FixedSizeBinaryArray, Float64Array, Int32Array, Int64Array,
    ListArray, MapBuilder, NullArray, StringArray, StringBuilder, StructArray, Time64NanosecondArray,
    TimestampMicrosecondArray,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields, Float32Type, Int32Type, Schema};
use arrow::record_batch::RecordBatch;
use capsieve_store::{
    CaptionScore, ColumnOptions, EarlierScores, Error, FINGERPRINT, Location, OutputHeads, OutputOptions, RowScore,
    ShardReader, ShardWriter,
};
use object_store::memory::InMemory;
use object_store::path::Path;

use super::{at, batch, failed, listed, options, read, rescore, scored, scored_list, wait, write};

const ROWS: usize = 10;

fn images() -> ArrayRef {
    let image = |row: usize| (row != 4).then(|| vec![row as u8; 1000 + row]);
    Arc::new((0..ROWS).map(image).collect::<BinaryArray>())
}

fn texts() -> ArrayRef {
    Arc::new((0..ROWS).map(|row| (row % 3 != 1).then(|| format!("caption {row}"))).collect::<StringArray>())
}

fn captions() -> ArrayRef {
    let items = StringArray::from((0..15).map(|item| format!("caption {item}")).collect::<Vec<_>>());
    let item = Arc::new(Field::new("item", DataType::Utf8, true));
    let offsets = OffsetBuffer::from_lengths([2, 0, 1, 3, 2, 2, 1, 0, 2, 2]);
    let nulls = NullBuffer::from((0..ROWS).map(|row| row != 7).collect::<Vec<_>>());
    Arc::new(ListArray::new(item, offsets, Arc::new(items), Some(nulls)))
}

/// Columns that are none of our business, of types that are easily lost on the way.
fn extras() -> Vec<(&'static str, ArrayRef)> {
    let numbers: ArrayRef = Arc::new((0..ROWS as i32).map(|row| (row % 4 != 2).then_some(row)).collect::<Int32Array>());
    let fields: Fields = vec![Field::new("x", DataType::Int32, true), Field::new("text", DataType::Utf8, true)].into();
    let nulls = NullBuffer::from((0..ROWS).map(|row| row % 2 == 0).collect::<Vec<_>>());
    let pairs = StructArray::new(fields.clone(), vec![Arc::clone(&numbers), texts()], Some(nulls.clone()));
    let item = Arc::new(Field::new("item", DataType::Struct(fields), true));
    let offsets = OffsetBuffer::from_lengths([1, 0, 3, 0, 0, 2, 0, 1, 1, 2]);
    let boxes = ListArray::new(item, offsets, Arc::new(pairs.clone()), Some(nulls));
    let mut map = MapBuilder::new(None, StringBuilder::new(), StringBuilder::new());
    for row in 0..ROWS {
        map.keys().append_value(format!("k{row}"));
        map.values().append_option((row % 2 == 0).then_some("v"));
        map.append(row % 3 != 0).unwrap();
    }
    let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    let times: Vec<Option<i64>> = (0..ROWS as i64).map(|row| (row != 3).then_some(row * 1_234_567)).collect();
    let decimals = Decimal128Array::from(vec![Some(-12345); ROWS]).with_precision_and_scale(20, 3).unwrap();
    let hashes = FixedSizeBinaryArray::try_from_iter((0..ROWS).map(|row| [row as u8; 16])).unwrap();
    vec![
        ("boxes", Arc::new(boxes)),
        ("pairs", Arc::new(pairs)),
        ("exif", Arc::new(map.finish())),
        ("licence", cast(&texts(), &dictionary).unwrap()),
        ("view", cast(&texts(), &DataType::Utf8View).unwrap()),
        ("large", cast(&images(), &DataType::LargeBinary).unwrap()),
        ("seen", Arc::new(TimestampMicrosecondArray::from(times.clone()).with_timezone("Europe/Berlin"))),
        ("clock", Arc::new(Time64NanosecondArray::from(times))),
        ("price", Arc::new(decimals)),
        ("hash", Arc::new(hashes)),
        ("ratio", Arc::new(Float64Array::from(vec![f64::NAN; ROWS]))),
        ("half", cast(&numbers, &DataType::Float16).unwrap()),
        ("nothing", Arc::new(NullArray::new(ROWS))),
    ]
}

/// What a column says, whatever entries its dictionary has. NaN is not equal to itself, so texts are compared.
fn values(array: &ArrayRef) -> String {
    let plain = array.as_any_dictionary_opt().map(|dictionary| cast(array, dictionary.values().data_type()).unwrap());
    format!("{:?}", plain.as_ref().unwrap_or(array))
}

/// The columns of `file` before ours.
fn carried(file: &RecordBatch, columns: usize) -> RecordBatch {
    file.project(&(0..columns).collect::<Vec<_>>()).unwrap()
}

#[test]
fn every_input_column_survives() {
    let fields: Fields =
        vec![Field::new("bytes", DataType::Binary, true), Field::new("path", DataType::Utf8, true)].into();
    let embedded: ArrayRef = Arc::new(StructArray::new(fields, vec![images(), texts()], None));
    let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    let layouts: [Vec<(&str, ArrayRef)>; 6] = [
        vec![("caption", texts()), ("jpg", images())],
        vec![("image", embedded), ("text", cast(&texts(), &DataType::LargeUtf8).unwrap())],
        vec![("URL", texts()), ("TEXT", texts())],
        vec![("image", cast(&images(), &DataType::BinaryView).unwrap()), ("captions", captions())],
        vec![("png", cast(&images(), &DataType::LargeBinary).unwrap()), ("txt", cast(&texts(), &dictionary).unwrap())],
        vec![("image_path", cast(&texts(), &DataType::Utf8View).unwrap()), ("prompt", texts())],
    ];
    for layout in layouts {
        let folder = tempfile::tempdir().unwrap();
        let (input, output) = (folder.path().join("in.parquet"), folder.path().join("out.parquet"));
        let columns: Vec<(&str, ArrayRef)> = layout.into_iter().chain(extras()).collect();
        let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
        write(&input, &batch(columns.clone()));
        let written =
            wait(rescore(&at(folder.path(), "in.parquet"), &at(folder.path(), "out.parquet"), &options(), |_| {
                failed("null_image")
            }));
        let written = written.unwrap();
        assert_eq!((written.rows, written.kept), (ROWS as u64, None), "{names:?}");
        assert_eq!(written.object.bytes, output.metadata().unwrap().len());
        let (before, after) = (read(&input), read(&output));
        let carried = carried(&after, names.len());
        assert_eq!(carried.schema().fields(), before.schema().fields(), "{names:?}");
        for (name, (ours, theirs)) in names.iter().zip(carried.columns().iter().zip(before.columns())) {
            assert_eq!(values(ours), values(theirs), "{name}");
            assert_eq!(ours.len(), ROWS);
        }
    }
}

fn input(folder: &std::path::Path, caption: ArrayRef) -> (Location, Location) {
    let columns = vec![("jpg", images()), ("caption", caption), ("key", texts())];
    write(&folder.join("in.parquet"), &batch(columns));
    (at(folder, "in.parquet"), at(folder, "out.parquet"))
}

fn names(file: &RecordBatch) -> Vec<String> {
    file.schema().fields().iter().map(|field| field.name().clone()).collect()
}

#[test]
fn scores_of_single_captions() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = input(folder.path(), texts());
    let options = OutputOptions { min_itm: Some(0.5), min_cosine: Some(0.2), ..options() };
    let score = |row: usize| match row {
        1 => failed("decode_failed"),
        _ => scored(row as f32 / 10.0, (10 - row) as f32 / 20.0),
    };
    let written = wait(rescore(&from, &to, &options, score)).unwrap();
    let file = read(to.as_file().unwrap());
    let want = ["jpg", "caption", "key", "itm_score", "cosine_score", "keep", "score_status", "score_error"];
    assert_eq!(names(&file), want);
    let (itm, cosine) = (file.column(3).as_primitive::<Float32Type>(), file.column(4).as_primitive::<Float32Type>());
    assert!(itm.is_null(1) && cosine.is_null(1) && itm.null_count() == 1);
    assert_eq!((itm.value(7), cosine.value(7)), (0.7, 0.15));
    // 0.5 passes at itm 0.5, and 0.2 at cosine 0.2: the bounds are kept.
    let keep: Vec<bool> = file.column(5).as_boolean().values().iter().collect();
    assert_eq!(keep, (0..ROWS).map(|row| row == 5 || row == 6).collect::<Vec<_>>());
    assert_eq!(written.kept, Some(2));
    assert_eq!(file.column(6).as_string::<i32>().value(1), "decode_failed");
    assert_eq!(file.column(7).as_string::<i32>().value(1), "decode_failed for a reason");
    assert_eq!(file.column(7).null_count(), ROWS - 1);
}

#[test]
fn scores_of_lists() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = input(folder.path(), captions());
    let score = |row: usize| match row {
        0 => scored_list(&[(0.1, 0.9), (0.4, 0.1)]),
        3 => scored_list(&[(0.7, 0.0), (0.7, 0.0), (0.2, 0.9)]),
        4 => {
            let mut row = scored_list(&[(0.0, 0.0), (0.1, 0.1)]);
            row.scores[0] = CaptionScore::default();
            row
        }
        _ => failed("null_caption"),
    };
    let options = OutputOptions { min_itm: Some(0.4), ..options() };
    assert_eq!(wait(rescore(&from, &to, &options, score)).unwrap().kept, Some(2));
    let file = read(to.as_file().unwrap());
    let list = file.column_by_name("itm_score").unwrap().as_list::<i32>();
    assert_eq!(list.value(0).as_primitive::<Float32Type>().values(), &[0.1, 0.4]);
    assert!(list.is_null(1) && list.value(4).is_null(0) && list.value(4).len() == 2);
    let best = file.column_by_name("best_caption").unwrap().as_primitive::<Int32Type>();
    assert_eq!((best.value(0), best.value(3), best.value(4), best.is_null(1)), (1, 0, 1, true));
    let keep = file.column_by_name("keep").unwrap().as_boolean();
    assert_eq!((keep.value(0), keep.value(3), keep.value(4)), (true, true, false));
    // With one head only, that head decides which caption is best.
    let cosine = OutputOptions { heads: OutputHeads { itm: false, cosine: true }, ..super::options() };
    let only = at(folder.path(), "cosine.parquet");
    let off = |row| {
        let mut row = score(row);
        row.scores.iter_mut().for_each(|score| score.itm = None);
        row
    };
    wait(rescore(&from, &only, &cosine, off)).unwrap();
    let file = read(only.as_file().unwrap());
    assert!(file.column_by_name("itm_score").is_none() && file.column_by_name("keep").is_none());
    assert_eq!(file.column_by_name("best_caption").unwrap().as_primitive::<Int32Type>().value(0), 0);
}

#[test]
fn old_scores_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (from, first) = input(folder.path(), texts());
    let (second, third) = (at(folder.path(), "2.parquet"), at(folder.path(), "3.parquet"));
    let keep = OutputOptions { min_itm: Some(0.5), ..options() };
    wait(rescore(&from, &first, &keep, |_| scored(0.1, 0.1))).unwrap();
    let cosine = OutputOptions {
        heads: OutputHeads { itm: false, cosine: true },
        metadata: vec![("capsieve.heads".to_owned(), "cosine".to_owned())],
        ..options()
    };
    let score = CaptionScore { itm: None, cosine: Some(0.9), fault: None };
    wait(rescore(&first, &second, &cosine, |_| RowScore { status: "ok", error: None, scores: vec![score] })).unwrap();
    let file = read(second.as_file().unwrap());
    assert_eq!(names(&file), ["jpg", "caption", "key", "cosine_score", "score_status", "score_error"]);
    assert_eq!(file.column(3).as_primitive::<Float32Type>().value(0), 0.9);
    let metadata = file.schema().metadata().clone();
    let mut keys: Vec<&String> = metadata.keys().collect();
    keys.sort();
    assert_eq!(keys, ["capsieve.heads", "capsieve.rows"], "what an earlier run noted is gone");
    assert_eq!(metadata["capsieve.heads"], "cosine");
    // A column of the user's that is called as one of ours stays where we write none.
    let user = batch(vec![("jpg", images()), ("caption", texts()), ("keep", texts())]);
    write(&folder.path().join("user.parquet"), &user);
    wait(rescore(&at(folder.path(), "user.parquet"), &third, &options(), |_| scored(0.1, 0.1))).unwrap();
    assert_eq!(names(&read(third.as_file().unwrap()))[..4], ["jpg", "caption", "keep", "itm_score"]);
}

#[test]
fn images_can_be_dropped_and_metadata_follows() {
    let features = r#"{"info": {"features": {"jpg": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"},
        "z": {"names": ["b", "a"], "_type": "ClassLabel"}, "a": {"dtype": "int64", "_type": "Value"}}, "more": 1}}"#;
    let metadata = [("huggingface", features), ("pandas", "{}"), ("capsieve.model", "old")];
    let metadata: HashMap<String, String> =
        metadata.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1; ROWS]));
    let whole = batch(vec![("jpg", images()), ("caption", captions()), ("z", Arc::clone(&numbers)), ("a", numbers)]);
    let schema = Schema::new_with_metadata(whole.schema().fields().clone(), metadata);
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("in.parquet"), &whole.with_schema(Arc::new(schema)).unwrap());
    let to = at(folder.path(), "out.parquet");
    let options = OutputOptions { drop_images: true, ..options() };
    wait(rescore(&at(folder.path(), "in.parquet"), &to, &options, |_| scored_list(&[(0.1, 0.2)]))).unwrap();
    let file = read(to.as_file().unwrap());
    let want = ["caption", "z", "a", "itm_score", "cosine_score", "best_caption", "score_status", "score_error"];
    assert_eq!(names(&file), want);
    let schema = file.schema();
    let mut keys: Vec<&String> = schema.metadata().keys().collect();
    keys.sort();
    assert_eq!(keys, ["capsieve.rows", "capsieve.version", "huggingface", "pandas"]);
    let text = &schema.metadata()["huggingface"];
    let parsed: serde_json::Value = serde_json::from_str(text).unwrap();
    let features = &parsed["info"]["features"];
    assert_eq!(features.as_object().unwrap().len(), want.len());
    assert_eq!(features["itm_score"]["feature"]["dtype"], "float32");
    assert_eq!(features["best_caption"]["dtype"], "int32");
    assert_eq!(parsed["info"]["more"], 1);
    assert!(text.contains(r#"{"names": ["b", "a"], "_type": "ClassLabel"}"#), "as it was written: {text}");
    assert!(text.find("\"z\"").unwrap() < text.find("\"a\":").unwrap(), "in the order it was written: {text}");
}

#[test]
fn nothing_is_visible_before_the_commit_or_after_a_drop() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = input(folder.path(), texts());
    // Killed runs of this output and of another one.
    let stale = [".out.parquet.0123456789abcdef.partial", ".out.parquet.0123456789abcdef.partial#1"];
    let other = ".other.parquet.0123456789abcdef.partial";
    stale.iter().chain([&other]).for_each(|name| std::fs::write(folder.path().join(name), b"x").unwrap());
    let before = listed(folder.path());
    wait(async {
        let reader = ShardReader::open(&from, &ColumnOptions::default()).await.unwrap();
        let mut writer = ShardWriter::create(&to, reader.schema(), reader.columns(), &options()).await.unwrap();
        let batch = reader.into_batches(100).next().await.unwrap().unwrap();
        let scores: Vec<RowScore> = (0..batch.num_rows()).map(|_| scored(0.5, 0.5)).collect();
        writer.write(&batch, &scores).await.unwrap();
        assert!(!to.exists().await.unwrap());
        assert!(listed(folder.path()).iter().all(|name| name == "in.parquet" || name.starts_with('.')));
        assert!(listed(folder.path()).len() > before.len(), "it is written to the same folder");
        drop(writer);
        assert_eq!(listed(folder.path()), before);
    });
    wait(rescore(&from, &to, &options(), |_| scored(0.5, 0.5))).unwrap();
    assert_eq!(listed(folder.path()), [other, "in.parquet", "out.parquet"]);
    // The same again is refused, and replaces only when asked to.
    let again = wait(rescore(&from, &to, &options(), |_| scored(0.6, 0.5)));
    assert!(matches!(again, Err(Error::Exists { .. })), "{again:?}");
    let overwrite = OutputOptions { overwrite: true, ..options() };
    std::fs::write(folder.path().join("out.stats.json"), "of another output").unwrap();
    wait(rescore(&from, &to, &overwrite, |_| scored(0.7, 0.5))).unwrap();
    let scores = read(to.as_file().unwrap());
    assert_eq!(scores.column_by_name("itm_score").unwrap().as_primitive::<Float32Type>().value(0), 0.7);
    assert_eq!(listed(folder.path()), [other, "in.parquet", "out.parquet"]);
}

#[cfg(unix)]
#[test]
fn a_pipe_is_replaced_by_no_output() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = input(folder.path(), texts());
    let pipe = to.as_file().unwrap();
    assert!(std::process::Command::new("mkfifo").arg(pipe).status().unwrap().success());
    let overwrite = OutputOptions { overwrite: true, ..options() };
    let error = wait(rescore(&from, &to, &overwrite, |_| scored(0.7, 0.5))).unwrap_err();
    assert!(error.to_string().contains("it is no regular file"), "{error}");
    assert!(!pipe.metadata().unwrap().is_file());
}

#[test]
fn earlier_scores_are_those_of_the_same_work() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = input(folder.path(), texts());
    let work = |name: &str| OutputOptions {
        metadata: vec![(FINGERPRINT.to_owned(), name.to_owned())],
        overwrite: true,
        ..options()
    };
    wait(rescore(&from, &to, &work("this"), |_| scored(0.5, 0.25))).unwrap();
    let open = |name: &'static str| wait(EarlierScores::open(&to, (name, options().heads), vec!["ok"]));
    let found = wait(open("this").unwrap().next(2)).unwrap();
    assert!(found.iter().flatten().all(|row| *row == scored(0.5, 0.25)) && found.len() == 2);
    // Another job was faster since somebody looked.
    assert!(matches!(open("other"), Err(Error::Changed { .. })));
}

#[test]
fn of_two_runs_on_one_output_one_wins_and_the_other_says_so() {
    for overwrite in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = input(folder.path(), texts());
        let options = OutputOptions { overwrite, ..options() };
        wait(async {
            let reader = ShardReader::open(&from, &ColumnOptions::default()).await.unwrap();
            let slow = ShardWriter::create(&to, reader.schema(), reader.columns(), &options).await.unwrap();
            let fast = rescore(&from, &to, &options, |_| scored(0.5, 0.5)).await.unwrap();
            assert_eq!(fast.rows, ROWS as u64);
            let error = slow.commit(&[]).await.unwrap_err();
            assert!(matches!(error, Error::Superseded { .. } | Error::Exists { .. }), "{error:?}");
        });
        assert_eq!(read(to.as_file().unwrap()).num_rows(), ROWS);
        assert_eq!(listed(folder.path()), ["in.parquet", "out.parquet"]);
    }
}

#[test]
fn outputs_that_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = input(folder.path(), texts());
    let score = |_| scored(0.5, 0.5);
    let missing = wait(rescore(&from, &at(folder.path(), "none/out.parquet"), &options(), score)).unwrap_err();
    assert!(matches!(&missing, Error::NoFolder { folder, .. } if folder.ends_with("none")), "{missing}");
    std::fs::create_dir(folder.path().join("sub.parquet")).unwrap();
    let folded = wait(rescore(&from, &at(folder.path(), "sub.parquet"), &options(), score)).unwrap_err();
    assert!(matches!(folded, Error::Folder { .. }), "{folded}");
    let headless = OutputOptions { heads: OutputHeads { itm: false, cosine: true }, min_itm: Some(0.5), ..options() };
    let headless = wait(rescore(&from, &to, &headless, score)).unwrap_err();
    assert!(matches!(headless, Error::ThresholdWithoutHead { head: "itm" }), "{headless}");
    assert_eq!(listed(folder.path()), ["in.parquet", "sub.parquet"]);
    // A device that is always full stands in for a disk.
    #[cfg(target_os = "linux")]
    {
        let unwritable = at(std::path::Path::new("/proc"), "out.parquet");
        let error = wait(rescore(&from, &unwritable, &options(), score)).unwrap_err();
        assert!(error.to_string().starts_with("/proc/out.parquet"), "{error}");
    }
}

#[test]
fn a_bucket_shows_the_object_only_when_it_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let (from, _) = input(folder.path(), texts());
    let store = Arc::new(InMemory::new());
    let to = Location::in_store(store, Path::from("out/0.parquet"), "memory://out/0.parquet");
    wait(async {
        let reader = ShardReader::open(&from, &ColumnOptions::default()).await.unwrap();
        let mut writer = ShardWriter::create(&to, reader.schema(), reader.columns(), &options()).await.unwrap();
        let batch = reader.into_batches(100).next().await.unwrap().unwrap();
        let scores: Vec<RowScore> = (0..batch.num_rows()).map(|_| scored(0.5, 0.5)).collect();
        writer.write(&batch, &scores).await.unwrap();
        assert!(!to.exists().await.unwrap());
        writer.commit(&[]).await.unwrap();
        let reader = ShardReader::open(&to, &ColumnOptions::default()).await.unwrap();
        assert_eq!(reader.rows(), batch.num_rows() as u64);
        let mut batches = reader.into_batches(100);
        assert_eq!(
            batches.next().await.unwrap().unwrap().project(&[0, 1, 2]).unwrap(),
            batch.project(&[0, 1, 2]).unwrap()
        );
    });
}

#[test]
fn outputs_are_deterministic_and_row_groups_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let noise = |row: usize| {
        let mut state = row as u64 + 1;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        };
        Some((0..3 << 20).map(|_| next()).collect::<Vec<u8>>())
    };
    let images: ArrayRef = Arc::new((0..30).map(noise).collect::<BinaryArray>());
    let texts: ArrayRef = Arc::new(StringArray::from(vec!["caption"; 30]));
    write(&folder.path().join("in.parquet"), &batch(vec![("jpg", images), ("caption", texts)]));
    let (from, a, b) =
        (at(folder.path(), "in.parquet"), at(folder.path(), "a.parquet"), at(folder.path(), "b.parquet"));
    wait(rescore(&from, &a, &options(), |_| scored(0.5, 0.5))).unwrap();
    wait(rescore(&from, &b, &options(), |_| scored(0.5, 0.5))).unwrap();
    assert!(std::fs::read(a.as_file().unwrap()).unwrap() == std::fs::read(b.as_file().unwrap()).unwrap());
    let reader = wait(ShardReader::open(&a, &ColumnOptions::default())).unwrap();
    assert_eq!(reader.row_groups(), 3, "90 MiB are more than one row group of 32 MiB");
    assert_eq!(read(a.as_file().unwrap()).column(0), read(from.as_file().unwrap()).column(0));
}
