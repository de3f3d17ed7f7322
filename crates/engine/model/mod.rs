//! The network, written once over [`Backend`]: image encoder, text encoder, the two heads.
//!
//! Equations and their sources: the BLIP paper (arXiv 2201.12086) and transformers' `BlipForImageTextRetrieval`, whose
//! float32 results are the reference.

mod bert;
mod chunk;
mod itm;
mod vit;

pub use self::itm::Model;

use crate::Error;
use crate::backend::{Backend, Care};
use crate::checkpoint::Checkpoint;

/// A place in the network whose value tests compare with the reference. Rows are what the buffer holds there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tap {
    /// Patch projections before positions are added, `[B * patches, V]`.
    Patches,
    /// Class row and patches with positions, `[B * N, V]`.
    ImageEmbeddings,
    /// Residual stream after an image layer.
    ImageBlock(usize),
    /// After the final norm.
    ImageEmbeds,
    /// Normed text embeddings, `[R, T]`: the ITM rows, then the cosine rows.
    TextEmbeddings,
    /// After a text layer.
    TextBlock(usize),
}

/// Receives values at taps; `None` costs a branch.
pub type Observer<'a> = Option<&'a mut (dyn FnMut(Tap, Vec<f32>) + Send)>;

fn observe<B: Backend>(
    observer: &mut Observer<'_>,
    backend: &mut B,
    tap: Tap,
    buf: &B::Buf,
    values: usize,
) -> Result<(), Error> {
    if let Some(receive) = observer {
        let mut data = vec![0.0; values];
        backend.read(buf, &mut data)?;
        receive(tap, data);
    }
    Ok(())
}

/// Reads weights by their transformers names.
struct Loader<'a, B> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
}

impl<B: Backend> Loader<'_, B> {
    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        self.checkpoint.read_f32(name, shape)
    }

    /// The linear layer `name.{weight,bias}`.
    fn linear(&self, care: Care, name: &str, outputs: usize, inputs: usize) -> Result<B::Linear, Error> {
        self.fused(care, &[name], outputs, inputs)
    }

    /// Several linear layers over the same input as one: their outputs side by side.
    fn fused(&self, care: Care, names: &[&str], outputs: usize, inputs: usize) -> Result<B::Linear, Error> {
        let (weight, bias) = self.side_by_side(names, outputs, inputs)?;
        self.backend.careful_weights(care, &weight, &bias, inputs)
    }

    /// Weights and biases of these layers, one after the other.
    fn side_by_side(&self, names: &[&str], outputs: usize, inputs: usize) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            weight.append(&mut self.read(&format!("{name}.weight"), &[outputs, inputs])?);
            bias.append(&mut self.read(&format!("{name}.bias"), &[outputs])?);
        }
        Ok((weight, bias))
    }

    fn norm(&self, name: &str, cols: usize, eps: f32) -> Result<B::Norm, Error> {
        let gain = self.read(&format!("{name}.weight"), &[cols])?;
        let bias = self.read(&format!("{name}.bias"), &[cols])?;
        self.backend.norm_weights(&gain, &bias, eps)
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<B::Buf, Error> {
        self.backend.upload(rows, cols, &self.read(name, &[rows, cols])?)
    }
}
