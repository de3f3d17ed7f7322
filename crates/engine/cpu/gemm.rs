//! The matrix product of the linear layers: `out[M, N] (=|gelu=|+=) x[M, K] W[N, K]ᵀ + b[N]`.
//!
//! After Goto and van de Geijn (ACM TOMS 34(3), 2008), with three simplifications that a fixed right-hand side allows:
//!
//! * W is packed once at load into panels of NR columns, `[ceil(N / NR)][K][NR]`, zero-filled, and never touched again;
//! * a task owns a block of at most MC rows. It copies KC columns of them at a time (the copy has a stride that does not
//!   alias in L1) and runs over all panels: block and panel stay in L2, an MR x NR tile of sums in registers;
//! * the epilogue (bias, GELU, residual) runs on the tile while it is in L1, so the output is written once per KC columns.
//!
//! Rows are never split over K, so a row's result does not depend on the number of threads or on the rows beside it.

use std::sync::Mutex;

use rayon::prelude::*;

use super::elementwise::gelu;
use super::memory::Aligned;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Isa, Kind, Portable, Simd};
use crate::Error;
use crate::backend::Epilogue;

/// Columns of x per pass: with MC = 96 rows the block is 400 kB and a panel of 64 columns 256 kB, together within 1 MB of L2.
pub(super) const KC: usize = 1024;
/// Most rows of a task.
pub(super) const MC: usize = 96;
/// Floats added to the stride of the copied block so that its rows do not fall on the same L1 sets.
const PAD: usize = 16;
/// Largest tile of any instruction set: 6 x 64.
const TILE: usize = 6 * 64;

/// Rows and columns of the tile of sums: as many as fit in the registers beside a panel row and a broadcast.
pub(super) fn tile_shape(isa: Isa) -> (usize, usize) {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => (6, 64),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => (6, 16),
        Kind::Portable => (4, 8),
    }
}

/// `a[rows, k]` (stride `lda`) times one panel `[k][NR]`, rows 0..MR of the tile, stored with stride `ldc`.
///
/// # Safety
/// The instruction set is there; `a` is valid for MR rows of k reads with stride lda, `panel` for `k * NR` reads, `c` for
/// MR rows of NR writes with stride ldc.
#[inline(always)]
unsafe fn tile_body<S: Simd, const MR: usize, const NV: usize>(
    k: usize,
    a: *const f32,
    lda: usize,
    panel: *const f32,
    c: *mut f32,
    ldc: usize,
) {
    // SAFETY: every address below lies in the ranges the caller vouches for: row r < MR, column l < k, lane < NR.
    unsafe {
        let mut sums = [[S::splat(0.0); NV]; MR];
        let mut b = panel;
        // Row pointers instead of `r * lda + l` in the loop: overflow checks are on in release builds.
        let rows: [*const f32; MR] = std::array::from_fn(|r| a.add(r * lda));
        for l in 0..k {
            let mut columns = [S::splat(0.0); NV];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = S::load(b.add(v * S::LANES));
            }
            for (sums, row) in sums.iter_mut().zip(&rows) {
                let x = S::splat(*row.add(l));
                for (sum, column) in sums.iter_mut().zip(&columns) {
                    *sum = S::fma(x, *column, *sum);
                }
            }
            b = b.add(NV * S::LANES);
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                S::store(c.add(r * ldc + v * S::LANES), *sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512(k: usize, a: *const f32, lda: usize, panel: *const f32, c: *mut f32, ldc: usize) {
    // SAFETY: passed on to the caller, see `tile_body`.
    unsafe { tile_body::<Avx512, 6, 4>(k, a, lda, panel, c, ldc) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2(k: usize, a: *const f32, lda: usize, panel: *const f32, c: *mut f32, ldc: usize) {
    // SAFETY: passed on to the caller, see `tile_body`.
    unsafe { tile_body::<Avx2, 6, 2>(k, a, lda, panel, c, ldc) }
}

/// One tile: `c[MR, NR] = a[MR, k] panel[k, NR]`, with the strides and the start of each given by the slices.
///
/// `a` must hold MR rows (stride `lda`), `c` MR rows of NR (stride `ldc`): callers pad the last block.
#[inline]
pub(super) fn tile(isa: Isa, k: usize, a: (&[f32], usize), panel: &[f32], c: (&mut [f32], usize)) {
    let (mr, nr) = tile_shape(isa);
    let (a, lda) = a;
    let (c, ldc) = c;
    assert!(a.len() >= (mr - 1) * lda + k && panel.len() >= k * nr && c.len() >= (mr - 1) * ldc + nr);
    let (a, panel, c) = (a.as_ptr(), panel.as_ptr(), c.as_mut_ptr());
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the Isa proves the features; the assertion above is the rest of the contract.
        Kind::Avx512 => unsafe { tile_avx512(k, a, lda, panel, c, ldc) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the Isa proves the features; the assertion above is the rest of the contract.
        Kind::Avx2 => unsafe { tile_avx2(k, a, lda, panel, c, ldc) },
        // SAFETY: no features needed; the assertion above is the rest of the contract.
        Kind::Portable => unsafe { tile_body::<Portable, 4, 2>(k, a, lda, panel, c, ldc) },
    }
}

/// A linear layer's weight in panels, and its bias.
pub struct Packed {
    panels: Aligned,
    bias: Vec<f32>,
    /// Columns of x.
    pub inputs: usize,
    /// Columns of the output.
    pub outputs: usize,
    nr: usize,
}

impl Packed {
    /// Packs `weight [outputs, inputs]`. Errors: no memory.
    pub fn new(isa: Isa, weight: &[f32], bias: &[f32], inputs: usize) -> Result<Self, Error> {
        let (_, nr) = tile_shape(isa);
        let outputs = bias.len();
        assert_eq!(weight.len(), outputs * inputs, "weight of {outputs} x {inputs}");
        let mut panels = Aligned::zeroed(outputs.div_ceil(nr) * inputs * nr)?;
        panels.par_chunks_mut(inputs * nr).enumerate().for_each(|(p, panel)| {
            for (lane, row) in weight[p * nr * inputs..].chunks(inputs).take(nr).enumerate() {
                for (k, value) in row.iter().enumerate() {
                    panel[k * nr + lane] = *value;
                }
            }
        });
        Ok(Self { panels, bias: bias.to_vec(), inputs, outputs, nr })
    }

    fn panel(&self, p: usize, k: std::ops::Range<usize>) -> &[f32] {
        let start = p * self.inputs * self.nr;
        &self.panels[start + k.start * self.nr..start + k.end * self.nr]
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(self.nr)
    }
}

/// Per-thread room for a copied block of x.
pub(super) struct BlockCopy(Aligned);

impl BlockCopy {
    /// Room for any block. Errors: no memory.
    pub(super) fn new() -> Result<Self, Error> {
        Ok(Self(Aligned::zeroed((MC + 6) * (KC + PAD))?))
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

/// The output matrix, shared by tasks that write disjoint rectangles.
struct Output {
    start: *mut f32,
    cols: usize,
    len: usize,
}

// SAFETY: the pointer comes from a `&mut [f32]` that outlives the parallel loop in `linear`; tasks reach it only through
// `rows_of_tile`, and their rectangles are disjoint (`Cut::task` partitions rows x panels).
unsafe impl Sync for Output {}

impl Output {
    /// Columns `cols` of row `row`.
    ///
    /// # Safety
    /// No other thread may hold any of these elements.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    unsafe fn row(&self, row: usize, cols: std::ops::Range<usize>) -> &mut [f32] {
        let first = row * self.cols + cols.start;
        assert!(cols.end <= self.cols && first + cols.len() <= self.len);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), cols.len()) }
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
    let cut = Cut::new(rows, tile_shape(isa).0, w.panels(), copies.len());
    let output = Output { start: out.as_mut_ptr(), cols: w.outputs, len: out.len() };
    (0..cut.len()).into_par_iter().with_max_len(1).for_each(|i| {
        let thread = rayon::current_thread_index().expect("the backend runs on its own pool");
        let mut copy = copies[thread].lock().expect("no task panics while it holds the block");
        block(isa, &mut copy.0, x, w, epilogue, &output, &cut.task(i));
    });
}

fn block(isa: Isa, copy: &mut [f32], x: &[f32], w: &Packed, epilogue: Epilogue, out: &Output, task: &Task) {
    let (mr, nr) = tile_shape(isa);
    let mut sums = [0.0_f32; TILE];
    for k in (0..w.inputs).step_by(KC) {
        let k = k..(k + KC).min(w.inputs);
        let stride = k.len().next_multiple_of(PAD) + PAD;
        for (i, row) in task.rows.clone().enumerate() {
            copy[i * stride..][..k.len()].copy_from_slice(&x[row * w.inputs..][k.clone()]);
        }
        let place = (k.start == 0, k.end == w.inputs);
        for p in task.panels.clone() {
            let cols = p * nr..((p + 1) * nr).min(w.outputs);
            for first in (0..task.rows.len()).step_by(mr) {
                tile(isa, k.len(), (&copy[first * stride..], stride), w.panel(p, k.clone()), (&mut sums, nr));
                for (i, sums) in sums.chunks_exact(nr).take(mr.min(task.rows.len() - first)).enumerate() {
                    // SAFETY: the row and the columns lie in this task's rectangle, which no other task touches.
                    let out = unsafe { out.row(task.rows.start + first + i, cols.clone()) };
                    finish(isa, sums, &w.bias[cols.clone()], epilogue, place, out);
                }
            }
        }
    }
}

/// Adds a row of a tile to the output: the bias with the first columns of x, the activation after the last.
#[inline]
fn finish(isa: Isa, sums: &[f32], bias: &[f32], epilogue: Epilogue, (first, last): (bool, bool), out: &mut [f32]) {
    if first && epilogue != Epilogue::Accumulate {
        for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
            *out = sum + bias;
        }
    } else if first {
        for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
            *out += sum + bias;
        }
    } else {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out += sum;
        }
    }
    if last && epilogue == Epilogue::Gelu {
        gelu(isa, out);
    }
}
