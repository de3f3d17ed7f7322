//! Cross-attention without keys and values equals cross-attention with them, in f64.

use capsieve_engine::Precision;
use capsieve_engine::testing::{Backend, CpuBackend, Images, Isa, Span};

use super::checks::naive_attention;
use super::{LIMITS, poisoned, read, rounded, values};

/// Largest error of an element in f32; measured 2.8e-6.
const F32_TOLERANCE: f64 = 1e-5;
/// The same in bf16, where queries, weights and sums of tokens are rounded on their way; measured 1.3e-2.
const BF16_TOLERANCE: f64 = 4e-2;

struct Case {
    heads: usize,
    size: usize,
    width: usize,
    tokens: usize,
    /// Query rows of each image.
    rows: &'static [usize],
}

/// `x [rows, inputs] wᵀ + b`, as f32.
fn linear(x: &[f32], w: &[f32], b: &[f32], inputs: usize) -> Vec<f32> {
    let row = |x: &[f32], o: usize| {
        let terms = x.iter().zip(&w[o * inputs..]).map(|(x, w)| f64::from(*x) * f64::from(*w));
        (terms.sum::<f64>() + f64::from(b[o])) as f32
    };
    x.chunks(inputs).flat_map(|x| (0..b.len()).map(move |o| row(x, o))).collect()
}

fn check(isa: Isa, precision: Precision, threads: usize, case: &Case) {
    let Case { heads, size, width, tokens, rows } = *case;
    let (hidden, images) = (heads * size, rows.len());
    let some = |count: usize, seed: u64, scale: f32| -> Vec<f32> {
        values(count, seed).into_iter().map(|v| rounded(v * scale, precision)).collect()
    };
    // Scores of a few units: weights that differ, and no row with but one.
    let small = 1.0 / (width as f32).sqrt();
    let (key, key_bias) = (some(hidden * width, 1, small), some(hidden, 2, 1.0));
    let (value, value_bias) = (some(hidden * width, 3, small), some(hidden, 4, 1.0));
    let (e, q) = (some(images * tokens * width, 5, 1.0), some(rows.iter().sum::<usize>() * hidden, 6, 1.0));
    let mut backend = CpuBackend::new(threads, isa, precision, LIMITS).unwrap();
    let absorbed = backend.absorbed_weights(&key, (&value, &value_bias), (width, heads)).unwrap().unwrap();
    let mut seen = backend.alloc_seen(Images { count: images, tokens, width }, size).unwrap().unwrap();
    let (e_buf, q_buf) =
        (backend.upload(images * tokens, width, &e).unwrap(), backend.upload(q.len() / hidden, hidden, &q).unwrap());
    // Images in the opposite order of their rows: an image is its span's, whichever that is.
    let mut first = 0;
    let span = |(i, rows): (usize, &usize)| {
        first += rows;
        Span { q: first - rows, q_len: *rows, kv: (images - 1 - i) * tokens, kv_len: tokens }
    };
    let spans: Vec<Span> = rows.iter().enumerate().map(span).collect();
    let mut out = poisoned(&backend, q.len() / hidden, hidden);
    backend.run(|backend| {
        assert!(backend.see(&e_buf, &spans, usize::MAX / images, &mut seen));
        backend.attend_seen(&q_buf, &spans, &seen, &absorbed, &mut out);
    });
    let got = read(&mut backend, &out, q.len() / hidden, hidden);
    let (k, v) = (linear(&e, &key, &key_bias, width), linear(&e, &value, &value_bias, width));
    let tolerance = if precision == Precision::F32 { F32_TOLERANCE } else { BF16_TOLERANCE };
    for span in &spans {
        for (row, head) in (span.q..span.q + span.q_len).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let at = row * hidden + head * size;
            let [k, v] = [&k, &v].map(|of| {
                let part = |token: usize| &of[(span.kv + token) * hidden + head * size..][..size];
                (0..tokens).map(part).collect::<Vec<_>>()
            });
            for (got, want) in got[at..at + size].iter().zip(naive_attention(&q[at..at + size], &k, &v)) {
                let error = (f64::from(*got) - want).abs();
                assert!(
                    error <= tolerance,
                    "{} {heads} x {size}, {width}, row {row} head {head}: {error:e}",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn absorbed_attention_equals_naive() {
    // Rows around tiles and blocks of 60 rows of all heads, with parts of heads in a block; tokens and widths around panels.
    let cases = [
        Case { heads: 1, size: 1, width: 1, tokens: 1, rows: &[1] },
        Case { heads: 3, size: 5, width: 17, tokens: 15, rows: &[1, 7, 2] },
        Case { heads: 5, size: 12, width: 64, tokens: 65, rows: &[13, 12] },
        Case { heads: 12, size: 64, width: 96, tokens: 50, rows: &[5, 20, 6] },
        Case { heads: 2, size: 20, width: 33, tokens: 145, rows: &[61] },
        Case { heads: 1, size: 80, width: 30, tokens: 16, rows: &[59, 60, 120] },
    ];
    for precision in [Precision::F32, Precision::Bf16] {
        for isa in Isa::available_for(precision) {
            for threads in [1, 3] {
                cases.iter().for_each(|case| check(isa, precision, threads, case));
            }
        }
    }
}

#[test]
fn absorbing_is_for_few_rows() {
    let isa = Isa::detect().unwrap();
    let mut backend = CpuBackend::new(1, isa, Precision::F32, LIMITS).unwrap();
    let mut seen = backend.alloc_seen(Images { count: 2, tokens: 4, width: 8 }, 16).unwrap().unwrap();
    let tokens = backend.alloc(8, 8).unwrap();
    for (rows, want) in [(15, true), (16, false), (40, false)] {
        let spans = [0, 1].map(|i| Span { q: i * rows, q_len: rows, kv: i * 4, kv_len: 4 });
        assert_eq!(backend.run(|backend| backend.see(&tokens, &spans, 16, &mut seen)), want, "{rows} rows an image");
    }
}
