//! The matrix product of the linear layers: `out[M, N] (=|gelu=|+=) x[M, K] W[N, K]ᵀ + b[N]`.
//!
//! After Goto and van de Geijn (ACM TOMS 34(3), 2008), with three simplifications that a fixed right-hand side allows:
//!
//! * W is packed once at load into panels of NR columns, `[ceil(N / NR)][K / group][NR]` words, and never touched again;
//! * a task owns a block of at most MC rows. It makes words of KC columns of them at a time (with a stride that does not
//!   alias in L1) and runs over all panels: block and panel stay in L2, an MR x NR tile of sums in registers;
//! * the epilogue (scales, bias, GELU, residual) runs on the tile while it is in L1, so the output is written once per KC columns.
//!
//! Rows are never split over K, so a row's result does not depend on the number of threads or on the rows beside it.

use std::sync::Mutex;

use rayon::prelude::*;

use super::epilogue::{Pass, Worth, finish};
use super::memory::{Aligned, Rectangle, Shared};
use super::pack::{Packed, Row};
use super::simd::Isa;
use super::tile::{Format, Next, TILE_MAX};
use crate::Error;
use crate::backend::Epilogue;

/// Words of a row per pass: with MC = 96 rows the block is 400 kB and a panel of 64 columns 256 kB, together within 1 MB of L2.
pub(super) const KC: usize = 1024;
/// Most rows of a task.
const MC: usize = 96;
/// Words added to the stride of the block so that its rows do not fall on the same L1 sets.
const PAD: usize = 16;
/// Rows that a tile may read beyond a task's.
const TILE_ROWS_MAX: usize = 6;

/// Per-thread room for a block of x in words.
pub(super) struct BlockCopy {
    words: Aligned<u32>,
    rows: Vec<Row>,
}

impl BlockCopy {
    /// Room for any block. Errors: no memory.
    pub(super) fn new() -> Result<Self, Error> {
        Ok(Self { words: Aligned::zeroed((MC + TILE_ROWS_MAX) * (KC + PAD))?, rows: Vec::with_capacity(MC) })
    }
}

/// A rectangle of the output: `rows` of one task, columns of panels `panels`.
struct Task {
    rows: std::ops::Range<usize>,
    panels: std::ops::Range<usize>,
}

/// Cuts the output into tasks: by rows, and where these are too few for the threads, by panels too.
struct Cut {
    rows: usize,
    row_block: usize,
    row_blocks: usize,
    panels: usize,
    panel_block: usize,
    panel_blocks: usize,
}

impl Cut {
    fn new(rows: usize, mr: usize, panels: usize, threads: usize) -> Self {
        // An even number of rounds for all threads, so that none waits for a last lonely block.
        let wanted = rows.div_ceil(MC).next_multiple_of(threads).min(rows.div_ceil(mr));
        let row_block = rows.div_ceil(wanted).next_multiple_of(mr).min(MC);
        let row_blocks = rows.div_ceil(row_block);
        let panel_blocks = (2 * threads).div_ceil(row_blocks).min(panels);
        let panel_blocks = if row_blocks >= threads { 1 } else { panel_blocks };
        let panel_block = panels.div_ceil(panel_blocks);
        Self { rows, row_block, row_blocks, panels, panel_block, panel_blocks: panels.div_ceil(panel_block) }
    }

    fn len(&self) -> usize {
        self.row_blocks * self.panel_blocks
    }

    fn task(&self, i: usize) -> Task {
        let (r, p) = (i / self.panel_blocks * self.row_block, i % self.panel_blocks * self.panel_block);
        Task { rows: r..(r + self.row_block).min(self.rows), panels: p..(p + self.panel_block).min(self.panels) }
    }
}

/// `out (=|gelu=|+=) x Wᵀ + b` over `rows` rows; `x [rows, w.inputs]`, `out [rows, w.outputs]`.
///
/// Runs on the current rayon pool; `copies` has one entry per thread of it.
pub(super) fn linear(
    isa: Isa,
    copies: &[Mutex<BlockCopy>],
    x: &[f32],
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
    let cut = Cut::new(rows, w.tile.mr, w.panels(), copies.len());
    let output = Shared::new(out, w.outputs);
    (0..cut.len()).into_par_iter().with_max_len(1).for_each(|i| {
        let thread = rayon::current_thread_index().expect("the backend runs on its own pool");
        let mut copy = copies[thread].lock().expect("no task panics while it holds the block");
        block(isa, &mut copy, x, w, epilogue, &output, &cut.task(i));
    });
}

fn block(isa: Isa, copy: &mut BlockCopy, x: &[f32], w: &Packed, epilogue: Epilogue, out: &Shared<'_>, task: &Task) {
    let (tile, group) = (w.tile, w.tile.format.group());
    let (mr, nr, words) = (tile.mr, tile.nr, tile.format.words(w.inputs));
    let mut sums = [0_u32; TILE_MAX];
    let row_of_x = |row: usize| &x[row * w.inputs..][..w.inputs];
    let BlockCopy { words: copied, rows } = copy;
    rows.clear();
    rows.extend(task.rows.clone().map(|row| Row::new(isa, &tile, row_of_x(row))));
    for k in (0..words).step_by(KC) {
        let k = k..(k + KC).min(words);
        let stride = k.len().next_multiple_of(PAD) + PAD;
        for (i, (row, how)) in task.rows.clone().zip(&*rows).enumerate() {
            let part = &row_of_x(row)[k.start * group..(k.end * group).min(w.inputs)];
            how.words(isa, part, &mut copied[i * stride..][..k.len()]);
        }
        let pass = Pass { first: k.start == 0, last: k.end == words };
        for p in task.panels.clone() {
            let cols = p * nr..((p + 1) * nr).min(w.outputs);
            let next = (p + 1 < task.panels.end).then(|| w.panel(p + 1, k.clone()));
            let next = Next::new(&tile, next, task.rows.len());
            for first in (0..task.rows.len()).step_by(mr) {
                let (block, last) = ((&copied[first * stride..], stride), task.rows.len().min(first + mr));
                let of_task = |row| task.rows.start + row;
                // SAFETY: the rows and columns lie in this task's rectangle, which no other task touches.
                let mut out = unsafe { Rectangle::new(out, of_task(first)..of_task(last), cols.clone()) };
                if epilogue == Epilogue::Accumulate || !pass.first {
                    out.prefetch();
                }
                tile.run(k.len(), block, w.panel(p, k.clone()), (&mut sums, nr), next.of(first));
                let worth = (tile.format == Format::Int8).then(|| Worth {
                    rows: &rows[first..last],
                    columns: &w.scales[cols.clone()],
                    shifts: w.shifts(k.start, cols.clone()),
                });
                finish(isa, (&mut sums, nr), worth, &w.bias[cols.clone()], (epilogue, pass), &mut out);
            }
        }
    }
}
