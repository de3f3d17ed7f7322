//! Scaled dot-product attention, one (span, head) at a time, without ever storing the scores of a whole head.
//!
//! A task packs its head's keys (transposed) and values into the panels of the matrix kernel, then walks the queries in
//! blocks of [`Q_ROWS`]: scores of the block against all keys, softmax, product with the values. All of it stays in L2:
//! with 577 keys of size 64 that is 164 + 148 + 64 kB in f32. Scores, softmax and sums are f32 whatever the operands are.

use std::sync::Mutex;

use rayon::prelude::*;

use super::elementwise::{scale, softmax_unscaled};
use super::memory::{Aligned, floats};
use super::pack::{Row, columns};
use super::simd::Isa;
use super::tile::{Format, TILE_MAX, Tile};
use crate::Error;
use crate::backend::Span;

/// Query rows of a block: a multiple of every tile's rows.
const Q_ROWS: usize = 24;

/// Per-thread room for one head's keys and values and one block of queries and scores.
pub(super) struct Head {
    tile: Tile,
    /// A query as f32.
    row: Aligned,
    queries: Aligned<u32>,
    keys: Aligned<u32>,
    values: Aligned<u32>,
    scores: Aligned<u32>,
    /// Scores after the softmax, where they are no f32.
    weights: Aligned<u32>,
}

impl Head {
    /// Room for spans of at most `keys_max` keys and heads of at most `size_max` values. Errors: no memory.
    pub(super) fn new(isa: Isa, format: Format, keys_max: usize, size_max: usize) -> Result<Self, Error> {
        assert!(format != Format::Int8, "the softmax's weights are no bytes");
        let tile = Tile::new(isa, format);
        let (keys, size) = (keys_max.next_multiple_of(tile.nr), size_max.next_multiple_of(tile.nr));
        let weights = if format == Format::F32 { 0 } else { Q_ROWS * format.words(keys) };
        Ok(Self {
            tile,
            row: Aligned::zeroed(size_max)?,
            queries: Aligned::zeroed(Q_ROWS * format.words(size_max))?,
            keys: Aligned::zeroed(keys * format.words(size_max))?,
            values: Aligned::zeroed(format.words(keys_max) * size)?,
            scores: Aligned::zeroed(Q_ROWS * keys)?,
            weights: Aligned::zeroed(weights)?,
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
    fn row(&self, row: usize, head: usize, size: usize) -> &'a [f32] {
        &self.data[row * self.stride + self.first + head * size..][..size]
    }
}

/// The output `[rows, heads * size]`, shared by tasks that write different rows or heads.
struct Output {
    start: *mut f32,
    cols: usize,
    len: usize,
}

// SAFETY: the pointer comes from a `&mut [f32]` that outlives the parallel loop; a task writes only the columns of its
// head in the rows of its span, and (span, head) pairs are different for all tasks (spans do not overlap in q).
unsafe impl Sync for Output {}

/// `out = softmax(q kᵀ / √size) v` for each span and head. `scratch` has one entry per thread of the current pool.
pub(super) fn attention(
    isa: Isa,
    scratch: &[Mutex<Head>],
    [q, k, v]: [Strided<'_>; 3],
    spans: &[Span],
    heads: usize,
    out: (&mut [f32], usize),
) {
    let (out, cols) = out;
    assert_eq!(cols % heads, 0, "{cols} columns in {heads} heads");
    let disjoint = spans.windows(2).all(|w| w[0].q + w[0].q_len <= w[1].q);
    assert!(disjoint, "spans are sorted by query row and do not overlap");
    let out = Output { start: out.as_mut_ptr(), cols, len: out.len() };
    (0..spans.len() * heads).into_par_iter().with_max_len(1).for_each(|i| {
        let thread = rayon::current_thread_index().expect("the backend runs on its own pool");
        let mut room = scratch[thread].lock().expect("no task panics while it holds the room");
        one_head(isa, &mut room, [q, k, v], &spans[i / heads], i % heads, &out, cols / heads);
    });
}

fn one_head(
    isa: Isa,
    room: &mut Head,
    [q, k, v]: [Strided<'_>; 3],
    span: &Span,
    head: usize,
    out: &Output,
    size: usize,
) {
    let (tile, format) = (room.tile, room.tile.format);
    let (mr, nr) = (tile.mr, tile.nr);
    let (padded, size_words, key_words) =
        (span.kv_len.next_multiple_of(nr), format.words(size), format.words(span.kv_len));
    let how = Row::new(isa, format, &[]);
    pack(isa, room, [k, v], span, head, size);
    let factor = 1.0 / (size as f32).sqrt();
    let mut sums = [0_u32; TILE_MAX];
    for first in (0..span.q_len).step_by(Q_ROWS) {
        let rows = Q_ROWS.min(span.q_len - first);
        for i in 0..rows {
            scale(isa, q.row(span.q + first + i, head, size), factor, &mut room.row[..size]);
            how.words(isa, &room.row[..size], &mut room.queries[i * size_words..][..size_words]);
        }
        for block in (0..rows).step_by(mr) {
            for p in 0..padded / nr {
                let queries = (&room.queries[block * size_words..], size_words);
                let scores = (&mut room.scores[block * padded + p * nr..], padded);
                tile.run(size_words, queries, &room.keys[p * nr * size_words..][..nr * size_words], scores);
            }
        }
        let mut totals = [0.0_f32; Q_ROWS];
        for (i, (total, scores)) in totals.iter_mut().zip(room.scores.chunks_exact_mut(padded)).take(rows).enumerate() {
            let scores = &mut floats(scores)[..span.kv_len];
            *total = softmax_unscaled(isa, scores);
            if format != Format::F32 {
                how.words(isa, scores, &mut room.weights[i * key_words..][..key_words]);
            }
        }
        let (weights, stride) = if format == Format::F32 { (&room.scores, padded) } else { (&room.weights, key_words) };
        for block in (0..rows).step_by(mr) {
            for p in 0..size.div_ceil(nr) {
                let values = &room.values[p * nr * key_words..][..nr * key_words];
                tile.run(key_words, (&weights[block * stride..], stride), values, (&mut sums, nr));
                let cols = p * nr..((p + 1) * nr).min(size);
                for (i, total) in totals.iter().enumerate().take((block + mr).min(rows)).skip(block) {
                    let start = (span.q + first + i) * out.cols + head * size + cols.start;
                    assert!(start + cols.len() <= out.len);
                    // SAFETY: in bounds by the assertion; these columns of this row belong to this task alone.
                    let out = unsafe { std::slice::from_raw_parts_mut(out.start.add(start), cols.len()) };
                    let sums = &floats(&mut sums)[(i - block) * nr..][..cols.len()];
                    scale(isa, sums, 1.0 / total, out);
                }
            }
        }
    }
}

/// Keys into panels `[keys / nr][words of size][nr]`, values into `[size / nr][words of keys][nr]`; what pads them is zero.
fn pack(isa: Isa, room: &mut Head, [k, v]: [Strided<'_>; 2], span: &Span, head: usize, size: usize) {
    let Head { tile, queries, keys, values, .. } = room;
    let (format, nr, group) = (tile.format, tile.nr, tile.format.group());
    let (size_words, how) = (format.words(size), Row::new(isa, tile.format, &[]));
    for (p, panel) in keys.chunks_exact_mut(size_words * nr).take(span.kv_len.div_ceil(nr)).enumerate() {
        panel.fill(0);
        for lane in 0..nr.min(span.kv_len - p * nr) {
            let words = &mut queries[..size_words];
            how.words(isa, k.row(span.kv + p * nr + lane, head, size), words);
            words.iter().enumerate().for_each(|(d, word)| panel[d * nr + lane] = *word);
        }
    }
    for (p, panel) in values.chunks_mut(format.words(span.kv_len) * nr).take(size.div_ceil(nr)).enumerate() {
        let cols = nr.min(size - p * nr);
        for (word, lanes) in panel.chunks_exact_mut(nr).enumerate() {
            let value = |row: usize| &v.row(span.kv + row, head, size)[p * nr..][..cols];
            let rows = (word * group..((word + 1) * group).min(span.kv_len)).map(value);
            columns(isa, format, rows, &mut lanes[..cols]);
            lanes[cols..].fill(0);
        }
    }
}
