//! Strings and bytes as views: what a dictionary holds once is in memory once, whatever comes of the rows, and nobody who
//! reads an output sees that it was so.

use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use capsieve_store::{ColumnOptions, Error, ImageCell, ShardReader, rows};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::arrow::encode_arrow_schema;
use parquet::basic::Encoding;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;

use super::{at, batch, options, read, rescore, scored, wait, write, write_with};

/// Rows that all have the same image and the same long caption, and a key of their own.
fn alike(rows: usize, image_bytes: usize) -> RecordBatch {
    let image = vec![7u8; image_bytes];
    let images: BinaryArray = (0..rows).map(|_| Some(image.as_slice())).collect();
    let caption = "a dog ".repeat(1000);
    let captions: StringArray = (0..rows).map(|_| Some(caption.as_str())).collect();
    let keys: StringArray = (0..rows).map(|row| Some(format!("key {row}"))).collect();
    batch(vec![("key", Arc::new(keys)), ("image", Arc::new(images)), ("caption", Arc::new(captions))])
}

#[test]
fn a_value_of_a_dictionary_is_in_memory_once() {
    let folder = tempfile::tempdir().unwrap();
    let (path, (rows_all, image_bytes)) = (folder.path().join("in.parquet"), (100, 2 << 20));
    let properties = WriterProperties::builder().set_dictionary_page_size_limit(8 << 20).build();
    let input = alike(rows_all, image_bytes);
    write_with(&path, &input, properties);
    assert!(path.metadata().unwrap().len() < 3 << 20, "the file holds the image once");
    let location = at(folder.path(), "in.parquet");
    for narrow in [false, true] {
        let reader = wait(ShardReader::open(&location, &ColumnOptions::default())).unwrap();
        let reader = if narrow { reader.narrowed() } else { reader };
        let columns = reader.columns().clone();
        let (mut batches, mut found) = (reader.into_batches(32), 0);
        while let Some(batch) = wait(batches.next()).unwrap() {
            assert!(batch.num_rows() == 32 || batch.num_rows() == rows_all % 32, "{}", batch.num_rows());
            let bytes = batch.get_array_memory_size();
            assert!(bytes < image_bytes + (64 << 10), "{bytes} for {} rows", batch.num_rows());
            for row in rows(&batch, &columns).unwrap() {
                assert!(matches!(row.image, ImageCell::Bytes(bytes) if bytes == vec![7u8; image_bytes]));
                found += 1;
            }
        }
        assert_eq!(found, rows_all);
    }
    let output = at(folder.path(), "out.parquet");
    wait(rescore(&location, &output, &options(), |row| scored(row as f32, 0.5))).unwrap();
    let after = read(&folder.path().join("out.parquet"));
    let carried = after.project(&[0, 1, 2]).unwrap();
    assert!(input.columns() == carried.columns());
    assert_eq!(input.schema().fields(), carried.schema().fields(), "the types of the input");
}

/// One large page of images, as pyarrow writes them: a chunk keeps its rows, not the page.
#[test]
fn a_batch_keeps_little_of_a_page_of_which_it_shows_little() {
    let folder = tempfile::tempdir().unwrap();
    let images: BinaryArray = (0..200u8).map(|row| Some(vec![row; 50_000])).collect();
    let captions: StringArray =
        (0..200).map(|row| Some(format!("a caption of more than twelve bytes {row}"))).collect();
    let properties = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .set_write_batch_size(1000)
        .set_data_page_size_limit(100 << 20)
        .build();
    let columns: Vec<(&str, ArrayRef)> = vec![("image", Arc::new(images)), ("caption", Arc::new(captions))];
    write_with(&folder.path().join("a.parquet"), &batch(columns), properties);
    let reader = wait(ShardReader::open(&at(folder.path(), "a.parquet"), &ColumnOptions::default())).unwrap();
    let (columns, mut batches, mut number) = (reader.columns().clone(), reader.into_batches(4), 0..200u8);
    while let Some(batch) = wait(batches.next()).unwrap() {
        let bytes = batch.get_array_memory_size();
        assert!(bytes < 3 * 4 * 50_000, "{bytes} for four images of 50,000 bytes");
        for row in rows(&batch, &columns).unwrap() {
            assert_eq!(row.image, ImageCell::Bytes(&[number.next().unwrap(); 50_000]));
        }
    }
    assert_eq!(number.next(), None);
}

/// The file says bytes, its writer's note says text, and text it is not.
#[test]
fn text_that_is_no_utf_8_is_an_error_of_the_shard() {
    let folder = tempfile::tempdir().unwrap();
    for (caption, good) in [(&b"a dog on a beach"[..], true), (&b"a dog \xff\xfe and more"[..], false)] {
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("image", Arc::new(BinaryArray::from_iter_values([b"image"]))),
            ("caption", Arc::new(BinaryArray::from_iter_values([caption]))),
        ];
        let batch = batch(columns);
        let field = |name: &str, kind| Field::new(name, kind, true);
        let note = Schema::new(vec![field("image", DataType::Binary), field("caption", DataType::Utf8)]);
        let note = KeyValue::new("ARROW:schema".to_owned(), encode_arrow_schema(&note));
        let properties = WriterProperties::builder().set_key_value_metadata(Some(vec![note])).build();
        let options = ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
        let file = std::fs::File::create(folder.path().join("a.parquet")).unwrap();
        let mut writer = ArrowWriter::try_new_with_options(file, batch.schema(), options).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let reader = wait(ShardReader::open(&at(folder.path(), "a.parquet"), &ColumnOptions::default())).unwrap();
        let read = wait(reader.into_batches(3).next());
        assert_eq!(read.is_ok(), good, "{read:?}");
        assert!(good || matches!(read, Err(Error::Corrupt { .. })), "{read:?}");
    }
}

#[test]
fn rows_are_fewer_where_a_value_says_what_it_shares_with_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let builder = || WriterProperties::builder().set_dictionary_enabled(false);
    let input = alike(100, 3 << 20);
    write_with(&folder.path().join("a.parquet"), &input, builder().set_encoding(Encoding::DELTA_BYTE_ARRAY).build());
    let reader = wait(ShardReader::open(&at(folder.path(), "a.parquet"), &ColumnOptions::default())).unwrap();
    let mut batches = reader.into_batches(100);
    let (mut found, mut most) = (0, 0);
    while let Some(batch) = wait(batches.next()).unwrap() {
        most = most.max(batch.num_rows() * (3 << 20));
        found += batch.num_rows();
    }
    assert_eq!(found, 100);
    assert!(most <= 64 << 20, "{most} bytes of images in a batch");
}

#[test]
fn a_pause_gives_up_the_footer_and_sees_a_replaced_shard() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.parquet");
    write(&path, &alike(9, 1000));
    let reader = wait(ShardReader::open(&at(folder.path(), "in.parquet"), &ColumnOptions::default())).unwrap();
    let mut batches = reader.clone().into_batches(3);
    assert_eq!(wait(batches.next()).unwrap().unwrap().num_rows(), 3);
    batches.pause();
    assert_eq!(wait(batches.next()).unwrap().unwrap().num_rows(), 1, "the rest of the row group");
    batches.pause();
    write(&path, &alike(9, 1001));
    let error = wait(batches.next()).unwrap_err();
    assert!(matches!(&error, Error::Changed { uri, .. } if uri.ends_with("in.parquet")), "{error}");
    assert!(wait(batches.next()).unwrap().is_none(), "an error is the end");
    // Before the first row, too.
    let mut batches = reader.into_batches(3);
    batches.pause();
    assert!(matches!(wait(batches.next()), Err(Error::Changed { .. })));
}
