//! Streams the rows of a shard, one row group in memory at a time. All columns are read, because the output carries them
//! on unchanged; strings and bytes come as views of their pages, see [`crate::views`].

use std::ops::Range;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use bytes::Bytes;
use futures::Stream;
use object_store::{OBJECT_STORE_COALESCE_DEFAULT, coalesce_ranges};
use parquet::DecodeResult;
use parquet::arrow::ProjectionMask;
use parquet::arrow::push_decoder::{ParquetPushDecoder, ParquetPushDecoderBuilder};
use parquet::errors::ParquetError;

use crate::footer::contained;
use crate::views::own;
use crate::{ColumnOptions, Columns, Error, Footer, Location, ObjectInfo, Result};

/// Decoded bytes of an average batch at most, whatever number of rows the caller asks for.
const BATCH_BYTES_MAX: u64 = 64 << 20;

/// An opened shard whose columns are known.
#[derive(Clone, Debug)]
pub struct ShardReader {
    footer: Footer,
    columns: Columns,
    /// Columns that are read, in the order of the schema; none: all.
    roots: Option<Vec<usize>>,
}

impl ShardReader {
    /// Opens a shard and finds its columns.
    ///
    /// # Errors
    /// When the object cannot be read, is not Parquet, or has no usable image or caption column.
    pub async fn open(location: &Location, options: &ColumnOptions) -> Result<Self> {
        Self::new(Footer::read(location).await?, options)
    }

    /// Opens this version of a shard and finds its columns.
    ///
    /// # Errors
    /// As [`Self::open`], or there is another version now.
    pub async fn open_at(location: &Location, info: &ObjectInfo, options: &ColumnOptions) -> Result<Self> {
        Self::new(Footer::at(location, info.clone()).await?, options)
    }

    /// Finds the columns of a shard whose footer is read already.
    ///
    /// # Errors
    /// When there is no usable image or caption column.
    pub fn new(footer: Footer, options: &ColumnOptions) -> Result<Self> {
        let columns = Columns::detect(footer.schema(), options, footer.location.uri())?;
        Ok(Self { footer, columns, roots: None })
    }

    /// Reads the columns that are scored and the key, and no others: [`Self::columns`] are then places in the batches.
    #[must_use]
    pub fn narrowed(mut self) -> Self {
        let Columns { key, image, caption, .. } = self.columns;
        let mut roots: Vec<usize> = key.into_iter().chain([image, caption]).collect();
        roots.sort_unstable();
        roots.dedup();
        let place = |root| roots.binary_search(&root).expect("it is one of them");
        (self.columns.key, self.columns.image, self.columns.caption) = (key.map(place), place(image), place(caption));
        self.roots = Some(roots);
        self
    }

    /// The shard's schema, with its key-value metadata.
    pub fn schema(&self) -> &SchemaRef {
        self.footer.schema()
    }

    /// Rows of the shard.
    pub fn rows(&self) -> u64 {
        self.footer.rows()
    }

    /// Row groups of the shard.
    pub fn row_groups(&self) -> usize {
        self.footer.row_groups()
    }

    /// Size, entity tag and time of the object.
    pub fn object_info(&self) -> &ObjectInfo {
        self.footer.object_info()
    }

    /// Where the image, the captions and the key are.
    pub fn columns(&self) -> &Columns {
        &self.columns
    }

    /// All rows in order, in batches of at most `batch_rows` rows, fewer where rows are large. Holds the compressed
    /// pages of one row group at a time, and reads the next one only when the caller asks. Ends after the first error.
    pub fn into_stream(self, batch_rows: usize) -> impl Stream<Item = Result<RecordBatch>> + Send {
        futures::stream::try_unfold(self.into_batches(batch_rows), |mut batches| async move {
            let batch = batches.next().await?;
            Ok(batch.map(|batch| (batch, batches)))
        })
    }

    /// All rows without the vocabulary of streams.
    pub fn into_batches(self, batch_rows: usize) -> Batches {
        let batch_rows = self.batch_rows(batch_rows);
        let (location, info) = (self.footer.location.clone(), self.footer.info.clone());
        let rows_all = self.rows();
        Batches { location, info, roots: self.roots, batch_rows, state: State::Opened(self.footer), rows: 0, rows_all }
    }

    /// The rows from row `first` on; row groups before it are not read.
    pub fn into_batches_from(self, first: u64, batch_rows: usize) -> Batches {
        Batches { rows: first.min(self.rows()), ..self.into_batches(batch_rows) }
    }

    /// The shard, as the user gave it.
    pub fn uri(&self) -> &str {
        self.footer.location.uri()
    }

    /// Rows that have at most so many captions together, on the average of any row group; at least one.
    pub fn rows_with_captions(&self, captions: usize) -> usize {
        let caption = self.roots.as_ref().map_or(self.columns.caption, |roots| roots[self.columns.caption]);
        self.footer.rows_with(caption, captions)
    }

    /// Bytes that reading it in batches of `batch_rows` rows takes at a time: a row group, and a batch of it.
    pub fn reading_bytes(&self, batch_rows: usize) -> u64 {
        self.footer.reading_bytes(self.batch_rows(batch_rows), self.roots.as_deref())
    }

    fn batch_rows(&self, rows: usize) -> usize {
        self.footer.batch_rows(rows, BATCH_BYTES_MAX, self.roots.as_deref())
    }
}

/// The rows of a shard that were not read yet.
pub struct Batches {
    location: Location,
    info: ObjectInfo,
    roots: Option<Vec<usize>>,
    batch_rows: usize,
    state: State,
    /// Rows given out or skipped.
    rows: u64,
    /// Rows of the shard.
    rows_all: u64,
}

enum State {
    /// Nothing is held.
    Closed,
    Opened(Footer),
    /// The decoder wants these bytes, or none, before it goes on.
    Ready(Box<ParquetPushDecoder>, Vec<Range<u64>>, Vec<Bytes>),
    Done,
}

impl Batches {
    /// Columns of a shard, whatever they are.
    pub(crate) fn of(footer: Footer, roots: Vec<usize>, batch_rows: usize) -> Self {
        let (location, info, rows_all) = (footer.location.clone(), footer.info.clone(), footer.rows());
        Self { location, info, roots: Some(roots), batch_rows, state: State::Opened(footer), rows: 0, rows_all }
    }

    /// Gives up all memory: that of the row group that is read, and the footer's. The next rows come as if nothing had
    /// happened, but both are read again.
    pub fn pause(&mut self) {
        if !matches!(self.state, State::Done) {
            self.state = State::Closed;
        }
    }

    /// The next rows, or none after the last one and after an error.
    ///
    /// # Errors
    /// When the shard cannot be read, was replaced meanwhile, or is damaged.
    pub async fn next(&mut self) -> Result<Option<RecordBatch>> {
        loop {
            let (mut decoder, ranges, data) = match std::mem::replace(&mut self.state, State::Done) {
                State::Closed => {
                    self.state = State::Opened(Footer::again(&self.location, &self.info).await?);
                    continue;
                }
                State::Opened(footer) => {
                    let decoder = build(footer, self.roots.clone(), self.rows, self.batch_rows).await?;
                    (decoder, Vec::new(), Vec::new())
                }
                State::Ready(decoder, ranges, data) => (decoder, ranges, data),
                State::Done => return Ok(None),
            };
            let step = contained(&self.location, move || {
                decoder.push_ranges(ranges, data)?;
                let step = match decoder.try_decode()? {
                    DecodeResult::Data(batch) => DecodeResult::Data(own(&batch)?),
                    other => other,
                };
                Ok((decoder, step))
            });
            let (decoder, step) = step.await?;
            match step {
                DecodeResult::Data(batch) => {
                    self.rows += batch.num_rows() as u64;
                    self.state = State::Ready(decoder, Vec::new(), Vec::new());
                    return Ok(Some(batch));
                }
                DecodeResult::NeedsData(ranges) => {
                    let data = fetch(&self.location, &self.info, &ranges).await?;
                    self.state = State::Ready(decoder, ranges, data);
                }
                DecodeResult::Finished if self.rows == self.rows_all => return Ok(None),
                DecodeResult::Finished => {
                    return Err(corrupt(&self.location, "the pages hold another number of rows than the footer says"));
                }
            }
        }
    }
}

async fn build(
    footer: Footer,
    roots: Option<Vec<usize>>,
    first: u64,
    batch_rows: usize,
) -> Result<Box<ParquetPushDecoder>> {
    let (groups, skipped) = footer.row_groups_from(first);
    let Footer { location, reading: metadata, .. } = footer;
    let build = move || {
        let schema = metadata.metadata().file_metadata().schema_descr_ptr();
        let mask = roots.map_or_else(ProjectionMask::all, |roots| ProjectionMask::roots(&schema, roots));
        let builder = ParquetPushDecoderBuilder::new_with_metadata(metadata).with_batch_size(batch_rows);
        builder.with_projection(mask).with_row_groups(groups).with_offset(skipped).build().map(Box::new)
    };
    contained(&location, build).await
}

/// Few large requests: column chunks that lie close together are fetched at once.
async fn fetch(location: &Location, info: &ObjectInfo, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
    if ranges.iter().any(|range| range.start > range.end || range.end > info.size) {
        return Err(corrupt(location, "a column chunk lies outside of the file"));
    }
    let fetch = |range| location.get_range(range, info);
    coalesce_ranges(ranges, fetch, OBJECT_STORE_COALESCE_DEFAULT).await
}

fn corrupt(location: &Location, reason: &str) -> Error {
    let uri = location.uri().to_owned();
    Error::Corrupt { uri, source: ParquetError::General(reason.to_owned()) }
}
