//! Shards that are something else, cut off or damaged: always an error or rows, never a panic that escapes.

use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, Int64Array, ListArray, StringArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use arrow::record_batch::RecordBatch;
use capsieve_store::{ColumnOptions, Error, Location, Result, ShardReader, rows};
use object_store::memory::InMemory;
use object_store::path::Path;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};

use super::{at, batch, options, rescore, wait, write, write_with};

fn table(rows: usize) -> RecordBatch {
    let images: ArrayRef =
        Arc::new((0..rows).map(|row| (row != 2).then(|| vec![row as u8; 40])).collect::<BinaryArray>());
    let texts: ArrayRef = Arc::new((0..rows).map(|row| Some(format!("caption {}", row % 3))).collect::<StringArray>());
    let items = StringArray::from(vec!["tag"; 2 * rows]);
    let item = Arc::new(Field::new("item", DataType::Utf8, true));
    let tags = ListArray::new(item, OffsetBuffer::from_lengths(vec![2; rows]), Arc::new(items), None);
    let numbers: ArrayRef = Arc::new((0..rows as i64).collect::<Int64Array>());
    batch(vec![("jpg", images), ("caption", texts), ("tags", Arc::new(tags)), ("n", numbers)])
}

fn encoded(properties: WriterProperties) -> Vec<u8> {
    let table = table(12);
    let mut writer = ArrowWriter::try_new(Vec::new(), table.schema(), Some(properties)).unwrap();
    writer.write(&table).unwrap();
    writer.into_inner().unwrap()
}

fn samples() -> Vec<Vec<u8>> {
    let properties = || WriterProperties::builder().set_max_row_group_row_count(Some(5));
    let plain = properties().set_dictionary_enabled(false).build();
    let packed = properties().set_compression(Compression::ZSTD(ZstdLevel::default()));
    let snappy = properties().set_compression(Compression::SNAPPY).set_writer_version(WriterVersion::PARQUET_2_0);
    vec![encoded(plain), encoded(packed.build()), encoded(snappy.build())]
}

/// Reads everything there is, cells too.
async fn read_all(bytes: Vec<u8>) -> Result<usize> {
    let store = Arc::new(InMemory::new());
    let shard = Location::in_store(store, Path::from("0.parquet"), "memory://0.parquet");
    shard.put(bytes.into()).await?;
    let reader = ShardReader::open(&shard, &ColumnOptions::default()).await?;
    let columns = reader.columns().clone();
    let mut batches = reader.into_batches(4);
    let mut count = 0;
    while let Some(batch) = batches.next().await? {
        count += rows(&batch, &columns)?.len();
    }
    assert!(batches.next().await?.is_none(), "the end is the end");
    Ok(count)
}

#[test]
fn cut_files_are_errors() {
    wait(async {
        for sample in samples() {
            assert_eq!(read_all(sample.clone()).await.unwrap(), 12);
            for length in (0..sample.len()).rev().step_by(7) {
                let error = read_all(sample[..length].to_vec()).await.unwrap_err();
                let want = if length < 12 { "is not a Parquet file" } else { "is cut off" };
                assert!(error.to_string().contains(want), "{length}: {error}");
            }
            // Cut at the other end, or in the middle: the magic is there, what it promises is not.
            for gap in [1, 100, sample.len() / 2] {
                let error = read_all(sample[gap..].to_vec()).await.unwrap_err();
                assert!(matches!(error, Error::Corrupt { .. } | Error::Malformed { .. }), "{gap}: {error:?}");
            }
        }
    });
}

#[test]
fn damaged_bytes_never_panic() {
    wait(async {
        let (mut errors, mut total) = (0, 0);
        for sample in samples() {
            for position in (0..sample.len()).step_by(3) {
                let mut bytes = sample.clone();
                bytes[position] ^= 1 << (position % 8);
                total += 1;
                errors += usize::from(read_all(bytes).await.is_err());
            }
            for position in (0..sample.len()).step_by(11) {
                let mut bytes = sample.clone();
                let end = bytes.len().min(position + 4);
                bytes[position..end].fill(0xff);
                total += 1;
                errors += usize::from(read_all(bytes).await.is_err());
            }
        }
        assert!(errors * 4 > total, "{errors} of {total} were noticed");
    });
}

#[test]
fn other_files_are_named_as_what_they_are() {
    wait(async {
        let other =
            [&b""[..], b"x", b"PAR1", b"\xff\xd8\xff\xe0 not a shard at all, a picture", b"caption,url\n1,2\n3,4\n"];
        for bytes in other {
            assert!(matches!(read_all(bytes.to_vec()).await, Err(Error::NotParquet { .. })), "{bytes:?}");
        }
        let mut encrypted = samples().remove(0);
        let length = encrypted.len();
        encrypted[length - 1] = b'E';
        assert!(matches!(read_all(encrypted).await, Err(Error::Encrypted { .. })));
    });
}

#[test]
fn shards_without_rows_are_shards() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (at(folder.path(), "in.parquet"), at(folder.path(), "out.parquet"));
    // No row group at all.
    write(from.as_file().unwrap(), &table(0));
    let written = wait(rescore(&from, &to, &options(), |_| unreachable!("there is no row"))).unwrap();
    assert_eq!((written.rows, written.kept), (0, None));
    let reader = wait(ShardReader::open(&to, &ColumnOptions::default())).unwrap();
    assert_eq!((reader.rows(), reader.schema().fields().len()), (0, 8));
    assert!(wait(reader.into_batches(10).next()).unwrap().is_none());
}

#[test]
fn large_rows_make_small_batches() {
    let folder = tempfile::tempdir().unwrap();
    let images: ArrayRef = Arc::new(BinaryArray::from_iter_values((0..24u8).map(|row| vec![row; 8 << 20])));
    let texts: ArrayRef = Arc::new(StringArray::from(vec!["caption"; 24]));
    let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
    write_with(&folder.path().join("in.parquet"), &batch(vec![("jpg", images), ("caption", texts)]), properties);
    let reader = wait(ShardReader::open(&at(folder.path(), "in.parquet"), &ColumnOptions::default())).unwrap();
    let mut batches = reader.into_batches(1000);
    let mut sizes = Vec::new();
    wait(async {
        while let Some(batch) = batches.next().await.unwrap() {
            sizes.push(batch.num_rows());
        }
    });
    assert_eq!(sizes.iter().sum::<usize>(), 24);
    assert!(sizes.iter().all(|size| *size <= 8), "64 MiB are eight of these rows: {sizes:?}");
}

#[test]
fn a_note_of_types_that_is_not_understood_is_ignored() {
    let table = table(3);
    let options = parquet::arrow::arrow_writer::ArrowWriterOptions::new().with_skip_arrow_metadata(true);
    let entry = parquet::file::metadata::KeyValue::new("ARROW:schema".to_owned(), "AAAA".to_owned());
    let properties = WriterProperties::builder().set_key_value_metadata(Some(vec![entry])).build();
    let mut writer =
        ArrowWriter::try_new_with_options(Vec::new(), table.schema(), options.with_properties(properties)).unwrap();
    writer.write(&table).unwrap();
    assert_eq!(wait(read_all(writer.into_inner().unwrap())).unwrap(), 3);
}

#[test]
fn an_input_that_is_replaced_while_it_is_read_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let from = at(folder.path(), "in.parquet");
    write(from.as_file().unwrap(), &table(12));
    wait(async {
        let reader = ShardReader::open(&from, &ColumnOptions::default()).await.unwrap();
        let mut batches = reader.into_batches(4);
        batches.next().await.unwrap().unwrap();
        std::fs::rename(from.as_file().unwrap(), folder.path().join("old.parquet")).unwrap();
        write(from.as_file().unwrap(), &table(13));
        let error = batches.next().await.unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");
        assert!(batches.next().await.unwrap().is_none(), "an error ends it");
    });
}
