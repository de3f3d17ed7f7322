//! Selected captions, whatever kind of list they come in.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryArray, FixedSizeListArray, ListArray, RecordBatch, StringArray};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Float32Type};
use capsieve_store::{OutputOptions, OutputRows, RowScore, Select};

use super::{at, failed, options, read, rescore, scored_list, wait, write};

const LENGTHS: [usize; 6] = [3, 0, 2, 1, 3, 2];
const NULL: usize = 4;

fn lists() -> ListArray {
    let items = StringArray::from((0..11).map(|item| Some(format!("caption {item}"))).collect::<Vec<_>>());
    let nulls = NullBuffer::from((0..LENGTHS.len()).map(|row| row != NULL).collect::<Vec<_>>());
    let item = Arc::new(Field::new("item", DataType::Utf8, true));
    ListArray::new(item, OffsetBuffer::from_lengths(LENGTHS), Arc::new(items), Some(nulls))
}

/// Of each caption of the third row and so on: its number.
fn score(row: usize) -> RowScore {
    match row {
        // One caption passes, none, the second one is the best one of two, none passes, no caption, both are equal.
        0 => scored_list(&[(0.1, 0.0), (0.7, 0.0), (0.2, 0.0)]),
        2 => scored_list(&[(0.6, 0.0), (0.9, 0.0)]),
        3 => scored_list(&[(0.4, 0.0)]),
        5 => scored_list(&[(0.8, 0.0), (0.8, 0.0)]),
        _ => failed("null_caption"),
    }
}

/// The captions and scores of each row.
fn found(batch: &RecordBatch) -> Vec<(String, Vec<f32>)> {
    let lists = cast(batch.column_by_name("captions").unwrap(), &lists().data_type().clone()).unwrap();
    let (lists, scores) = (lists.as_list::<i32>(), batch.column_by_name("itm_score").unwrap().as_list::<i32>());
    let text = |row: usize| match lists.is_null(row) {
        true => "null".to_owned(),
        false => {
            let texts = lists.value(row);
            texts.as_string::<i32>().iter().flatten().map(|text| text[8..].to_owned()).collect::<Vec<_>>().join(" ")
        }
    };
    let floats = |row: usize| match scores.is_null(row) {
        true => vec![],
        false => scores.value(row).as_primitive::<Float32Type>().iter().flatten().collect(),
    };
    (0..batch.num_rows()).map(|row| (text(row), floats(row))).collect()
}

fn expected(rows: &[(&str, &[f32])]) -> Vec<(String, Vec<f32>)> {
    rows.iter().map(|(captions, scores)| ((*captions).to_owned(), scores.to_vec())).collect()
}

#[test]
fn every_kind_of_list_is_made_shorter() {
    let item = Arc::new(Field::new("item", DataType::Utf8, true));
    let kinds = [
        (DataType::List(Arc::clone(&item)), DataType::List(Arc::clone(&item))),
        (DataType::LargeList(Arc::clone(&item)), DataType::LargeList(Arc::clone(&item))),
        (DataType::ListView(Arc::clone(&item)), DataType::List(Arc::clone(&item))),
        (DataType::LargeListView(Arc::clone(&item)), DataType::LargeList(Arc::clone(&item))),
    ];
    let folder = tempfile::tempdir().unwrap();
    let images: ArrayRef = Arc::new((0..LENGTHS.len()).map(|row| Some([row as u8])).collect::<BinaryArray>());
    for (number, (kind, written)) in kinds.into_iter().enumerate() {
        let captions = cast(&lists(), &kind).unwrap();
        let batch = RecordBatch::try_from_iter([("image", Arc::clone(&images)), ("captions", captions)]).unwrap();
        let (input, output) = (at(folder.path(), "in.parquet"), at(folder.path(), &format!("{number}.parquet")));
        write(&folder.path().join("in.parquet"), &batch);
        let options = |select, rows| OutputOptions { select, rows, min_itm: Some(0.5), overwrite: true, ..options() };
        let run = |select, rows| {
            wait(rescore(&input, &output, &options(select, rows), score)).unwrap();
            let batch = read(&folder.path().join(format!("{number}.parquet")));
            assert_eq!(*batch.schema().field_with_name("captions").unwrap().data_type(), written, "{kind}");
            found(&batch)
        };
        let others: [(&str, &[f32]); 3] = [("", &[]), ("5", &[0.4]), ("null", &[])];
        let whole = |first: (&'static str, &'static [f32]), third, last| {
            expected(&[first, others[0], third, others[1], others[2], last])
        };
        let matching = whole(("1", &[0.7]), ("3 4", &[0.6, 0.9]), ("9 10", &[0.8, 0.8]));
        assert_eq!(run(Select::Matching, OutputRows::All), matching, "{kind}");
        let best = whole(("1", &[0.7]), ("4", &[0.9]), ("9", &[0.8]));
        assert_eq!(run(Select::Best, OutputRows::All), best, "{kind}");
        let rejected = at(folder.path(), "rejected.parquet");
        let kept = run(Select::Best, OutputRows::Kept { rejected: Some(rejected) });
        assert_eq!(kept, [best[0].clone(), best[2].clone(), best[5].clone()], "{kind}");
        assert_eq!(found(&read(&folder.path().join("rejected.parquet"))), expected(&others), "{kind}");
    }
}

#[test]
fn a_list_of_fixed_size_becomes_one_of_any() {
    let item = Arc::new(Field::new("item", DataType::Utf8, true));
    let items = StringArray::from((0..6).map(|item| Some(format!("caption {item}"))).collect::<Vec<_>>());
    let nulls = NullBuffer::from(vec![true, false, true]);
    let captions: ArrayRef = Arc::new(FixedSizeListArray::new(Arc::clone(&item), 2, Arc::new(items), Some(nulls)));
    let images: ArrayRef = Arc::new((0..3).map(|row| Some([row as u8])).collect::<BinaryArray>());
    let batch = RecordBatch::try_from_iter([("image", images), ("captions", captions)]).unwrap();
    let value = r#"{"dtype": "string", "_type": "Value"}"#;
    let list = format!(r#"{{"feature": {value}, "length": 2, "_type": "Sequence"}}"#);
    let features = format!(r#"{{"info": {{"features": {{"image": {value}, "captions": {list}}}}}}}"#);
    let metadata: HashMap<String, String> = [("huggingface".to_owned(), features)].into();
    let schema = batch.schema().as_ref().clone().with_metadata(metadata);
    let batch = batch.with_schema(Arc::new(schema)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("in.parquet"), &batch);
    let score = |row| match row {
        1 => failed("null_caption"),
        _ => scored_list(&[(0.1, 0.0), (0.7 - row as f32 * 0.35, 0.0)]),
    };
    let options = OutputOptions { select: Select::Best, ..options() };
    wait(rescore(&at(folder.path(), "in.parquet"), &at(folder.path(), "out.parquet"), &options, score)).unwrap();
    let batch = read(&folder.path().join("out.parquet"));
    assert_eq!(*batch.schema().field_with_name("captions").unwrap().data_type(), DataType::List(item));
    // What Hugging Face's library is told of it, too.
    let features: serde_json::Value = serde_json::from_str(&batch.schema().metadata()["huggingface"]).unwrap();
    let captions = &features["info"]["features"]["captions"];
    assert!(captions["_type"] == "Sequence" && captions.get("length").is_none(), "{features}");
    let third: &[f32] = &[0.1];
    assert_eq!(found(&batch)[1..], expected(&[("null", &[]), ("4", third)]));
}
