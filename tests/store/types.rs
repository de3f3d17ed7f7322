//! Columns whose types would lose something on the way from a shard to an output.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, Date32Array, Date64Array, DictionaryArray, ListArray, NullArray,
    RecordBatch, StringArray, StructArray,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Date32Type, Field, Fields, Int8Type, TimeUnit, TimestampMicrosecondType};
use capsieve_store::{CaptionCell, ColumnOptions, Columns, ImageCell, rows};
use parquet::arrow::ArrowWriter;
use parquet::data_type::{ByteArray, ByteArrayType, Int96, Int96Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::{at, batch, options, read, rescore, scored, wait, write_with};

/// Microseconds of 9999-12-31 and of 0001-01-01.
const FAR: [i64; 2] = [253_402_214_400_000_000, -62_135_596_800_000_000];
const MICROSECONDS_A_DAY: i64 = 86_400_000_000;
/// Of 1970-01-01.
const JULIAN_DAY: i64 = 2_440_588;

fn images(count: usize) -> ArrayRef {
    Arc::new((0..count).map(|row| Some([row as u8])).collect::<BinaryArray>())
}

fn captions(count: usize) -> ArrayRef {
    Arc::new((0..count).map(|row| Some(format!("caption {row}"))).collect::<StringArray>())
}

/// The output of `in.parquet`.
fn rescored(folder: &Path) -> RecordBatch {
    wait(rescore(&at(folder, "in.parquet"), &at(folder, "out.parquet"), &options(), |_| scored(0.5, 0.5))).unwrap();
    read(&folder.join("out.parquet"))
}

#[test]
fn timestamps_of_96_bits_are_those_of_any_year() {
    let folder = tempfile::tempdir().unwrap();
    let schema = "message shard { required binary image; required binary caption (UTF8); required int96 at; }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = std::fs::File::create(folder.path().join("in.parquet")).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for _ in 0..2 {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&["a", "b"].map(ByteArray::from), None, None).unwrap();
        column.close().unwrap();
    }
    let far = FAR.map(|time| {
        let mut value = Int96::new();
        let day = u32::try_from(time.div_euclid(MICROSECONDS_A_DAY) + JULIAN_DAY).unwrap();
        value.set_data(0, 0, day);
        value
    });
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int96Type>().write_batch(&far, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    let found = rescored(folder.path());
    let times = found.column_by_name("at").unwrap();
    assert_eq!(*times.data_type(), DataType::Timestamp(TimeUnit::Microsecond, None));
    assert_eq!(times.as_primitive::<TimestampMicrosecondType>().values(), &FAR);
}

#[test]
fn days_stay_days() {
    let folder = tempfile::tempdir().unwrap();
    let days: ArrayRef = Arc::new(Date64Array::from(vec![Some(0), None, Some(86_400_000)]));
    let inner = StructArray::from(vec![(Arc::new(Field::new("day", DataType::Date64, true)), Arc::clone(&days))]);
    let columns =
        vec![("image", images(3)), ("caption", captions(3)), ("day", days), ("inner", Arc::new(inner) as ArrayRef)];
    let properties = WriterProperties::builder().set_coerce_types(true).build();
    write_with(&folder.path().join("in.parquet"), &batch(columns), properties);
    let found = rescored(folder.path());
    let expected = Date32Array::from(vec![Some(0), None, Some(1)]);
    assert_eq!(found.column_by_name("day").unwrap().as_primitive::<Date32Type>(), &expected);
    let inner = found.column_by_name("inner").unwrap().as_struct().column(0);
    assert_eq!(inner.as_primitive::<Date32Type>(), &expected);
}

#[test]
fn dictionaries_of_several_row_groups_have_room_for_all_values() {
    let folder = tempfile::tempdir().unwrap();
    let group = |number: usize| {
        let values: DictionaryArray<Int8Type> = (0..100)
            .map(|row| Some(format!("{number}-{row}")))
            .collect::<Vec<_>>()
            .iter()
            .map(|value| value.as_deref())
            .collect();
        batch(vec![("image", images(100)), ("caption", captions(100)), ("label", Arc::new(values) as ArrayRef)])
    };
    let file = std::fs::File::create(folder.path().join("in.parquet")).unwrap();
    let mut writer = ArrowWriter::try_new(file, group(0).schema(), None).unwrap();
    for number in 0..3 {
        writer.write(&group(number)).unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
    let found = rescored(folder.path());
    let labels = cast(found.column_by_name("label").unwrap(), &DataType::Utf8).unwrap();
    let expected: StringArray = (0..300).map(|row| Some(format!("{}-{}", row / 100, row % 100))).collect();
    assert_eq!(labels.as_string::<i32>(), &expected);
}

#[test]
fn columns_that_are_always_null_are_rows_without_image_or_caption() {
    let nothing = |count| Arc::new(NullArray::new(count)) as ArrayRef;
    let image = |fields: Vec<(&str, ArrayRef)>| {
        let (names, columns): (Vec<_>, Vec<_>) = fields.into_iter().unzip();
        let fields: Fields = names
            .iter()
            .zip(&columns)
            .map(|(name, column)| Field::new(*name, column.data_type().clone(), true))
            .collect();
        Arc::new(StructArray::new(fields, columns, None::<NullBuffer>)) as ArrayRef
    };
    let item = Arc::new(Field::new("item", DataType::Null, true));
    let list = Arc::new(ListArray::new(item, OffsetBuffer::from_lengths([0, 1]), nothing(1), None)) as ArrayRef;
    let found = |columns: Vec<(&str, ArrayRef)>| {
        let batch =
            RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, column)| (name, column, true)))
                .unwrap();
        let columns = Columns::detect(&batch.schema(), &ColumnOptions::default(), "x").unwrap();
        let rows = rows(&batch, &columns).unwrap();
        (format!("{:?}", rows[0].image), format!("{:?}", rows[0].captions))
    };
    let (null, bytes) = (format!("{:?}", ImageCell::Null), format!("{:?}", ImageCell::Bytes(&[0])));
    let (none, one) = (format!("{:?}", CaptionCell::Null), format!("{:?}", CaptionCell::One("caption 0")));
    assert_eq!(found(vec![("image", nothing(2)), ("caption", nothing(2))]), (null.clone(), none));
    let embedded = image(vec![("bytes", images(2)), ("path", nothing(2))]);
    assert_eq!(found(vec![("image", embedded), ("caption", captions(2))]), (bytes.clone(), one.clone()));
    let elsewhere = image(vec![("bytes", nothing(2)), ("path", captions(2))]);
    assert_eq!(
        found(vec![("image", elsewhere), ("caption", captions(2))]),
        (format!("{:?}", ImageCell::Uri("caption 0")), one.clone())
    );
    // A column that has values is preferred.
    assert_eq!(
        found(vec![("image", nothing(2)), ("jpg", images(2)), ("caption", nothing(2)), ("text", captions(2))]),
        (bytes, one)
    );
    let lists = found(vec![("image", nothing(2)), ("captions", list)]);
    assert_eq!(lists, (null, format!("{:?}", CaptionCell::List(vec![]))));
}
