//! What happens to a tile of sums on its way to the output: scales, bias, GELU, residual, while the tile is in L1.
//!
//! A tile is small, so everything here is one call a tile, and its loops run over whole registers.

use super::elementwise::gelu_of;
use super::memory::{Rectangle, floats};
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
    /// What the activations' zero adds to each column's sums.
    pub(super) shifts: &'a [i32],
}

/// `out = f(sums, bias, out)` for the rows of the output.
#[inline(always)]
fn each((sums, nr): (&[f32], usize), bias: &[f32], out: &mut Rectangle<'_>, f: impl Fn(f32, f32, f32) -> f32) {
    let (bias, bias_rest) = bias.as_chunks::<STEP>();
    for (row, sums) in sums.chunks_exact(nr).take(out.rows()).enumerate() {
        let (sums, sums_rest) = sums.as_chunks::<STEP>();
        let (out, out_rest) = out.row(row).as_chunks_mut::<STEP>();
        for ((sums, bias), out) in sums.iter().zip(bias).zip(out) {
            for i in 0..STEP {
                out[i] = f(sums[i], bias[i], out[i]);
            }
        }
        // Of the last panel's columns some may not exist; then no whole steps are left of the sums, or none of the output.
        let sums = sums.get(bias.len()).map_or(sums_rest, |sums| &sums[..]);
        for ((sum, bias), out) in sums.iter().zip(bias_rest).zip(out_rest) {
            *out = f(*sum, *bias, *out);
        }
    }
}

#[inline(always)]
fn finish_body<const F: bool>(
    (sums, nr): (&mut [u32], usize),
    worth: Option<Worth<'_>>,
    bias: &[f32],
    (epilogue, pass): (Epilogue, Pass),
    out: &mut Rectangle<'_>,
) {
    if let Some(worth) = worth {
        dequantize((sums, nr), worth);
    }
    let sums = (&*floats(sums), nr);
    match (epilogue, pass.first, pass.last) {
        (Epilogue::Gelu, true, true) => each(sums, bias, out, |sum, bias, _| gelu_of::<F>(sum + bias)),
        (Epilogue::Gelu, false, true) => each(sums, bias, out, |sum, _, out| gelu_of::<F>(out + sum)),
        (Epilogue::Store | Epilogue::Gelu, true, _) => each(sums, bias, out, |sum, bias, _| sum + bias),
        (Epilogue::Accumulate, true, _) => each(sums, bias, out, |sum, bias, out| out + (sum + bias)),
        (_, false, _) => each(sums, bias, out, |sum, _, out| out + sum),
    }
}

dispatch! {
    /// Brings a tile of sums to the output; they are of bytes where it is said what these are worth.
    pub(super) fn finish(
        sums: (&mut [u32], usize),
        worth: Option<Worth<'_>>,
        bias: &[f32],
        how: (Epilogue, Pass),
        out: &mut Rectangle<'_>,
    ) = finish_body
}

/// Makes f32 of sums of bytes, in their place.
#[inline(always)]
fn dequantize((sums, nr): (&mut [u32], usize), worth: Worth<'_>) {
    let Worth { rows, columns, shifts } = worth;
    for (sums, row) in sums.chunks_exact_mut(nr).zip(rows) {
        for ((sum, scale), shift) in sums.iter_mut().zip(columns).zip(shifts) {
            *sum = ((sum.cast_signed() - shift) as f32 * (row.scale * scale)).to_bits();
        }
    }
}
