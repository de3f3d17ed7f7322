//! Operands as the words of the matrix kernel: rows of activations when a product takes them, weights once at load.
//!
//! bf16 rounds to nearest, ties to even. Bytes: a weight is `scale[column] * i8`, each column by its largest weight; an
//! activation is `scale[row] * (u8 - 128)`, each row by its largest value, for the instructions multiply u8 by i8.

use rayon::prelude::*;

use super::bf16::{self, bf16};
use super::gemm::KC;
use super::memory::{Aligned, floats};
use super::simd::{Isa, dispatch};
use super::tile::{Format, Tile};
use crate::Error;

/// The largest quantised activation, of either sign; of weights see [`Tile::weight_steps`].
const ACTIVATION_STEPS: f32 = 127.0;
/// What is added to an activation's steps, so that they are no less than 0.
const ACTIVATION_ZERO: i32 = 128;
/// 1.5 * 2^23 + 128: adding it rounds to an integer, whose sum with 128 then stands in the low byte.
const ROUND_TO_BYTE: f32 = 12_583_040.0;

#[inline(always)]
fn wide_bf16_words_body<const F: bool>(x: &[f32], out: &mut [u32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out = bf16(*x) << 16);
}

dispatch! {
    /// bf16 as the f32 that they are.
    fn wide_bf16_words(x: &[f32], out: &mut [u32]) = wide_bf16_words_body
}

#[inline(always)]
fn widen_body<const F: bool>(panel: &[u32], nr: usize, out: &mut [u32]) {
    for (words, rows) in panel.chunks_exact(nr).zip(out.chunks_exact_mut(2 * nr)) {
        let (low, high) = rows.split_at_mut(nr);
        for ((word, low), high) in words.iter().zip(low).zip(high) {
            (*low, *high) = (word << 16, word & 0xffff_0000);
        }
    }
}

dispatch! {
    /// A panel of pairs of bf16 as one of f32.
    fn widen(panel: &[u32], nr: usize, out: &mut [u32]) = widen_body
}

#[inline(always)]
fn byte_words_body<const F: bool>(x: &[f32], steps: f32, out: &mut [u32]) {
    let byte = |x: f32| (x * steps + ROUND_TO_BYTE).to_bits() & 0xff;
    let (fours, rest) = x.as_chunks::<4>();
    for (out, [a, b, c, d]) in out.iter_mut().zip(fours) {
        *out = byte(*a) | byte(*b) << 8 | byte(*c) << 16 | byte(*d) << 24;
    }
    if let Some(out) = out.get_mut(fours.len()).filter(|_| !rest.is_empty()) {
        *out = rest.iter().rev().fold(0, |word, x| word << 8 | byte(*x));
    }
}

dispatch! {
    /// Fours of bytes, `x * steps + 128` each; what is missing to the last four meets weights of 0.
    fn byte_words(x: &[f32], steps: f32, out: &mut [u32]) = byte_words_body
}

#[inline(always)]
fn largest_body<const F: bool>(x: &[f32]) -> u32 {
    // As integers: so that what is no number is larger than all that are.
    x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff))
}

dispatch! {
    /// The bits of the largest magnitude.
    fn largest(x: &[f32]) -> u32 = largest_body
}

/// The scale of a row or column, and the steps of a unit; NaN where a value is not finite, so that the product is, too.
fn scale(isa: Isa, x: &[f32], steps: f32) -> (f32, f32) {
    match f32::from_bits(largest(isa, x)) {
        0.0 => (0.0, 0.0),
        // Its steps would be infinite: it is as good as 0.
        tiny if tiny < steps / f32::MAX => (0.0, 0.0),
        most if most.is_finite() => (most / steps, steps / most),
        _ => (f32::NAN, 0.0),
    }
}

/// How a row of activations becomes words.
#[derive(Clone, Copy)]
pub(super) struct Row {
    format: Format,
    /// What a unit of the sums is worth.
    pub(super) scale: f32,
    steps: f32,
}

impl Row {
    /// Looks at the whole row, where that is needed.
    pub(super) fn new(isa: Isa, tile: &Tile, row: &[f32]) -> Self {
        let format = tile.format;
        let (scale, steps) = if format == Format::Int8 { scale(isa, row, ACTIVATION_STEPS) } else { (1.0, 1.0) };
        Self { format, scale, steps }
    }

    /// Its words.
    pub(super) fn words(&self, isa: Isa, part: &[f32], out: &mut [u32]) {
        assert_eq!(out.len(), self.format.words(part.len()));
        match self.format {
            Format::F32 => floats(out).copy_from_slice(part),
            Format::Bf16 => bf16::words(isa, part, out),
            Format::WideBf16 => wide_bf16_words(isa, part, out),
            Format::Int8 => byte_words(isa, part, self.steps, out),
        }
    }
}

/// A copy of a register or two, without the call that one of unknown size takes.
fn copy_lanes(from: &[f32], to: &mut [f32]) {
    match (<&[f32; 16]>::try_from(from), <&mut [f32; 16]>::try_from(&mut *to)) {
        (Ok(from), Ok(to)) => *to = *from,
        _ => to.copy_from_slice(from),
    }
}

/// Rows that follow each other along K, as the words of a panel: f32, or pairs of bf16.
pub(super) fn columns<'a>(isa: Isa, format: Format, mut rows: impl Iterator<Item = &'a [f32]>, out: &mut [u32]) {
    let first = rows.next().expect("a word has a value");
    match (format, rows.next()) {
        (Format::F32, None) => copy_lanes(first, floats(out)),
        (Format::Bf16, Some(second)) => bf16::columns(isa, first, second, out),
        (Format::Bf16, None) => first.iter().zip(out).for_each(|(value, out)| *out = bf16(*value)),
        _ => unreachable!("attention has no words of {format:?}, or the word has not as many values as its group"),
    }
}

/// A linear layer's weight in panels `[outputs / NR][words][NR]`, filled up with zeros, and its bias.
pub struct Packed {
    pub(super) tile: Tile,
    /// Of the panels: bf16 is stored as such, whatever the tile takes.
    stored: Format,
    panels: Aligned<u32>,
    pub(super) bias: Vec<f32>,
    /// Of bytes: what a unit of each column's sums is worth, and for each pass over K what the activations' zero adds to the sums.
    pub(super) scales: Vec<f32>,
    shifts: Vec<i32>,
    /// Columns of x.
    pub inputs: usize,
    /// Columns of the output.
    pub outputs: usize,
}

impl Packed {
    /// Packs `weight [outputs, inputs]`. Errors: no memory.
    pub(super) fn new(isa: Isa, format: Format, weight: &[f32], bias: &[f32], inputs: usize) -> Result<Self, Error> {
        let (tile, outputs) = (Tile::new(isa, format), bias.len());
        assert_eq!(weight.len(), outputs * inputs, "weight of {outputs} x {inputs}");
        let (nr, words) = (tile.nr, format.words(inputs));
        let mut panels = Aligned::zeroed(outputs.div_ceil(nr) * words * nr)?;
        let columns: Vec<(f32, f32)> = match format {
            Format::Int8 => weight.par_chunks(inputs).map(|column| scale(isa, column, tile.weight_steps)).collect(),
            Format::F32 | Format::Bf16 => Vec::new(),
            Format::WideBf16 => unreachable!("it is stored as bf16"),
        };
        panels.par_chunks_mut(words * nr).enumerate().for_each(|(p, panel)| {
            for (lane, row) in weight[p * nr * inputs..].chunks(inputs).take(nr).enumerate() {
                let steps = columns.get(p * nr + lane).map_or(1.0, |(_, steps)| *steps);
                for (k, values) in row.chunks(format.group()).enumerate() {
                    panel[k * nr + lane] = word(format, values, steps);
                }
            }
        });
        let shift = |pass: usize, (column, (_, steps)): (&[f32], &(f32, f32))| -> i32 {
            let part = column.chunks(KC * format.group()).nth(pass).unwrap_or_default();
            part.iter().map(|x| ACTIVATION_ZERO * i32::from(step(*x, *steps))).sum()
        };
        let of_pass = |pass| weight.chunks(inputs).zip(&columns).map(move |column| shift(pass, column));
        let shifts = (0..words.div_ceil(KC)).flat_map(of_pass).collect();
        let scales = columns.iter().map(|(scale, _)| *scale).collect();
        Ok(Self { tile, stored: format, panels, bias: bias.to_vec(), scales, shifts, inputs, outputs })
    }

    /// These words of a panel, as it is stored.
    pub(super) fn stored(&self, p: usize, words: std::ops::Range<usize>) -> &[u32] {
        let (start, shared) = (p * self.stored.words(self.inputs), self.stored.group() / self.tile.format.group());
        let words = start + words.start / shared..start + words.end.div_ceil(shared);
        &self.panels[words.start * self.tile.nr..words.end * self.tile.nr]
    }

    /// These words of a panel, as the tile takes them: in `room` where they are stored otherwise.
    pub(super) fn panel<'a>(
        &'a self,
        isa: Isa,
        p: usize,
        words: std::ops::Range<usize>,
        room: &'a mut [u32],
    ) -> &'a [u32] {
        let stored = self.stored(p, words);
        if self.stored == self.tile.format {
            return stored;
        }
        widen(isa, stored, self.tile.nr, room);
        room
    }

    /// Words that [`Self::panel`] needs room for.
    pub(super) fn room(&self) -> usize {
        if self.stored == self.tile.format { 0 } else { KC * self.tile.nr }
    }

    /// All panels, one after the other, of a format that is stored as the tile takes it.
    pub(super) fn all(&self) -> &[u32] {
        assert!(self.stored == self.tile.format);
        &self.panels
    }

    /// What the activations' zero adds to the sums of these columns in the pass that begins at a word.
    pub(super) fn shifts(&self, word: usize, columns: std::ops::Range<usize>) -> &[i32] {
        &self.shifts[word / KC * self.outputs..][columns]
    }

    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(self.tile.nr)
    }
}

fn step(x: f32, steps: f32) -> i8 {
    // Between -127 and 127 by the choice of the steps; what is no number is told by the scale.
    (x * steps).round_ties_even() as i8
}

fn word(format: Format, values: &[f32], steps: f32) -> u32 {
    let bits = |x: &f32| match format {
        Format::F32 => x.to_bits(),
        Format::Bf16 => bf16(*x),
        Format::WideBf16 => unreachable!("it is stored as bf16"),
        Format::Int8 => u32::from(step(*x, steps).cast_unsigned()),
    };
    let width = u32::BITS / format.group() as u32;
    values.iter().rev().fold(0, |word, x| word.checked_shl(width).unwrap_or_default() | bits(x))
}
