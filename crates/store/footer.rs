//! A shard's footer: schema, row groups, metadata. Tells apart what is not Parquet, what is cut off, and what is damaged.
//! Reads no pages.

use std::sync::{Arc, LazyLock};

use arrow_schema::SchemaRef;
use parquet::DecodeResult;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::basic::Encoding;
use parquet::errors::ParquetError;
use parquet::file::metadata::{
    ColumnChunkMetaData, PageIndexPolicy, ParquetMetaData, ParquetMetaDataPushDecoder, RowGroupMetaData,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::types::lossless;
use crate::views::with_views;
use crate::{Error, Location, ObjectInfo, Result};

/// Bytes of a footer at most: its columns times its row groups, about a hundred bytes each. It is several times as large
/// when it is read.
const FOOTER_BYTES_MAX: u64 = 64 << 20;
/// Read from the end at once: the footer of most shards, so that opening one costs one request.
const TAIL_BYTES: u64 = 64 << 10;
const MAGIC: &[u8] = b"PAR1";
const MAGIC_ENCRYPTED: &[u8] = b"PARE";
/// Magic, footer length, magic: no Parquet file is shorter.
const FILE_BYTES_MIN: u64 = 12;

/// Bytes of a footer that is long ...
const FOOTER_BYTES_LONG: u64 = 1 << 20;
/// ... so that only one of them is read at a time: until its rows are asked for, nobody accounts for it.
static LONG_FOOTERS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(1)));

/// Columns by their place in the schema; none: all.
pub(crate) type Roots<'a> = Option<&'a [usize]>;

/// What a shard is, before any of its rows is read.
#[derive(Clone, Debug)]
pub struct Footer {
    pub(crate) location: Location,
    pub(crate) info: ObjectInfo,
    pub(crate) metadata: ArrowReaderMetadata,
    /// The same, for reading strings and bytes as views.
    pub(crate) reading: ArrowReaderMetadata,
}

impl Footer {
    /// Reads the footer of `location`.
    ///
    /// # Errors
    /// When the object cannot be read or is not a Parquet file we understand.
    pub async fn read(location: &Location) -> Result<Self> {
        Self::at(location, location.head().await?).await
    }

    /// Reads the footer of this version of `location`.
    ///
    /// # Errors
    /// As [`Self::read`], or there is another version now, if the store can tell.
    pub async fn at(location: &Location, info: ObjectInfo) -> Result<Self> {
        let metadata = read_metadata(location, &info).await?;
        let opened = contained(location, move || {
            check_ranges(&metadata)?;
            let metadata = arrow_metadata(Arc::new(metadata))?;
            let reading = viewed(&metadata);
            Ok((metadata, reading))
        });
        let (metadata, reading) = opened.await?;
        Ok(Self { location: location.clone(), info, metadata, reading })
    }

    /// Reads it again; the object must be the one it was.
    pub(crate) async fn again(location: &Location, info: &ObjectInfo) -> Result<Self> {
        let footer = Self::read(location).await?;
        match footer.info == *info {
            true => Ok(footer),
            false => Err(Error::changed(location.uri())),
        }
    }

    /// The Arrow schema, with the file's key-value metadata.
    pub fn schema(&self) -> &SchemaRef {
        self.metadata.schema()
    }

    /// Rows, as the footer says.
    pub fn rows(&self) -> u64 {
        u64::try_from(self.metadata.metadata().file_metadata().num_rows()).unwrap_or_default()
    }

    /// Row groups.
    pub fn row_groups(&self) -> usize {
        self.metadata.metadata().num_row_groups()
    }

    /// The row groups from the one that holds row `first` on, and the rows of it before that row.
    pub(crate) fn row_groups_from(&self, first: u64) -> (Vec<usize>, usize) {
        let groups = self.metadata.metadata().row_groups();
        let (mut group, mut before) = (0, first);
        while let Some(rows) = groups.get(group).and_then(|group| u64::try_from(group.num_rows()).ok())
            && before >= rows
        {
            (group, before) = (group + 1, before - rows);
        }
        ((group..groups.len()).collect(), usize::try_from(before).unwrap_or(usize::MAX))
    }

    /// Bytes that reading takes: the footer, the largest row group as it is stored, and `batch_rows` rows of it as they are
    /// read. A page is decompressed as a whole, and a column that is much larger then may be one page.
    pub(crate) fn reading_bytes(&self, batch_rows: usize, roots: Roots<'_>) -> u64 {
        let pages = |column: &ColumnChunkMetaData| {
            let (stored, whole) = (count(column.compressed_size()), count(column.uncompressed_size()));
            if whole / 2 > stored { stored.saturating_add(whole) } else { stored }
        };
        let bytes = |group: &RowGroupMetaData| {
            let (rows, whole) = (count(group.num_rows()).max(1), self.decoded_bytes(group, roots));
            let batch = u128::from(whole) * u128::from(rows.min(batch_rows as u64)) / u128::from(rows);
            let pages = self.leaves(group, roots).map(pages).fold(0, u64::saturating_add);
            pages.saturating_add(u64::try_from(batch).unwrap_or(u64::MAX))
        };
        let metadata = self.metadata.metadata();
        let largest = metadata.row_groups().iter().map(bytes).max().unwrap_or_default();
        largest.saturating_add(metadata.memory_size() as u64)
    }

    /// Rows that have at most `values` values of a column together, on the average of any row group; at least one.
    pub(crate) fn rows_with(&self, root: usize, values: usize) -> usize {
        let rows = |group: &RowGroupMetaData| {
            let found =
                self.leaves(group, Some(&[root])).map(ColumnChunkMetaData::num_values).max().unwrap_or_default();
            let rows = i128::from(group.num_rows()) * values as i128 / i128::from(found.max(1));
            usize::try_from(rows).unwrap_or(usize::MAX)
        };
        self.metadata.metadata().row_groups().iter().map(rows).min().unwrap_or(usize::MAX).max(1)
    }

    /// The leaves of some columns.
    fn leaves<'a>(
        &'a self,
        group: &'a RowGroupMetaData,
        roots: Roots<'a>,
    ) -> impl Iterator<Item = &'a ColumnChunkMetaData> {
        let schema = self.metadata.metadata().file_metadata().schema_descr();
        let wanted = move |leaf: usize| roots.is_none_or(|roots| roots.contains(&schema.get_column_root_idx(leaf)));
        group.columns().iter().enumerate().filter(move |(leaf, _)| wanted(*leaf)).map(|(_, column)| column)
    }

    fn decoded_bytes(&self, group: &RowGroupMetaData, roots: Roots<'_>) -> u64 {
        let bytes = |column: &ColumnChunkMetaData| {
            // Stored as what it has in common with the one before, a value is larger than it looks.
            let prefixed = column.encodings().any(|encoding| encoding == Encoding::DELTA_BYTE_ARRAY);
            let unencoded = column.unencoded_byte_array_data_bytes().filter(|_| prefixed).map(count);
            count(column.uncompressed_size()).max(unencoded.unwrap_or_default())
        };
        self.leaves(group, roots).map(bytes).fold(0, u64::saturating_add)
    }

    /// Size, entity tag and time of the object.
    pub fn object_info(&self) -> &ObjectInfo {
        &self.info
    }

    /// The program that wrote the file, as it calls itself.
    pub fn created_by(&self) -> Option<&str> {
        self.metadata.metadata().file_metadata().created_by()
    }

    /// Rows a batch may have so that an average one of any row group stays within `bytes_max`.
    pub(crate) fn batch_rows(&self, rows_max: usize, bytes_max: u64, roots: Roots<'_>) -> usize {
        let rows = |group: &RowGroupMetaData| {
            let row_bytes = self.decoded_bytes(group, roots).checked_div(count(group.num_rows())).unwrap_or_default();
            usize::try_from(bytes_max / row_bytes.max(1)).unwrap_or(usize::MAX)
        };
        let fitting = self.metadata.metadata().row_groups().iter().map(rows).min().unwrap_or(usize::MAX);
        fitting.min(rows_max).max(1)
    }
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

async fn read_metadata(location: &Location, info: &ObjectInfo) -> Result<ParquetMetaData> {
    if info.size < FILE_BYTES_MIN {
        return Err(Error::NotParquet { uri: location.uri().to_owned() });
    }
    let mut range = info.size.saturating_sub(TAIL_BYTES)..info.size;
    let mut bytes = location.get_range(range.clone(), info).await?;
    if !bytes.ends_with(MAGIC) {
        return Err(no_footer(location, info, &bytes).await);
    }
    let corrupt = |source| Error::Corrupt { uri: location.uri().to_owned(), source };
    let decoder = ParquetMetaDataPushDecoder::try_new(info.size).map_err(corrupt)?;
    let mut decoder = decoder.with_page_index_policy(PageIndexPolicy::Skip);
    let mut turn: Option<OwnedSemaphorePermit> = None;
    // The tail, then at most the rest of a long footer; the bound only guards against a decoder that never has enough.
    for _ in 0..4 {
        let decoded = contained(location, move || {
            decoder.push_range(range, bytes)?;
            // What nobody waits for any more is still decoded to its end: the turn is over only then.
            decoder.try_decode().map(|step| (decoder, step, turn))
        });
        let step;
        (decoder, step, turn) = decoded.await?;
        range = match step {
            DecodeResult::Data(metadata) => return Ok(metadata),
            DecodeResult::NeedsData(ranges) if ranges.len() == 1 && ranges[0].end <= info.size => ranges[0].clone(),
            _ => break,
        };
        if range.end - range.start > FOOTER_BYTES_MAX {
            return Err(Error::LongFooter { uri: location.uri().to_owned(), limit: FOOTER_BYTES_MAX });
        }
        if range.end - range.start > FOOTER_BYTES_LONG && turn.is_none() {
            turn = Arc::clone(&LONG_FOOTERS).acquire_owned().await.ok();
        }
        bytes = location.get_range(range.clone(), info).await?;
    }
    Err(corrupt(ParquetError::EOF("the footer does not end".to_owned())))
}

async fn no_footer(location: &Location, info: &ObjectInfo, tail: &[u8]) -> Error {
    let uri = location.uri().to_owned();
    if tail.ends_with(MAGIC_ENCRYPTED) {
        return Error::Encrypted { uri };
    }
    match location.get_range(0..MAGIC.len() as u64, info).await {
        Ok(head) if head == MAGIC => Error::Cut { uri },
        Ok(head) if head == MAGIC_ENCRYPTED => Error::Encrypted { uri },
        Ok(_) => Error::NotParquet { uri },
        Err(error) => error,
    }
}

/// The library asserts on some of these later, or trusts them when it allocates.
fn check_ranges(metadata: &ParquetMetaData) -> Result<(), ParquetError> {
    let mut rows = 0i64;
    for group in metadata.row_groups() {
        let columns = group.columns();
        let negative = |column: &ColumnChunkMetaData| {
            let offset = column.dictionary_page_offset().unwrap_or_default().min(column.data_page_offset());
            offset < 0 || column.compressed_size() < 0 || column.num_values() < 0
        };
        if group.num_rows() < 0 || columns.iter().any(negative) {
            return Err(ParquetError::General("a row group has a negative size".to_owned()));
        }
        rows = rows.saturating_add(group.num_rows());
    }
    if rows != metadata.file_metadata().num_rows() {
        return Err(ParquetError::General("the row groups do not add up to the rows of the file".to_owned()));
    }
    Ok(())
}

/// Reads with the Arrow types the file was written from; where that note is not understood, with Parquet's own. Some of either
/// would lose something, see [`lossless`].
fn arrow_metadata(metadata: Arc<ParquetMetaData>) -> Result<ArrowReaderMetadata, ParquetError> {
    let options = || ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Skip);
    let found = ArrowReaderMetadata::try_new(Arc::clone(&metadata), options())
        .or_else(|_| ArrowReaderMetadata::try_new(Arc::clone(&metadata), options().with_skip_arrow_metadata(true)))?;
    match lossless(found.schema(), &metadata) {
        Some(schema) => ArrowReaderMetadata::try_new(metadata, options().with_schema(Arc::new(schema))),
        None => Ok(found),
    }
}

/// The same with views; without, where the library takes some column only as it is.
fn viewed(metadata: &ArrowReaderMetadata) -> ArrowReaderMetadata {
    let options = ArrowReaderOptions::new().with_schema(Arc::new(with_views(metadata.schema())));
    ArrowReaderMetadata::try_new(Arc::clone(metadata.metadata()), options).unwrap_or_else(|_| metadata.clone())
}

/// Runs Parquet code on a blocking thread. It computes, and on bytes that contradict each other the library may panic
/// (its maintainers count that as an ordinary bug); the thread's end contains the panic, and the job gets an error.
pub(crate) async fn contained<T: Send + 'static>(
    location: &Location,
    work: impl FnOnce() -> Result<T, ParquetError> + Send + 'static,
) -> Result<T> {
    let uri = || location.uri().to_owned();
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(Error::Corrupt { uri: uri(), source }),
        Err(source) => Err(Error::Malformed { uri: uri(), source }),
    }
}
