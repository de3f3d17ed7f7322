//! `x += fc2(gelu(fc1(x)))`, with a norm before it or not: block by block of rows, so that what is between the two products is of a
//! block, stays in the caches next to the processor (400 kB to 1.6 MB) and is never the size of a batch.

use std::sync::Mutex;

use rayon::prelude::*;

use super::Norm;
use super::gemm::{Block, Cut, ENOUGH_TILES, MC, Task, multiply, rows_suffice, stride};
use super::memory::{Aligned, Shared, floats, floats_of, own};
use super::pack::Packed;
use super::simd::Isa;
use super::tile::{Format, TILE_ROWS_MAX};
use crate::Error;
use crate::backend::Epilogue;

/// Per-thread room for what is between the products.
pub(super) struct Hidden(Aligned<u32>);

impl Hidden {
    /// No room yet.
    pub(super) fn new() -> Result<Self, Error> {
        Aligned::zeroed(0).map(Self)
    }

    /// Sees to room for rows of so many values. Errors: no memory.
    pub(super) fn reserve(&mut self, values: usize) -> Result<(), Error> {
        self.0.reserve((MC + TILE_ROWS_MAX) * stride(values))
    }
}

/// Whether there are rows for all threads: otherwise the panels must be shared out, which one product at a time can.
pub(super) fn fits(rows: usize, fc1: &Packed, threads: usize) -> bool {
    rows_suffice(rows.div_ceil(fc1.tile.mr), threads)
}

/// Most rows that do not fit.
pub(super) fn rows_alone(threads: usize) -> usize {
    ENOUGH_TILES * threads * TILE_ROWS_MAX
}

/// Does it on `x [rows, fc1.inputs]`; runs on the current rayon pool, of which `rooms` have one entry per thread.
pub(super) fn mlp(
    isa: Isa,
    (blocks, hiddens): (&[Mutex<Block>], &[Mutex<Hidden>]),
    norm: Option<&Norm>,
    [fc1, fc2]: [&Packed; 2],
    x: &mut [f32],
) {
    let (cols, hidden_cols) = (fc1.inputs, stride(fc1.outputs));
    assert!(fc2.inputs == fc1.outputs && fc2.outputs == cols && fc2.tile.format == fc1.tile.format);
    let cut = Cut::new(x.len() / cols, fc1.tile.mr, 1, blocks.len());
    let x = Shared::new(x, cols);
    (0..cut.row_blocks).into_par_iter().with_max_len(1).for_each(|i| {
        let (rows, mut block, mut hidden) = (cut.task(i).rows, own(blocks), own(hiddens));
        // SAFETY: the rows of a task are no other's, and nothing of them is held while they are written below.
        block.take(isa, &fc1.tile, rows.clone(), |row| unsafe { &*x.row(row, 0..cols) }, norm);
        let hidden = &mut hidden.0[..];
        {
            let between = Shared::new(&mut floats(hidden)[..rows.len() * hidden_cols], hidden_cols);
            let task = Task { rows: 0..rows.len(), panels: 0..fc1.panels() };
            let Block { words, rows, panel, .. } = &mut *block;
            // SAFETY: the room is this thread's.
            unsafe { multiply(isa, (words, rows, panel), fc1, Epilogue::Gelu, &between, &task) };
        }
        let row_of = |row: usize| &floats_of(hidden)[row * hidden_cols..][..fc2.inputs];
        if fc2.tile.format != Format::F32 {
            block.take(isa, &fc2.tile, 0..rows.len(), row_of, None);
        }
        // As f32 they are words already, with the stride of a block.
        let Block { words, rows: of_block, panel, .. } = &mut *block;
        let words = if fc2.tile.format == Format::F32 { &*hidden } else { words };
        let task = Task { rows, panels: 0..fc2.panels() };
        // SAFETY: the rows of a task are no other's.
        unsafe { multiply(isa, (words, of_block, panel), fc2, Epilogue::Accumulate, &x, &task) };
    });
}
