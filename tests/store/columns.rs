//! Finding columns, and reading their cells in every type they come in.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, DictionaryArray, FixedSizeListArray, Int32Array, LargeListArray, LargeListViewArray,
    LargeStringArray, ListArray, ListViewArray, RecordBatch, StringArray, StringViewArray, StructArray,
};
use arrow::buffer::{NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields, Int8Type, Schema};
use capsieve_store::{
    CaptionCell, CaptionKind, ColumnOptions, Columns, Error, ImageCell, ImageKind, Location, ShardReader, key_texts,
    rows,
};

use super::{batch, wait};
use crate::support::write_parquet;

fn schema(columns: &[(&str, DataType)]) -> Schema {
    Schema::new(columns.iter().map(|(name, kind)| Field::new(*name, kind.clone(), true)).collect::<Fields>())
}

fn hugging_face() -> DataType {
    DataType::Struct(vec![Field::new("bytes", DataType::Binary, true), Field::new("path", DataType::Utf8, true)].into())
}

fn list() -> DataType {
    DataType::List(Arc::new(Field::new("element", DataType::Utf8, true)))
}

fn detect(columns: &[(&str, DataType)]) -> Result<Columns, Error> {
    Columns::detect(&schema(columns), &ColumnOptions::default(), "s.parquet")
}

/// Names and types of the columns; then where the image is and of what kind, the caption likewise, the key.
type Case<'a> = (&'a [(&'a str, DataType)], usize, ImageKind, usize, CaptionKind, Option<usize>);

#[test]
fn layouts_in_the_wild() {
    use DataType::{Binary, Int64, LargeBinary, LargeUtf8, Utf8};
    let img2dataset = [
        ("caption", Utf8),
        ("url", Utf8),
        ("key", Utf8),
        ("status", Utf8),
        ("error_message", Utf8),
        ("width", Int64),
        ("height", Int64),
        ("jpg", Binary),
    ];
    let cases: [Case<'_>; 9] = [
        (&img2dataset, 7, ImageKind::Binary, 0, CaptionKind::Text, Some(2)),
        (&[("image", hugging_face()), ("text", Utf8)], 0, ImageKind::Struct, 1, CaptionKind::Text, None),
        (&[("URL", Utf8), ("TEXT", Utf8)], 0, ImageKind::Uri, 1, CaptionKind::Text, None),
        (&[("uid", Utf8), ("url", Utf8), ("text", Utf8)], 1, ImageKind::Uri, 2, CaptionKind::Text, Some(0)),
        // The list's order decides, not the file's.
        (
            &[("txt", Utf8), ("png", Binary), ("caption", LargeUtf8), ("jpg", LargeBinary)],
            3,
            ImageKind::Binary,
            2,
            CaptionKind::Text,
            None,
        ),
        // A column of the right name and a useless type is passed over.
        (
            &[("image", Int64), ("img", Binary), ("caption", Int64), ("prompt", Utf8)],
            1,
            ImageKind::Binary,
            3,
            CaptionKind::Text,
            None,
        ),
        (&[("image", Binary), ("captions", list())], 0, ImageKind::Binary, 1, CaptionKind::List, None),
        (
            &[("path", Utf8), ("image_bytes", Binary), ("alt_text", Utf8), ("id", Int64), ("__key__", Utf8)],
            1,
            ImageKind::Binary,
            2,
            CaptionKind::Text,
            Some(4),
        ),
        (
            &[("image_path", Utf8), ("text", Utf8), ("image_id", Int64)],
            0,
            ImageKind::Uri,
            1,
            CaptionKind::Text,
            Some(2),
        ),
    ];
    for (columns, image, image_kind, caption, caption_kind, key) in cases {
        let want = Columns { image, image_kind, caption, caption_kind, key };
        assert_eq!(detect(columns).unwrap(), want, "{columns:?}");
    }
}

#[test]
fn named_columns_win_and_are_checked() {
    use DataType::{Binary, Int64, Utf8};
    let columns = [("jpg", Binary), ("caption", Utf8), ("thumb", Binary), ("title", Utf8), ("n", Int64)];
    let named = |image: &str, caption: &str, key: &str| {
        let name = |name: &str| (!name.is_empty()).then(|| name.to_owned());
        let options = ColumnOptions { image: name(image), caption: name(caption), key: name(key) };
        Columns::detect(&schema(&columns), &options, "s.parquet")
    };
    let found = named("thumb", "title", "n").unwrap();
    assert_eq!((found.image, found.caption, found.key), (2, 3, Some(4)));
    assert!(matches!(named("thump", "", ""), Err(Error::MissingColumn { name, .. }) if name == "thump"));
    assert!(matches!(named("", "Caption", ""), Err(Error::MissingColumn { option: "--caption-column", .. })));
    assert!(matches!(named("", "", "uid"), Err(Error::MissingColumn { option: "--key-column", .. })));
    assert!(matches!(named("n", "", ""), Err(Error::ColumnType { role: "image", .. })));
    assert!(matches!(named("", "jpg", ""), Err(Error::ColumnType { role: "caption", .. })));
    // A URI column is what it is when it is asked for.
    assert_eq!(named("title", "", "").unwrap().image_kind, ImageKind::Uri);
}

#[test]
fn what_cannot_be_decided_lists_the_columns() {
    use DataType::{Binary, Int64, Utf8};
    let message = |columns: &[(&str, DataType)]| detect(columns).unwrap_err().to_string();
    let none = message(&[("picture", Binary), ("caption", Utf8)]);
    assert!(none.contains("picture (Binary)") && none.contains("--image-column"), "{none}");
    let none = message(&[("jpg", Binary), ("words", Utf8), ("n", Int64)]);
    assert!(none.contains("words (Utf8), n (Int64)") && none.contains("--caption-column"), "{none}");
    let twice = message(&[("jpg", Binary), ("caption", Utf8), ("caption", Utf8)]);
    assert!(twice.contains("2 columns named \"caption\""), "{twice}");
    // The other one is of no use, so there is nothing to decide.
    assert_eq!(detect(&[("jpg", Binary), ("caption", Int64), ("caption", Utf8)]).unwrap().caption, 2);
    let wide: Vec<(String, DataType)> = (0..500).map(|index| (format!("c{index}"), Int64)).collect();
    let wide: Vec<(&str, DataType)> = wide.iter().map(|(name, kind)| (name.as_str(), kind.clone())).collect();
    assert!(message(&wide).len() < 1500);
}

#[test]
fn metadata_of_img2dataset_is_recognised() {
    use DataType::{Binary, Utf8};
    let names = ["caption", "url", "key", "status", "error_message", "width"];
    let side: Vec<(&str, DataType)> = names.into_iter().map(|name| (name, Utf8)).collect();
    let error = detect(&side).unwrap_err();
    assert!(matches!(&error, Error::MetadataOnly { column, .. } if column == "url"), "{error}");
    assert!(error.to_string().contains("--image-column url"), "{error}");
    let asked = ColumnOptions { image: Some("url".to_owned()), ..ColumnOptions::default() };
    assert_eq!(Columns::detect(&schema(&side), &asked, "s.parquet").unwrap().image_kind, ImageKind::Uri);
    // With images under any name it is an ordinary shard, whether we know the name or not.
    let shard: Vec<(&str, DataType)> = side.iter().cloned().chain([("picture", Binary)]).collect();
    assert!(detect(&shard).is_ok());
}

const TEXTS: [Option<&str>; 5] = [Some("a"), None, Some(""), Some("größer"), Some("a")];

/// The same five strings in every type a caption comes in.
fn text_arrays() -> Vec<ArrayRef> {
    let small: ArrayRef = Arc::new(StringArray::from(TEXTS.to_vec()));
    let dictionary = |kind| DataType::Dictionary(Box::new(DataType::Int16), Box::new(kind));
    let mut arrays: Vec<ArrayRef> = vec![Arc::clone(&small)];
    for kind in [DataType::LargeUtf8, DataType::Utf8View, dictionary(DataType::Utf8), dictionary(DataType::LargeUtf8)] {
        arrays.push(cast(&small, &kind).unwrap());
    }
    // A null may also be an entry of the dictionary.
    let keys = arrow::array::Int8Array::from(vec![0, 1, 2, 3, 0]);
    let values = StringArray::from(vec![Some("a"), None, Some(""), Some("größer")]);
    arrays.push(Arc::new(DictionaryArray::<Int8Type>::try_new(keys, Arc::new(values)).unwrap()));
    arrays
}

#[test]
fn captions_of_every_type() {
    let want: Vec<CaptionCell<'_>> =
        TEXTS.iter().map(|text| text.map_or(CaptionCell::Null, CaptionCell::One)).collect();
    for array in text_arrays() {
        let images: ArrayRef = Arc::new(BinaryArray::from_vec(vec![b"x"; 5]));
        let whole = batch(vec![("jpg", images), ("text", Arc::clone(&array))]);
        let columns = Columns::detect(whole.schema_ref(), &ColumnOptions::default(), "").unwrap();
        let captions = |rows: Vec<capsieve_store::InputRow<'_>>| {
            format!("{:?}", rows.iter().map(|row| &row.captions).collect::<Vec<_>>())
        };
        assert_eq!(captions(rows(&whole, &columns).unwrap()), format!("{want:?}"), "{}", array.data_type());
        let cut = whole.slice(1, 3);
        assert_eq!(captions(rows(&cut, &columns).unwrap()), format!("{:?}", &want[1..4]), "{}", array.data_type());
    }
}

#[test]
fn images_of_every_type() {
    let bytes = vec![Some(b"one".as_slice()), None, Some(b""), Some(b"one"), Some(&[0xff, 0xd8])];
    let want: Vec<ImageCell<'_>> = bytes.iter().map(|bytes| bytes.map_or(ImageCell::Null, ImageCell::Bytes)).collect();
    let small: ArrayRef = Arc::new(BinaryArray::from(bytes.clone()));
    let dictionary = DataType::Dictionary(Box::new(DataType::UInt8), Box::new(DataType::Binary));
    for kind in [DataType::Binary, DataType::LargeBinary, DataType::BinaryView, dictionary] {
        let texts: ArrayRef = Arc::new(StringArray::from(TEXTS.to_vec()));
        let whole = batch(vec![("jpg", cast(&small, &kind).unwrap()), ("text", texts)]).slice(1, 4);
        let columns = Columns::detect(whole.schema_ref(), &ColumnOptions::default(), "").unwrap();
        let images: Vec<ImageCell<'_>> = rows(&whole, &columns).unwrap().into_iter().map(|row| row.image).collect();
        assert_eq!(images, want[1..], "{kind}");
    }
}

#[test]
fn an_embedded_image_goes_before_its_path() {
    let fields: Fields =
        vec![Field::new("bytes", DataType::Binary, true), Field::new("path", DataType::Utf8, true)].into();
    let bytes = BinaryArray::from(vec![Some(b"x".as_slice()), None, None, Some(b"y"), None]);
    let path = StringArray::from(vec![Some("a.jpg"), Some("b.jpg"), None, None, Some("")]);
    let nulls = NullBuffer::from(vec![true, true, true, false, true]);
    let images = StructArray::new(fields, vec![Arc::new(bytes), Arc::new(path)], Some(nulls));
    let texts: ArrayRef = Arc::new(StringViewArray::from(TEXTS.to_vec()));
    let whole = batch(vec![("image", Arc::new(images)), ("text", texts)]);
    let columns = Columns::detect(whole.schema_ref(), &ColumnOptions::default(), "").unwrap();
    let images: Vec<ImageCell<'_>> = rows(&whole, &columns).unwrap().into_iter().map(|row| row.image).collect();
    let null = ImageCell::Null;
    assert_eq!(images, [ImageCell::Bytes(b"x"), ImageCell::Uri("b.jpg"), null.clone(), null.clone(), null]);
}

/// `[["a", null], null, [], ["", "größer"]]` in every type of list.
fn list_arrays() -> Vec<ArrayRef> {
    let items: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some(""), Some("größer")]));
    let item = || Arc::new(Field::new("item", DataType::Utf8, true));
    let nulls = || Some(NullBuffer::from(vec![true, false, true, true]));
    let offsets = || OffsetBuffer::<i32>::from_lengths([2, 0, 0, 2]);
    let list = ListArray::new(item(), offsets(), Arc::clone(&items), nulls());
    let large =
        LargeListArray::new(item(), OffsetBuffer::<i64>::from_lengths([2, 0, 0, 2]), Arc::clone(&items), nulls());
    // Views may lie in any order.
    let view = ListViewArray::new(
        item(),
        ScalarBuffer::from(vec![0, 3, 1, 2]),
        ScalarBuffer::from(vec![2, 1, 0, 2]),
        Arc::clone(&items),
        nulls(),
    );
    let large_view = LargeListViewArray::new(
        item(),
        ScalarBuffer::from(vec![0i64, 0, 4, 2]),
        ScalarBuffer::from(vec![2i64, 0, 0, 2]),
        Arc::clone(&items),
        nulls(),
    );
    let strings: ArrayRef = Arc::new(LargeStringArray::from(vec![Some("a"), None, Some(""), Some("größer")]));
    let item = Arc::new(Field::new("item", DataType::LargeUtf8, true));
    let of_large = ListArray::new(item, offsets(), strings, nulls());
    vec![Arc::new(list), Arc::new(large), Arc::new(view), Arc::new(large_view), Arc::new(of_large)]
}

#[test]
fn lists_of_captions() {
    let want = [
        CaptionCell::List(vec![Some("a"), None]),
        CaptionCell::Null,
        CaptionCell::List(vec![]),
        CaptionCell::List(vec![Some(""), Some("größer")]),
    ];
    for array in list_arrays() {
        let kind = array.data_type().clone();
        let images: ArrayRef = Arc::new(BinaryArray::from_vec(vec![b"x"; 4]));
        let whole = batch(vec![("jpg", images), ("captions", array)]).slice(1, 3);
        let columns = Columns::detect(whole.schema_ref(), &ColumnOptions::default(), "").unwrap();
        let found: Vec<CaptionCell<'_>> = rows(&whole, &columns).unwrap().into_iter().map(|row| row.captions).collect();
        assert_eq!(found, want[1..], "{kind}");
    }
    let item = Arc::new(Field::new("item", DataType::Utf8, true));
    let items: ArrayRef = Arc::new(StringArray::from(vec!["a", "b", "c", "d", "e", "f"]));
    let pairs = FixedSizeListArray::new(item, 2, items, None);
    let images: ArrayRef = Arc::new(BinaryArray::from_vec(vec![b"x"; 3]));
    let whole = batch(vec![("jpg", images), ("captions", Arc::new(pairs))]).slice(1, 2);
    let columns = Columns::detect(whole.schema_ref(), &ColumnOptions::default(), "").unwrap();
    assert_eq!(rows(&whole, &columns).unwrap()[1].captions, CaptionCell::List(vec![Some("e"), Some("f")]));
}

#[test]
fn columns_of_another_shard_are_refused() {
    let images: ArrayRef = Arc::new(BinaryArray::from_vec(vec![b"x"]));
    let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1]));
    let texts: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let good = batch(vec![("jpg", images), ("text", Arc::clone(&texts))]);
    let columns = Columns::detect(good.schema_ref(), &ColumnOptions::default(), "").unwrap();
    let other = batch(vec![("jpg", numbers), ("text", texts)]);
    assert!(matches!(rows(&other, &columns), Err(Error::ForeignColumns)));
    assert!(matches!(rows(&good.project(&[0]).unwrap(), &columns), Err(Error::ForeignColumns)));
}

/// Columns before, between and behind those that are scored, nested ones among them, are not read and change nothing.
#[test]
fn narrowed_rows_are_the_same_rows() {
    let (folder, count) = (tempfile::tempdir().unwrap(), 50);
    let text =
        |prefix: &str| Arc::new((0..count).map(|i| Some(format!("{prefix} {i}"))).collect::<StringArray>()) as ArrayRef;
    let bytes: ArrayRef = Arc::new((0..count).map(|i| Some(vec![i as u8; 3])).collect::<BinaryArray>());
    let field = |name: &str, kind| Arc::new(Field::new(name, kind, true));
    let image = StructArray::from(vec![
        (field("bytes", DataType::Binary), bytes),
        (field("path", DataType::Utf8), text("path")),
    ]);
    let nested =
        StructArray::from(vec![(field("a", DataType::Utf8), text("a")), (field("b", DataType::Utf8), text("b"))]);
    let batch = RecordBatch::try_from_iter([
        ("nested", Arc::new(nested) as ArrayRef),
        ("caption", text("caption")),
        ("other", text("other")),
        ("image", Arc::new(image)),
        ("key", text("key")),
        ("last", text("last")),
    ])
    .unwrap();
    let path = folder.path().join("a.parquet");
    write_parquet(&path, &batch, 16);
    let location = Location::parse(path.to_str().unwrap()).unwrap();
    let reader = wait(ShardReader::open(&location, &ColumnOptions::default())).unwrap();
    let narrow = reader.clone().narrowed();
    assert!(narrow.reading_bytes(10) < reader.reading_bytes(10));
    let read = |reader: ShardReader, first| {
        let columns = reader.columns().clone();
        let mut batches = reader.into_batches_from(first, 10);
        let mut found = Vec::new();
        while let Some(batch) = wait(batches.next()).unwrap() {
            let keys = key_texts(batch.column(columns.key.unwrap()));
            let rows = rows(&batch, &columns).unwrap().into_iter().map(|row| format!("{row:?}"));
            found.extend(rows.zip(keys));
        }
        found
    };
    for first in [0, 17, 50] {
        let rows = read(narrow.clone(), first);
        assert_eq!(rows.len() as u64, 50 - first);
        assert_eq!(rows, read(reader.clone(), first));
    }
}
