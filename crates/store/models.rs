//! A model's folder in a bucket to a local folder. A copy belongs to the versions (entity tag, size, time) of all its files: what
//! is there is not fetched again, a model that was replaced gets a folder of its own, and no folder mixes two of them. A file
//! has its name when it is whole; processes that fetch the same model at once do the work twice and agree.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt, stream};
use object_store::ObjectStoreExt;
use sha2::{Digest, Sha256};

use crate::access::blocking;
use crate::hub::{CONFIG, FileProgress, INDEX, SMALL_FILES, WEIGHTS, WEIGHTS_WANTED, weight_files};
use crate::{Error, Location, ObjectInfo, Result};

/// Bytes of one request; so many of them are held at a time.
const PIECE_BYTES: u64 = 16 << 20;
const PIECES: usize = 4;
/// Bytes of a list of weight files.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// What a killed process left of a file, when surely nobody writes it any more.
const LEFTOVER_AGE: Duration = Duration::from_secs(24 * 3600);

/// A file of a model, in one version.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ModelFile {
    name: String,
    info: ObjectInfo,
}

/// The local folder that holds the model whose `config.json` this is, after fetching what `cache` does not have. `progress` is
/// called for each piece that arrives; it must not block.
///
/// # Errors
/// When the bucket cannot be read, holds no model or another one in the end, or the cache cannot be written.
pub async fn fetch_stored_model(cache: &Path, config: &Location, progress: impl Fn(FileProgress)) -> Result<PathBuf> {
    let files = look(config).await?;
    let folder = cache.join(folder_name(config.uri())).join(version(&files));
    let missing = missing(&folder, &files).await?;
    for file in &missing {
        fetch(&folder, config, file, &progress).await?;
    }
    // Somebody may have replaced the files that were not looked at yet.
    if !missing.is_empty() && look(config).await? != files {
        return Err(Error::changed(config.uri()));
    }
    Ok(folder)
}

/// The files of the model that the loader wants, as they are now.
async fn look(config: &Location) -> Result<Vec<ModelFile>> {
    let mut files = Vec::new();
    files.push(find(config, CONFIG).await?.ok_or_else(|| missing_file(config, CONFIG))?);
    for name in SMALL_FILES {
        files.extend(find(config, name).await?);
    }
    let [safetensors, pickle] = WEIGHTS;
    if let Some(weights) = find(config, safetensors).await? {
        files.push(weights);
    } else if let Some(index) = find(config, INDEX).await? {
        let location = config.sibling(INDEX);
        let text = location.get(&location.head_within(INDEX_BYTES_MAX).await?).await?;
        files.push(index);
        let bad = |source: serde_json::Error| Error::ModelIndex { uri: location.to_string(), source };
        for name in weight_files(&text).map_err(bad)? {
            // Anybody may have written the list: it names files beside it, and no others.
            if name.contains(['/', '\\']) || name.starts_with('.') {
                return Err(missing_file(config, &format!("usable weight file {name:?}")));
            }
            files.push(find(config, &name).await?.ok_or_else(|| missing_file(config, &name))?);
        }
    } else {
        files.push(find(config, pickle).await?.ok_or_else(|| missing_file(config, WEIGHTS_WANTED))?);
    }
    Ok(files)
}

async fn find(config: &Location, name: &str) -> Result<Option<ModelFile>> {
    match config.sibling(name).head().await {
        Ok(info) => Ok(Some(ModelFile { name: name.to_owned(), info })),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn missing_file(config: &Location, missing: &str) -> Error {
    let uri = config.uri();
    let folder = uri.strip_suffix(CONFIG).unwrap_or(uri).to_owned();
    Error::ModelIncomplete { uri: folder, missing: missing.to_owned() }
}

/// Legible, and different for every URI.
fn folder_name(uri: &str) -> String {
    let folder = uri.strip_suffix(CONFIG).unwrap_or(uri).trim_end_matches('/');
    let last = folder.rsplit('/').next().unwrap_or_default();
    let letter = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    format!("{}-{}", last.chars().take(64).map(letter).collect::<String>(), digest(uri))
}

fn version(files: &[ModelFile]) -> String {
    let identity = |file: &ModelFile| format!("{:?} {} {:?} ", file.name, file.info.size, tag(&file.info));
    digest(&files.iter().map(identity).collect::<String>())
}

/// What tells versions apart: the time, where the store has no tags.
fn tag(info: &ObjectInfo) -> String {
    info.e_tag.clone().unwrap_or_else(|| format!("{:?}", info.modified))
}

/// Eight bytes of a SHA-256.
fn digest(text: &str) -> String {
    Sha256::digest(text)[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the folder, and says what it does not hold.
async fn missing(folder: &Path, files: &[ModelFile]) -> Result<Vec<ModelFile>> {
    let (folder, files) = (folder.to_owned(), files.to_owned());
    blocking(move || {
        let cache = |source| Error::ModelCache { path: folder.display().to_string(), source };
        std::fs::create_dir_all(&folder).map_err(cache)?;
        remove_leftovers(&folder);
        let there =
            |file: &ModelFile| folder.join(&file.name).metadata().is_ok_and(|meta| meta.len() == file.info.size);
        Ok(files.into_iter().filter(|file| !there(file)).collect())
    })
    .await
}

/// The store adds "#1" and the like to a name while its file grows. Best effort: they are in nobody's way.
fn remove_leftovers(folder: &Path) {
    let old = |meta: std::fs::Metadata| {
        let age = meta.modified().ok().and_then(|time| SystemTime::now().duration_since(time).ok());
        age.is_some_and(|age| age > LEFTOVER_AGE)
    };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains('#') && entry.metadata().is_ok_and(old) {
            drop(std::fs::remove_file(entry.path()));
        }
    }
}

/// One file, in the version that was looked at: it has its name when it is whole.
async fn fetch(folder: &Path, config: &Location, file: &ModelFile, progress: &impl Fn(FileProgress)) -> Result<()> {
    let source = config.sibling(&file.name);
    let target = Location::parse(&folder.join(&file.name).display().to_string())?;
    let failed = |source| Error::store(target.uri(), source);
    let size = file.info.size;
    let ranges = (0..size.div_ceil(PIECE_BYTES)).map(|piece| piece * PIECE_BYTES..size.min((piece + 1) * PIECE_BYTES));
    let piece = |range| source.get_range(range, &file.info);
    let mut pieces = stream::iter(ranges.map(piece)).buffered(PIECES);
    let mut upload = target.store().put_multipart(&target.path()).await.map_err(failed)?;
    let mut bytes = 0;
    while let Some(piece) = pieces.try_next().await? {
        bytes += piece.len() as u64;
        upload.put_part(piece.into()).await.map_err(failed)?;
        progress(FileProgress { file: file.name.clone(), bytes, bytes_total: size });
    }
    // A store without tags may have given another version's bytes.
    if bytes != size {
        return Err(Error::changed(source.uri()));
    }
    upload.complete().await.map(drop).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::folder_name;

    #[test]
    fn folders_are_legible_and_differ() {
        let name = folder_name("s3://bucket/models/blip itm/config.json");
        assert!(name.starts_with("blip-itm-") && name.len() == "blip-itm-".len() + 16, "{name}");
        assert_ne!(name, folder_name("s3://other/models/blip itm/config.json"));
        assert!(folder_name("s3://bucket/config.json").starts_with("bucket-"));
    }
}
