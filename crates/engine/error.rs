//! What can go wrong in the engine, by object.

use std::path::PathBuf;

/// An error of the engine: a checkpoint that cannot be used, a batch it was not loaded for, or no room.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the checkpoint cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the checkpoint cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The folder holds no weights.
    #[error(
        "no weights in {}: expected model.safetensors, model.safetensors.index.json, pytorch_model.bin or one .pth file",
        path.display()
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A weights file without a config.json beside it.
    #[error(
        "no config.json beside {}: put the one of the matching public checkpoint there \
         (Salesforce/blip-itm-base-coco, -base-flickr, -large-coco or -large-flickr)",
        path.display()
    )]
    NoConfig {
        /// The weights file.
        path: PathBuf,
    },
    /// config.json is no JSON of the right form.
    #[error("config.json of {origin} is not valid")]
    ConfigJson {
        /// The checkpoint.
        origin: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// config.json describes a model this engine cannot run.
    #[error("config.json of {origin}: {reason}")]
    Config {
        /// The checkpoint.
        origin: String,
        /// Which field, what it is and what it should be.
        reason: String,
    },
    /// A weights file is damaged or of another format.
    #[error("{}: {reason}", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A safetensors file is damaged.
    #[error("{} is not a whole safetensors file: download it again", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: safetensors::SafeTensorError,
    },
    /// A torch file is no readable zip archive.
    #[error("{} is not a whole torch file (a zip archive since torch 1.6): download it again, or save it with a newer torch", path.display())]
    Zip {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: zip::result::ZipError,
    },
    /// A tensor the model needs is not there.
    #[error("{origin} lacks the tensor {name} {shape:?}{}", more(*.others))]
    MissingTensor {
        /// The checkpoint.
        origin: String,
        /// Its transformers name.
        name: String,
        /// The shape the configuration asks for.
        shape: Vec<usize>,
        /// How many more are missing.
        others: usize,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error(
        "{origin}: tensor {name} is {found:?}, its config.json asks for {expected:?}: the two belong to different models"
    )]
    WrongShape {
        /// The checkpoint.
        origin: String,
        /// Its transformers name.
        name: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a type that is not a float.
    #[error("{origin}: tensor {name} is stored as {dtype}, expected float32, float16 or bfloat16")]
    WrongType {
        /// The checkpoint.
        origin: String,
        /// Its transformers name.
        name: String,
        /// The stored type.
        dtype: String,
    },
    /// There is no memory for weights or buffers.
    #[error("no memory for {bytes} more bytes: choose a smaller batch size or model")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// CUDA cannot be used on this machine, or not this card.
    #[error("cuda:{ordinal} cannot be used: {reason}; --device cpu computes without it")]
    NoCuda {
        /// The card that was asked for.
        ordinal: usize,
        /// What is missing and how to get it.
        reason: String,
    },
    /// The card has no memory left.
    #[error(
        "cuda:{ordinal} has {free} bytes of memory free, the model needs {needed} or more: choose a smaller batch size or model"
    )]
    CardOutOfMemory {
        /// The card.
        ordinal: usize,
        /// Bytes that were asked for up to the one that failed.
        needed: usize,
        /// Bytes that were free before.
        free: usize,
    },
    /// The card refused or was lost.
    #[error("cuda:{ordinal} failed to {action}: what was finished before is valid, run the same command again")]
    Card {
        /// The card.
        ordinal: usize,
        /// What it was asked to do.
        action: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No way to multiply matrices of this shape was found.
    #[error("cuBLASLt knows no way to multiply {m} x {k} by {k} x {n}: a newer libcublasLt may")]
    NoProduct {
        /// Rows.
        m: usize,
        /// Columns of the result.
        n: usize,
        /// Columns of the input.
        k: usize,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{origin}: tensor {name} holds a value that is NaN or infinite: the checkpoint is damaged, download it again"
    )]
    NotFinite {
        /// The checkpoint.
        origin: String,
        /// Its transformers name.
        name: String,
    },
    /// A weight does not fit into 16 bits.
    #[error("a weight of {value} does not fit into f16: use bf16 or f32")]
    WeightRange {
        /// The largest weight of its layer.
        value: f32,
    },
    /// The engine's threads cannot be started.
    #[error("cannot start the engine's threads")]
    Threads {
        /// Why.
        source: rayon::ThreadPoolBuildError,
    },
    /// An instruction set that this processor has not.
    #[error("CAPSIEVE_CPU_ISA is {wanted:?}, but this processor has {available}: name one of these, or unset it")]
    NoInstructions {
        /// What was asked for.
        wanted: String,
        /// What there is.
        available: String,
    },
    /// A batch the scorer was not loaded for.
    #[error("the batch has {reason}")]
    Batch {
        /// What is wrong with it.
        reason: String,
    },
}

fn more(others: usize) -> String {
    if others == 0 { String::new() } else { format!(" and {others} more") }
}
