//! Scaled dot-product attention, one (span, head) at a time, without ever storing the scores of a whole head.
//!
//! A task packs its head's keys (transposed) and values into the panels of the matrix kernel, then walks the queries in
//! blocks of [`Q_ROWS`]: scores of the block against all keys, softmax, product with the values. All of it stays in L2:
//! with 577 keys of size 64 that is 164 + 148 + 64 kB.

use std::sync::Mutex;

use rayon::prelude::*;

use super::elementwise::{scale, softmax_unscaled};
use super::gemm::{tile, tile_shape};
use super::memory::Aligned;
use super::simd::Isa;
use crate::Error;
use crate::backend::Span;

/// Query rows of a block: a multiple of every tile's rows.
const Q_ROWS: usize = 24;
/// Largest tile of any instruction set: 6 x 64.
const TILE: usize = 6 * 64;

/// Per-thread room for one head's keys and values and one block of queries and scores.
pub(super) struct Head {
    queries: Aligned,
    keys: Aligned,
    values: Aligned,
    scores: Aligned,
}

impl Head {
    /// Room for spans of at most `keys_max` keys and heads of at most `size_max` values. Errors: no memory.
    pub(super) fn new(isa: Isa, keys_max: usize, size_max: usize) -> Result<Self, Error> {
        let (_, nr) = tile_shape(isa);
        let keys = keys_max.next_multiple_of(nr);
        Ok(Self {
            queries: Aligned::zeroed(Q_ROWS * size_max)?,
            keys: Aligned::zeroed(keys * size_max)?,
            values: Aligned::zeroed(keys_max * size_max.next_multiple_of(nr))?,
            scores: Aligned::zeroed(Q_ROWS * keys)?,
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
    let (mr, nr) = tile_shape(isa);
    let padded = span.kv_len.next_multiple_of(nr);
    pack(room, [k, v], span, head, size, nr);
    let factor = 1.0 / (size as f32).sqrt();
    let mut sums = [0.0_f32; TILE];
    for first in (0..span.q_len).step_by(Q_ROWS) {
        let rows = Q_ROWS.min(span.q_len - first);
        for i in 0..rows {
            scale(isa, q.row(span.q + first + i, head, size), factor, &mut room.queries[i * size..][..size]);
        }
        for block in (0..rows).step_by(mr) {
            for p in 0..padded / nr {
                let queries = (&room.queries[block * size..], size);
                let scores = (&mut room.scores[block * padded + p * nr..], padded);
                tile(isa, size, queries, &room.keys[p * nr * size..][..nr * size], scores);
            }
        }
        let mut totals = [0.0_f32; Q_ROWS];
        for (total, scores) in totals.iter_mut().zip(room.scores.chunks_exact_mut(padded)).take(rows) {
            *total = softmax_unscaled(isa, &mut scores[..span.kv_len]);
        }
        for block in (0..rows).step_by(mr) {
            for p in 0..size.div_ceil(nr) {
                let values = &room.values[p * nr * span.kv_len..][..nr * span.kv_len];
                tile(isa, span.kv_len, (&room.scores[block * padded..], padded), values, (&mut sums, nr));
                let cols = p * nr..((p + 1) * nr).min(size);
                for i in block..(block + mr).min(rows) {
                    let start = (span.q + first + i) * out.cols + head * size + cols.start;
                    assert!(start + cols.len() <= out.len);
                    // SAFETY: in bounds by the assertion; these columns of this row belong to this task alone.
                    let out = unsafe { std::slice::from_raw_parts_mut(out.start.add(start), cols.len()) };
                    scale(isa, &sums[(i - block) * nr..][..cols.len()], 1.0 / totals[i], out);
                }
            }
        }
    }
}

/// Keys into panels `[keys / nr][size][nr]`, values into `[size / nr][keys][nr]`; what pads them is zero.
fn pack(room: &mut Head, [k, v]: [Strided<'_>; 2], span: &Span, head: usize, size: usize, nr: usize) {
    for (p, panel) in room.keys.chunks_exact_mut(size * nr).take(span.kv_len.div_ceil(nr)).enumerate() {
        let keys = nr.min(span.kv_len - p * nr);
        for lane in 0..keys {
            for (d, value) in k.row(span.kv + p * nr + lane, head, size).iter().enumerate() {
                panel[d * nr + lane] = *value;
            }
        }
        for lane in keys..nr {
            for d in 0..size {
                panel[d * nr + lane] = 0.0;
            }
        }
    }
    for (p, panel) in room.values.chunks_mut(span.kv_len * nr).take(size.div_ceil(nr)).enumerate() {
        let cols = nr.min(size - p * nr);
        for (row, lanes) in panel.chunks_exact_mut(nr).enumerate() {
            lanes[..cols].copy_from_slice(&v.row(span.kv + row, head, size)[p * nr..][..cols]);
            lanes[cols..].fill(0.0);
        }
    }
}
