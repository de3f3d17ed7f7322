//! What happens to a tile of sums on its way to the output: scales, bias, GELU, residual, while the tile is in L1.
//!
//! A tile is small, so everything here is one call a tile, and its loops run over whole registers.

use super::elementwise::gelu_of;
use super::pack::Row;
use super::simd::dispatch;
use crate::backend::Epilogue;

/// Values of a loop's step: one or two registers.
const STEP: usize = 16;

/// Which of the passes over K this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pass {
    /// The bias comes with it.
    pub(super) first: bool,
    /// The activation comes after it.
    pub(super) last: bool,
}

/// What sums of bytes are worth.
#[derive(Clone, Copy)]
pub(super) struct Worth<'a> {
    /// Of each row.
    pub(super) rows: &'a [Row],
    /// Of each column.
    pub(super) columns: &'a [f32],
    /// What the activations' zero adds to each column's sums; empty where it was taken off before.
    pub(super) shifts: &'a [i32],
}

/// `out[i] = f(sums[i], bias[i], out[i])`
#[inline(always)]
fn each(sums: &[f32], bias: &[f32], out: &mut [f32], f: impl Fn(f32, f32, f32) -> f32) {
    let ((sums, sums_rest), (bias, bias_rest)) = (sums.as_chunks::<STEP>(), bias.as_chunks::<STEP>());
    let (out, out_rest) = out.as_chunks_mut::<STEP>();
    for ((sums, bias), out) in sums.iter().zip(bias).zip(out) {
        for i in 0..STEP {
            out[i] = f(sums[i], bias[i], out[i]);
        }
    }
    for ((sum, bias), out) in sums_rest.iter().zip(bias_rest).zip(out_rest) {
        *out = f(*sum, *bias, *out);
    }
}

#[inline(always)]
fn finish_body<const F: bool>(
    (sums, nr): (&[f32], usize),
    bias: &[f32],
    (epilogue, pass): (Epilogue, Pass),
    out: &mut [&mut [f32]],
) {
    for (sums, out) in sums.chunks_exact(nr).zip(out) {
        let sums = &sums[..out.len()];
        match (epilogue, pass.first, pass.last) {
            (Epilogue::Gelu, true, true) => each(sums, bias, out, |sum, bias, _| gelu_of::<F>(sum + bias)),
            (Epilogue::Gelu, false, true) => each(sums, bias, out, |sum, _, out| gelu_of::<F>(out + sum)),
            (Epilogue::Store | Epilogue::Gelu, true, _) => each(sums, bias, out, |sum, bias, _| sum + bias),
            (Epilogue::Accumulate, true, _) => each(sums, bias, out, |sum, bias, out| out + (sum + bias)),
            (_, false, _) => each(sums, bias, out, |sum, _, out| out + sum),
        }
    }
}

dispatch! {
    /// Adds the rows of a tile to those of the output.
    pub(super) fn finish(sums: (&[f32], usize), bias: &[f32], how: (Epilogue, Pass), out: &mut [&mut [f32]]) = finish_body
}

#[inline(always)]
fn dequantize_body<const F: bool>(sums: &mut [u32], nr: usize, worth: Worth<'_>) {
    let Worth { rows, columns, shifts } = worth;
    for (sums, row) in sums.chunks_exact_mut(nr).zip(rows) {
        let shifted = sums.iter_mut().zip(columns);
        if shifts.is_empty() {
            shifted.for_each(|(sum, scale)| *sum = (sum.cast_signed() as f32 * (row.scale * scale)).to_bits());
        } else {
            for ((sum, scale), shift) in shifted.zip(shifts) {
                *sum = ((sum.cast_signed() - shift) as f32 * (row.scale * scale)).to_bits();
            }
        }
    }
}

dispatch! {
    /// Makes f32 of sums of bytes, in their place.
    pub(super) fn dequantize(sums: &mut [u32], nr: usize, worth: Worth<'_>) = dequantize_body
}
