//! Checkpoints: from a folder, a file or a seed to named tensors of checked shapes.
//!
//! Input is hostile until parsed: sizes are bounded by the file, nothing in a pickle is ever executed, and every error
//! names the file and the tensor. Must not: know what the network does with a tensor.

mod config;
mod folder;
mod names;
mod pickle;
mod safetensors;
mod synthetic;
mod tensors;
mod torch;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub use self::config::{Config, TextConfig, VisionConfig};
pub use self::synthetic::SyntheticSize;
use self::tensors::{Bytes, Dtype, Entry, required};
use crate::Error;

/// Tensors the model lacks but files have: accepted without a word.
const STALE: &str = "text_encoder.embeddings.position_ids";
/// Unknown tensors a warning names before it only counts.
const UNKNOWN_SHOWN: usize = 5;

/// An opened checkpoint: its configuration, and weights that are read tensor by tensor.
pub struct Checkpoint {
    origin: String,
    config: Config,
    config_json: Vec<u8>,
    format: String,
    warnings: Vec<String>,
    weights: Weights,
}

enum Weights {
    Files { files: Vec<Bytes>, tensors: BTreeMap<String, Entry> },
    Synthetic { seed: u64 },
}

/// What a tensor of a checkpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// transformers' name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Stored type: "float32", "float16", "bfloat16".
    pub dtype: String,
    /// Stored size.
    pub bytes: u64,
}

/// Weights as found, before they are checked against a configuration.
struct Found {
    format: String,
    files: Vec<Bytes>,
    tensors: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Opens a folder in Hugging Face's layout, or a weights file with its config.json beside it. Weights are mapped, not
    /// read.
    ///
    /// # Errors
    /// No weights, no or an impossible configuration, a damaged file, a missing or misshapen tensor: each names it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (config_json, found) = folder::open(path)?;
        Self::checked(path.display().to_string(), config_json, found)
    }

    /// A checkpoint that is part of the program: config.json and a safetensors file.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn from_bytes(config_json: &[u8], weights: &'static [u8]) -> Result<Self, Error> {
        let files = vec![Bytes::Static(weights)];
        let tensors = safetensors::read(&files[0], 0)?;
        let found = Found { format: "safetensors (bundled)".to_owned(), files, tensors };
        Self::checked("the bundled model".to_owned(), config_json.to_vec(), found)
    }

    /// Seeded random weights, made when they are read.
    pub fn synthetic(size: SyntheticSize, seed: u64) -> Self {
        let config = size.config();
        Self {
            origin: format!("synthetic:{size}:{seed}"),
            config_json: write::config_json(&config),
            config,
            format: "synthetic".to_owned(),
            warnings: Vec::new(),
            weights: Weights::Synthetic { seed },
        }
    }

    fn checked(origin: String, config_json: Vec<u8>, found: Found) -> Result<Self, Error> {
        let (config, mut warnings) = config::parse(&origin, &config_json)?;
        let Found { format, files, tensors } = found;
        let required = required(&config);
        let missing: Vec<_> = required.iter().filter(|(name, _)| !tensors.contains_key(name)).collect();
        if let Some((name, shape)) = missing.first() {
            let (name, shape, others) = (name.clone(), shape.clone(), missing.len() - 1);
            return Err(Error::MissingTensor { origin, name, shape, others });
        }
        for (name, expected) in &required {
            check_tensor(&origin, name, &tensors[name], expected)?;
        }
        warnings.extend(unknown(&required, &tensors));
        Ok(Self { origin, config, config_json, format, warnings, weights: Weights::Files { files, tensors } })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How the weights are stored: "safetensors", "safetensors (3 shards)", "pytorch pickle", "Salesforce .pth", "synthetic".
    pub fn format(&self) -> &str {
        &self.format
    }

    /// What the user should know: suspicious configuration, unknown tensors.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The model's tensors in the order of the network.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo> {
        required(&self.config).into_iter().map(|(name, shape)| {
            let values = shape.iter().product::<usize>() as u64;
            let dtype = match &self.weights {
                Weights::Files { tensors, .. } => tensors[&name].dtype.clone(),
                Weights::Synthetic { .. } => Dtype::F32,
            };
            let bytes = values * dtype.size().map_or(0, |size| size as u64);
            TensorInfo { name, shape, dtype: dtype.name().to_owned(), bytes }
        })
    }

    /// A tensor's values as f32, row-major.
    ///
    /// # Errors
    /// The tensor is not there, has another shape, or holds NaN or infinity.
    pub fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        match &self.weights {
            Weights::Synthetic { seed } => Ok(synthetic::values(*seed, name, shape)),
            Weights::Files { files, tensors } => {
                let missing = || Error::MissingTensor {
                    origin: self.origin.clone(),
                    name: name.to_owned(),
                    shape: shape.to_vec(),
                    others: 0,
                };
                let entry = tensors.get(name).ok_or_else(missing)?;
                check_tensor(&self.origin, name, entry, shape)?;
                let file = &files[entry.file];
                let values = entry.dtype.to_f32(&file.get()[entry.bytes.clone()]);
                file.forget(&entry.bytes);
                if !values.iter().fold(true, |finite, v| finite & v.is_finite()) {
                    return Err(Error::NotFinite { origin: self.origin.clone(), name: name.to_owned() });
                }
                Ok(values)
            }
        }
    }

    /// SHA-256, in hexadecimal, over the configuration and every tensor's name, shape, type and bytes; the file format
    /// does not matter. Reads all weights.
    ///
    /// # Errors
    /// None today; reading may fail for stores to come.
    pub fn hash(&self) -> Result<String, Error> {
        let mut hash = Sha256::new();
        hash.update(format!("{:?}", self.config));
        match &self.weights {
            Weights::Synthetic { seed } => hash.update(format!("synthetic:{}:{seed}", synthetic::VERSION)),
            Weights::Files { files, tensors } => {
                let names: Vec<String> = required(&self.config).into_iter().map(|(name, _)| name).collect();
                let digest = |name: &String| {
                    let entry = &tensors[name];
                    let mut hash = Sha256::new();
                    hash.update(format!("{name} {:?} {}", entry.shape, entry.dtype.name()));
                    hash.update(&files[entry.file].get()[entry.bytes.clone()]);
                    files[entry.file].forget(&entry.bytes);
                    hash.finalize()
                };
                let digests: Vec<_> = names.par_iter().map(digest).collect();
                digests.iter().for_each(|digest| hash.update(digest));
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Writes `config.json` and `model.safetensors` (float32) into `folder`, one tensor in memory at a time. The weights
    /// appear whole or not at all.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write_safetensors(&self, folder: &Path) -> Result<(), Error> {
        write::folder(self, folder)
    }
}

fn check_tensor(origin: &str, name: &str, entry: &Entry, expected: &[usize]) -> Result<(), Error> {
    if entry.shape != expected {
        let (found, expected) = (entry.shape.clone(), expected.to_vec());
        return Err(Error::WrongShape { origin: origin.to_owned(), name: name.to_owned(), found, expected });
    }
    if entry.dtype.size().is_none() {
        let dtype = entry.dtype.name().to_owned();
        return Err(Error::WrongType { origin: origin.to_owned(), name: name.to_owned(), dtype });
    }
    Ok(())
}

fn unknown(required: &[(String, Vec<usize>)], tensors: &BTreeMap<String, Entry>) -> Option<String> {
    let known = |name: &String| name == STALE || required.iter().any(|(required, _)| required == name);
    let unknown: Vec<&str> = tensors.keys().filter(|name| !known(name)).map(String::as_str).collect();
    if unknown.is_empty() {
        return None;
    }
    let shown = unknown[..unknown.len().min(UNKNOWN_SHOWN)].join(", ");
    Some(format!("{} tensors the model does not have were ignored: {shown}", unknown.len()))
}
