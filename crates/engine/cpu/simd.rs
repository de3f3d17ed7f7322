//! Which vector instructions this processor has, and the five vector operations the matrix kernel needs.
//!
//! Detection happens once, when the backend is made; every kernel then takes the [`Isa`] by value. Kernels are written
//! once: the matrix tile over the trait [`Simd`], everything element-wise as plain loops that the compiler vectorises
//! inside a function compiled for the instruction set (see [`dispatch`]).

/// An instruction set this process may use. Values are only made by [`Isa::detect`] and [`Isa::available`], so holding
/// one proves that the processor has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// Environment variable that forces an instruction set: `avx512`, `avx2` or `portable`.
pub(super) const ISA_VARIABLE: &str = "CAPSIEVE_CPU_ISA";

impl Isa {
    /// All instruction sets of this processor, best first.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw");
            if fma && avx512 {
                found.push(Isa(Kind::Avx512));
            }
            if fma {
                found.push(Isa(Kind::Avx2));
            }
        }
        found.push(Isa(Kind::Portable));
        found
    }

    /// The best instruction set, or the one named by [`ISA_VARIABLE`]. A name this processor lacks is ignored with the
    /// best one taken instead: the variable is for tests and comparisons, not for users.
    pub fn detect() -> Isa {
        let available = Self::available();
        let wanted = std::env::var(ISA_VARIABLE).unwrap_or_default();
        available.iter().copied().find(|isa| isa.name() == wanted).unwrap_or(available[0])
    }

    /// "avx512", "avx2" or "portable".
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            Kind::Portable => "portable",
        }
    }

    pub(super) fn kind(self) -> Kind {
        self.0
    }
}

/// A register of f32 lanes.
///
/// # Safety
/// The methods of an implementation may only run on a processor that has its instruction set; pointers must be valid
/// for `LANES` reads or writes.
pub(super) trait Simd {
    type V: Copy;
    const LANES: usize;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    pub(in crate::cpu) struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            // SAFETY: the trait's contract: the processor has AVX-512F.
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: the trait's contract: AVX-512F, and p is valid for 16 reads.
            unsafe { _mm512_loadu_ps(p) }
        }

        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            // SAFETY: the trait's contract: AVX-512F, and p is valid for 16 writes.
            unsafe { _mm512_storeu_ps(p, v) }
        }

        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: the trait's contract: the processor has AVX-512F.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
    }

    pub(in crate::cpu) struct Avx2;

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            // SAFETY: the trait's contract: the processor has AVX2.
            unsafe { _mm256_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: the trait's contract: AVX2, and p is valid for 8 reads.
            unsafe { _mm256_loadu_ps(p) }
        }

        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            // SAFETY: the trait's contract: AVX2, and p is valid for 8 writes.
            unsafe { _mm256_storeu_ps(p, v) }
        }

        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: the trait's contract: the processor has FMA.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
    }
}

/// Four lanes in plain Rust: every target has them, and NEON and SSE map onto them.
pub(super) struct Portable;

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: the trait's contract: p is valid for 4 reads; the cast type has f32's alignment.
        unsafe { *p.cast::<[f32; 4]>() }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 4]) {
        // SAFETY: the trait's contract: p is valid for 4 writes; the cast type has f32's alignment.
        unsafe { *p.cast::<[f32; 4]>() = v }
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| mul_add::<{ cfg!(target_arch = "aarch64") }>(a[i], b[i], c[i]))
    }
}

/// `a * b + c`, fused where the instruction set has it: without one, `f32::mul_add` is a slow library call.
#[inline(always)]
pub(super) fn mul_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Independent chains of [`multiply_adds`]: more than latency times units, fewer than AVX2's registers.
const CHAINS: usize = 12;

/// # Safety
/// The processor has the instruction set.
#[inline(always)]
unsafe fn chains<S: Simd>(rounds: usize) -> usize {
    // SAFETY: the caller vouches for the instruction set; nothing here goes through a pointer.
    unsafe {
        let (factor, addend) = (S::splat(0.999), S::splat(0.001));
        let mut sums = [addend; CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = S::fma(*sum, factor, addend);
            }
        }
        std::hint::black_box(sums);
    }
    2 * S::LANES * CHAINS * rounds
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn chains_avx512(rounds: usize) -> usize {
    // SAFETY: passed on to the caller.
    unsafe { chains::<Avx512>(rounds) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn chains_avx2(rounds: usize) -> usize {
    // SAFETY: passed on to the caller.
    unsafe { chains::<Avx2>(rounds) }
}

/// Multiply-adds that touch nothing but registers, on this thread: the bound that benchmarks compare with. The
/// floating-point operations done.
pub(super) fn multiply_adds(isa: Isa, rounds: usize) -> usize {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the Isa proves the features.
        Kind::Avx512 => unsafe { chains_avx512(rounds) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the Isa proves the features.
        Kind::Avx2 => unsafe { chains_avx2(rounds) },
        // SAFETY: no features needed.
        Kind::Portable => unsafe { chains::<Portable>(rounds) },
    }
}

/// Compiles a loop for each instruction set and picks one at run time.
///
/// `dispatch! { fn name(args) = body::<FUSED> }` makes `name(isa, args)`, which runs `body` (an `#[inline(always)]`
/// safe function with one const parameter: whether fused multiply-add is there) inside a function compiled for `isa`.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        $vis fn $name(isa: $crate::cpu::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            use $crate::cpu::simd::Kind;

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { $body::<true>($($arg),*) }

            match isa.kind() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Isa` of this kind is only made after the processor was asked for these features.
                Kind::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: an `Isa` of this kind is only made after the processor was asked for these features.
                Kind::Avx2 => unsafe { avx2($($arg),*) },
                Kind::Portable => $body::<{ cfg!(target_arch = "aarch64") }>($($arg),*),
            }
        }
    };
}
pub(super) use dispatch;
