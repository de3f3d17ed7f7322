//! Columns of strings and bytes as views of the pages they were read from: little is copied, and a value that a dictionary
//! holds once is in memory once, however many rows have it.
//!
//! Only how a column is held changes. A reader's schema and an output's have the types that the shard was written from.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{BinaryViewType, ByteViewType, StringViewType};
use arrow_array::{Array, ArrayRef, GenericByteViewArray, RecordBatch, make_array};
use arrow_data::ArrayData;
use arrow_schema::{ArrowError, DataType, Field, FieldRef, Fields, Schema};

/// Blocks that are more than so many times as large as what a batch shows of them are left behind.
const BLOCKS_TO_VALUES: usize = 2;

/// The schema with views in place of strings and bytes, on every level but inside of dictionaries: those hold each value
/// once anyway.
pub(crate) fn with_views(schema: &Schema) -> Schema {
    Schema::new_with_metadata(fields(schema.fields()), schema.metadata().clone())
}

/// A field with views.
pub(crate) fn field(plain: &FieldRef) -> FieldRef {
    Arc::new(Field::clone(plain).with_data_type(data_type(plain.data_type())))
}

fn fields(plain: &Fields) -> Fields {
    plain.iter().map(field).collect()
}

/// A type with views.
pub(crate) fn data_type(plain: &DataType) -> DataType {
    match plain {
        DataType::Utf8 | DataType::LargeUtf8 => DataType::Utf8View,
        DataType::Binary | DataType::LargeBinary => DataType::BinaryView,
        DataType::List(item) => DataType::List(field(item)),
        DataType::LargeList(item) => DataType::LargeList(field(item)),
        DataType::ListView(item) => DataType::ListView(field(item)),
        DataType::LargeListView(item) => DataType::LargeListView(field(item)),
        DataType::FixedSizeList(item, length) => DataType::FixedSizeList(field(item), *length),
        DataType::Struct(inner) => DataType::Struct(fields(inner)),
        DataType::Map(entries, sorted) => DataType::Map(field(entries), *sorted),
        other => other.clone(),
    }
}

/// The batch without pages of which it shows little, so that its memory is its own: at most [`BLOCKS_TO_VALUES`] times what its
/// values take. What a batch shares with others counts for each of them.
///
/// # Errors
/// Text that is not UTF-8: the library looks only where the file says that a column is text, and takes a note of its
/// writer for granted.
pub(crate) fn own(batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    // Numbers are their own, and tables of thousands of them are common.
    let own = |column: &ArrayRef| match column.data_type().is_primitive() {
        true => Ok(Arc::clone(column)),
        false => Ok(make_array(owned(column.to_data())?)),
    };
    let columns = batch.columns().iter().map(own);
    RecordBatch::try_new(batch.schema(), columns.collect::<Result<Vec<ArrayRef>, ArrowError>>()?)
}

fn owned(data: ArrayData) -> Result<ArrayData, ArrowError> {
    match data.data_type() {
        DataType::Utf8View => {
            data.validate_values()?;
            Ok(values_only::<StringViewType>(data))
        }
        DataType::BinaryView => Ok(values_only::<BinaryViewType>(data)),
        DataType::Utf8 | DataType::LargeUtf8 => data.validate_values().map(|()| data),
        _ if data.child_data().is_empty() => Ok(data),
        _ => {
            let children = data.child_data().iter().cloned().map(owned).collect::<Result<Vec<_>, _>>()?;
            data.into_builder().child_data(children).build()
        }
    }
}

fn values_only<T: ByteViewType>(data: ArrayData) -> ArrayData {
    let array = make_array(data.clone());
    let array: &GenericByteViewArray<T> = array.as_byte_view();
    let blocks = array.data_buffers().iter().map(|block| block.len()).sum::<usize>();
    if blocks > BLOCKS_TO_VALUES * array.total_buffer_bytes_used() { array.gc().into_data() } else { data }
}
