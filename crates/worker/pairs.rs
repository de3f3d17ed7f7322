//! Pairs that came with a call, as the rows of a shard: the pipeline has one way for both.

use std::sync::Arc;

use arrow_array::builder::{BinaryViewBuilder, ListBuilder, StringBuilder};
use arrow_array::{ArrayRef, RecordBatch, StringArray, StructArray};
use arrow_schema::{DataType, Field};
use capsieve_store::{CaptionKind, Columns, ImageKind};

use crate::limits::{CHUNK_CAPTIONS, CHUNK_ROWS};

/// An image and its captions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// What the caller calls it.
    pub key: String,
    /// The image.
    pub image: PairImage,
    /// At least one is scored or the row fails.
    pub captions: Vec<String>,
}

/// Where an image is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PairImage {
    /// Nowhere: an error of its row.
    #[default]
    None,
    /// Here, encoded.
    Bytes(bytes::Bytes),
    /// At an address that the worker may read.
    Uri(String),
}

/// Where [`batches`] puts what.
pub(crate) fn columns() -> Columns {
    Columns { key: Some(0), image: 1, image_kind: ImageKind::Struct, caption: 2, caption_kind: CaptionKind::List }
}

/// The pairs in batches, made one at a time: of so many rows and so many captions, or of one row.
pub(crate) fn batches(pairs: Vec<Pair>) -> impl Iterator<Item = capsieve_store::Result<RecordBatch>> + Send {
    let mut left = pairs.into_iter().peekable();
    std::iter::from_fn(move || {
        let (mut chunk, mut captions) = (Vec::new(), 0);
        while chunk.len() < CHUNK_ROWS
            && let Some(pair) =
                left.next_if(|pair: &Pair| chunk.is_empty() || captions + pair.captions.len() <= CHUNK_CAPTIONS)
        {
            captions += pair.captions.len();
            chunk.push(pair);
        }
        (!chunk.is_empty()).then(|| Ok(batch(&chunk)))
    })
}

fn batch(pairs: &[Pair]) -> RecordBatch {
    let keys: StringArray = pairs.iter().map(|pair| Some(pair.key.as_str())).collect();
    // Views into the request: images are not copied.
    let (mut bytes, mut paths) = (BinaryViewBuilder::new(), StringBuilder::new());
    let mut captions = ListBuilder::new(StringBuilder::new());
    for Pair { image, captions: texts, .. } in pairs {
        let (image, uri) = match image {
            PairImage::None => (None, None),
            PairImage::Bytes(image) => (Some(image), None),
            PairImage::Uri(uri) => (None, Some(uri)),
        };
        match image {
            Some(image) => {
                let block = bytes.append_block(image.clone().into());
                let length = u32::try_from(image.len()).expect("a request has less than 4 GiB");
                bytes.try_append_view(block, 0, length).expect("the view is the block");
            }
            None => bytes.append_null(),
        }
        paths.append_option(uri);
        texts.iter().for_each(|text| captions.values().append_value(text));
        captions.append(true);
    }
    let field = |name: &str, data_type| Arc::new(Field::new(name, data_type, true));
    let (bytes, paths): (ArrayRef, ArrayRef) = (Arc::new(bytes.finish()), Arc::new(paths.finish()));
    let images =
        StructArray::from(vec![(field("bytes", DataType::BinaryView), bytes), (field("path", DataType::Utf8), paths)]);
    let columns: [(&str, ArrayRef, bool); 3] = [
        ("key", Arc::new(keys), false),
        ("image", Arc::new(images), true),
        ("captions", Arc::new(captions.finish()), true),
    ];
    RecordBatch::try_from_iter_with_nullable(columns).expect("columns of one length")
}
