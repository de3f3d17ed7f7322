//! What happens to sums on their way to the output: scales, bias, GELU, residual, while they are in L1.
//!
//! A tile is small, so everything here is one call for some of them, and its loops run over whole registers.

use super::elementwise::gelu_of;
use super::memory::Rectangle;
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

/// Sums as numbers.
trait Value: Copy {
    /// The sums of a row from the column `step * STEP` on.
    fn step(self, row: usize, step: usize, sums: &[u32; STEP]) -> [f32; STEP];
    /// The sum of a column.
    fn one(self, row: usize, column: usize, sum: u32) -> f32;
}

#[derive(Clone, Copy)]
struct Floats;

impl Value for Floats {
    #[inline(always)]
    fn step(self, _: usize, _: usize, sums: &[u32; STEP]) -> [f32; STEP] {
        sums.map(f32::from_bits)
    }

    #[inline(always)]
    fn one(self, _: usize, _: usize, sum: u32) -> f32 {
        f32::from_bits(sum)
    }
}

impl Value for Worth<'_> {
    #[inline(always)]
    fn step(self, row: usize, step: usize, sums: &[u32; STEP]) -> [f32; STEP] {
        let (columns, shifts) = (&self.columns.as_chunks::<STEP>().0[step], &self.shifts.as_chunks::<STEP>().0[step]);
        let scale = self.rows[row].scale;
        std::array::from_fn(|i| (sums[i].cast_signed().wrapping_sub(shifts[i])) as f32 * (scale * columns[i]))
    }

    #[inline(always)]
    fn one(self, row: usize, column: usize, sum: u32) -> f32 {
        (sum.cast_signed().wrapping_sub(self.shifts[column])) as f32 * (self.rows[row].scale * self.columns[column])
    }
}

/// `out = f(sum, bias, out)` for the rows of the output.
#[inline(always)]
fn each(
    (sums, nr): (&[u32], usize),
    value: impl Value,
    bias: &[f32],
    out: &mut Rectangle<'_>,
    f: impl Fn(f32, f32, f32) -> f32,
) {
    let (steps, bias_rest) = bias.as_chunks::<STEP>();
    for (row, sums) in sums.chunks_exact(nr).take(out.rows()).enumerate() {
        let (out, out_rest) = out.row(row).as_chunks_mut::<STEP>();
        for (step, ((sums, bias), out)) in sums.as_chunks::<STEP>().0.iter().zip(steps).zip(out).enumerate() {
            // All is read before anything is written: the compiler need not wonder whether one is the other.
            let (values, bias, mut results) = (value.step(row, step, sums), *bias, *out);
            for i in 0..STEP {
                results[i] = f(values[i], bias[i], results[i]);
            }
            *out = results;
        }
        // Of the last panel's columns some may not exist.
        let done = steps.len() * STEP;
        for (i, ((sum, bias), out)) in sums[done..].iter().zip(bias_rest).zip(out_rest).enumerate() {
            *out = f(value.one(row, done + i, *sum), *bias, *out);
        }
    }
}

#[inline(always)]
fn finish_of<const F: bool>(
    sums: (&[u32], usize),
    value: impl Value,
    bias: &[f32],
    (epilogue, pass): (Epilogue, Pass),
    out: &mut Rectangle<'_>,
) {
    match (epilogue, pass.first, pass.last) {
        (Epilogue::Gelu, true, true) => each(sums, value, bias, out, |sum, bias, _| gelu_of::<F>(sum + bias)),
        (Epilogue::Gelu, false, true) => each(sums, value, bias, out, |sum, _, out| gelu_of::<F>(out + sum)),
        (Epilogue::Store | Epilogue::Gelu, true, _) => each(sums, value, bias, out, |sum, bias, _| sum + bias),
        (Epilogue::Accumulate, true, _) => each(sums, value, bias, out, |sum, bias, out| out + (sum + bias)),
        (_, false, _) => each(sums, value, bias, out, |sum, _, out| out + sum),
    }
}

#[inline(always)]
fn finish_body<const F: bool>(
    sums: (&[u32], usize),
    worth: Option<Worth<'_>>,
    bias: &[f32],
    how: (Epilogue, Pass),
    out: &mut Rectangle<'_>,
) {
    match worth {
        Some(worth) => finish_of::<F>(sums, worth, bias, how, out),
        None => finish_of::<F>(sums, Floats, bias, how, out),
    }
}

dispatch! {
    /// Brings rows of a panel's sums to the output; they are of bytes where it is said what these are worth.
    pub(super) fn finish(
        sums: (&[u32], usize),
        worth: Option<Worth<'_>>,
        bias: &[f32],
        how: (Epilogue, Pass),
        out: &mut Rectangle<'_>,
    ) = finish_body
}
