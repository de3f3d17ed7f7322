//! Every backend operation against a naive f64 reference, over awkward shapes, on every instruction set of this machine
//! and, with feature `emulator`, by every CUDA kernel in every precision.
//!
//! Outputs are poisoned with NaN before an operation and have spare rows behind the ones it may write; the spare rows
//! must still be poisoned afterwards. Inputs are rounded to what the backend stores, so that the reference sees the same.

mod absorbed;
mod checks;
pub(crate) mod operands;

use capsieve_engine::Precision;
use capsieve_engine::testing::{AttentionLimits, Backend, CpuBackend, Isa};

/// Largest error of a product over the sum of its terms' magnitudes; measured 2.4e-7.
const PRODUCT_TOLERANCE: f64 = 1e-6;
/// Absolute error of GELU for |x| <= 12; measured 9.6e-7, which is how exact an f32 near 12 is.
const GELU_TOLERANCE: f64 = 1.5e-6;
/// Absolute error of normed values of size 1..4; measured 1.1e-6.
const NORM_TOLERANCE: f64 = 5e-6;
/// Absolute error of attention over values in [-2, 2]; measured 1.1e-6.
const ATTENTION_TOLERANCE: f64 = 5e-6;

const SPARE_ROWS: usize = 3;
const LIMITS: AttentionLimits = AttentionLimits { keys: 700, head_size: 80 };

/// What a check runs on.
struct On {
    name: String,
    /// Of products.
    precision: Precision,
    /// Of what is stored: processors round only what they multiply.
    storage: Precision,
}

impl On {
    /// Relative error of storing a value: half a unit in the last place.
    fn rounding(&self) -> f64 {
        match self.precision {
            Precision::F32 | Precision::Tf32 => 0.0,
            Precision::F16 => 1.0 / 2048.0,
            Precision::Bf16 | Precision::Int8 => 1.0 / 256.0,
        }
    }

    /// A value that loses nothing when it is multiplied.
    fn stored(&self, value: f32) -> f32 {
        rounded(value, self.precision)
    }

    /// A value that is stored and not multiplied.
    fn kept(&self, value: f32) -> f32 {
        rounded(value, self.storage)
    }

    /// Seeded values in [-2, 2) as this backend stores them.
    fn values(&self, count: usize, seed: u64) -> Vec<f32> {
        values(count, seed).into_iter().map(|v| self.stored(v)).collect()
    }

    /// Fails with the worst element if any `|got - want|` exceeds `tolerance * scale` by more than `roundings` times the
    /// rounding of what is stored; NaN fails.
    fn assert_close(&self, got: &[f32], want: &[f64], scale: &[f64], (tolerance, roundings): (f64, f64), what: &str) {
        assert_eq!(got.len(), want.len(), "{} {what}", self.name);
        let error = |i: usize| {
            let allowed = tolerance * scale[i % scale.len()] + roundings * self.rounding() * want[i].abs().max(1.0);
            (f64::from(got[i]) - want[i]).abs() / allowed
        };
        let worst = (0..got.len()).max_by(|a, b| error(*a).total_cmp(&error(*b)));
        if let Some(i) = worst {
            let (name, got, want, times) = (&self.name, got[i], want[i], error(i));
            assert!(
                times <= 1.0,
                "{name} {what}: element {i} is {got}, wanted {want}, {times:.1} times what is allowed"
            );
        }
    }
}

/// Seeded values in [-2, 2).
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

fn rounded(value: f32, precision: Precision) -> f32 {
    match precision {
        Precision::F32 | Precision::Tf32 => value,
        Precision::F16 => half::f16::from_f32(value).to_f32(),
        Precision::Bf16 | Precision::Int8 => half::bf16::from_f32(value).to_f32(),
    }
}

/// Makes tests of checks that are generic over the backend.
macro_rules! on_every_backend {
    ($($test:ident)*) => {$(
        #[test]
        fn $test() {
            for (threads, precision) in [(1, Precision::F32), (3, Precision::F32), (2, Precision::Bf16)] {
                for isa in Isa::available_for(precision) {
                    let mut backend = CpuBackend::new(threads, isa, precision, LIMITS).unwrap();
                    let name = format!("{} x {threads} {}", isa.name(), precision.name());
                    let on = On { name, precision, storage: Precision::F32 };
                    checks::$test(&mut backend, &on);
                }
            }
            #[cfg(feature = "emulator")]
            for order in crate::support::ORDERS {
                for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
                    let mut backend = crate::support::emulated(order, precision, 2048);
                    let on = On { name: format!("emulator {order:?} {}", precision.name()), precision, storage: precision };
                    checks::$test(&mut backend, &on);
                }
            }
        }
    )*
        /// On a real card: `capsieve-tests --ignored card::`, see scripts/gpu-check.
        #[cfg(feature = "cuda")]
        mod card {
            use super::*;
            $(
                #[test]
                #[ignore = "needs an NVIDIA card"]
                fn $test() {
                    for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
                        let mut backend = crate::support::card(precision, 2048);
                        let on = On { name: format!("card {}", precision.name()), precision, storage: precision };
                        checks::$test(&mut backend, &on);
                    }
                }
            )*
        }
    };
}

on_every_backend! {
    linear_equals_naive
    gelu_is_the_erf_form
    layer_norm_equals_naive
    attention_equals_naive
    attention_of_real_heads_equals_naive
    attention_spans_are_separate
    attention_survives_huge_scores
    attention_sums_are_f32
    patchify_takes_patches_row_by_row
    images_that_follow_leave_those_before_alone
    image_tokens_prepend_the_class_row
    embed_adds_and_norms
    rows_are_taken_and_copied
    fused_operations_equal_their_parts
    products_of_later_rows_are_theirs
    reruns_are_identical
}

#[test]
fn fused_operations_of_bytes_equal_their_parts() {
    for isa in Isa::available_for(Precision::Int8) {
        let mut backend = CpuBackend::new(2, isa, Precision::Int8, LIMITS).unwrap();
        let on = On { name: isa.name().to_owned(), precision: Precision::Int8, storage: Precision::F32 };
        checks::fused_operations_equal_their_parts(&mut backend, &on);
    }
}

fn poisoned<B: Backend>(backend: &B, rows: usize, cols: usize) -> B::Buf {
    backend.upload(rows + SPARE_ROWS, cols, &vec![f32::NAN; (rows + SPARE_ROWS) * cols]).unwrap()
}

/// Reads the first `rows` rows and checks that the spare rows behind them were left alone.
fn read<B: Backend>(backend: &mut B, buf: &B::Buf, rows: usize, cols: usize) -> Vec<f32> {
    let mut all = vec![0.0; (rows + SPARE_ROWS) * cols];
    backend.read(buf, &mut all).unwrap();
    let spare = all.split_off(rows * cols);
    assert!(spare.iter().all(|v| v.is_nan()), "an operation wrote behind its rows");
    all
}

fn erf(x: f64) -> f64 {
    // Series below 3, continued fraction above: both converge to 1e-15.
    let z = x.abs();
    let value = if z < 3.0 {
        let (mut term, mut sum) = (z, z);
        for n in 1..100 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let fraction = (1..60).rev().fold(0.0, |f, k| f64::from(k) / 2.0 / (z + f));
        1.0 - (-z * z).exp() / ((z + fraction) * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}

fn naive_gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))
}

#[test]
fn erf_reference_is_right() {
    // Abramowitz & Stegun, table 7.1.
    for (x, want) in [(0.0, 0.0), (0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0)] {
        assert!((erf(x) - want).abs() < 1e-10, "erf({x}) = {}", erf(x));
        assert!((erf(-x) + want).abs() < 1e-10);
    }
    assert!((erf(2.999_999_9) - erf(3.000_000_1)).abs() < 1e-9, "the two branches meet");
}
