//! Writes one output shard: input batches and their scores in, a Parquet object that appears whole or not at all out, and
//! another one of rejected rows where that is asked for. The commit point is [`ShardWriter::commit`].
//!
//! Encoding: the image column is Snappy without dictionary or statistics (images do not compress, and Snappy gives up on
//! them fastest), everything else is Zstandard level 1. The input's own codecs are not copied: they say nothing about
//! what is cheap to write, and readers do not care. A row group is closed at 32 MiB, which bounds what is held here: a
//! process that reads and writes 200 kB images from row groups of 40 MB peaks at 0.3 GB.

use arrow_array::{BooleanArray, RecordBatch};
use arrow_schema::{ArrowError, SchemaRef};
use arrow_select::filter::filter_record_batch;
use parquet::arrow::add_encoded_arrow_schema_to_metadata;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use crate::object::{NewObject, WrittenObject};
use crate::output::{FINGERPRINT, Layout, OutputRows, ROWS_ALL, ROWS_KEPT, ROWS_REJECTED, rows_entry, rows_of};
use crate::stats::remove_stats;
use crate::{Columns, Error, Footer, ImageKind, Location, OutputOptions, Result, RowScore};

/// Encoded bytes of a row group at most.
const ROW_GROUP_BYTES_MAX: usize = 32 << 20;
/// Rows encoded between two looks at the size of a page: the library's 1024 would put 1024 images on one page.
const PAGE_CHECK_ROWS: usize = 16;

/// An output shard under construction. Dropping it leaves nothing behind.
pub struct ShardWriter {
    layout: Layout,
    object: NewObject,
    /// Where rows go that are not kept; none: nowhere.
    rejected: Option<NewObject>,
    /// Only kept rows go into the object.
    kept_only: bool,
    /// Outputs that are there are replaced.
    overwrite: bool,
    written: Written,
}

/// What a shard's output holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Rows of the input.
    pub rows: u64,
    /// The object.
    pub object: WrittenObject,
    /// Rows of the object.
    pub rows_written: u64,
    /// Rows with a caption that passes the thresholds, where there are any.
    pub kept: Option<u64>,
    /// The rejected rows' object, where there is one.
    pub rejected: Option<WrittenObject>,
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
        let image = image_path(input, columns);
        let (kept_only, rejected) = match &options.rows {
            OutputRows::All => (false, None),
            OutputRows::Kept { rejected } => (true, rejected.as_ref()),
        };
        let rows = if kept_only { ROWS_KEPT } else { ROWS_ALL };
        let properties = |rows| properties(&layout, image.clone(), rows);
        let object = NewObject::create(location, &layout, properties(rows), options.overwrite).await?;
        let rejected = match rejected {
            Some(location) => {
                // What an earlier attempt of the same work has left is replaced.
                let overwrite = options.overwrite || rejected_rows(location, &layout).await?.is_some();
                Some(NewObject::create(location, &layout, properties(ROWS_REJECTED), overwrite).await?)
            }
            None => None,
        };
        let written = Written { kept: layout.has_thresholds().then_some(0), ..Written::default() };
        Ok(Self { layout, object, rejected, kept_only, overwrite: options.overwrite, written })
    }

    /// The schema of the output.
    pub fn schema(&self) -> &SchemaRef {
        self.layout.schema()
    }

    /// Columns of the input that are not in the output, for columns of ours have their names.
    pub fn covered_columns(&self) -> &[String] {
        self.layout.covered()
    }

    /// What was written until now; bytes are known at the end.
    pub fn written(&self) -> &Written {
        &self.written
    }

    /// Appends the rows of a batch of the input, one score for each. After an error only dropping the writer is left.
    ///
    /// # Errors
    /// When the rows cannot be encoded or stored.
    ///
    /// # Panics
    /// When `scores` are not one for each row, or more than one for a caption that is no list.
    pub async fn write(&mut self, batch: &RecordBatch, scores: &[RowScore]) -> Result<()> {
        let (rows, rejected) = self.rows(batch, scores)?;
        self.written.rows += batch.num_rows() as u64;
        self.written.rows_written += rows.num_rows() as u64;
        self.object.write(rows).await?;
        if let (Some(object), Some(rows)) = (&mut self.rejected, rejected) {
            object.write(rows).await?;
        }
        Ok(())
    }

    /// The rows that are written, and those that are rejected if anybody wants them.
    fn rows(&mut self, batch: &RecordBatch, scores: &[RowScore]) -> Result<(RecordBatch, Option<RecordBatch>)> {
        let failed =
            |source: ArrowError| Error::Encode { uri: self.object.location().to_string(), source: source.into() };
        let (rows, keep) = self.layout.build(batch, scores).map_err(failed)?;
        self.written.kept = self.written.kept.map(|kept| kept + keep.true_count() as u64);
        let rejected = match &self.rejected {
            Some(_) => Some(filter_record_batch(&rows, &inverse(&keep)).map_err(failed)?),
            None => None,
        };
        let rows = if self.kept_only { filter_record_batch(&rows, &keep).map_err(failed)? } else { rows };
        Ok((rows, rejected))
    }

    /// Completes the object, with `notes` in its metadata beside those of its options, and makes it visible under its name, on
    /// disk if it is a local file; rejected rows before. Then removes what killed runs left of the same output, so of two runs
    /// on one output at a time the slower one fails here.
    ///
    /// # Errors
    /// When the rest cannot be encoded or stored: nothing is then visible under the output's name. When another run has replaced
    /// what was written.
    pub async fn commit(self, notes: &[(String, String)]) -> Result<Written> {
        let Self { layout, object, rejected, overwrite, mut written, .. } = self;
        let (location, rejected_location) =
            (object.location().clone(), rejected.as_ref().map(|to| to.location().clone()));
        if let Some((rejected, location)) = rejected.zip(rejected_location.clone()) {
            let committed = match rejected.commit(Vec::new()).await {
                // Another run of the same job was faster, or the answer of the store was lost.
                Err(error @ (Error::Exists { .. } | Error::Superseded { .. } | Error::Store { .. }))
                    if !(overwrite && matches!(error, Error::Store { .. })) =>
                {
                    let there = rejected_rows(&location, &layout).await.ok().flatten();
                    let same = there.filter(|there| there.rows() == written.rows - written.rows_written);
                    same.ok_or(error)?.object_info().into()
                }
                committed => committed?,
            };
            written.rejected = Some(committed);
        }
        if overwrite {
            // They would speak of another output than the one that is there from the next moment on.
            remove_stats(&location).await?;
        }
        let entry = |(key, value): &(String, String)| KeyValue { key: key.clone(), value: Some(value.clone()) };
        written.object = object.commit(notes.iter().map(entry).collect()).await?;
        // Of two runs that replace the same, each may have had the last word once.
        let rejected = rejected_location.as_ref().zip(written.rejected.as_ref());
        for (location, object) in std::iter::once((&location, &written.object)).chain(rejected) {
            if !object.is_at(location).await? {
                return Err(Error::Superseded { uri: location.to_string() });
            }
        }
        Ok(written)
    }
}

fn inverse(keep: &BooleanArray) -> BooleanArray {
    BooleanArray::from(!keep.values())
}

/// What is there, if it is the rejected rows of the same work, told by what its metadata says of that.
async fn rejected_rows(location: &Location, layout: &Layout) -> Result<Option<Footer>> {
    let same = |footer: &Footer| {
        let (ours, theirs) = (layout.schema().metadata().get(FINGERPRINT), footer.schema().metadata());
        ours.is_some() && ours == theirs.get(FINGERPRINT) && rows_of(footer) == ROWS_REJECTED
    };
    match Footer::read(location).await {
        Ok(footer) => Ok(Some(footer).filter(same)),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) if error.is_no_shard() => Ok(None),
        Err(error) => Err(error),
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

fn properties(layout: &Layout, image: Option<ColumnPath>, rows: &str) -> ArrowWriterOptions {
    let mut entries: Vec<KeyValue> = layout
        .schema()
        .metadata()
        .iter()
        .map(|(key, value)| KeyValue { key: key.clone(), value: Some(value.clone()) })
        .collect();
    entries.push(rows_entry(rows));
    // A hash map's order is random, an output's bytes should not be.
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_bytes(Some(ROW_GROUP_BYTES_MAX))
        .set_write_batch_size(PAGE_CHECK_ROWS)
        .set_key_value_metadata(Some(entries));
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
