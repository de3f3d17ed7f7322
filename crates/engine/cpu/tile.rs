//! The tile of sums that the matrix kernel keeps in registers: rows of activations times one panel of weights.
//!
//! Activations are rows of words `[rows][K / group]`, a panel is `[K / group][NR]` words, sums are `[MR][NR]` words; what a word
//! is says the [`Format`], see [`super::dot`].

#[cfg(target_arch = "x86_64")]
use super::dot::{Avx2, Avx512, WideBf16, WideBytes};
use super::dot::{Bf16, Bytes, Dot, F32, Portable};
use super::simd::{Isa, Level};

/// Words of the largest tile.
pub(super) const TILE_MAX: usize = 6 * 64;

/// What the operands of a product are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Format {
    /// f32, summed in f32.
    F32,
    /// bf16, summed in f32.
    Bf16,
    /// u8 activations and i8 weights, summed in i32.
    Int8,
}

impl Format {
    /// Values of a word.
    pub(super) const fn group(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::Int8 => 4,
        }
    }

    /// Words of so many values along K.
    pub(super) const fn words(self, values: usize) -> usize {
        values.div_ceil(self.group())
    }
}

/// `c[MR, NR] = a[MR, words] panel[words, NR]`, with the strides of `a` and `c`.
type Run = unsafe fn(usize, *const u32, usize, *const u32, *mut u32, usize);
/// So many rounds of [`CHAINS`] products of registers, of integers or not.
type Chains = unsafe fn(usize, bool);

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
    lanes: usize,
    run: Run,
    chains: Chains,
}

/// # Safety
/// The instruction set is there; `a` is valid for MR rows of `words` reads with stride lda, `panel` for `words * NR` reads, `c`
/// for MR rows of NR writes with stride ldc.
#[inline(always)]
unsafe fn body<D: Dot, const MR: usize, const NV: usize>(
    words: usize,
    a: *const u32,
    lda: usize,
    panel: *const u32,
    c: *mut u32,
    ldc: usize,
) {
    // SAFETY: every address below lies in the ranges the caller vouches for: row r < MR, word l < words, lane < NR.
    unsafe {
        let mut sums = [[D::zero(); NV]; MR];
        let mut b = panel;
        // Row pointers instead of `r * lda + l` in the loop: overflow checks are on in release builds.
        let rows: [*const u32; MR] = std::array::from_fn(|r| a.add(r * lda));
        for l in 0..words {
            let mut columns = [D::zero(); NV];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = D::load(b.add(v * D::LANES));
            }
            for (sums, row) in sums.iter_mut().zip(&rows) {
                let x = D::splat(*row.add(l));
                for (sum, column) in sums.iter_mut().zip(&columns) {
                    *sum = D::dot(*sum, x, *column);
                }
            }
            b = b.add(NV * D::LANES);
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                D::store(c.add(r * ldc + v * D::LANES), *sum);
            }
        }
    }
}

/// # Safety
/// The instruction set is there.
#[inline(always)]
unsafe fn chains_body<D: Dot>(rounds: usize, integers: bool) {
    // SAFETY: the caller vouches for the instruction set; nothing here goes through a pointer.
    unsafe {
        let (a, b) = (D::splat(std::hint::black_box(0x3c01_3c01)), D::splat(std::hint::black_box(0x3c02_3c03)));
        let mut sums = [D::zero(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                // Products of integers that are always the same would be taken out of the loop.
                *sum = if integers { D::dot(b, *sum, b) } else { D::dot(*sum, a, b) };
            }
        }
        std::hint::black_box(sums);
    }
}

/// The kernel `$dot` compiled for `$features`: as many rows and columns as fit in the registers beside a panel's row, a broadcast
/// and what widening takes.
macro_rules! tile {
    ($format:expr, $dot:ty, $mr:literal x $vectors:literal $(, $features:literal)?) => {{
        $(#[target_feature(enable = $features)])?
        unsafe fn run(words: usize, a: *const u32, lda: usize, panel: *const u32, c: *mut u32, ldc: usize) {
            // SAFETY: passed on to the caller, see `body`.
            unsafe { body::<$dot, $mr, $vectors>(words, a, lda, panel, c, ldc) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn chains(rounds: usize, integers: bool) {
            // SAFETY: passed on to the caller, see `chains_body`.
            unsafe { chains_body::<$dot>(rounds, integers) }
        }
        let lanes = <$dot>::LANES;
        Tile { mr: $mr, nr: $vectors * lanes, format: $format, lanes, run, chains }
    }};
}

impl Tile {
    /// The fastest there is.
    pub(super) fn new(isa: Isa, format: Format) -> Self {
        let level = isa.level();
        match format {
            #[cfg(target_arch = "x86_64")]
            Format::F32 if level >= Level::Avx512 => tile!(format, Avx512<F32>, 6 x 4, "avx512f"),
            #[cfg(target_arch = "x86_64")]
            Format::F32 if level >= Level::Avx2 => tile!(format, Avx2<F32>, 6 x 2, "avx2,fma"),
            Format::F32 => tile!(format, Portable<F32>, 4 x 2),
            #[cfg(target_arch = "x86_64")]
            Format::Bf16 if level >= Level::Avx512Bf16 => tile!(format, Avx512<Bf16>, 6 x 4, "avx512f,avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Format::Bf16 if level >= Level::Avx512 => tile!(format, Avx512<WideBf16>, 6 x 2, "avx512f"),
            #[cfg(target_arch = "x86_64")]
            Format::Bf16 if level >= Level::Avx2 => tile!(format, Avx2<WideBf16>, 4 x 2, "avx2,fma"),
            Format::Bf16 => tile!(format, Portable<Bf16>, 4 x 2),
            #[cfg(target_arch = "x86_64")]
            Format::Int8 if level >= Level::Avx512Vnni => tile!(format, Avx512<Bytes>, 6 x 4, "avx512f,avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            Format::Int8 if level >= Level::Avx512 => tile!(format, Avx512<WideBytes>, 6 x 2, "avx512f,avx512bw"),
            #[cfg(target_arch = "x86_64")]
            Format::Int8 if level >= Level::AvxVnni => tile!(format, Avx2<Bytes>, 6 x 2, "avx2,avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Format::Int8 if level >= Level::Avx2 => tile!(format, Avx2<WideBytes>, 4 x 2, "avx2"),
            Format::Int8 => tile!(format, Portable<Bytes>, 4 x 2),
        }
    }

    /// Multiply-adds that touch nothing but registers, on this thread: the bound that benchmarks compare with. The operations
    /// done, multiplications and additions.
    pub(super) fn multiply_adds(&self, rounds: usize) -> usize {
        // SAFETY: `new` has picked what the Isa proves.
        unsafe { (self.chains)(rounds, self.format == Format::Int8) }
        2 * self.format.group() * self.lanes * CHAINS * rounds
    }

    /// One tile; each slice comes with its stride. `a` must hold MR rows of `words`, `c` MR rows of NR: callers pad the last block.
    #[inline]
    pub(super) fn run(&self, words: usize, (a, lda): (&[u32], usize), panel: &[u32], (c, ldc): (&mut [u32], usize)) {
        let Self { mr, nr, .. } = *self;
        assert!(a.len() >= (mr - 1) * lda + words && panel.len() >= words * nr && c.len() >= (mr - 1) * ldc + nr);
        // SAFETY: `new` has picked what the Isa proves; the assertion is the rest of the contract.
        unsafe { (self.run)(words, a.as_ptr(), lda, panel.as_ptr(), c.as_mut_ptr(), ldc) }
    }
}
