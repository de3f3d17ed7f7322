//! Numbers rounded to bf16, to nearest, ties to even: one at a time on every processor; in pairs, the words of the matrix kernel,
//! by the instruction that comes with products of bf16, which takes numbers too small to be normal for 0.

use super::simd::{Isa, Level};

/// The bits of the nearest bf16.
#[inline(always)]
pub(super) fn bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding could make a number of what is none.
    if x.is_nan() { 0x7fc0 } else { rounded }
}

/// Pairs of what follows each other in a row; what is missing to the last pair is 0.
pub(super) fn words(isa: Isa, x: &[f32], out: &mut [u32]) {
    assert!(isa.level() >= Level::Avx512Bf16 && out.len() == x.len().div_ceil(2));
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the `Isa` proves that the instructions are there.
    unsafe {
        x86::words(x, out);
    }
}

/// Pairs of what stands below each other in two rows.
pub(super) fn columns(isa: Isa, low: &[f32], high: &[f32], out: &mut [u32]) {
    assert!(isa.level() >= Level::Avx512Bf16 && out.len() == low.len() && out.len() == high.len());
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the `Isa` proves that the instructions are there.
    unsafe {
        x86::columns(low, high, out);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// Words of a register.
    const LANES: usize = 16;

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn words(x: &[f32], out: &mut [u32]) {
        let (blocks, rest) = x.as_chunks::<{ 2 * LANES }>();
        let (done, last) = out.split_at_mut(blocks.len() * LANES);
        for (block, out) in blocks.iter().zip(done.as_chunks_mut().0) {
            *out = neighbours(block);
        }
        if !rest.is_empty() {
            let mut block = [0.0; 2 * LANES];
            block[..rest.len()].copy_from_slice(rest);
            last.copy_from_slice(&neighbours(&block)[..last.len()]);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn columns(low: &[f32], high: &[f32], out: &mut [u32]) {
        let [(lows, low), (highs, high)] = [low, high].map(|row| row.as_chunks::<LANES>());
        let (done, last) = out.split_at_mut(lows.len() * LANES);
        for ((low, high), out) in lows.iter().zip(highs).zip(done.as_chunks_mut().0) {
            *out = below(low, high);
        }
        if !last.is_empty() {
            let [low, high] = [low, high].map(|rest| {
                let mut block = [0.0; LANES];
                block[..rest.len()].copy_from_slice(rest);
                block
            });
            last.copy_from_slice(&below(&low, &high)[..last.len()]);
        }
    }

    /// A word of each two.
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn neighbours(x: &[f32; 2 * LANES]) -> [u32; LANES] {
        // SAFETY: arrays of as many bytes as registers, of which every pattern is a value.
        unsafe {
            let halves = transmute::<[f32; 2 * LANES], [__m512; 2]>(*x);
            transmute::<[__m256bh; 2], [u32; LANES]>(halves.map(|half| _mm512_cvtneps_pbh(half)))
        }
    }

    /// A word of each two that have the same place.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn below(low: &[f32; LANES], high: &[f32; LANES]) -> [u32; LANES] {
        let turns: [u16; 2 * LANES] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as u16);
        // SAFETY: arrays of as many bytes as registers, of which every pattern is a value.
        unsafe {
            let halves = [low, high].map(|row| _mm512_cvtneps_pbh(transmute::<[f32; LANES], __m512>(*row)));
            let [turns, halves] =
                [transmute::<[u16; 2 * LANES], __m512i>(turns), transmute::<[__m256bh; 2], __m512i>(halves)];
            transmute::<__m512i, [u32; LANES]>(_mm512_permutexvar_epi16(turns, halves))
        }
    }
}
