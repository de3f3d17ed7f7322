//! MODEL as the user names it: to a checkpoint, its image preparation and its tokenizer, checked to belong together.

use std::path::{Path, PathBuf};

use capsieve_engine::{Checkpoint, Device, Info, Options, Scorer, SyntheticSize};
use capsieve_prep::{ImageSpec, Tokenizer};
use capsieve_store::{HubConfig, Location, below, is_remote};
use sha2::{Digest, Sha256};

use crate::limits::MODEL_JSON_BYTES_MAX;
use crate::{Engines, Error, Result};

/// Files of the bundled model, see demo/README.md.
const BUNDLED_CONFIG: &[u8] = include_bytes!("../../demo/model/config.json");
const BUNDLED_WEIGHTS: &[u8] = include_bytes!("../../demo/model/model.safetensors");
const BUNDLED_TOKENIZER: &[u8] = include_bytes!("../../demo/model/tokenizer.json");
const BUNDLED_PREPROCESSOR: &[u8] = include_bytes!("../../demo/model/preprocessor_config.json");

/// Bytes of a download between two lines about it.
const DOWNLOAD_LOG_BYTES: u64 = 64 << 20;

/// The forms of MODEL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// The small model that is part of the program.
    Bundled,
    /// `synthetic:SIZE[:SEED]`
    Synthetic(SyntheticSize, u64),
    /// A folder or a weights file.
    Path(PathBuf),
    /// A prefix of a bucket, which ends in '/'.
    Stored(String),
    /// A hub id, `owner/name[@revision]`.
    Hub(String),
}

impl ModelSource {
    /// Reads MODEL: `synthetic:tiny|base|large[:SEED]`, an existing path, a prefix of a bucket, or a hub id.
    ///
    /// # Errors
    /// None of these; the message says which forms there are.
    pub fn parse(model: &str) -> Result<Self> {
        let bad = |reason: &str| Err(Error::ModelName { model: model.to_owned(), reason: reason.to_owned() });
        if let Some(rest) = model.strip_prefix("synthetic:") {
            let (size, seed) = rest.split_once(':').unwrap_or((rest, "0"));
            return match (synthetic_size(size), seed.parse()) {
                (Some(size), Ok(seed)) => Ok(Self::Synthetic(size, seed)),
                _ => bad("expected synthetic:tiny, synthetic:base or synthetic:large, then optionally :SEED"),
            };
        }
        if Path::new(model).exists() {
            return Ok(Self::Path(model.into()));
        }
        if is_remote(model) {
            return match model.starts_with("http") {
                true => bad(
                    "a web server cannot say what a folder holds: name a bucket's prefix such as s3://bucket/model/",
                ),
                false => Ok(Self::Stored(format!("{}/", model.trim_end_matches('/')))),
            };
        }
        let path_like = model.starts_with(['.', '/', '~']) || model.ends_with('/') || model.contains('\\');
        if path_like || model.split('/').count() != 2 || model.contains("://") {
            return bad(
                "there is no such folder or file, and it is no hub id (owner/name), bucket's prefix (s3://bucket/model/) or \
                 synthetic:tiny|base|large[:SEED]",
            );
        }
        Ok(Self::Hub(model.to_owned()))
    }
}

fn synthetic_size(name: &str) -> Option<SyntheticSize> {
    match name {
        "tiny" => Some(SyntheticSize::Tiny),
        "base" => Some(SyntheticSize::Base),
        "large" => Some(SyntheticSize::Large),
        _ => None,
    }
}

/// A model whose parts fit together. Weights are mapped, not read, until [`Self::scorer`].
pub struct LoadedModel {
    /// As the user named it.
    pub name: String,
    /// Weights and shape.
    pub checkpoint: Checkpoint,
    /// Image preparation.
    pub image: ImageSpec,
    /// Caption preparation.
    pub tokenizer: Tokenizer,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl LoadedModel {
    /// Finds and opens MODEL, downloading it if it is a hub id or in a bucket.
    ///
    /// # Errors
    /// No such model, no network, no such bucket, a damaged or incomplete folder, parts that do not belong together.
    pub async fn open(model: &str) -> Result<Self> {
        match ModelSource::parse(model)? {
            ModelSource::Bundled => Self::bundled(),
            ModelSource::Synthetic(size, seed) => Self::synthetic(size, seed),
            ModelSource::Path(path) => Self::folder(model, &path),
            ModelSource::Stored(prefix) => {
                let config = Location::parse(&below(&prefix, "config.json"))?;
                let folder = capsieve_store::fetch_stored_model(&cache(model)?, &config, downloaded).await?;
                Self::folder(model, &folder)
            }
            ModelSource::Hub(id) => {
                let folder = capsieve_store::fetch_model_with(&HubConfig::from_env()?, &id, downloaded).await?;
                Self::folder(model, &folder)
            }
        }
    }

    /// The small model that is part of the program.
    ///
    /// # Errors
    /// None, unless the program was built from a broken checkout.
    pub fn bundled() -> Result<Self> {
        let name = "bundled";
        let bad = |source| Error::Preprocessing { model: name.to_owned(), source };
        Self::checked(Self {
            name: name.to_owned(),
            checkpoint: Checkpoint::from_bytes(BUNDLED_CONFIG, BUNDLED_WEIGHTS)?,
            image: ImageSpec::from_json(BUNDLED_PREPROCESSOR).map_err(bad)?,
            tokenizer: Tokenizer::from_json(BUNDLED_TOKENIZER).map_err(bad)?,
            notes: Vec::new(),
        })
    }

    /// Seeded random weights with the public models' preparation.
    ///
    /// # Errors
    /// None.
    pub fn synthetic(size: SyntheticSize, seed: u64) -> Result<Self> {
        let checkpoint = Checkpoint::synthetic(size, seed);
        let image = ImageSpec::blip(checkpoint.config().vision.image_size);
        let (tokenizer, name) = (Tokenizer::bert_uncased(), format!("synthetic:{size}:{seed}"));
        Ok(Self { name, checkpoint, image, tokenizer, notes: Vec::new() })
    }

    fn folder(name: &str, path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
        let bad = |source| Error::Preprocessing { model: name.to_owned(), source };
        let mut notes = checkpoint.warnings().to_vec();
        let image = match read(&folder.join("preprocessor_config.json"))? {
            Some(json) => ImageSpec::from_json(&json).map_err(bad)?,
            None => {
                notes.push("no preprocessor_config.json: images are prepared as for the public BLIP models".to_owned());
                ImageSpec::blip(checkpoint.config().vision.image_size)
            }
        };
        let tokenizer = match (read(&folder.join("tokenizer.json"))?, read(&folder.join("vocab.txt"))?) {
            (Some(json), _) => Tokenizer::from_json(&json).map_err(bad)?,
            (None, Some(vocab)) => Tokenizer::from_vocab(&vocab).map_err(bad)?,
            (None, None) => {
                notes.push("no tokenizer.json or vocab.txt: captions are split as by BERT uncased".to_owned());
                Tokenizer::bert_uncased()
            }
        };
        Self::checked(Self { name: name.to_owned(), checkpoint, image, tokenizer, notes })
    }

    fn checked(self) -> Result<Self> {
        let bad = |reason: String| Err(Error::Model { model: self.name.clone(), reason });
        let config = self.checkpoint.config();
        if self.image.size != config.vision.image_size {
            return bad(format!(
                "preprocessor_config.json makes images of {} px, config.json wants {}: take both from one model",
                self.image.size, config.vision.image_size
            ));
        }
        if self.tokenizer.vocab_len() > config.text.vocab {
            return bad(format!(
                "the tokenizer has {} entries, the model's vocabulary {}: take both from one model",
                self.tokenizer.vocab_len(),
                config.text.vocab
            ));
        }
        Ok(self)
    }

    /// Loads the weights onto every device.
    ///
    /// # Errors
    /// No memory, no threads, a device that cannot be used.
    pub fn scorers(&self, engines: &Engines, options: &Options) -> Result<Vec<Box<dyn Scorer>>> {
        let load = |device: &Device| {
            let scorer = self.scorer(&Options { device: *device, ..*options })?;
            let Info { images_max, device, .. } = scorer.info();
            if *images_max < options.images_max {
                tracing::warn!("{device} has memory for batches of {images_max} images, not {}", options.images_max);
            }
            Ok(scorer)
        };
        engines.devices.iter().map(load).collect()
    }

    /// Loads the weights.
    ///
    /// # Errors
    /// No memory, no threads.
    pub fn scorer(&self, options: &Options) -> Result<Box<dyn Scorer>> {
        Ok(capsieve_engine::load(&self.checkpoint, &self.image.pixel_lut(), options)?)
    }

    /// SHA-256, in hexadecimal, over weights, configuration, tokenizer and image preparation. Reads all weights.
    ///
    /// # Errors
    /// The weights or the tokenizer cannot be read.
    pub fn hash(&self) -> Result<String> {
        let bad = |source| Error::Preprocessing { model: self.name.clone(), source };
        let mut hash = Sha256::new();
        hash.update(self.checkpoint.hash()?);
        hash.update(self.tokenizer.to_json().map_err(bad)?);
        hash.update(format!("{:?}", self.image));
        Ok(hex(&hash.finalize()))
    }
}

/// Where models of buckets are kept: `$XDG_CACHE_HOME/capsieve/models`, or below `~/.cache`.
fn cache(model: &str) -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let nowhere = || Error::ModelName {
        model: model.to_owned(),
        reason: "set XDG_CACHE_HOME or HOME, it is copied to a folder below".to_owned(),
    };
    Ok(cache.ok_or_else(nowhere)?.join("capsieve").join("models"))
}

/// Tells of a download every [`DOWNLOAD_LOG_BYTES`].
fn downloaded(progress: capsieve_store::FileProgress) {
    let (file, bytes, total) = (progress.file, progress.bytes, progress.bytes_total);
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let step = if total < DOWNLOAD_LOG_BYTES { 0 } else { bytes / DOWNLOAD_LOG_BYTES };
    if bytes == total || NEXT.swap(step, std::sync::atomic::Ordering::Relaxed) != step {
        tracing::info!("downloading {file}: {} of {} MB", bytes >> 20, total >> 20);
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A small file of a model folder; `None` if there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let fail = |source| Error::File { path: path.display().to_string(), source };
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
        Ok(metadata) if metadata.len() > MODEL_JSON_BYTES_MAX => {
            return Err(fail(std::io::Error::other("too large for such a file")));
        }
        Ok(_) => {}
    }
    std::fs::read(path).map(Some).map_err(fail)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn model_names_are_told_apart() {
        let parse = |model: &str| ModelSource::parse(model);
        assert_eq!(parse("synthetic:large:7").unwrap(), ModelSource::Synthetic(SyntheticSize::Large, 7));
        assert_eq!(parse("synthetic:tiny").unwrap(), ModelSource::Synthetic(SyntheticSize::Tiny, 0));
        assert_eq!(
            parse("Salesforce/blip-itm-base-coco").unwrap(),
            ModelSource::Hub("Salesforce/blip-itm-base-coco".into())
        );
        for uri in ["s3://bucket/x", "s3://bucket/x/", "gs://bucket/x/", "az://box/x", "abfs://box@account/x"] {
            let prefix = format!("{}/", uri.trim_end_matches('/'));
            assert_eq!(parse(uri).unwrap(), ModelSource::Stored(prefix));
        }
        for bad in [
            "synthetic:huge",
            "synthetic:tiny:x",
            "./nowhere",
            "/no/where",
            "nowhere",
            "a/b/c",
            "http://host/x/",
            "sftp://host/x",
            "",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
