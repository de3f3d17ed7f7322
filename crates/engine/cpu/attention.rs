//! Scaled dot-product attention, one (span, head) at a time, without ever storing the scores of a whole head.
//!
//! A task packs its head's keys (transposed) and values into the panels of the matrix kernel, then walks the queries in
//! blocks of [`Q_ROWS`]: scores of the block against all keys, softmax, product with the values. All of it stays in L2:
//! with 577 keys of size 64 that is 164 + 148 + 64 kB in f32. Scores, softmax and sums are f32 whatever the operands are.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::elementwise::{scale, softmax_unscaled};
use super::memory::{Aligned, LINE, Rectangle, Shared, floats, own};
use super::pack::{Row, columns};
use super::simd::{Isa, prefetch};
use super::tile::{Format, Tile};
use crate::Error;
use crate::backend::Span;

/// Query rows of a block: a multiple of every tile's rows.
const Q_ROWS: usize = 24;
/// Rows from the one that is read to the one that is asked for.
const AHEAD: usize = 8;

/// Room for the scores of a block of query rows.
pub(super) struct Block {
    tile: Tile,
    scores: Aligned<u32>,
    /// Scores after the softmax, where they are no f32.
    weights: Aligned<u32>,
    totals: Vec<f32>,
}

impl Block {
    /// Room for `rows` query rows, a multiple of the tile's, and `keys_max` keys. Errors: no memory.
    pub(super) fn new(tile: Tile, rows: usize, keys_max: usize) -> Result<Self, Error> {
        let (format, keys) = (tile.format, keys_max.next_multiple_of(tile.nr));
        assert!(matches!(format, Format::F32 | Format::Bf16), "attention's operands are no {format:?}");
        let weights = if format == Format::F32 { 0 } else { rows * format.words(keys) };
        let (scores, weights) = (Aligned::zeroed(rows * keys)?, Aligned::zeroed(weights)?);
        Ok(Self { tile, scores, weights, totals: vec![0.0; rows] })
    }

    /// `out = e^(factor (q kᵀ - max)) v` for `rows` rows of queries, which come with their stride; keys and values are panels. Returns
    /// what each row is to be divided by.
    pub(super) fn attend(
        &mut self,
        isa: Isa,
        factor: f32,
        (queries, stride, rows): (&[u32], usize, usize),
        (keys, values, count): (&[u32], &[u32], usize),
        (out, out_stride): (&mut [u32], usize),
    ) -> &[f32] {
        let Self { tile, scores, weights, totals } = self;
        let (format, how) = (tile.format, Row::new(isa, tile, &[]));
        let (padded, words) = (count.next_multiple_of(tile.nr), format.words(count));
        tile.run_all(stride, (queries, stride, rows), keys, (scores, padded));
        for (i, (total, scores)) in totals.iter_mut().zip(scores.chunks_exact_mut(padded)).take(rows).enumerate() {
            let scores = floats(scores);
            // What fills up the last panel: so the softmax has whole registers.
            scores[count..].fill(f32::NEG_INFINITY);
            *total = softmax_unscaled(isa, scores, factor);
            if format != Format::F32 {
                how.words(isa, &scores[..count], &mut weights[i * words..][..words]);
            }
        }
        let (weights, stride): (&[u32], _) = if format == Format::F32 { (scores, padded) } else { (weights, words) };
        tile.run_all(words, (weights, stride, rows), values, (out, out_stride));
        totals
    }
}

/// Per-thread room for one head's keys and values and one block of queries and scores.
pub(super) struct Head {
    tile: Tile,
    queries: Aligned<u32>,
    keys: Aligned<u32>,
    values: Aligned<u32>,
    block: Block,
    sums: Aligned<u32>,
}

impl Head {
    /// Room for spans of at most `keys_max` keys and heads of at most `size_max` values. Errors: no memory.
    pub(super) fn new(isa: Isa, format: Format, keys_max: usize, size_max: usize) -> Result<Self, Error> {
        let tile = Tile::new(isa, format);
        let format = tile.format;
        let (keys, size) = (keys_max.next_multiple_of(tile.nr), size_max.next_multiple_of(tile.nr));
        Ok(Self {
            tile,
            queries: Aligned::zeroed(Q_ROWS * format.words(size_max))?,
            keys: Aligned::zeroed(keys * format.words(size_max))?,
            values: Aligned::zeroed(format.words(keys_max) * size)?,
            block: Block::new(tile, Q_ROWS, keys_max)?,
            sums: Aligned::zeroed(Q_ROWS * size)?,
        })
    }
}

/// A block of columns of a row-major matrix.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    /// The matrix, from its first row on.
    pub data: &'a [f32],
    /// Its columns.
    pub stride: usize,
    /// First column of the block.
    pub first: usize,
}

impl<'a> Strided<'a> {
    /// From this row and this column of the block on.
    pub(super) fn from(self, row: usize, first: usize) -> Self {
        Self { data: &self.data[row * self.stride..], first: self.first + first, ..self }
    }

    /// `size` columns from column `first` of the block on.
    pub(super) fn row(&self, row: usize, first: usize, size: usize) -> &'a [f32] {
        &self.data[row * self.stride + self.first + first..][..size]
    }

    /// The same of several rows. Those that follow are asked for: no processor foresees rows that lie a page or more apart.
    fn rows(self, rows: Range<usize>, first: usize, size: usize) -> impl Iterator<Item = &'a [f32]> {
        rows.map(move |row| {
            let values = self.row(row, first, size);
            let ahead = values.as_ptr().wrapping_add(AHEAD * self.stride);
            (0..size).step_by(LINE / size_of::<f32>()).for_each(|i| prefetch::<false, _>(ahead.wrapping_add(i)));
            values
        })
    }
}

/// `out = softmax(q kᵀ / √size) v` for each span and head. `scratch` has one entry per thread of the current pool.
pub(super) fn attention(
    isa: Isa,
    scratch: &[Mutex<Head>],
    [q, k, v]: [Strided<'_>; 3],
    spans: &[Span],
    heads: usize,
    out: &Shared<'_>,
) {
    assert_eq!(out.cols() % heads, 0, "{} columns in {heads} heads", out.cols());
    assert_disjoint(spans);
    (0..spans.len() * heads).into_par_iter().with_max_len(1).for_each(|i| {
        one_head(isa, &mut own(scratch), [q, k, v], &spans[i / heads], i % heads, out, out.cols() / heads);
    });
}

/// What lets tasks of different spans write at the same time.
pub(super) fn assert_disjoint(spans: &[Span]) {
    let disjoint = spans.windows(2).all(|w| w[0].q + w[0].q_len <= w[1].q);
    assert!(disjoint, "spans are sorted by query row and do not overlap");
}

fn one_head(
    isa: Isa,
    room: &mut Head,
    [q, k, v]: [Strided<'_>; 3],
    span: &Span,
    head: usize,
    out: &Shared<'_>,
    size: usize,
) {
    let Head { tile, queries, keys, values, block, sums } = room;
    let (words, stride) = (tile.format.words(size), size.next_multiple_of(tile.nr));
    let how = Row::new(isa, tile, &[]);
    let kv = [k, v].map(|of| of.from(span.kv, head * size));
    let (keys, values) = pack(isa, tile, kv, (span.kv_len, size), (keys, values), queries);
    let factor = 1.0 / (size as f32).sqrt();
    for first in (0..span.q_len).step_by(Q_ROWS) {
        let rows = Q_ROWS.min(span.q_len - first);
        let of_block = q.rows(span.q + first..span.q + first + rows, head * size, size);
        of_block.zip(queries.chunks_exact_mut(words)).for_each(|(row, words)| how.words(isa, row, words));
        let cols = head * size..(head + 1) * size;
        // SAFETY: these columns of these rows belong to this task alone: (span, head) pairs are different for all tasks, and
        // spans do not overlap in their query rows.
        let mut out = unsafe { Rectangle::new(out, span.q + first..span.q + first + rows, cols) };
        out.prefetch(0..rows);
        let totals = block.attend(isa, factor, (queries, words, rows), (keys, values, span.kv_len), (sums, stride));
        for (i, (sums, total)) in floats(sums).chunks_exact(stride).zip(totals).take(rows).enumerate() {
            scale(isa, &sums[..size], 1.0 / total, out.row(i));
        }
    }
}

/// The first `count` rows, `size` columns of each: keys into panels `[count / nr][words of size][nr]`, values into
/// `[size / nr][words of count][nr]`; what pads them is zero. Returns as much of the rooms as was written; `words` has room for a row.
pub(super) fn pack<'a>(
    isa: Isa,
    tile: &Tile,
    [k, v]: [Strided<'_>; 2],
    (count, size): (usize, usize),
    (keys, values): (&'a mut [u32], &'a mut [u32]),
    words: &mut [u32],
) -> (&'a [u32], &'a [u32]) {
    let (format, nr, group) = (tile.format, tile.nr, tile.format.group());
    let (size_words, count_words) = (format.words(size), format.words(count));
    let keys = &mut keys[..count.div_ceil(nr) * size_words * nr];
    let values = &mut values[..size.div_ceil(nr) * count_words * nr];
    let (how, words) = (Row::new(isa, tile, &[]), &mut words[..size_words]);
    for (p, panel) in keys.chunks_exact_mut(size_words * nr).enumerate() {
        let lanes = nr.min(count - p * nr);
        if lanes < nr {
            panel.fill(0);
        }
        for (lane, row) in k.rows(p * nr..p * nr + lanes, 0, size).enumerate() {
            how.words(isa, row, words);
            words.iter().zip(panel.chunks_exact_mut(nr)).for_each(|(word, lanes)| lanes[lane] = *word);
        }
    }
    for (p, panel) in values.chunks_exact_mut(count_words * nr).enumerate() {
        let cols = nr.min(size - p * nr);
        let mut rows = v.rows(0..count, p * nr, cols);
        for lanes in panel.chunks_exact_mut(nr) {
            columns(isa, format, rows.by_ref().take(group), &mut lanes[..cols]);
            lanes[cols..].fill(0);
        }
    }
    (keys, values)
}
