//! Cross-attention of few rows to many image tokens without making keys and values of these, by the order of the products:
//!
//! `q (W_k e + b_k)ᵀ = (q W_k) eᵀ + q b_kᵀ`, of which the last is the same for all tokens of a row and falls out of the softmax, and
//! `Σ p (W_v e + b_v) = W_v (Σ p e) + b_v`, for the p of a row add up to 1.
//!
//! So each head's rows take the width of the image tokens, which are keys and values to all heads of all layers, and are made into
//! panels once. Tokens N, width V, rows r and size d a head: `4 r N V` operations instead of `4 d N V + 4 r N d`.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::attention::{Block, Strided, assert_disjoint, pack};
use super::elementwise::{add, scale};
use super::memory::{Aligned, Shared, floats, own};
use super::pack::{Packed, Row};
use super::simd::Isa;
use super::tile::{Format, TILE_ROWS_MAX, Tile};
use crate::Error;
use crate::backend::Span;

/// Rows of a block, of all heads together: a multiple of every tile's rows.
const ROWS: usize = 60;

/// A layer's weights.
pub struct Absorbed {
    /// Of each head: from a query `[d]` to the width of the tokens.
    queries: Vec<Packed>,
    /// Of each head: from a sum of tokens `[V]` to `[d]`.
    values: Vec<Packed>,
}

impl Absorbed {
    /// From the key's and the value's `weight [heads * d, inputs]` row-major. Errors: no memory.
    pub(super) fn new(
        (isa, format): (Isa, Format),
        key: &[f32],
        (value, value_bias): (&[f32], &[f32]),
        (inputs, heads): (usize, usize),
    ) -> Result<Self, Error> {
        let size = value_bias.len() / heads;
        let part = size * inputs;
        let query = |head: usize| {
            let weight = &key[head * part..][..part];
            let transposed: Vec<f32> = (0..inputs * size).map(|i| weight[i % size * inputs + i / size]).collect();
            Packed::new(isa, format, &transposed, &vec![0.0; inputs], size)
        };
        let value = |head: usize| {
            let (weight, bias) = (&value[head * part..][..part], &value_bias[head * size..][..size]);
            Packed::new(isa, format, weight, bias, inputs)
        };
        Ok(Self {
            queries: (0..heads).map(query).collect::<Result<_, _>>()?,
            values: (0..heads).map(value).collect::<Result<_, _>>()?,
        })
    }

    /// Values of a token.
    pub(super) fn inputs(&self) -> usize {
        self.values[0].inputs
    }
}

/// Images that are seen: their tokens as keys and values, and room for each thread.
pub struct Seen {
    tile: Tile,
    width: usize,
    tokens: usize,
    images: Vec<Image>,
    rooms: Vec<Mutex<Room>>,
}

struct Image {
    keys: Aligned<u32>,
    values: Aligned<u32>,
}

struct Room {
    row: Aligned,
    /// A row of tokens, or the block's queries.
    queries: Aligned<u32>,
    /// `[ROWS, V]`: the block's queries in the width of the tokens, then its sums of tokens.
    wide: Aligned<u32>,
    /// The same as operands.
    words: Aligned<u32>,
    block: Block,
}

impl Seen {
    /// Room for `images` images of `tokens` tokens and heads of at most `size` values. Errors: no memory.
    pub(super) fn new(
        tile: Tile,
        (images, tokens, width, size): (usize, usize, usize, usize),
        threads: usize,
    ) -> Result<Self, Error> {
        let (format, nr) = (tile.format, tile.nr);
        let panels = |rows: usize, words: usize| Aligned::zeroed(rows.next_multiple_of(nr) * format.words(words));
        let image = |_| Ok(Image { keys: panels(tokens, width)?, values: panels(width, tokens)? });
        let rows = ROWS + TILE_ROWS_MAX;
        let room = || {
            Ok(Mutex::new(Room {
                row: Aligned::zeroed(width)?,
                queries: Aligned::zeroed(format.words(width).max(rows * format.words(size)))?,
                wide: Aligned::zeroed(rows * width.max(size).next_multiple_of(nr))?,
                words: Aligned::zeroed(rows * format.words(width))?,
                block: Block::new(tile, ROWS, tokens)?,
            }))
        };
        Ok(Self {
            tile,
            width,
            tokens,
            images: (0..images).map(image).collect::<Result<_, Error>>()?,
            rooms: (0..threads).map(|_| room()).collect::<Result<_, Error>>()?,
        })
    }

    /// Values of a token.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Makes panels of the tokens of each span's image, `tokens [rows, V]`.
    pub(super) fn see(&mut self, isa: Isa, tokens: &[f32], spans: &[Span]) {
        let (tile, width, count, rooms) = (self.tile, self.width, self.tokens, &self.rooms);
        self.images[..spans.len()].par_iter_mut().zip(spans).with_max_len(1).for_each(
            |(Image { keys, values }, span)| {
                assert_eq!(span.kv_len, count, "an image has {count} tokens");
                let of = Strided { data: tokens, stride: width, first: 0 }.from(span.kv, 0);
                pack(isa, &tile, [of, of], (count, width), (keys, values), &mut own(rooms).queries);
            },
        );
    }
}

/// `out = softmax((q W_k) eᵀ / √d) e W_v + b_v` for each span and head; span i's image is the i-th that was seen.
pub(super) fn attend(isa: Isa, q: Strided<'_>, spans: &[Span], seen: &Seen, w: &Absorbed, out: &Shared<'_>) {
    assert!(out.cols().is_multiple_of(w.queries.len()) && spans.len() <= seen.images.len());
    assert_disjoint(spans);
    let threads = seen.rooms.len();
    spans.par_iter().zip(&seen.images).with_max_len(1).for_each(|(span, image)| {
        let rows = span.q_len * w.queries.len();
        // As many blocks as keep all threads busy, where there are few images.
        let blocks = rows.div_ceil(ROWS).max((2 * threads).div_ceil(spans.len())).min(rows.div_ceil(seen.tile.mr));
        let block = rows.div_ceil(blocks).next_multiple_of(seen.tile.mr).min(ROWS);
        (0..rows.div_ceil(block)).into_par_iter().with_max_len(1).for_each(|i| {
            one_block(
                isa,
                &mut own(&seen.rooms),
                (q, span, i * block..rows.min((i + 1) * block)),
                (seen, image),
                w,
                out,
            );
        });
    });
}

/// The rows of a block, which go through the span's rows for each head, as parts of one head: its number and the rows of the span.
fn parts(block: &Range<usize>, rows: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let (start, end) = (block.start, block.end);
    (start / rows..end.div_ceil(rows))
        .map(move |head| (head, start.max(head * rows) - head * rows..end.min((head + 1) * rows) - head * rows))
}

fn one_block(
    isa: Isa,
    room: &mut Room,
    (q, span, block): (Strided<'_>, &Span, Range<usize>),
    (seen, image): (&Seen, &Image),
    w: &Absorbed,
    out: &Shared<'_>,
) {
    let Room { row, queries, wide, words, block: scores } = room;
    let (tile, width, size) = (seen.tile, seen.width, out.cols() / w.queries.len());
    let (stride, how) = (width.next_multiple_of(tile.nr), Row::new(isa, &tile, &[]));
    let [size_words, width_words] = [size, width].map(|values| tile.format.words(values));
    let factor = 1.0 / (size as f32).sqrt();
    for (head, rows) in parts(&block, span.q_len) {
        let at = head * span.q_len + rows.start - block.start;
        for (i, of_span) in rows.clone().enumerate() {
            how.words(isa, q.row(span.q + of_span, head * size, size), &mut queries[i * size_words..][..size_words]);
        }
        // The rows that fill up its last tile are those of the next part, which come later.
        let of_head = (&**queries, size_words, rows.len());
        tile.run_all(size_words, of_head, w.queries[head].all(), (&mut wide[at * stride..], stride));
    }
    for (wide, words) in wide.chunks_exact_mut(stride).zip(words.chunks_exact_mut(width_words)).take(block.len()) {
        how.words(isa, &floats(wide)[..width], words);
    }
    let panels = (&*image.keys, &*image.values, seen.tokens);
    let totals = scores.attend(isa, factor, (words, width_words, block.len()), panels, (wide, stride));
    let sums = wide.chunks_exact_mut(stride).zip(words.chunks_exact_mut(width_words));
    for ((sums, words), total) in sums.zip(totals).take(block.len()) {
        scale(isa, &floats(sums)[..width], 1.0 / total, &mut row[..width]);
        how.words(isa, &row[..width], words);
    }
    let stride = size.next_multiple_of(tile.nr);
    for (head, rows) in parts(&block, span.q_len) {
        let at = head * span.q_len + rows.start - block.start;
        let (of_head, values) = ((&words[at * width_words..], width_words, rows.len()), &w.values[head]);
        tile.run_all(width_words, of_head, values.all(), (wide, stride));
        for (sums, of_span) in floats(wide).chunks_exact(stride).zip(rows) {
            // SAFETY: a head's columns of a row belong to one block alone, and spans do not overlap in their rows.
            let out = unsafe { out.row(span.q + of_span, head * size..(head + 1) * size) };
            add(isa, &sums[..size], &values.bias, out);
        }
    }
}
