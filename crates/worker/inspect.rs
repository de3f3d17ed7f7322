//! The job `inspect`: what a checkpoint or a shard is, before anything is scored.

use std::path::Path;

use capsieve_engine::Config;
use capsieve_store::{CaptionKind, ColumnOptions, Footer, ImageKind, Location, ShardReader};

use crate::{LoadedModel, Result};

/// What was inspected.
#[derive(Clone, Debug)]
pub enum Inspection {
    /// A model.
    Checkpoint(Box<CheckpointReport>),
    /// A Parquet shard.
    Shard(Box<ShardReport>),
}

/// What a checkpoint is.
#[derive(Clone, Debug)]
pub struct CheckpointReport {
    /// As the user named it.
    pub name: String,
    /// "safetensors", "pytorch pickle", ...
    pub format: String,
    /// Shape of the model.
    pub config: Config,
    /// Number of values.
    pub parameters: u64,
    /// Number of tensors.
    pub tensors: usize,
    /// Stored types.
    pub dtypes: Vec<String>,
    /// Stored bytes.
    pub bytes: u64,
    /// Entries of the tokenizer.
    pub vocabulary: usize,
    /// What the user should know.
    pub notes: Vec<String>,
    /// SHA-256 of the model.
    pub hash: String,
}

/// What a shard is.
#[derive(Clone, Debug)]
pub struct ShardReport {
    /// Its URI.
    pub uri: String,
    /// Rows.
    pub rows: u64,
    /// Row groups.
    pub row_groups: usize,
    /// Bytes.
    pub bytes: u64,
    /// The program that wrote it.
    pub created_by: Option<String>,
    /// Name and type of each column.
    pub schema: Vec<(String, String)>,
    /// Image, caption and key column with what they hold; or why it cannot be scored.
    pub detected: std::result::Result<Vec<(&'static str, String)>, String>,
}

/// Inspects a shard (a file that is Parquet by name or content), else a model.
///
/// # Errors
/// It is neither, or damaged.
pub async fn inspect(what: &str, columns: &ColumnOptions) -> Result<Inspection> {
    let file = Path::new(what.strip_prefix("file://").unwrap_or(what));
    if what.ends_with(".parquet") || is_parquet(file) {
        return shard(what, columns).await.map(|report| Inspection::Shard(Box::new(report)));
    }
    checkpoint(LoadedModel::open(what).await?).map(|report| Inspection::Checkpoint(Box::new(report)))
}

fn is_parquet(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = std::fs::File::open(path).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut magic));
    read.is_ok() && &magic == b"PAR1"
}

fn checkpoint(model: LoadedModel) -> Result<CheckpointReport> {
    let tensors: Vec<_> = model.checkpoint.tensors().collect();
    let mut dtypes: Vec<String> = tensors.iter().map(|tensor| tensor.dtype.clone()).collect();
    dtypes.sort_unstable();
    dtypes.dedup();
    Ok(CheckpointReport {
        hash: model.hash()?,
        name: model.name,
        format: model.checkpoint.format().to_owned(),
        config: model.checkpoint.config().clone(),
        parameters: tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum(),
        tensors: tensors.len(),
        dtypes,
        bytes: tensors.iter().map(|tensor| tensor.bytes).sum(),
        vocabulary: model.tokenizer.vocab_len(),
        notes: model.notes,
    })
}

async fn shard(uri: &str, options: &ColumnOptions) -> Result<ShardReport> {
    let footer = Footer::read(&Location::parse(uri)?).await?;
    let schema: Vec<_> =
        footer.schema().fields().iter().map(|f| (f.name().clone(), f.data_type().to_string())).collect();
    let (rows, row_groups, bytes) = (footer.rows(), footer.row_groups(), footer.object_info().size);
    let created_by = footer.created_by().map(str::to_owned);
    let name = |index: usize| schema[index].0.clone();
    let detected = ShardReader::new(footer, options).map(|reader| {
        let columns = reader.columns();
        let image = match columns.image_kind {
            ImageKind::Binary => "encoded images",
            ImageKind::Struct => "struct of bytes and path",
            ImageKind::Uri => "addresses of images",
        };
        let caption = match columns.caption_kind {
            CaptionKind::Text => "one caption a row",
            CaptionKind::List => "a list of captions a row",
        };
        let mut found = vec![
            ("image", format!("{} ({image})", name(columns.image))),
            ("caption", format!("{} ({caption})", name(columns.caption))),
        ];
        found.extend(columns.key.map(|key| ("key", name(key))));
        found
    });
    let detected = detected.map_err(|error| crate::prepare::chain(&error));
    Ok(ShardReport { uri: uri.to_owned(), rows, row_groups, bytes, created_by, schema, detected })
}
