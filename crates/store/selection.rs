//! `--select`: the captions of a list that a kept row is written with.

use std::sync::Arc;

use arrow_array::{Array, ArrayRef, LargeListArray, ListArray, UInt64Array};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{ArrowError, DataType, Field, FieldRef};
use arrow_select::take::take;

use crate::rows::{list_items, list_range};

/// Which captions of its list a kept row is written with. A row that is not kept is written as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Select {
    /// As they are.
    #[default]
    All,
    /// Those that pass the thresholds.
    Matching,
    /// The best one of those.
    Best,
}

impl Select {
    /// As users say it; nothing where nothing is selected.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::All => None,
            Self::Matching => Some("matching"),
            Self::Best => Some("best"),
        }
    }
}

/// The captions of each row that stay, by their place; none: all of them.
pub(crate) type Selected = Vec<Option<Vec<usize>>>;

/// A column of fewer captions: of any number, whatever the list was.
pub(crate) fn field(captions: &FieldRef) -> FieldRef {
    let data_type = match captions.data_type() {
        DataType::LargeListView(item) => DataType::LargeList(Arc::clone(item)),
        DataType::ListView(item) | DataType::FixedSizeList(item, _) => DataType::List(Arc::clone(item)),
        other => other.clone(),
    };
    Arc::new(Field::clone(captions).with_data_type(data_type))
}

/// The captions that are selected, as a column of [`field`]'s type.
///
/// # Errors
/// More captions than offsets of 32 bits can count.
pub(crate) fn captions(lists: &ArrayRef, selected: &Selected) -> Result<ArrayRef, ArrowError> {
    let (mut places, mut lengths) = (Vec::new(), Vec::with_capacity(lists.len()));
    for (row, selected) in selected.iter().enumerate() {
        // What is behind a null is nothing.
        let (start, length) = if lists.is_null(row) { (0, 0) } else { list_range(lists, row) };
        let before = places.len();
        match selected {
            Some(captions) => places.extend(captions.iter().map(|caption| (start + caption) as u64)),
            None => places.extend((start..start + length).map(|caption| caption as u64)),
        }
        lengths.push(places.len() - before);
    }
    let items = take(list_items(lists), &UInt64Array::from(places), None)?;
    let nulls = lists.nulls().cloned();
    let item = |field: &FieldRef| Arc::new(Field::clone(field).with_data_type(items.data_type().clone()));
    Ok(match lists.data_type() {
        DataType::LargeList(field) | DataType::LargeListView(field) => {
            let offsets = OffsetBuffer::<i64>::from_lengths(lengths);
            Arc::new(LargeListArray::try_new(item(field), offsets, items, nulls)?)
        }
        DataType::List(field) | DataType::ListView(field) | DataType::FixedSizeList(field, _) => {
            list(item(field), lengths, items, nulls)?
        }
        other => return Err(ArrowError::SchemaError(format!("{other} is no list of captions"))),
    })
}

fn list(
    item: FieldRef,
    lengths: Vec<usize>,
    items: ArrayRef,
    nulls: Option<NullBuffer>,
) -> Result<ArrayRef, ArrowError> {
    if i32::try_from(items.len()).is_err() {
        return Err(ArrowError::OffsetOverflowError(items.len()));
    }
    Ok(Arc::new(ListArray::try_new(item, OffsetBuffer::from_lengths(lengths), items, nulls)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use arrow_array::cast::AsArray;
    use arrow_array::{FixedSizeListArray, StringArray};

    use super::*;

    #[test]
    fn what_is_behind_a_null_is_left_behind() {
        let item = Arc::new(Field::new("item", DataType::Utf8, true));
        let nulls = NullBuffer::from(vec![true, false, true]);
        let items = Arc::new(StringArray::from(vec!["a", "b", "c", "d", "e", "f"]));
        let lists: ArrayRef = Arc::new(FixedSizeListArray::new(item, 2, items, Some(nulls)));
        let found = captions(&lists, &vec![Some(vec![1]), None, None]).unwrap();
        let found = found.as_list::<i32>();
        assert_eq!(found.values().as_string::<i32>().iter().flatten().collect::<Vec<_>>(), ["b", "e", "f"]);
        assert!(found.is_null(1) && found.null_count() == 1);
    }
}
