//! Which vector instructions this processor has.
//!
//! Detection happens once, when the backend is made; every kernel then takes the [`Isa`] by value. Kernels are written once: the
//! matrix tile over the trait [`super::dot::Dot`], everything element-wise as plain loops that the compiler vectorises inside a
//! function compiled for the instruction set (see [`dispatch`]).

use crate::{Error, Precision};

/// An instruction set this process may use. Values are only made by [`Isa::detect`] and [`Isa::available`], so holding
/// one proves that the processor has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

/// Instruction sets, each with all that comes before it (but [`Level::AvxVnni`], which is a way of its own to have in 256 bits what
/// [`Level::Avx512Vnni`] has in 512).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "other processors have one of them"))]
pub(super) enum Level {
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// Sums of products of bytes, in 256 bits.
    AvxVnni,
    /// AVX-512 F, DQ, VL and BW.
    Avx512,
    /// Sums of products of bytes.
    Avx512Vnni,
    /// Sums of products of bf16.
    Avx512Bf16,
}

/// What element-wise loops are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// Environment variable that forces an instruction set by its name.
const ISA_VARIABLE: &str = "CAPSIEVE_CPU_ISA";

impl Isa {
    /// All instruction sets of this processor, best first.
    pub fn available() -> Vec<Isa> {
        let mut found = vec![Isa(Level::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw");
            let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
            let levels = [
                (avx2, Level::Avx2),
                (avx2 && is_x86_feature_detected!("avxvnni"), Level::AvxVnni),
                (avx512, Level::Avx512),
                (vnni, Level::Avx512Vnni),
                (vnni && is_x86_feature_detected!("avx512bf16"), Level::Avx512Bf16),
            ];
            found.extend(levels.into_iter().filter_map(|(there, level)| there.then_some(Isa(level))));
        }
        found.reverse();
        found
    }

    /// Those of them that do a precision's products in ways of their own, best first.
    pub fn available_for(precision: Precision) -> Vec<Isa> {
        let own = |isa: &Isa| match isa.0 {
            Level::Portable | Level::Avx2 | Level::Avx512 => true,
            Level::AvxVnni | Level::Avx512Vnni => precision == Precision::Int8,
            // Its bytes come with products of bf16 in the layers that bear no bytes.
            Level::Avx512Bf16 => matches!(precision, Precision::Bf16 | Precision::Int8),
        };
        Self::available().into_iter().filter(own).collect()
    }

    /// The best instruction set, or the one named by [`ISA_VARIABLE`]. Errors: a name of what this processor has not.
    pub fn detect() -> Result<Isa, Error> {
        let available = Self::available();
        let wanted = std::env::var(ISA_VARIABLE).unwrap_or_default();
        if wanted.is_empty() {
            return Ok(available[0]);
        }
        available.iter().copied().find(|isa| isa.name() == wanted).ok_or_else(|| Error::NoInstructions {
            wanted,
            available: available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2" or "portable".
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Avx512Bf16 => "avx512_bf16",
            Level::Avx512Vnni => "avx512_vnni",
            Level::Avx512 => "avx512",
            Level::AvxVnni => "avx_vnni",
            Level::Avx2 => "avx2",
            Level::Portable => "portable",
        }
    }

    pub(super) fn level(self) -> Level {
        self.0
    }

    pub(super) fn kind(self) -> Kind {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 => Kind::Avx512,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::AvxVnni => Kind::Avx2,
            _ => Kind::Portable,
        }
    }
}

/// Asks for the cache line of an address, which may be any: at once, or for later, which leaves L1 to others.
#[inline(always)]
pub(super) fn prefetch<const LATER: bool, T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE, and a prefetch does nothing where there is no memory.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if LATER { _mm_prefetch::<_MM_HINT_T1>(p.cast()) } else { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// `a * b + c`, fused where the instruction set has it: without one, `f32::mul_add` is a slow library call.
#[inline(always)]
pub(super) fn mul_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
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
