//! One Parquet object under construction: batches in, row groups on their way into a store as they are full, the object visible
//! at the end.

use std::sync::Arc;

use arrow_array::RecordBatch;
use object_store::ObjectStoreExt;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;

use crate::output::Layout;
use crate::partial::{Partial, remove_leftovers};
use crate::upload::Upload;
use crate::{Error, Location, ObjectInfo, Result};

/// An object that was written, as it can be known again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WrittenObject {
    /// Its bytes.
    pub bytes: u64,
    /// The store's name for its content, if it has one.
    pub e_tag: Option<String>,
}

impl From<&ObjectInfo> for WrittenObject {
    fn from(info: &ObjectInfo) -> Self {
        Self { bytes: info.size, e_tag: info.e_tag.clone() }
    }
}

impl WrittenObject {
    /// Whether it is still there.
    ///
    /// # Errors
    /// When the store cannot say.
    pub async fn is_at(&self, location: &Location) -> Result<bool> {
        match location.head().await {
            Ok(info) => {
                let same = self.e_tag.as_ref().zip(info.e_tag.as_ref()).is_none_or(|(ours, theirs)| ours == theirs);
                Ok(same && info.size == self.bytes)
            }
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Dropped before [`NewObject::commit`], nothing becomes visible.
pub(crate) struct NewObject {
    location: Location,
    /// Taken while it works on a blocking thread, so absent after it failed.
    encoder: Option<Box<ArrowWriter<Vec<u8>>>>,
    upload: Upload,
    partial: Partial,
    overwrite: bool,
}

impl NewObject {
    /// Begins it.
    pub(crate) async fn create(
        location: &Location,
        layout: &Layout,
        properties: ArrowWriterOptions,
        overwrite: bool,
    ) -> Result<Self> {
        location.check_store()?;
        location.check_folder()?;
        // Folders, devices, pipes and sockets are nobody's outputs, whoever may replace them.
        location.check_regular()?;
        if !overwrite && location.exists().await? {
            return Err(Error::Exists { uri: location.uri().to_owned() });
        }
        let encoder = ArrowWriter::try_new_with_options(Vec::new(), Arc::clone(layout.encoded()), properties);
        let encoder = encoder.map_err(|source| Error::Encode { uri: location.uri().to_owned(), source })?;
        let partial = Partial::new(location);
        let only_new = !overwrite && partial.to_rename().is_none();
        let upload = Upload::start(partial.location(), only_new).await;
        let upload = upload.map_err(|source| Error::store(location.uri(), source))?;
        Ok(Self { location: location.clone(), encoder: Some(Box::new(encoder)), upload, partial, overwrite })
    }

    pub(crate) fn location(&self) -> &Location {
        &self.location
    }

    /// Appends rows. After an error only dropping it is left.
    pub(crate) async fn write(&mut self, rows: RecordBatch) -> Result<()> {
        self.encode(move |encoder| encoder.write(&rows)).await
    }

    /// Completes the object, with these entries in its metadata beside the layout's, and makes it visible under its name, on disk
    /// if it is a local file. Then removes what killed runs left of the same output.
    pub(crate) async fn commit(mut self, entries: Vec<KeyValue>) -> Result<WrittenObject> {
        let finish = move |encoder: &mut ArrowWriter<Vec<u8>>| {
            entries.into_iter().for_each(|entry| encoder.append_key_value_metadata(entry));
            encoder.finish().map(drop)
        };
        self.encode(finish).await?;
        let bytes = self.encoder.as_ref().map_or(0, |encoder| encoder.bytes_written() as u64);
        let Self { location, upload, partial, overwrite, .. } = self;
        let e_tag = upload.finish().await.map_err(|source| commit_error(&location, &partial, source))?;
        publish(&location, &partial, overwrite).await?;
        drop(partial);
        remove_leftovers(&location).await;
        Ok(WrittenObject { bytes, e_tag })
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
        let uri = || self.location.uri().to_owned();
        let done = done.await.map_err(|source| Error::EncodePanic { uri: uri(), source })?;
        let (encoder, bytes) = done.map_err(|source| Error::Encode { uri: uri(), source })?;
        self.encoder = Some(encoder);
        self.upload.write(bytes.into()).await.map_err(|source| Error::store(self.location.uri(), source))
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
