//! torch.save files since torch 1.6: a zip archive of stored entries, `*/data.pkl` and one `*/data/KEY` per storage.

use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Read};
use std::ops::Range;
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, Tensor};
use super::tensors::{Bytes, Dtype, Entry};
use super::{Found, names};
use crate::Error;

/// Largest pickle: one of 10,000 tensors with their optimiser is a few MB.
const PICKLE_BYTES_MAX: u64 = 32 << 20;
/// Storages of a file at most.
const ENTRIES_MAX: usize = 1 << 20;

/// Reads the directory and the pickle of a torch file; tensors keep their place in the mapped file.
pub(super) fn open(path: &Path) -> Result<Found, Error> {
    let file = Bytes::map(path)?;
    let bad = |reason: String| Error::Weights { path: path.to_owned(), reason };
    let bytes = file.get();
    if !bytes.starts_with(b"PK") {
        return Err(bad(
            "not a torch file of version 1.6 or later, nor safetensors: load it with torch and save it again"
                .to_owned(),
        ));
    }
    let zip = |source| Error::Zip { path: path.to_owned(), source };
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(zip)?;
    let entries = entries(&mut archive).map_err(zip)?;
    let found = entries.keys().find(|name| name.ends_with("/data.pkl") || *name == "data.pkl").cloned();
    let pickle_name = found.ok_or_else(|| bad("it has no data.pkl: not a torch file".to_owned()))?;
    let prefix = pickle_name.strip_suffix("data.pkl").unwrap_or_default();
    if let Some(order) = entries.get(&format!("{prefix}byteorder"))
        && slice(bytes, order) != Some(b"little")
    {
        return Err(bad("it was saved on a big-endian machine: load it with torch and save it again".to_owned()));
    }
    let pickled = entries[&pickle_name].clone();
    let pickled = slice(bytes, &pickled).filter(|p| p.len() as u64 <= PICKLE_BYTES_MAX);
    let pickled = pickled.ok_or_else(|| bad("its data.pkl is cut or too large".to_owned()))?;
    let named = pickle::read(pickled).map_err(bad)?;
    let salesforce = names::is_salesforce(named.iter().map(|(name, _)| name.as_str()));
    let mut tensors = BTreeMap::new();
    for (name, tensor) in named {
        let Some(name) = (if salesforce { names::to_transformers(&name) } else { Some(name) }) else { continue };
        let entry = place(&tensor, prefix, &entries, bytes.len());
        tensors.insert(name.clone(), entry.map_err(|reason| bad(format!("tensor {name} {reason}")))?);
    }
    let format = if salesforce { "Salesforce .pth" } else { "pytorch pickle" };
    Ok(Found { format: format.to_owned(), files: vec![file], tensors })
}

/// Where each stored entry's bytes are.
fn entries(archive: &mut ZipArchive<Cursor<&[u8]>>) -> zip::result::ZipResult<HashMap<String, Range<u64>>> {
    let mut all = HashMap::new();
    for i in 0..archive.len().min(ENTRIES_MAX) {
        // Raw: nothing is decompressed. Reading nothing makes the archive find where the data starts.
        let mut entry = archive.by_index_raw(i)?;
        entry.read_exact(&mut [])?;
        let name = entry.name()?.into_owned();
        let start = entry.data_start();
        if let (Some(start), CompressionMethod::Stored) = (start, entry.compression()) {
            all.insert(name, start..start.saturating_add(entry.size()));
        }
    }
    Ok(all)
}

fn slice<'a>(bytes: &'a [u8], range: &Range<u64>) -> Option<&'a [u8]> {
    bytes.get(usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?)
}

fn place(tensor: &Tensor, prefix: &str, entries: &HashMap<String, Range<u64>>, file: usize) -> Result<Entry, String> {
    let key = format!("{prefix}data/{}", tensor.storage.key);
    let stored = entries.get(&key).ok_or_else(|| format!("has no uncompressed data {key}: the file is cut"))?;
    let dtype = match tensor.storage.kind.as_str() {
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::Bf16,
        "DoubleStorage" => Dtype::F64,
        other => Dtype::Other(other.trim_end_matches("Storage").to_lowercase()),
    };
    let Some(size) = dtype.size() else {
        return Ok(Entry { shape: tensor.shape.clone(), dtype, file: 0, bytes: 0..0 });
    };
    if !contiguous(&tensor.shape, &tensor.strides) {
        let dtype = Dtype::Other("a strided view (save a contiguous copy)".to_owned());
        return Ok(Entry { shape: tensor.shape.clone(), dtype, file: 0, bytes: 0..0 });
    }
    let values = tensor.shape.iter().try_fold(1_u64, |all, n| all.checked_mul(*n as u64));
    let length = values.and_then(|v| v.checked_mul(size as u64));
    let start = (tensor.offset as u64).checked_mul(size as u64).and_then(|o| o.checked_add(stored.start));
    let end = start.zip(length).and_then(|(start, length)| start.checked_add(length));
    match (start, end) {
        (Some(start), Some(end)) if end <= stored.end && end <= file as u64 => {
            Ok(Entry { shape: tensor.shape.clone(), dtype, file: 0, bytes: start as usize..end as usize })
        }
        _ => Err(format!("of shape {:?} does not fit its data: the file is cut or damaged", tensor.shape)),
    }
}

/// Row-major without gaps; the stride of a dimension of one value means nothing.
fn contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1_usize;
    shape.len() == strides.len()
        && shape.iter().zip(strides).rev().all(|(size, stride)| {
            let fits = *size == 1 || *stride == expected;
            expected = expected.saturating_mul(*size);
            fits
        })
}
