//! Types that columns are read with instead of those that the library picks, where these would lose something on the way to an
//! output.

use std::sync::Arc;

use arrow_schema::{DataType, Field, FieldRef, Fields, Schema, TimeUnit};
use parquet::basic::Type as Physical;
use parquet::file::metadata::ParquetMetaData;

/// Key of the note that says which Arrow types a file was written from.
const ARROW_NOTE: &str = "ARROW:schema";

/// What decides the type of a leaf beside the type that the library picks.
struct Leaves<'a> {
    file: &'a ParquetMetaData,
    /// Somebody noted the types.
    noted: bool,
    next: usize,
}

/// The schema with
///
/// * timestamps of 96 bits in microseconds, as they are written by Spark: in nanoseconds, their years end in 2262;
/// * days as days, also where they were noted as milliseconds: a file of milliseconds would be one of plain numbers;
/// * dictionaries of small keys with keys of 32 bits where they come from several row groups, each with values of its own.
///
/// None: it is the same.
pub(crate) fn lossless(schema: &Schema, file: &ParquetMetaData) -> Option<Schema> {
    let notes = file.file_metadata().key_value_metadata();
    let noted = notes.is_some_and(|notes| notes.iter().any(|note| note.key == ARROW_NOTE));
    let mut leaves = Leaves { file, noted, next: 0 };
    let fields = leaves.fields(schema.fields());
    (fields != *schema.fields()).then(|| Schema::new_with_metadata(fields, schema.metadata().clone()))
}

impl Leaves<'_> {
    fn fields(&mut self, fields: &Fields) -> Fields {
        fields.iter().map(|field| self.field(field)).collect()
    }

    fn field(&mut self, field: &FieldRef) -> FieldRef {
        let data_type = match field.data_type() {
            DataType::List(item) => DataType::List(self.field(item)),
            DataType::LargeList(item) => DataType::LargeList(self.field(item)),
            DataType::ListView(item) => DataType::ListView(self.field(item)),
            DataType::LargeListView(item) => DataType::LargeListView(self.field(item)),
            DataType::FixedSizeList(item, length) => DataType::FixedSizeList(self.field(item), *length),
            DataType::Struct(inner) => DataType::Struct(self.fields(inner)),
            DataType::Map(entries, sorted) => DataType::Map(self.field(entries), *sorted),
            leaf => self.leaf(leaf),
        };
        Arc::new(Field::clone(field).with_data_type(data_type))
    }

    /// Leaves come in the order of Parquet's columns.
    fn leaf(&mut self, leaf: &DataType) -> DataType {
        let columns = self.file.file_metadata().schema_descr().columns();
        let physical = columns.get(self.next).map(|column| column.physical_type());
        self.next += 1;
        match (leaf, physical) {
            (DataType::Timestamp(TimeUnit::Nanosecond, zone), Some(Physical::INT96)) if !self.noted => {
                DataType::Timestamp(TimeUnit::Microsecond, zone.clone())
            }
            (DataType::Date64, Some(Physical::INT32)) => DataType::Date32,
            (DataType::Dictionary(key, value), _)
                if matches!(**key, DataType::Int8 | DataType::UInt8 | DataType::Int16 | DataType::UInt16)
                    && self.file.num_row_groups() > 1 =>
            {
                DataType::Dictionary(Box::new(DataType::Int32), value.clone())
            }
            (other, _) => other.clone(),
        }
    }
}
