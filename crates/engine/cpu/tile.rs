//! The tile of sums that the matrix kernel keeps in registers: rows of activations times one panel of weights.
//!
//! Activations are rows of words `[rows][K / group]`, a panel is `[K / group][NR]` words, sums are `[MR][NR]` words; what a word
//! is says the [`Format`], see [`super::dot`].

#[cfg(target_arch = "x86_64")]
use super::dot::{Avx2, Avx512, Bf16, PairBytes};
use super::dot::{Bytes, Dot, F32, Portable};
#[cfg(target_arch = "x86_64")]
use super::simd::Level;
use super::simd::{Isa, prefetch};

/// Rows of the largest tile: so many may be read and written beyond a block's.
pub(super) const TILE_ROWS_MAX: usize = 6;

/// What the operands of a product are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Format {
    /// f32, summed in f32.
    F32,
    /// bf16, summed in f32.
    Bf16,
    /// The same as words of f32, which kernels take where there is no instruction for bf16.
    WideBf16,
    /// u8 activations and i8 weights, summed in i32.
    Int8,
}

impl Format {
    /// Values of a word.
    pub(super) const fn group(self) -> usize {
        match self {
            Self::F32 | Self::WideBf16 => 1,
            Self::Bf16 => 2,
            Self::Int8 => 4,
        }
    }

    /// Words of so many values along K.
    pub(super) const fn words(self, values: usize) -> usize {
        values.div_ceil(self.group())
    }
}

/// `c[MR, NR] = a[MR, words] panel[words, NR]`, with the strides of `a` and `c`; and where the cache lines begin that are needed next,
/// with the words from one to the next.
type Run = unsafe fn(usize, *const u32, usize, *const u32, *mut u32, usize, *const u32, usize);
/// So many rounds of [`CHAINS`] products of registers.
type Chains = unsafe fn(usize);

/// Independent sums of [`Tile::multiply_adds`]: more than latency times units, fewer than AVX2's registers.
const CHAINS: usize = 12;

/// The kernel of an instruction set and a format.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Rows.
    pub(super) mr: usize,
    /// Columns.
    pub(super) nr: usize,
    pub(super) format: Format,
    /// The largest byte that a weight may be, of either sign.
    pub(super) weight_steps: f32,
    /// Steps along K of an iteration: the addresses of their broadcasts differ by constants, which leaves the processor more room for
    /// products. They ask for one cache line.
    unroll: usize,
    lanes: usize,
    run: Run,
    chains: Chains,
}

/// # Safety
/// The instruction set is there; `a` is valid for MR rows of `words` reads with stride lda, `panel` for `words * NR` reads, `c`
/// for MR rows of NR writes with stride ldc.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "a kernel's, see `Run`")]
unsafe fn body<D: Dot, const MR: usize, const NV: usize, const UNROLL: usize>(
    words: usize,
    a: *const u32,
    lda: usize,
    panel: *const u32,
    c: *mut u32,
    ldc: usize,
    next: *const u32,
    next_step: usize,
) {
    // SAFETY: every address below lies in the ranges the caller vouches for: row r < MR, word l < words, lane < NR.
    unsafe {
        let mut sums = [[D::zero(); NV]; MR];
        let (mut b, mut next) = (panel, next);
        // Row pointers instead of `r * lda + l` in the loop: overflow checks are on in release builds.
        let mut rows: [*const u32; MR] = std::array::from_fn(|r| a.add(r * lda));
        for _ in 0..words / UNROLL {
            prefetch::<true, _>(next);
            next = next.wrapping_add(next_step);
            for l in 0..UNROLL {
                step::<D, MR, NV>(&mut sums, rows.map(|row| row.add(l)), b.add(l * NV * D::LANES));
            }
            rows = rows.map(|row| row.add(UNROLL));
            b = b.add(UNROLL * NV * D::LANES);
        }
        for l in 0..words % UNROLL {
            step::<D, MR, NV>(&mut sums, rows.map(|row| row.add(l)), b.add(l * NV * D::LANES));
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                D::store(c.add(r * ldc + v * D::LANES), *sum);
            }
        }
    }
}

/// A word of each row times a row of the panel.
///
/// # Safety
/// The instruction set is there, each of `rows` is valid for a read and `b` for NR.
#[inline(always)]
unsafe fn step<D: Dot, const MR: usize, const NV: usize>(
    sums: &mut [[D::V; NV]; MR],
    rows: [*const u32; MR],
    b: *const u32,
) {
    // SAFETY: the caller vouches for all of it.
    unsafe {
        let columns: [D::V; NV] = std::array::from_fn(|v| D::load(b.add(v * D::LANES)));
        for (sums, row) in sums.iter_mut().zip(rows) {
            let x = D::splat(*row);
            for (sum, column) in sums.iter_mut().zip(&columns) {
                *sum = D::dot(*sum, x, *column);
            }
        }
    }
}

/// # Safety
/// The instruction set is there.
#[inline(always)]
unsafe fn chains_body<D: Dot>(rounds: usize) {
    // SAFETY: the caller vouches for the instruction set; nothing here goes through a pointer.
    unsafe {
        // As floats -2 and some x, which becomes -x and x again: numbers of ordinary size for ever. Each product has an operand that
        // changes, or the compiler would take it out of the loop.
        let [a, x] = [0xc000_0000, 0x3c02_0000].map(|word| D::splat(std::hint::black_box(word)));
        let mut sums = [x; CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = D::dot(*sum, a, *sum);
            }
        }
        std::hint::black_box(sums);
    }
}

/// The kernel `$dot` compiled for `$features`: as many rows and columns as fit in the registers beside a panel's row and a
/// broadcast.
macro_rules! tile {
    ($format:expr, $dot:ty, $mr:literal x $vectors:literal x $unroll:literal $(, $features:literal)?) => {{
        $(#[target_feature(enable = $features)])?
        #[allow(clippy::too_many_arguments, reason = "a kernel's, see `Run`")]
        unsafe fn run(
            words: usize,
            a: *const u32,
            lda: usize,
            panel: *const u32,
            c: *mut u32,
            ldc: usize,
            next: *const u32,
            next_step: usize,
        ) {
            // SAFETY: passed on to the caller, see `body`.
            unsafe { body::<$dot, $mr, $vectors, $unroll>(words, a, lda, panel, c, ldc, next, next_step) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn chains(rounds: usize) {
            // SAFETY: passed on to the caller, see `chains_body`.
            unsafe { chains_body::<$dot>(rounds) }
        }
        Tile {
            mr: $mr,
            nr: $vectors * <$dot>::LANES,
            format: $format,
            weight_steps: 127.0,
            unroll: $unroll,
            lanes: <$dot>::LANES,
            run,
            chains,
        }
    }};
}

/// The panel that comes next, which the tiles of the one before bring to the cache, each its part.
#[derive(Clone, Copy)]
pub(super) struct Next {
    start: *const u32,
    /// Words for each row of the block.
    row: usize,
    step: usize,
}

impl Next {
    /// A panel as wide as the one before, for a block of `rows` rows and tiles of `words` words.
    pub(super) fn new(tile: &Tile, words: usize, panel: Option<&[u32]>, rows: usize) -> Self {
        // Where none comes, what is there already: an address without memory would be looked for again and again.
        let Some(panel) = panel else { return Self { start: std::ptr::from_ref(tile).cast(), row: 0, step: 0 } };
        let tiles = rows.div_ceil(tile.mr);
        Self {
            start: panel.as_ptr(),
            row: panel.len() / (tiles * tile.mr),
            step: (panel.len() * tile.unroll).div_ceil(tiles * words),
        }
    }

    /// What the tile takes over that begins at this row, and the words from line to line.
    pub(super) fn of(&self, row: usize) -> (*const u32, usize) {
        (self.start.wrapping_add(row * self.row), self.step)
    }
}

/// With weights of 7 bits, as [`PairBytes`] needs them. They cost some accuracy and save a third of the time.
#[cfg(target_arch = "x86_64")]
fn pairs(tile: Tile) -> Tile {
    Tile { weight_steps: 63.0, ..tile }
}

impl Tile {
    /// The fastest there is.
    pub(super) fn new(isa: Isa, format: Format) -> Self {
        #[cfg(target_arch = "x86_64")]
        let level = isa.level();
        #[cfg(not(target_arch = "x86_64"))]
        let _ = isa;
        match format {
            #[cfg(target_arch = "x86_64")]
            Format::Bf16 if level >= Level::Avx512Bf16 => tile!(format, Avx512<Bf16>, 6 x 4 x 4, "avx512f,avx512bf16"),
            Format::Bf16 => Self::new(isa, Format::WideBf16),
            #[cfg(target_arch = "x86_64")]
            Format::F32 | Format::WideBf16 if level >= Level::Avx512 => {
                tile!(format, Avx512<F32>, 6 x 4 x 4, "avx512f")
            }
            #[cfg(target_arch = "x86_64")]
            Format::F32 | Format::WideBf16 if level >= Level::Avx2 => tile!(format, Avx2<F32>, 6 x 2 x 4, "avx2,fma"),
            Format::F32 | Format::WideBf16 => tile!(format, Portable<F32>, 4 x 2 x 4),
            #[cfg(target_arch = "x86_64")]
            Format::Int8 if level >= Level::Avx512Vnni => tile!(format, Avx512<Bytes>, 6 x 4 x 4, "avx512f,avx512vnni"),
            // Of these one step at a time: the compiler would add up several before the sum, and run out of registers.
            #[cfg(target_arch = "x86_64")]
            Format::Int8 if level >= Level::Avx512 => {
                pairs(tile!(format, Avx512<PairBytes>, 6 x 4 x 1, "avx512f,avx512bw"))
            }
            #[cfg(target_arch = "x86_64")]
            Format::Int8 if level >= Level::AvxVnni => tile!(format, Avx2<Bytes>, 6 x 2 x 4, "avx2,avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Format::Int8 if level >= Level::Avx2 => pairs(tile!(format, Avx2<PairBytes>, 4 x 2 x 1, "avx2")),
            Format::Int8 => tile!(format, Portable<Bytes>, 4 x 2 x 4),
        }
    }

    /// Multiply-adds that touch nothing but registers, on this thread: the bound that benchmarks compare with. The operations
    /// done, multiplications and additions.
    pub(super) fn multiply_adds(&self, rounds: usize) -> usize {
        // SAFETY: `new` has picked what the Isa proves.
        unsafe { (self.chains)(rounds) }
        2 * self.format.group() * self.lanes * CHAINS * rounds
    }

    /// All tiles of `c[rows, panels * NR] = a panels`, `rows` rows of `a` and the panels one after the other; `a` and `c` come with their
    /// strides, and have room for the rows that fill up the last tile.
    pub(super) fn run_all(
        &self,
        words: usize,
        (a, lda, rows): (&[u32], usize, usize),
        panels: &[u32],
        (c, ldc): (&mut [u32], usize),
    ) {
        let size = words * self.nr;
        for (p, panel) in panels.chunks_exact(size).enumerate() {
            let next = Next::new(self, words, panels[p * size..].get(size..2 * size), rows);
            for first in (0..rows).step_by(self.mr) {
                let c = &mut c[first * ldc + p * self.nr..];
                self.run(words, (&a[first * lda..], lda), panel, (c, ldc), next.of(first));
            }
        }
    }

    /// One tile; each slice comes with its stride. `a` must hold MR rows of `words`, `c` MR rows of NR: callers pad the last block.
    #[inline]
    pub(super) fn run(
        &self,
        words: usize,
        (a, lda): (&[u32], usize),
        panel: &[u32],
        (c, ldc): (&mut [u32], usize),
        (next, next_step): (*const u32, usize),
    ) {
        let Self { mr, nr, .. } = *self;
        assert!(a.len() >= (mr - 1) * lda + words && panel.len() >= words * nr && c.len() >= (mr - 1) * ldc + nr);
        // SAFETY: `new` has picked what the Isa proves; the assertion is the rest of the contract.
        unsafe { (self.run)(words, a.as_ptr(), lda, panel.as_ptr(), c.as_mut_ptr(), ldc, next, next_step) }
    }
}
