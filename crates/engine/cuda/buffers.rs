//! What lies on the device: activations, tables, weights. Rows begin 16-byte aligned; what is behind a row's columns, up
//! to its stride, is padding.

use super::device::{Device, Element};
use super::kernels::{Matrix, NormParameters};
use crate::Error;

/// Values a row's stride is a multiple of: 16 bytes at 16 bits.
pub(super) const STRIDE: usize = 8;

/// A matrix of activations or table rows.
pub struct Buffer<M> {
    pub(super) memory: M,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) ld: usize,
    pub(super) element: Element,
}

/// A linear layer: weight `[outputs, inputs]` in the precision's element, bias in that and in f32.
pub struct Linear<M> {
    pub(super) weight: M,
    pub(super) bias: M,
    pub(super) bias_f32: M,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) ld: usize,
}

/// A layer norm's parameters, in f32.
pub struct Norm<M> {
    pub(super) gain: M,
    pub(super) bias: M,
    pub(super) cols: usize,
    pub(super) eps: f32,
}

impl<M> Buffer<M> {
    /// A matrix with nothing in it. Errors: no memory.
    pub(super) fn new<D: Device<Memory = M>>(
        device: &D,
        rows: usize,
        cols: usize,
        element: Element,
    ) -> Result<Self, Error> {
        let ld = cols.next_multiple_of(STRIDE);
        let memory = device.alloc(rows * ld * element.bytes())?;
        Ok(Self { memory, rows, cols, ld, element })
    }
}

/// `data [rows, cols]` at the start of `to`, rows padded to `ld`.
pub(super) fn fill<D: Device>(
    device: &D,
    to: &D::Memory,
    data: &[f32],
    (cols, ld): (usize, usize),
    element: Element,
) -> Result<(), Error> {
    let mut bytes = Vec::with_capacity(data.len() / cols * ld * element.bytes());
    for row in data.chunks_exact(cols) {
        element.encode(row, &mut bytes);
        bytes.resize(bytes.len() + (ld - cols) * element.bytes(), 0);
    }
    device.upload(&bytes, D::address(to))
}

/// A vector, padded to a multiple of [`STRIDE`].
pub(super) fn vector<D: Device>(device: &D, data: &[f32], element: Element) -> Result<D::Memory, Error> {
    let ld = data.len().next_multiple_of(STRIDE);
    let memory = device.alloc(ld * element.bytes())?;
    fill(device, &memory, data, (data.len(), ld), element)?;
    Ok(memory)
}

pub(super) fn matrix<D: Device>(buffer: &Buffer<D::Memory>) -> Matrix {
    let Buffer { memory, rows, cols, ld, element } = buffer;
    Matrix { at: D::address(memory), rows: *rows, cols: *cols, ld: *ld, element: *element }
}

pub(super) fn parameters<D: Device>(norm: &Norm<D::Memory>) -> NormParameters {
    NormParameters { gain: D::address(&norm.gain), bias: D::address(&norm.bias), cols: norm.cols, eps: norm.eps }
}
