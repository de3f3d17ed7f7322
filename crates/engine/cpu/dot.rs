//! Products of 32-bit words: the one operation that the matrix kernel is made of, for each instruction set and kind of operand.
//!
//! A word holds one f32, two bf16 or four bytes that follow each other along K; a lane of a register multiplies the words of one
//! column. So all three kinds have the same panels, the same loop and the same sums of 32 bits, see [`super::tile`].

/// A register of 32-bit words, and how words are multiplied and summed.
///
/// # Safety
/// The methods of an implementation may only run on a processor that has its instruction set; pointers must be valid for
/// `LANES` reads or writes.
pub(super) trait Dot {
    type V: Copy;
    const LANES: usize;
    unsafe fn zero() -> Self::V;
    unsafe fn splat(word: u32) -> Self::V;
    unsafe fn load(p: *const u32) -> Self::V;
    unsafe fn store(p: *mut u32, v: Self::V);
    /// `sum + Σ a b` over the values of each lane's words.
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V;
}

/// Words of f32, on AVX-512, AVX2 and in plain Rust.
pub(super) struct F32;
/// Words of two bf16 with sums in f32, by `vdpbf16ps`.
#[cfg(target_arch = "x86_64")]
pub(super) struct Bf16;
/// Words of four bytes, u8 times i8, with sums in i32: by `vpdpbusd`. All implementations give the same sums of the same bytes.
pub(super) struct Bytes;
/// The same where there is no instruction for it: by products that are summed in pairs in 16 bits, where those with weights of 7 bits
/// fit (2 x 255 x 63).
#[cfg(target_arch = "x86_64")]
pub(super) struct PairBytes;

/// Four lanes in plain Rust: every target has them, and NEON and SSE map onto them.
pub(super) struct Portable<Kind>(std::marker::PhantomData<Kind>);

const PORTABLE_LANES: usize = 4;

/// What a word of each kind is in plain Rust: also the reference of its instructions.
pub(super) trait Word {
    fn dot(sum: u32, a: u32, b: u32) -> u32;
}

impl Word for F32 {
    #[inline(always)]
    fn dot(sum: u32, a: u32, b: u32) -> u32 {
        let [sum, a, b] = [sum, a, b].map(f32::from_bits);
        super::simd::mul_add::<{ cfg!(target_arch = "aarch64") }>(a, b, sum).to_bits()
    }
}

impl Word for Bytes {
    #[inline(always)]
    fn dot(sum: u32, a: u32, b: u32) -> u32 {
        let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
        // 2^31 is more than any layer sums up: 4096 x 255 x 127 is 2^27.
        products.fold(sum, |sum, (a, b)| sum.wrapping_add_signed(i32::from(a) * i32::from(b.cast_signed())))
    }
}

impl<Kind: Word> Dot for Portable<Kind> {
    type V = [u32; PORTABLE_LANES];
    const LANES: usize = PORTABLE_LANES;

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0; PORTABLE_LANES]
    }

    #[inline(always)]
    unsafe fn splat(word: u32) -> Self::V {
        [word; PORTABLE_LANES]
    }

    #[inline(always)]
    unsafe fn load(p: *const u32) -> Self::V {
        // SAFETY: the trait's contract: p is valid for 4 reads; the cast type has u32's alignment.
        unsafe { *p.cast() }
    }

    #[inline(always)]
    unsafe fn store(p: *mut u32, v: Self::V) {
        // SAFETY: the trait's contract: p is valid for 4 writes; the cast type has u32's alignment.
        unsafe { *p.cast() = v }
    }

    #[inline(always)]
    unsafe fn dot(sum: Self::V, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| Kind::dot(sum[i], a[i], b[i]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::marker::PhantomData;

    use super::{Bf16, Bytes, Dot, F32, PairBytes};

    pub(in crate::cpu) struct Avx512<Kind>(PhantomData<Kind>);
    pub(in crate::cpu) struct Avx2<Kind>(PhantomData<Kind>);

    /// Everything of [`Dot`] but the product, which is the kind's.
    macro_rules! dot {
        ($isa:ident<$kind:ident>, $v:ty, $lanes:literal, $zero:ident, $splat:ident, $load:ident, $store:ident,
         |$sum:ident, $a:ident, $b:ident| $dot:expr) => {
            impl Dot for $isa<$kind> {
                type V = $v;
                const LANES: usize = $lanes;

                #[inline(always)]
                unsafe fn zero() -> $v {
                    // SAFETY: the trait's contract: the processor has the instruction set.
                    unsafe { $zero() }
                }

                #[inline(always)]
                unsafe fn splat(word: u32) -> $v {
                    // SAFETY: the trait's contract: the processor has the instruction set.
                    unsafe { $splat(word.cast_signed()) }
                }

                #[inline(always)]
                unsafe fn load(p: *const u32) -> $v {
                    // SAFETY: the trait's contract: the instruction set, and p is valid for the lanes.
                    unsafe { $load(p.cast()) }
                }

                #[inline(always)]
                unsafe fn store(p: *mut u32, v: $v) {
                    // SAFETY: the trait's contract: the instruction set, and p is valid for the lanes.
                    unsafe { $store(p.cast(), v) }
                }

                #[inline(always)]
                unsafe fn dot($sum: $v, $a: $v, $b: $v) -> $v {
                    // SAFETY: the trait's contract: the processor has the instruction set.
                    unsafe { $dot }
                }
            }
        };
    }

    macro_rules! dot512 {
        ($kind:ident, |$sum:ident, $a:ident, $b:ident| $dot:expr) => {
            dot!(
                Avx512<$kind>,
                __m512i,
                16,
                _mm512_setzero_si512,
                _mm512_set1_epi32,
                _mm512_loadu_si512,
                _mm512_storeu_si512,
                |$sum, $a, $b| $dot
            );
        };
    }

    macro_rules! dot256 {
        ($kind:ident, |$sum:ident, $a:ident, $b:ident| $dot:expr) => {
            dot!(
                Avx2<$kind>,
                __m256i,
                8,
                _mm256_setzero_si256,
                _mm256_set1_epi32,
                _mm256_loadu_si256,
                _mm256_storeu_si256,
                |$sum, $a, $b| $dot
            );
        };
    }

    dot512!(F32, |sum, a, b| {
        let (a, b, sum) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(sum));
        _mm512_castps_si512(_mm512_fmadd_ps(a, b, sum))
    });

    dot512!(Bf16, |sum, a, b| {
        let (a, b) = (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b));
        _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), a, b))
    });

    dot512!(Bytes, |sum, a, b| _mm512_dpbusd_epi32(sum, a, b));

    dot512!(PairBytes, |sum, a, b| {
        _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)))
    });

    dot256!(F32, |sum, a, b| {
        let (a, b, sum) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(sum));
        _mm256_castps_si256(_mm256_fmadd_ps(a, b, sum))
    });

    dot256!(Bytes, |sum, a, b| _mm256_dpbusd_avx_epi32(sum, a, b));

    dot256!(PairBytes, |sum, a, b| {
        _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))
    });
}
