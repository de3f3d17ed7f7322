//! Which files of a folder are the checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::tensors::Bytes;
use super::{Found, safetensors, torch};
use crate::Error;

/// Largest config.json or index: the index of a model of 10,000 tensors is 1 MB.
const JSON_BYTES_MAX: u64 = 16 << 20;

/// Finds and reads the headers of the weights under `path`, and its config.json.
pub(super) fn open(path: &Path) -> Result<(Vec<u8>, Found), Error> {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
    let weights = if path.is_dir() { weights_of(folder)? } else { path.to_owned() };
    let config = folder.join("config.json");
    std::fs::metadata(&weights).map_err(|source| Error::Read { path: weights.clone(), source })?;
    if !config.exists() {
        return Err(Error::NoConfig { path: weights });
    }
    let config_json = small_file(&config)?;
    let found = match extension(&weights) {
        "json" => indexed(folder, &weights)?,
        "safetensors" => {
            let files = vec![Bytes::map(&weights)?];
            let tensors = safetensors::read(&files[0], 0)?;
            Found { format: "safetensors".to_owned(), files, tensors }
        }
        _ => torch::open(&weights)?,
    };
    Ok((config_json, found))
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default()
}

fn weights_of(folder: &Path) -> Result<PathBuf, Error> {
    let usual =
        ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];
    if let Some(name) = usual.iter().find(|name| folder.join(name).exists()) {
        return Ok(folder.join(name));
    }
    let read = |source| Error::Read { path: folder.to_owned(), source };
    let entries = std::fs::read_dir(folder).map_err(read)?;
    let paths = entries.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(read)?;
    let mut single: Vec<PathBuf> = paths.into_iter().filter(|p| ["pth", "pt"].contains(&extension(p))).collect();
    match (single.pop(), single.len()) {
        (Some(path), 0) => Ok(path),
        _ => Err(Error::NoWeights { path: folder.to_owned() }),
    }
}

fn small_file(path: &Path) -> Result<Vec<u8>, Error> {
    let read = |source| Error::Read { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(read)?.len();
    if size > JSON_BYTES_MAX {
        let reason = format!("{size} bytes are too many for such a file, at most {JSON_BYTES_MAX} are read");
        return Err(Error::Weights { path: path.to_owned(), reason });
    }
    std::fs::read(path).map_err(read)
}

/// `*.index.json`: which of several files holds each tensor.
fn indexed(folder: &Path, index: &Path) -> Result<Found, Error> {
    let bad = |reason: String| Error::Weights { path: index.to_owned(), reason };
    let json: Value = serde_json::from_slice(&small_file(index)?).map_err(|e| bad(format!("not valid JSON: {e}")))?;
    let map =
        json.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("it has no weight_map".to_owned()))?;
    let mut names = BTreeSet::new();
    for name in map.values() {
        let name = name.as_str().unwrap_or_default();
        // The index is as foreign as the weights: it may only name files beside itself.
        if name.is_empty() || Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(bad(format!("it names the file {name:?}, which is not a file of its folder")));
        }
        names.insert(name);
    }
    let (mut files, mut tensors, mut kind) = (Vec::new(), BTreeMap::new(), "");
    for name in names {
        let path = folder.join(name);
        if extension(&path) == "safetensors" {
            files.push(Bytes::map(&path)?);
            tensors.append(&mut safetensors::read(&files[files.len() - 1], files.len() - 1)?);
            kind = "safetensors";
        } else {
            let mut shard = torch::open(&path)?;
            shard.tensors.values_mut().for_each(|entry| entry.file += files.len());
            tensors.append(&mut shard.tensors);
            files.append(&mut shard.files);
            kind = "pytorch pickle";
        }
    }
    Ok(Found { format: format!("{kind} ({} shards)", files.len()), files, tensors })
}
