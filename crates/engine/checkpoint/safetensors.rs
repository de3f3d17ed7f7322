//! safetensors files: the header says where each tensor is.

use std::collections::BTreeMap;

use safetensors::{Dtype as Stored, SafeTensors};

use super::tensors::{Bytes, Dtype, Entry};
use crate::Error;

/// The tensors of a file, which is file number `number` of the checkpoint.
pub(super) fn read(file: &Bytes, number: usize) -> Result<BTreeMap<String, Entry>, Error> {
    let bytes = file.get();
    let parsed = SafeTensors::deserialize(bytes).map_err(|source| Error::Safetensors { path: file.path(), source })?;
    let entry = |(name, tensor): (String, safetensors::tensor::TensorView<'_>)| {
        let start = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let bytes = start..start + tensor.data().len();
        (name, Entry { shape: tensor.shape().to_vec(), dtype: dtype(tensor.dtype()), file: number, bytes })
    };
    Ok(parsed.tensors().into_iter().map(entry).collect())
}

fn dtype(stored: Stored) -> Dtype {
    match stored {
        Stored::F32 => Dtype::F32,
        Stored::F16 => Dtype::F16,
        Stored::BF16 => Dtype::Bf16,
        Stored::F64 => Dtype::F64,
        other => Dtype::Other(format!("{other:?}").to_lowercase()),
    }
}
