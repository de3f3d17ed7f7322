//! The matrix product of the linear layers: `out[M, N] (=|gelu=|+=) x[M, K] W[N, K]ᵀ + b[N]`.
//!
//! After Goto and van de Geijn (ACM TOMS 34(3), 2008), with three simplifications that a fixed right-hand side allows:
//!
//! * W is packed once at load into panels of NR columns, `[ceil(N / NR)][K / group][NR]` words, and never touched again;
//! * a task owns a block of at most MC rows. It makes words of them (normed, if that is asked; with a stride that does not alias in
//!   L1) and runs over all panels, KC words of K at a time: block and panel stay in L2, an MR x NR tile of sums in registers;
//! * the epilogue (scales, bias, GELU, residual) runs on the tile while it is in L1, so the output is written once per KC words.
//!
//! Rows are never split over K, so a row's result does not depend on the number of threads or on the rows beside it.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::Norm;
use super::elementwise::layer_norm;
use super::epilogue::{Pass, Worth, finish};
use super::memory::{Aligned, Rectangle, Shared, own};
use super::pack::{Packed, Row};
use super::simd::Isa;
use super::tile::{Format, Next, TILE_ROWS_MAX, Tile};
use crate::Error;
use crate::backend::Epilogue;

/// Words of a row per pass: with MC = 96 rows that is 400 kB of the block, and a panel of 64 columns 256 kB, together within 1 MB of L2.
pub(super) const KC: usize = 1024;
/// Most rows of a task.
pub(super) const MC: usize = 96;
/// Sums that are made before they go to the output: so many that it costs little to call for it, so few that they stay in L1.
const SUMS: usize = 2048;
/// Tiles for each thread that make one more or less of them no matter.
pub(super) const ENOUGH_TILES: usize = 4;
/// Words added to the stride of the block so that its rows do not fall on the same L1 sets.
const PAD: usize = 16;

/// Words from row to row of a block.
pub(super) fn stride(words: usize) -> usize {
    words.next_multiple_of(PAD) + PAD
}

/// Per-thread room for a block of rows in words.
pub(super) struct Block {
    pub(super) words: Aligned<u32>,
    pub(super) rows: Vec<Row>,
    /// A panel that is not stored as the tile takes it.
    pub(super) panel: Aligned<u32>,
    normed: Aligned,
}

impl Block {
    /// No room yet.
    pub(super) fn new() -> Result<Self, Error> {
        let (words, panel, normed) = (Aligned::zeroed(0)?, Aligned::zeroed(0)?, Aligned::zeroed(0)?);
        Ok(Self { words, rows: Vec::with_capacity(MC), panel, normed })
    }

    /// Sees to room for what is multiplied with these weights. Errors: no memory.
    pub(super) fn reserve(&mut self, w: &Packed) -> Result<(), Error> {
        self.words.reserve((MC + TILE_ROWS_MAX) * stride(w.tile.format.words(w.inputs)))?;
        self.panel.reserve(w.room())?;
        self.normed.reserve(w.inputs)
    }

    /// Makes words of `rows` rows.
    pub(super) fn take<'a>(
        &mut self,
        isa: Isa,
        tile: &Tile,
        rows: Range<usize>,
        row_of: impl Fn(usize) -> &'a [f32],
        norm: Option<&Norm>,
    ) {
        self.rows.clear();
        for (i, row) in rows.enumerate() {
            let mut x = row_of(row);
            if let Some(norm) = norm {
                let normed = &mut self.normed[..x.len()];
                layer_norm(isa, x, &norm.gain, &norm.bias, norm.eps, normed);
                x = normed;
            }
            let (how, words) = (Row::new(isa, tile, x), tile.format.words(x.len()));
            how.words(isa, x, &mut self.words[i * stride(words)..][..words]);
            self.rows.push(how);
        }
    }
}

/// A rectangle of the output: `rows` of one task, columns of panels `panels`.
pub(super) struct Task {
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
}

/// Cuts the output into tasks that are alike but for a tile or a panel, so that no thread waits for others at the end: by rows, and
/// where these are too few for that, by panels too.
pub(super) struct Cut {
    rows: usize,
    mr: usize,
    tiles: usize,
    pub(super) row_blocks: usize,
    panels: usize,
    panel_blocks: usize,
}

/// Whether so many tiles can be shared out without one thread having much more to do than another.
pub(super) fn rows_suffice(tiles: usize, threads: usize) -> bool {
    tiles > 0 && (tiles.is_multiple_of(threads) || tiles >= ENOUGH_TILES * threads)
}

impl Cut {
    pub(super) fn new(rows: usize, mr: usize, panels: usize, threads: usize) -> Self {
        let tiles = rows.div_ceil(mr);
        let row_blocks = tiles.div_ceil(MC / mr).next_multiple_of(threads).min(tiles);
        let (row_blocks, panel_blocks) = if rows_suffice(tiles, threads) {
            (row_blocks, 1)
        } else {
            let row_blocks = tiles.div_ceil(MC / mr);
            (row_blocks, (4 * threads).div_ceil(row_blocks).min(panels))
        };
        Self { rows, mr, tiles, row_blocks, panels, panel_blocks }
    }

    fn len(&self) -> usize {
        self.row_blocks * self.panel_blocks
    }

    pub(super) fn task(&self, i: usize) -> Task {
        let part = |all: usize, parts: usize, i: usize| all * i / parts..all * (i + 1) / parts;
        let tiles = part(self.tiles, self.row_blocks, i / self.panel_blocks);
        let rows = tiles.start * self.mr..(tiles.end * self.mr).min(self.rows);
        Task { rows, panels: part(self.panels, self.panel_blocks, i % self.panel_blocks) }
    }
}

/// `out (=|gelu=|+=) x Wᵀ + b` over `rows` rows, of the normed x where there is a norm; `x [rows, w.inputs]`, `out [rows, w.outputs]`.
///
/// Runs on the current rayon pool; `blocks` has one entry per thread of it.
pub(super) fn linear(
    isa: Isa,
    blocks: &[Mutex<Block>],
    (x, norm): (&[f32], Option<&Norm>),
    w: &Packed,
    epilogue: Epilogue,
    out: &mut [f32],
) {
    let rows = x.len() / w.inputs;
    assert_eq!(x.len(), rows * w.inputs, "x is [rows, {}]", w.inputs);
    assert_eq!(out.len(), rows * w.outputs, "out is [{rows}, {}]", w.outputs);
    if rows == 0 {
        return;
    }
    let cut = Cut::new(rows, w.tile.mr, w.panels(), blocks.len());
    let output = Shared::new(out, w.outputs);
    (0..cut.len()).into_par_iter().with_max_len(1).for_each(|i| {
        let (task, mut block) = (cut.task(i), own(blocks));
        block.take(isa, &w.tile, task.rows.clone(), |row| &x[row * w.inputs..][..w.inputs], norm);
        let Block { words, rows, panel, .. } = &mut *block;
        // SAFETY: tasks partition rows x panels, so no two of them have the same element of the output.
        unsafe { multiply(isa, (words, rows, panel), w, epilogue, &output, &task) };
    });
}

/// `out (=|gelu=|+=) words Wᵀ + b` in a task's rectangle, of whose rows these are the words.
///
/// # Safety
/// No other thread may hold any of the rectangle's elements.
pub(super) unsafe fn multiply(
    isa: Isa,
    (words, rows, room): (&[u32], &[Row], &mut [u32]),
    w: &Packed,
    epilogue: Epilogue,
    out: &Shared<'_>,
    task: &Task,
) {
    let (tile, all) = (w.tile, w.tile.format.words(w.inputs));
    let (mr, nr, stride) = (tile.mr, tile.nr, stride(all));
    let rows_max = SUMS / nr / mr * mr;
    let mut sums = [0_u32; SUMS];
    for k in (0..all).step_by(KC) {
        let k = k..(k + KC).min(all);
        let pass = Pass { first: k.start == 0, last: k.end == all };
        for p in task.panels.clone() {
            let cols = p * nr..((p + 1) * nr).min(w.outputs);
            let next = (p + 1 < task.panels.end).then(|| w.stored(p + 1, k.clone()));
            let next = Next::new(&tile, k.len(), next, task.rows.len());
            let panel = w.panel(isa, p, k.clone(), room);
            for part in (0..task.rows.len()).step_by(rows_max) {
                let part = part..task.rows.len().min(part + rows_max);
                let of_output = task.rows.start + part.start..task.rows.start + part.end;
                // SAFETY: the rows and columns lie in the task's rectangle, which the caller vouches for.
                let mut out = unsafe { Rectangle::new(out, of_output, cols.clone()) };
                for first in part.clone().step_by(mr) {
                    if epilogue == Epilogue::Accumulate || !pass.first {
                        out.prefetch(first - part.start..part.end.min(first + mr) - part.start);
                    }
                    let (block, sums) = (&words[first * stride + k.start..], &mut sums[(first - part.start) * nr..]);
                    tile.run(k.len(), (block, stride), panel, (sums, nr), next.of(first));
                }
                let worth = (tile.format == Format::Int8).then(|| Worth {
                    rows: &rows[part.clone()],
                    columns: &w.scales[cols.clone()],
                    shifts: w.shifts(k.start, cols.clone()),
                });
                finish(isa, (&sums, nr), worth, &w.bias[cols.clone()], (epilogue, pass), &mut out);
            }
        }
    }
}
