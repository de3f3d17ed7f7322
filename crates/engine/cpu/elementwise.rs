//! Element-wise and row-wise operations: exp, GELU, softmax, layer norm.
//!
//! All are plain loops over slices that the compiler vectorises for each instruction set ([`super::simd::dispatch`]);
//! sums run over [`LANES`] partial sums, which fixes their order on every machine of an instruction set.

use super::simd::{dispatch, mul_add};

/// Partial sums of a reduction.
const LANES: usize = 16;
/// Of 2 in a softmax: its power is a normal number, and nothing beside 1.
const LEAST_EXPONENT: f32 = -125.5;

/// `erf(x)`, absolute error below 5e-7 over all x (4.2e-7 without fused multiply-adds, 3.3e-7 with them).
///
/// The rational minimax approximation `x P(x²) / Q(x²)` on [-4, 4] that Eigen and XLA use; beyond it erf is ±1 in f32.
#[inline(always)]
fn erf<const F: bool>(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let x2 = x * x;
    let mut p = -2.726_142_4e-10;
    for c in [2.770_681_5e-8, -2.101_024e-6, -5.692_506e-5, -7.349_906_4e-4, -2.954_6e-3, -1.609_603_3e-2] {
        p = mul_add::<F>(p, x2, c);
    }
    let mut q = -1.456_607_15e-5;
    for c in [-2.133_740_5e-4, -1.682_827e-3, -7.373_329_3e-3, -1.426_473_9e-2] {
        q = mul_add::<F>(q, x2, c);
    }
    x * p / q
}

/// `2^(x factor)` for x <= 0, absolute error below 2e-7 (relative: 2e-7 down to 2^-1.5, then growing with the exponent to 4e-6), and
/// 2^-125.5 where x is below `least`, which is that by the factor.
///
/// It is `2^n 2^f` with `n + f = x factor` and `|f| <= 0.5`. The polynomial of `2^f` is the minimax one that begins with 1 + f ln 2; its
/// error is 1.1e-7, with the rounding of its steps 1.7e-7.
#[inline(always)]
fn exp2_of_negative<const F: bool>(x: f32, factor: f32, least: f32) -> f32 {
    /// 1.5 * 2^23 + 127: adding it rounds to an integer, whose sum with the exponent's bias then stands in the low bits.
    const ROUND: f32 = 12_583_039.0;
    // What is no number stays none.
    let x = if x < least { least } else { x };
    let shifted = mul_add::<F>(x, factor, ROUND);
    let f = mul_add::<F>(x, factor, ROUND - shifted);
    let mut p = 1.330_053_1e-3;
    for c in [9.669_661e-3, 5.550_558_5e-2, 0.240_222_83, std::f32::consts::LN_2, 1.0] {
        p = mul_add::<F>(p, f, c);
    }
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// `0.5 x (1 + erf(x / √2))`
#[inline(always)]
pub(super) fn gelu_of<const F: bool>(x: f32) -> f32 {
    0.5 * x * (1.0 + erf::<F>(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// Folds `x` into [`LANES`] accumulators with `step(accumulator, value)`, then these into one with `join`.
#[inline(always)]
fn fold_lanes(x: &[f32], start: f32, step: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = step(*lane, *v);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane = step(*lane, *v);
    }
    // Or the compiler would take the accumulators apart in the loop, by the halves and quarters in which they are joined here.
    std::hint::black_box(&mut lanes);
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    fold_lanes(x, 0.0, |a, b| a + b, |a, b| a + b)
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[inline(always)]
fn softmax_body<const F: bool>(x: &mut [f32], factor: f32) -> f32 {
    let max = fold_lanes(x, f32::NEG_INFINITY, larger, larger);
    let factor = factor * std::f32::consts::LOG2_E;
    let least = LEAST_EXPONENT / factor;
    let mut sums = [0.0_f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (sum, v) in sums.iter_mut().zip(chunk) {
            *v = exp2_of_negative::<F>(*v - max, factor, least);
            *sum += *v;
        }
    }
    for (sum, v) in sums.iter_mut().zip(rest) {
        *v = exp2_of_negative::<F>(*v - max, factor, least);
        *sum += *v;
    }
    sum(&sums)
}

dispatch! {
    /// `x = e^(factor (x - max x))` for a factor above 0; returns the sum, which the caller divides by after the product with the
    /// values. -∞ adds nothing to any other.
    pub(super) fn softmax_unscaled(x: &mut [f32], factor: f32) -> f32 = softmax_body
}

#[inline(always)]
fn layer_norm_row<const F: bool>(x: &mut [f32], gain: &[f32], bias: &[f32], eps: f32) {
    let count = gain.len() as f32;
    let mean = sum(x) / count;
    for v in x.iter_mut() {
        *v -= mean;
    }
    let squares = fold_lanes(x, 0.0, |sum, v| mul_add::<F>(v, v, sum), |a, b| a + b);
    let scale = 1.0 / (squares / count + eps).sqrt();
    for ((v, gain), bias) in x.iter_mut().zip(gain).zip(bias) {
        *v = mul_add::<F>(*v * scale, *gain, *bias);
    }
}

#[inline(always)]
fn layer_norm_body<const F: bool>(x: &[f32], gain: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(gain.len()).zip(out.chunks_exact_mut(gain.len())) {
        out.copy_from_slice(x);
        layer_norm_row::<F>(out, gain, bias, eps);
    }
}

dispatch! {
    /// Layer norm of each row of `x [rows, gain.len()]`; two passes, so that a large mean does not eat the variance.
    pub(super) fn layer_norm(x: &[f32], gain: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) = layer_norm_body
}

dispatch! {
    /// Layer norm of one row.
    pub(super) fn layer_norm_in_place(x: &mut [f32], gain: &[f32], bias: &[f32], eps: f32) = layer_norm_row
}

#[inline(always)]
fn add_body<const F: bool>(x: &[f32], y: &[f32], out: &mut [f32]) {
    for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
        *out = x + y;
    }
}

dispatch! {
    /// `out = x + y`
    pub(super) fn add(x: &[f32], y: &[f32], out: &mut [f32]) = add_body
}

#[inline(always)]
fn scale_body<const F: bool>(x: &[f32], factor: f32, out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = x * factor;
    }
}

dispatch! {
    /// `out = x * factor`
    pub(super) fn scale(x: &[f32], factor: f32, out: &mut [f32]) = scale_body
}
