//! The tensors every checkpoint must have, and where a tensor's bytes are.

use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::Config;
use crate::Error;

/// How a tensor's values are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
    F64,
    /// Anything else, by its name in the file: accepted for tensors the model does not need.
    Other(String),
}

impl Dtype {
    pub(super) fn name(&self) -> &str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
            Dtype::F64 => "float64",
            Dtype::Other(name) => name,
        }
    }

    /// Bytes of a value; `None` for types the model cannot use.
    pub(super) fn size(&self) -> Option<usize> {
        match self {
            Dtype::F32 => Some(4),
            Dtype::F16 | Dtype::Bf16 => Some(2),
            Dtype::F64 => Some(8),
            Dtype::Other(_) => None,
        }
    }

    /// Little-endian bytes to f32.
    pub(super) fn to_f32(&self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::Bf16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
            Dtype::Other(name) => unreachable!("{name} was refused when the checkpoint was opened"),
        }
    }
}

/// A tensor in a file: contiguous, row-major.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) shape: Vec<usize>,
    pub(super) dtype: Dtype,
    /// Which of the checkpoint's files.
    pub(super) file: usize,
    pub(super) bytes: std::ops::Range<usize>,
}

/// A weights file in memory.
pub(super) enum Bytes {
    Mapped { path: PathBuf, map: Mmap },
    Static(&'static [u8]),
}

impl Bytes {
    pub(super) fn map(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(read)?;
        // SAFETY: the map is read-only. Another process that truncates the file while it is mapped can end this one by a
        // signal, which every reader of memory-mapped weights accepts; values are checked by nobody but used as numbers
        // only, so a changed file gives wrong scores, not undefined behaviour of ours.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        Ok(Self::Mapped { path: path.to_owned(), map })
    }

    pub(super) fn get(&self) -> &[u8] {
        match self {
            Bytes::Mapped { map, .. } => map,
            Bytes::Static(bytes) => bytes,
        }
    }

    pub(super) fn path(&self) -> PathBuf {
        match self {
            Bytes::Mapped { path, .. } => path.clone(),
            Bytes::Static(_) => PathBuf::from("the bundled model"),
        }
    }

    /// Lets the system take back the pages of a range: a weight is read once, and mapped pages count as our memory.
    pub(super) fn forget(&self, range: &std::ops::Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped { map, .. } = self {
            // SAFETY: the map is a shared read-only map of a file, so dropped pages come back from the file unchanged.
            let dropped =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
            // Advice that is not taken costs memory, nothing else.
            drop(dropped);
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Name and shape of every tensor of a model, in transformers' names.
pub(super) fn required(config: &Config) -> Vec<(String, Vec<usize>)> {
    let mut all = Vec::new();
    vision(config, &mut all);
    text(config, &mut all);
    let (v, t, p) = (config.vision.hidden, config.text.hidden, config.projection);
    for (name, outputs, inputs) in [("vision_proj", p, v), ("text_proj", p, t), ("itm_head", 2, t)] {
        layer(&mut all, name, &[outputs, inputs]);
    }
    all
}

/// `name.weight` of the given shape and `name.bias` of its first dimension.
fn layer(all: &mut Vec<(String, Vec<usize>)>, name: &str, shape: &[usize]) {
    all.push((format!("{name}.weight"), shape.to_vec()));
    all.push((format!("{name}.bias"), vec![shape[0]]));
}

fn vision(config: &Config, all: &mut Vec<(String, Vec<usize>)>) {
    let (c, name) = (&config.vision, "vision_model.embeddings");
    let (v, f, p) = (c.hidden, c.intermediate, c.patch_size);
    all.push((format!("{name}.class_embedding"), vec![1, 1, v]));
    all.push((format!("{name}.position_embedding"), vec![1, c.patches() + 1, v]));
    layer(all, &format!("{name}.patch_embedding"), &[v, 3, p, p]);
    for i in 0..c.layers {
        let name = format!("vision_model.encoder.layers.{i}");
        layer(all, &format!("{name}.layer_norm1"), &[v]);
        layer(all, &format!("{name}.self_attn.qkv"), &[3 * v, v]);
        layer(all, &format!("{name}.self_attn.projection"), &[v, v]);
        layer(all, &format!("{name}.layer_norm2"), &[v]);
        layer(all, &format!("{name}.mlp.fc1"), &[f, v]);
        layer(all, &format!("{name}.mlp.fc2"), &[v, f]);
    }
    layer(all, "vision_model.post_layernorm", &[v]);
}

fn text(config: &Config, all: &mut Vec<(String, Vec<usize>)>) {
    let (c, name) = (&config.text, "text_encoder.embeddings");
    let (t, g, v) = (c.hidden, c.intermediate, config.vision.hidden);
    all.push((format!("{name}.word_embeddings.weight"), vec![c.vocab, t]));
    all.push((format!("{name}.position_embeddings.weight"), vec![c.positions, t]));
    layer(all, &format!("{name}.LayerNorm"), &[t]);
    for j in 0..c.layers {
        let name = format!("text_encoder.encoder.layer.{j}");
        for (attention, source) in [("attention", t), ("crossattention", v)] {
            layer(all, &format!("{name}.{attention}.self.query"), &[t, t]);
            layer(all, &format!("{name}.{attention}.self.key"), &[t, source]);
            layer(all, &format!("{name}.{attention}.self.value"), &[t, source]);
            layer(all, &format!("{name}.{attention}.output.dense"), &[t, t]);
            layer(all, &format!("{name}.{attention}.output.LayerNorm"), &[t]);
        }
        layer(all, &format!("{name}.intermediate.dense"), &[g, t]);
        layer(all, &format!("{name}.output.dense"), &[t, g]);
        layer(all, &format!("{name}.output.LayerNorm"), &[t]);
    }
}
