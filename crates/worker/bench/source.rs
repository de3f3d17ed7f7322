//! The rows that are measured: those of a shard, the bundled one or the user's, again and again from its first row.

use std::sync::Arc;
use std::time::Instant;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::SchemaRef;
use capsieve_store::{Access, ColumnOptions, Columns, Location, ShardReader};
use tempfile::TempDir;

use super::temporary;
use crate::budget::Budget;
use crate::demo::SHARD;
use crate::fetch::Fetcher;
use crate::pipeline::Images;
use crate::rows::{Rows, ShardRows};
use crate::{Error, Result};

/// Columns of the bundled shard.
const IMAGE: &str = "image";
const CAPTION: &str = "caption";

/// See the module.
pub(super) struct Source {
    reader: ShardReader,
    pub(super) images: Images,
    /// Of the rows as they are given out.
    pub(super) schema: SchemaRef,
    pub(super) columns: Columns,
    /// Captions that each image gets, where it is not to have its own.
    captions: Option<usize>,
    /// Where the bundled shard is.
    _folder: Option<TempDir>,
}

/// How much is measured.
#[derive(Clone, Copy)]
pub(super) enum Until {
    /// So many rows.
    Rows(usize),
    /// What was begun before.
    Time(Instant),
}

impl Source {
    /// The bundled shard; each image gets `captions` captions: its own, and those of the rows behind it.
    pub(super) async fn bundled(captions: usize) -> Result<Self> {
        let folder = tempfile::tempdir().map_err(temporary)?;
        let path = folder.path().join("shard.parquet");
        std::fs::write(&path, SHARD).map_err(temporary)?;
        let mut source = Self::shard(&path.display().to_string(), &ColumnOptions::default()).await?;
        source._folder = Some(folder);
        if captions != 1 {
            source.captions = Some(captions);
            let mut rows = source.rows(Until::Rows(1))?;
            let one = rows.next().await?.expect("the bundled shard has rows");
            source.schema = one.schema();
            source.columns = Columns::detect(&source.schema, &ColumnOptions::default(), source.reader.uri())?;
        }
        Ok(source)
    }

    /// A shard of the user's, its rows as they are.
    pub(super) async fn shard(uri: &str, columns: &ColumnOptions) -> Result<Self> {
        let location = Location::parse(uri)?;
        let reader = ShardReader::open(&location, columns).await?;
        if reader.rows() == 0 {
            return Err(Error::NothingToMeasure { uri: uri.to_owned(), what: "no rows" });
        }
        let (access, fetcher) = (Access::everything(), Arc::new(Fetcher::new(0)));
        let images = Images { beside: Some(location), access, fetcher };
        let (schema, columns) = (Arc::clone(reader.schema()), reader.columns().clone());
        Ok(Self { reader, images, schema, columns, captions: None, _folder: None })
    }

    pub(super) fn uri(&self) -> &str {
        self.reader.uri()
    }

    /// Rows of the shard.
    pub(super) fn len(&self) -> usize {
        usize::try_from(self.reader.rows()).unwrap_or(usize::MAX)
    }

    /// The shard's rows from its first on, and again when it ends.
    pub(super) fn rows(&self, until: Until) -> Result<Again> {
        Ok(Again { reader: self.reader.clone(), rows: read(&self.reader)?, captions: self.captions, until, given: 0 })
    }
}

fn read(reader: &ShardReader) -> Result<ShardRows> {
    ShardRows::new(reader.clone(), 0, &Budget::default())
}

/// The rows of a shard that is read again when it ends.
pub(super) struct Again {
    reader: ShardReader,
    rows: ShardRows,
    captions: Option<usize>,
    until: Until,
    /// Rows so far.
    given: usize,
}

impl Rows for Again {
    async fn next(&mut self) -> Result<Option<RecordBatch>> {
        let left = match self.until {
            Until::Rows(rows) => rows - self.given,
            Until::Time(end) if self.given > 0 && Instant::now() >= end => 0,
            Until::Time(_) => usize::MAX,
        };
        if left == 0 {
            return Ok(None);
        }
        loop {
            let Some(batch) = self.rows.next().await? else {
                self.rows = read(&self.reader)?;
                continue;
            };
            let batch = self.captions.map_or_else(|| batch.clone(), |captions| listed(&batch, captions));
            let batch = batch.slice(0, batch.num_rows().min(left));
            self.given += batch.num_rows();
            return Ok(Some(batch));
        }
    }
}

/// The bundled rows with so many captions each, which come from the rows of the same batch. No two are equal: what is equal is
/// scored once.
fn listed(batch: &RecordBatch, captions: usize) -> RecordBatch {
    let column = |name: &str| batch.column_by_name(name).expect("a bundled column");
    let texts = column(CAPTION).as_string_view();
    let mut lists = ListBuilder::new(StringBuilder::new());
    for row in 0..batch.num_rows() {
        (0..captions)
            .for_each(|c| lists.values().append_value(format!("{} {row}", texts.value((row + c) % batch.num_rows()))));
        lists.append(true);
    }
    let lists: ArrayRef = Arc::new(lists.finish());
    RecordBatch::try_from_iter([(IMAGE, Arc::clone(column(IMAGE))), (CAPTION, lists)])
        .expect("two columns of one length")
}
