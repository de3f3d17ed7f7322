//! Writes one output shard: input batches and their scores in, a Parquet object that appears whole or not at all out.
//! The commit point is [`ShardWriter::commit`].
//!
//! Encoding: the image column is Snappy without dictionary or statistics (images do not compress, and Snappy gives up on
//! them fastest), everything else is Zstandard level 1. The input's own codecs are not copied: they say nothing about
//! what is cheap to write, and readers do not care. A row group is closed at 32 MiB, which bounds what is held here: a
//! process that reads and writes 200 kB images from row groups of 40 MB peaks at 0.3 GB.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use object_store::ObjectStoreExt;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::arrow::{ArrowWriter, add_encoded_arrow_schema_to_metadata};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use crate::output::Layout;
use crate::partial::{Partial, remove_leftovers};
use crate::upload::Upload;
use crate::{Columns, Error, ImageKind, Location, OutputOptions, Result, RowScore};

/// Encoded bytes of a row group at most.
const ROW_GROUP_BYTES_MAX: usize = 32 << 20;
/// Rows encoded between two looks at the size of a page: the library's 1024 would put 1024 images on one page.
const PAGE_CHECK_ROWS: usize = 16;
/// An output shard under construction. Dropping it leaves nothing behind.
pub struct ShardWriter {
    location: Location,
    layout: Layout,
    /// Taken while it works on a blocking thread, so absent after it failed.
    encoder: Option<Box<ArrowWriter<Vec<u8>>>>,
    upload: Upload,
    partial: Partial,
    overwrite: bool,
    written: Written,
}

/// What a committed shard holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Rows.
    pub rows: u64,
    /// Bytes of the object.
    pub bytes: u64,
    /// Rows with a caption that passes the thresholds; without thresholds, rows with a score.
    pub kept: u64,
}

impl ShardWriter {
    /// Begins the output `location` of a shard with this schema and these columns. Nothing is visible there before
    /// [`ShardWriter::commit`].
    ///
    /// # Errors
    /// When the folder is missing or not writable, the output exists and must not be replaced, or a threshold has no head.
    pub async fn create(
        location: &Location,
        input: &SchemaRef,
        columns: &Columns,
        options: &OutputOptions,
    ) -> Result<Self> {
        let layout = Layout::new(input, columns, options)?;
        location.check_store()?;
        location.check_folder()?;
        if location.exists().await? && !options.overwrite {
            return Err(Error::Exists { uri: location.uri().to_owned() });
        }
        let properties = properties(&layout, image_path(input, columns));
        let encoder = ArrowWriter::try_new_with_options(Vec::new(), Arc::clone(layout.encoded()), properties);
        let encoder = encoder.map_err(|source| Error::Encode { uri: location.uri().to_owned(), source })?;
        let partial = Partial::new(location);
        let only_new = !options.overwrite && partial.to_rename().is_none();
        let upload = Upload::start(partial.location(), only_new).await;
        let upload = upload.map_err(|source| Error::store(location.uri(), source))?;
        Ok(Self {
            location: location.clone(),
            layout,
            encoder: Some(Box::new(encoder)),
            upload,
            partial,
            overwrite: options.overwrite,
            written: Written::default(),
        })
    }

    /// The schema of the output.
    pub fn schema(&self) -> &SchemaRef {
        self.layout.schema()
    }

    /// Appends the rows of a batch of the input, one score for each. After an error only dropping the writer is left.
    ///
    /// # Errors
    /// When the rows cannot be encoded or stored.
    ///
    /// # Panics
    /// When `scores` are not one for each row, or more than one for a caption that is no list.
    pub async fn write(&mut self, batch: &RecordBatch, scores: &[RowScore]) -> Result<()> {
        let built = self.layout.build(batch, scores);
        let (rows, kept) = built.map_err(|source| self.encode_error(source.into()))?;
        self.encode(move |encoder| encoder.write(&rows)).await?;
        self.written.rows += batch.num_rows() as u64;
        self.written.kept += kept;
        Ok(())
    }

    /// Completes the object and makes it visible under its name, on disk if it is a local file. Then removes what killed
    /// runs left of the same output, so of two runs on one output at a time the slower one fails here.
    ///
    /// # Errors
    /// When the rest cannot be encoded or stored. Nothing is then visible.
    pub async fn commit(mut self) -> Result<Written> {
        self.encode(|encoder| encoder.finish().map(drop)).await?;
        self.written.bytes = self.encoder.as_ref().map_or(0, |encoder| encoder.bytes_written() as u64);
        let Self { location, upload, partial, overwrite, written, .. } = self;
        upload.finish().await.map_err(|source| commit_error(&location, &partial, source))?;
        publish(&location, &partial, overwrite).await?;
        drop(partial);
        remove_leftovers(&location).await;
        Ok(written)
    }

    /// Encodes on a blocking thread, then hands finished row groups to the store.
    async fn encode(
        &mut self,
        work: impl FnOnce(&mut ArrowWriter<Vec<u8>>) -> Result<(), ParquetError> + Send + 'static,
    ) -> Result<()> {
        let mut encoder = self.encoder.take().expect("a writer that failed is not used again");
        let done = tokio::task::spawn_blocking(move || {
            work(&mut encoder)?;
            let bytes = std::mem::take(encoder.inner_mut());
            Ok((encoder, bytes))
        });
        let done = done.await.map_err(|source| Error::EncodePanic { uri: self.location.uri().to_owned(), source })?;
        let (encoder, bytes) = done.map_err(|source| self.encode_error(source))?;
        self.encoder = Some(encoder);
        self.upload.write(bytes.into()).await.map_err(|source| Error::store(self.location.uri(), source))
    }

    fn encode_error(&self, source: ParquetError) -> Error {
        Error::Encode { uri: self.location.uri().to_owned(), source }
    }
}

/// Renames a finished local file to its name.
async fn publish(location: &Location, partial: &Partial, overwrite: bool) -> Result<()> {
    let Some(hidden) = partial.to_rename() else { return Ok(()) };
    let store = location.store();
    let renamed = if overwrite {
        store.rename(&hidden.path(), &location.path()).await
    } else {
        match store.rename_if_not_exists(&hidden.path(), &location.path()).await {
            // Some file systems have no hard links, which an atomic "only if absent" is made of.
            Err(object_store::Error::Generic { .. }) if !location.exists().await? => {
                store.rename(&hidden.path(), &location.path()).await
            }
            other => other,
        }
    };
    renamed.map_err(|source| commit_error(location, partial, source))
}

/// A hidden file that is gone was removed by the run that committed the same output first.
fn commit_error(location: &Location, partial: &Partial, source: object_store::Error) -> Error {
    match Error::store(location.uri(), source) {
        Error::NotFound { uri, .. } if partial.to_rename().is_some() => Error::Superseded { uri },
        other => other,
    }
}

/// The Parquet column of the images, where the shard holds them.
fn image_path(input: &SchemaRef, columns: &Columns) -> Option<ColumnPath> {
    let name = input.field(columns.image).name().clone();
    match columns.image_kind {
        ImageKind::Binary => Some(ColumnPath::new(vec![name])),
        ImageKind::Struct => Some(ColumnPath::new(vec![name, "bytes".to_owned()])),
        ImageKind::Uri => None,
    }
}

fn properties(layout: &Layout, image: Option<ColumnPath>) -> ArrowWriterOptions {
    let mut entries: Vec<KeyValue> = layout
        .schema()
        .metadata()
        .iter()
        .map(|(key, value)| KeyValue { key: key.clone(), value: Some(value.clone()) })
        .collect();
    // A hash map's order is random, an output's bytes should not be.
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_bytes(Some(ROW_GROUP_BYTES_MAX))
        .set_write_batch_size(PAGE_CHECK_ROWS)
        .set_key_value_metadata((!entries.is_empty()).then_some(entries));
    if let Some(image) = image {
        properties = properties
            .set_column_compression(image.clone(), Compression::SNAPPY)
            .set_column_dictionary_enabled(image.clone(), false)
            .set_column_statistics_enabled(image, EnabledStatistics::None);
    }
    let mut properties = properties.build();
    // Readers get the types of the input, not those of the batches that are encoded.
    add_encoded_arrow_schema_to_metadata(layout.schema(), &mut properties);
    ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true)
}
