//! Cells of a batch as plain borrowed values, whatever Arrow type holds them. Copies nothing but list headers.
//!
//! A null on any level (row, struct, field, list, dictionary value) is [`ImageCell::Null`], [`CaptionCell::Null`] or a
//! `None` in a list: the worker reports such rows as `null_image` and `null_caption`.

use arrow_array::cast::AsArray;
use arrow_array::{
    Array, ArrayRef, BinaryArray, BinaryViewArray, LargeBinaryArray, LargeStringArray, RecordBatch, StringArray,
    StringViewArray, StructArray,
};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::DataType;

use crate::{CaptionKind, Columns, ImageKind, Result};

/// The image of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageCell<'a> {
    /// There is none, for example because its download failed.
    Null,
    /// An encoded image; may be empty, which is the decoder's to refuse.
    Bytes(&'a [u8]),
    /// Where the image is, see [`crate::Location::resolve`].
    Uri(&'a str),
}

/// The captions of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaptionCell<'a> {
    /// There is none.
    Null,
    /// The caption.
    One(&'a str),
    /// The captions of a list column, possibly none or null.
    List(Vec<Option<&'a str>>),
}

/// What is scored of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputRow<'a> {
    /// The image.
    pub image: ImageCell<'a>,
    /// Its captions.
    pub captions: CaptionCell<'a>,
}

/// The rows of a batch.
///
/// # Errors
/// When `columns` were detected in a shard of another schema.
pub fn rows<'a>(batch: &'a RecordBatch, columns: &Columns) -> Result<Vec<InputRow<'a>>> {
    columns.check(batch.schema_ref())?;
    let images = Images::new(batch.column(columns.image), columns.image_kind);
    let captions = Captions::new(batch.column(columns.caption), columns.caption_kind);
    let row = |index| InputRow { image: images.get(index), captions: captions.get(index) };
    Ok((0..batch.num_rows()).map(row).collect())
}

/// One row of a batch.
///
/// # Errors
/// When `columns` were detected in a shard of another schema.
///
/// # Panics
/// When the batch has no such row.
pub fn row<'a>(batch: &'a RecordBatch, columns: &Columns, index: usize) -> Result<InputRow<'a>> {
    columns.check(batch.schema_ref())?;
    Ok(InputRow {
        image: Images::new(batch.column(columns.image), columns.image_kind).get(index),
        captions: Captions::new(batch.column(columns.caption), columns.caption_kind).get(index),
    })
}

/// Bytes of a key at most; what is longer is cut.
const KEY_BYTES_MAX: usize = 4096;

/// The keys of a key column as text; empty where there is none.
pub fn key_texts(keys: &ArrayRef) -> Vec<String> {
    let options = FormatOptions::new();
    let Ok(formatter) = ArrayFormatter::try_new(keys, &options) else { return vec![String::new(); keys.len()] };
    let text = |row| {
        let mut text = if keys.is_null(row) { String::new() } else { formatter.value(row).to_string() };
        let end = (0..=KEY_BYTES_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or_default());
        text
    };
    (0..keys.len()).map(text).collect()
}

enum Images<'a> {
    Binary(Binaries<'a>),
    Struct { outer: &'a StructArray, bytes: Binaries<'a>, path: Option<Strings<'a>> },
    Uri(Strings<'a>),
}

impl<'a> Images<'a> {
    fn new(array: &'a ArrayRef, kind: ImageKind) -> Self {
        match kind {
            ImageKind::Binary => Self::Binary(Binaries::new(array)),
            ImageKind::Uri => Self::Uri(Strings::new(array)),
            ImageKind::Struct => {
                let outer = array.as_struct();
                let bytes = outer.column_by_name("bytes").expect("detection asked for a field `bytes`");
                Self::Struct {
                    outer,
                    bytes: Binaries::new(bytes),
                    path: outer.column_by_name("path").map(Strings::new),
                }
            }
        }
    }

    fn get(&self, row: usize) -> ImageCell<'a> {
        let uri = |strings: &Strings<'a>| strings.get(row).filter(|uri| !uri.is_empty()).map(ImageCell::Uri);
        let cell = match self {
            Self::Binary(bytes) => bytes.get(row).map(ImageCell::Bytes),
            Self::Uri(strings) => uri(strings),
            Self::Struct { outer, .. } if outer.is_null(row) => None,
            // As `datasets` reads it: the path counts only where the image is not embedded.
            Self::Struct { bytes, path, .. } => {
                bytes.get(row).map(ImageCell::Bytes).or_else(|| path.as_ref().and_then(uri))
            }
        };
        cell.unwrap_or(ImageCell::Null)
    }
}

enum Captions<'a> {
    Text(Strings<'a>),
    List { outer: &'a ArrayRef, items: Strings<'a> },
}

impl<'a> Captions<'a> {
    fn new(array: &'a ArrayRef, kind: CaptionKind) -> Self {
        match kind {
            CaptionKind::Text => Self::Text(Strings::new(array)),
            CaptionKind::List => Self::List { outer: array, items: Strings::new(list_items(array)) },
        }
    }

    fn get(&self, row: usize) -> CaptionCell<'a> {
        match self {
            Self::Text(strings) => strings.get(row).map_or(CaptionCell::Null, CaptionCell::One),
            Self::List { outer, .. } if outer.is_null(row) => CaptionCell::Null,
            Self::List { outer, items } => {
                let (start, len) = list_range(outer, row);
                CaptionCell::List((start..start + len).map(|item| items.get(item)).collect())
            }
        }
    }
}

pub(crate) fn list_items(array: &ArrayRef) -> &ArrayRef {
    match array.data_type() {
        DataType::List(_) => array.as_list::<i32>().values(),
        DataType::LargeList(_) => array.as_list::<i64>().values(),
        DataType::ListView(_) => array.as_list_view::<i32>().values(),
        DataType::LargeListView(_) => array.as_list_view::<i64>().values(),
        _ => array.as_fixed_size_list().values(),
    }
}

/// Where the items of a row begin among all items, and how many there are.
pub(crate) fn list_range(array: &ArrayRef, row: usize) -> (usize, usize) {
    match array.data_type() {
        DataType::List(_) => {
            let offsets = array.as_list::<i32>().value_offsets();
            (offsets[row] as usize, (offsets[row + 1] - offsets[row]) as usize)
        }
        DataType::LargeList(_) => {
            let offsets = array.as_list::<i64>().value_offsets();
            (offsets[row] as usize, (offsets[row + 1] - offsets[row]) as usize)
        }
        DataType::ListView(_) => {
            let list = array.as_list_view::<i32>();
            (list.value_offset(row) as usize, list.value_size(row) as usize)
        }
        DataType::LargeListView(_) => {
            let list = array.as_list_view::<i64>();
            (list.value_offset(row) as usize, list.value_size(row) as usize)
        }
        _ => {
            let list = array.as_fixed_size_list();
            (list.value_offset_at(row), list.value_length() as usize)
        }
    }
}

/// A column of strings.
enum Strings<'a> {
    /// Of a type that has no other value.
    Null,
    Small(&'a StringArray),
    Large(&'a LargeStringArray),
    View(&'a StringViewArray),
    Dictionary(Keys, Box<Strings<'a>>),
}

impl<'a> Strings<'a> {
    fn new(array: &'a ArrayRef) -> Self {
        match array.data_type() {
            DataType::Utf8 => Self::Small(array.as_string()),
            DataType::LargeUtf8 => Self::Large(array.as_string()),
            DataType::Utf8View => Self::View(array.as_string_view()),
            DataType::Null => Self::Null,
            _ => Self::Dictionary(Keys::new(array), Box::new(Self::new(array.as_any_dictionary().values()))),
        }
    }

    fn get(&self, index: usize) -> Option<&'a str> {
        match self {
            Self::Null => None,
            Self::Small(array) => array.is_valid(index).then(|| array.value(index)),
            Self::Large(array) => array.is_valid(index).then(|| array.value(index)),
            Self::View(array) => array.is_valid(index).then(|| array.value(index)),
            Self::Dictionary(keys, values) => values.get(keys.get(index)?),
        }
    }
}

/// A column of byte strings.
enum Binaries<'a> {
    /// Of a type that has no other value.
    Null,
    Small(&'a BinaryArray),
    Large(&'a LargeBinaryArray),
    View(&'a BinaryViewArray),
    Dictionary(Keys, Box<Binaries<'a>>),
}

impl<'a> Binaries<'a> {
    fn new(array: &'a ArrayRef) -> Self {
        match array.data_type() {
            DataType::Binary => Self::Small(array.as_binary()),
            DataType::LargeBinary => Self::Large(array.as_binary()),
            DataType::BinaryView => Self::View(array.as_binary_view()),
            DataType::Null => Self::Null,
            _ => Self::Dictionary(Keys::new(array), Box::new(Self::new(array.as_any_dictionary().values()))),
        }
    }

    fn get(&self, index: usize) -> Option<&'a [u8]> {
        match self {
            Self::Null => None,
            Self::Small(array) => array.is_valid(index).then(|| array.value(index)),
            Self::Large(array) => array.is_valid(index).then(|| array.value(index)),
            Self::View(array) => array.is_valid(index).then(|| array.value(index)),
            Self::Dictionary(keys, values) => values.get(keys.get(index)?),
        }
    }
}

/// Positions in a dictionary; a null key has none.
struct Keys(Vec<Option<usize>>);

impl Keys {
    fn new(array: &ArrayRef) -> Self {
        let dictionary = array.as_any_dictionary();
        if dictionary.values().is_empty() {
            return Self(vec![None; array.len()]);
        }
        let positions = dictionary.normalized_keys();
        Self(positions.into_iter().enumerate().map(|(row, key)| array.is_valid(row).then_some(key)).collect())
    }

    fn get(&self, index: usize) -> Option<usize> {
        self.0.get(index).copied().flatten()
    }
}
