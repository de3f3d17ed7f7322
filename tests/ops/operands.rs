//! What products are rounded to: bf16 and bytes of the CPU backend, bit by bit.

use capsieve_engine::Precision;
use capsieve_engine::testing::{Backend, Columns, CpuBackend, Epilogue, Isa, Span};

use super::{LIMITS, values};

/// Largest error of a product of bytes over the sum of its terms' magnitudes: the integers are exact, their scales are f32.
const SCALES_TOLERANCE: f64 = 1e-6;

/// `x [m, k]` times `w [n, k]` transposed, plus `b`.
fn product(isa: Isa, precision: Precision, [x, w, b]: [&[f32]; 3], k: usize, epilogue: Epilogue) -> Vec<f32> {
    let mut backend = CpuBackend::new(2, isa, precision, LIMITS).unwrap();
    let (m, n) = (x.len() / k, b.len());
    let linear = backend.linear_weights(w, b, k).unwrap();
    let input = backend.upload(m, k, x).unwrap();
    let mut out = backend.upload(m, n, &vec![1.0; m * n]).unwrap();
    backend.run(|backend| backend.linear(&input, m, &linear, epilogue, &mut out));
    let mut got = vec![0.0; m * n];
    backend.read(&out, &mut got).unwrap();
    got
}

#[test]
fn bf16_rounds_to_nearest_even() {
    let mut x: Vec<f32> = (0..4000_u32).map(|i| f32::from_bits(i.wrapping_mul(0x9E37_79B9))).collect();
    // Halves between two numbers, the largest ones, what is none.
    x.extend([0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_ffff, 0x7f80_0000, 0xff80_0000].map(f32::from_bits));
    x.extend([0x7fc0_0000, 0x7f80_0001, 0x7fff_ffff, 0xffff_ffff].map(f32::from_bits));
    for isa in Isa::available_for(Precision::Bf16) {
        for (k, rest) in [(1, &[][..]), (2, &[0.0]), (3, &[0.0, 0.0])] {
            let rows: Vec<f32> = x.iter().flat_map(|x| std::iter::once(*x).chain(rest.iter().copied())).collect();
            let weight: Vec<f32> = std::iter::once(1.0).chain(rest.iter().copied()).collect();
            let got = product(isa, Precision::Bf16, [&rows, &weight, &[0.0]], k, Epilogue::Store);
            for (x, got) in x.iter().zip(got) {
                let want = half::bf16::from_f32(*x).to_f32();
                // The instruction takes the smallest numbers for 0.
                let same =
                    got == want || (got.is_nan() && want.is_nan()) || (got == 0.0 && want.abs() < f32::MIN_POSITIVE);
                assert!(same, "{} {k}: {x:e} became {got:e}, not {want:e}", isa.name());
            }
        }
    }
}

/// As the documentation says: steps of a 127th of the largest magnitude, of a 63rd for weights where [`sums_pairs`].
fn quantised(x: &[f32], count: f32) -> (f64, Vec<i64>) {
    let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let steps = if most == 0.0 { 0.0 } else { count / most };
    (f64::from(most) / f64::from(count), x.iter().map(|x| i64::from((x * steps).round_ties_even() as i8)).collect())
}

/// Whether this instruction set sums pairs of bytes' products in 16 bits, for which weights have 7.
pub(crate) fn sums_pairs(isa: Isa) -> bool {
    ["avx2", "avx512"].contains(&isa.name())
}

#[test]
fn bytes_are_exact_products_of_quantised_rows_and_columns() {
    // Around every tile edge, fours of K, and the pass over K (4096).
    for (m, n, k) in
        [(1, 1, 1), (1, 2, 3), (5, 7, 4), (6, 16, 5), (7, 65, 17), (13, 63, 64), (97, 17, 31), (3, 130, 4097)]
    {
        let (x, w, b) = (values(m * k, 1), values(n * k, 2), values(n, 3));
        let rows: Vec<_> = x.chunks(k).map(|x| quantised(x, 127.0)).collect();
        let mut first = [None, None];
        for isa in Isa::available_for(Precision::Int8) {
            let pairs = sums_pairs(isa);
            let columns: Vec<_> = w.chunks(k).map(|w| quantised(w, if pairs { 63.0 } else { 127.0 })).collect();
            let got = product(isa, Precision::Int8, [&x, &w, &b], k, Epilogue::Accumulate);
            for (i, got) in got.iter().enumerate() {
                let ((row_scale, row), (column_scale, column)) = (&rows[i / n], &columns[i % n]);
                let scale = row_scale * column_scale;
                let terms = row.iter().zip(column).map(|(a, b)| a * b);
                let want = terms.clone().sum::<i64>() as f64 * scale + f64::from(b[i % n]) + 1.0;
                let allowed = SCALES_TOLERANCE * (terms.map(i64::abs).sum::<i64>() as f64 * scale + 4.0);
                assert!((f64::from(*got) - want).abs() <= allowed, "{} {m}x{n}x{k} {i}: {got}, not {want}", isa.name());
            }
            // Sums of the same integers: the same on every instruction set.
            assert_eq!(
                first[usize::from(pairs)].get_or_insert_with(|| got.clone()),
                &got,
                "{} {m}x{n}x{k}",
                isa.name()
            );
        }
    }
}

#[test]
fn rows_of_bytes_that_are_no_numbers_say_so_and_spoil_no_other() {
    let k = 9;
    let (w, b) = (values(5 * k, 2), values(5, 3));
    for isa in Isa::available_for(Precision::Int8) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = values(4 * k, 1);
            x[k + 7] = bad;
            x[3 * k..].fill(0.0);
            let got = product(isa, Precision::Int8, [&x, &w, &b], k, Epilogue::Store);
            assert!(got[5..10].iter().all(|value| value.is_nan()), "{} {bad}: {got:?}", isa.name());
            assert!(got[..5].iter().chain(&got[10..]).all(|value| value.is_finite()), "{} {bad}", isa.name());
            assert_eq!(got[15..], b, "a row of zeros is the bias");
        }
    }
}

/// One query each against two keys, heads of one value: `out[i] = (e^(q[i] k[0]) v[0] + e^(q[i] k[1]) v[1]) / (..)`.
fn of_two_keys(isa: Isa, precision: Precision, q: &[f32], k: [f32; 2], v: [f32; 2]) -> Vec<f32> {
    let mut backend = CpuBackend::new(2, isa, precision, LIMITS).unwrap();
    let [q, k, v] = [q, &k, &v].map(|x| (x.len(), backend.upload(x.len(), 1, x).unwrap()));
    let mut out = backend.alloc(q.0, 1).unwrap();
    let views = [&q, &k, &v].map(|(_, buf)| Columns { buf, first: 0 });
    let span = Span { q: 0, q_len: q.0, kv: 0, kv_len: 2 };
    backend.run(|backend| backend.attention(views, &[span], 1, &mut out));
    let mut got = vec![0.0; q.0];
    backend.read(&out, &mut got).unwrap();
    got
}

/// Absolute error of a softmax's weight; measured 1.5e-7.
const SOFTMAX_TOLERANCE: f64 = 2.5e-7;

#[test]
fn softmax_is_exact_to_a_few_units() {
    let q: Vec<f32> = (0..40_000).map(|i| i as f32 / 400.0).collect();
    for isa in Isa::available_for(Precision::F32) {
        let mut most = 0.0_f64;
        for (q, got) in q.iter().zip(of_two_keys(isa, Precision::F32, &q, [0.0, -1.0], [0.0, 1.0])) {
            let power = (-f64::from(*q)).exp();
            most = most.max((f64::from(got) - power / (1.0 + power)).abs());
            assert!(got.is_finite());
        }
        println!("{}: {most:.1e}", isa.name());
        assert!(most <= SOFTMAX_TOLERANCE, "{}: {most:e}", isa.name());
    }
}

#[test]
fn attention_of_no_numbers_says_so_and_spoils_no_other_row() {
    for precision in [Precision::F32, Precision::Bf16] {
        for isa in Isa::available_for(precision) {
            // The second query's scores are infinite, the third is no number.
            let got = of_two_keys(isa, precision, &[0.0, f32::INFINITY, f32::NAN, 0.0], [1.0, -1.0], [2.0, 4.0]);
            assert_eq!((got[0], got[3]), (3.0, 3.0), "{} {}", isa.name(), precision.name());
            assert!(got[1].is_nan() && got[2].is_nan(), "{} {}: {got:?}", isa.name(), precision.name());
            let got = of_two_keys(isa, precision, &[1.0], [0.0, f32::NEG_INFINITY], [2.0, 4.0]);
            assert_eq!(got, [2.0], "{} {}", isa.name(), precision.name());
        }
    }
}

#[test]
fn values_of_attention_round_to_nearest_even_where_they_are_bf16() {
    let numbers: Vec<f32> = values(400, 5).into_iter().chain([1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1.003]).collect();
    for isa in Isa::available_for(Precision::Bf16) {
        let kept = |x: f32| if isa.name() == "avx512_bf16" { half::bf16::from_f32(x).to_f32() } else { x };
        for [a, b] in numbers.windows(2).map(|pair| [pair[0], pair[1]]) {
            // Both weigh the same.
            let got = of_two_keys(isa, Precision::Bf16, &[0.0], [1.0, 1.0], [a, b]);
            assert_eq!(got, [(kept(a) + kept(b)) * 0.5], "{} {a} {b}", isa.name());
        }
    }
}
