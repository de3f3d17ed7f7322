//! Every backend operation against a naive f64 reference, over awkward shapes, on every instruction set of this machine.
//!
//! Outputs are poisoned with NaN before an operation and have spare rows behind the ones it may write; the spare rows
//! must still be poisoned afterwards.

use capsieve_engine::testing::{AttentionLimits, Backend, Columns, CpuBackend, Epilogue, Isa, Patches, Span, TextRows};

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

type Mat = <CpuBackend as Backend>::Buf;

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

fn each_backend(mut check: impl FnMut(&mut CpuBackend, &str)) {
    for isa in Isa::available() {
        for threads in [1, 3] {
            let mut backend = CpuBackend::new(threads, isa, LIMITS).unwrap();
            check(&mut backend, &format!("{} x {threads}", isa.name()));
        }
    }
}

fn poisoned(backend: &CpuBackend, rows: usize, cols: usize) -> Mat {
    backend.upload(rows + SPARE_ROWS, cols, &vec![f32::NAN; (rows + SPARE_ROWS) * cols]).unwrap()
}

/// Reads the first `rows` rows and checks that the spare rows behind them were left alone.
fn read(backend: &mut CpuBackend, buf: &Mat, rows: usize, cols: usize) -> Vec<f32> {
    let mut all = vec![0.0; (rows + SPARE_ROWS) * cols];
    backend.read(buf, &mut all).unwrap();
    let spare = all.split_off(rows * cols);
    assert!(spare.iter().all(|v| v.is_nan()), "an operation wrote behind its rows");
    all
}

/// Fails with the worst element if any `|got - want|` exceeds `tolerance * scale`; NaN fails.
fn assert_close(got: &[f32], want: &[f64], scale: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let error = |i: usize| (f64::from(got[i]) - want[i]).abs() / scale[i % scale.len()];
    let worst = (0..got.len()).max_by(|a, b| error(*a).total_cmp(&error(*b)));
    if let Some(i) = worst {
        assert!(error(i) <= tolerance, "{what}: element {i} is {}, wanted {}, error {:e}", got[i], want[i], error(i));
    }
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

#[test]
fn linear_equals_naive() {
    // Around every tile edge (4, 6 rows; 8, 16, 64 columns), the row block (96) and the column pass (1024).
    let shapes = [
        (1, 1, 1),
        (1, 2, 3),
        (5, 7, 9),
        (6, 64, 16),
        (7, 65, 17),
        (4, 8, 1024),
        (13, 63, 1025),
        (97, 16, 31),
        (191, 129, 64),
        (35, 200, 2050),
        (577, 24, 60),
        (2, 300, 768),
    ];
    each_backend(|backend, name| {
        for (m, n, k) in shapes {
            let (x, w, b) = (values(m * k, 1), values(n * k, 2), values(n, 3));
            let linear = backend.linear_weights(&w, &b, k).unwrap();
            let input = backend.upload(m, k, &x).unwrap();
            let before = values(m * n, 4);
            let (mut sums, mut scales) = (Vec::new(), Vec::new());
            for r in 0..m {
                for c in 0..n {
                    let terms = (0..k).map(|i| f64::from(x[r * k + i]) * f64::from(w[c * k + i]));
                    sums.push(terms.clone().sum::<f64>() + f64::from(b[c]));
                    scales.push(terms.map(f64::abs).sum::<f64>() + 4.0);
                }
            }
            for epilogue in [Epilogue::Store, Epilogue::Gelu, Epilogue::Accumulate] {
                let mut out = poisoned(backend, m, n);
                if epilogue == Epilogue::Accumulate {
                    let mut start = before.clone();
                    start.resize((m + SPARE_ROWS) * n, f32::NAN);
                    out = backend.upload(m + SPARE_ROWS, n, &start).unwrap();
                }
                backend.run(|backend| backend.linear(&input, m, &linear, epilogue, &mut out));
                let got = read(backend, &out, m, n);
                let want: Vec<f64> = match epilogue {
                    Epilogue::Store => sums.clone(),
                    Epilogue::Gelu => sums.iter().map(|v| naive_gelu(*v)).collect(),
                    Epilogue::Accumulate => sums.iter().zip(&before).map(|(s, b)| s + f64::from(*b)).collect(),
                };
                assert_close(&got, &want, &scales, PRODUCT_TOLERANCE, &format!("{name} {m}x{n}x{k} {epilogue:?}"));
            }
        }
    });
}

#[test]
fn gelu_is_the_erf_form() {
    // The tanh form is off by up to 4.7e-4 near 2.7.
    let x: Vec<f32> = (-1200..=1200).map(|i| i as f32 / 100.0).collect();
    each_backend(|backend, name| {
        let linear = backend.linear_weights(&[1.0], &[0.0], 1).unwrap();
        let input = backend.upload(x.len(), 1, &x).unwrap();
        let mut out = poisoned(backend, x.len(), 1);
        backend.run(|backend| backend.linear(&input, x.len(), &linear, Epilogue::Gelu, &mut out));
        let want: Vec<f64> = x.iter().map(|v| naive_gelu(f64::from(*v))).collect();
        assert_close(&read(backend, &out, x.len(), 1), &want, &[1.0], GELU_TOLERANCE, name);
    });
}

fn naive_norm(x: &[f32], gain: &[f32], bias: &[f32], eps: f64) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
    let parameters = gain.iter().zip(bias);
    let normed = x.iter().map(|v| (f64::from(*v) - mean) / (variance + eps).sqrt());
    normed.zip(parameters).map(|(v, (g, b))| v * f64::from(*g) + f64::from(*b)).collect()
}

#[test]
fn layer_norm_equals_naive() {
    each_backend(|backend, name| {
        for (rows, cols) in [(1, 1), (1, 15), (3, 16), (5, 17), (40, 60), (130, 192), (3, 1024)] {
            for (scale, offset, eps) in [(1.0, 0.0, 1e-5), (1e-3, 0.0, 1e-5), (1e-4, 0.0, 1e-12), (1.0, 100.0, 1e-12)] {
                let x: Vec<f32> = values(rows * cols, 5).iter().map(|v| v * scale + offset).collect();
                let (gain, bias) = (values(cols, 6), values(cols, 7));
                let norm = backend.norm_weights(&gain, &bias, eps).unwrap();
                let input = backend.upload(rows, cols, &x).unwrap();
                let mut out = poisoned(backend, rows, cols);
                backend.run(|backend| backend.layer_norm(&input, rows, &norm, &mut out));
                let want: Vec<f64> = x.chunks(cols).flat_map(|x| naive_norm(x, &gain, &bias, f64::from(eps))).collect();
                // A mean of 100 costs two digits of what is left: the inputs themselves are only that exact (measured 2.3e-5).
                let tolerance = if offset == 0.0 { NORM_TOLERANCE } else { 20.0 * NORM_TOLERANCE };
                let what = format!("{name} {rows}x{cols} scale {scale} offset {offset}");
                assert_close(&read(backend, &out, rows, cols), &want, &[1.0], tolerance, &what);
            }
        }
    });
}

/// One head's attention in f64.
fn naive_attention(q: &[f32], k: &[&[f32]], v: &[&[f32]]) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let scores: Vec<f64> = k.iter().map(|k| dot(q, k) / (q.len() as f64).sqrt()).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let weighted = |d: usize| scores.iter().zip(v).map(|(s, v)| (s - max).exp() * f64::from(v[d])).sum::<f64>();
    (0..q.len()).map(|d| weighted(d) / total).collect()
}

fn check_attention(backend: &mut CpuBackend, spans: &[Span], (heads, size): (usize, usize), scale: f32, what: &str) {
    let width = heads * size;
    let q_rows = spans.iter().map(|s| s.q + s.q_len).max().unwrap();
    let kv_rows = spans.iter().map(|s| s.kv + s.kv_len).max().unwrap();
    let q: Vec<f32> = values(q_rows * width, 8).iter().map(|v| v * scale).collect();
    let kv = values(kv_rows * 3 * width, 9);
    let (q_buf, kv_buf) =
        (backend.upload(q_rows, width, &q).unwrap(), backend.upload(kv_rows, 3 * width, &kv).unwrap());
    let mut out = poisoned(backend, q_rows, width);
    // k in the third block of columns, v in the second: nothing may assume an order.
    let views = [(&q_buf, 0), (&kv_buf, 2 * width), (&kv_buf, width)].map(|(buf, first)| Columns { buf, first });
    backend.run(|backend| backend.attention(views, spans, heads, &mut out));
    let got = read(backend, &out, q_rows, width);
    for span in spans {
        for head in 0..heads {
            let part = |row: usize, first: usize| &kv[row * 3 * width + first + head * size..][..size];
            let rows = span.kv..span.kv + span.kv_len;
            let k: Vec<_> = rows.clone().map(|r| part(r, 2 * width)).collect();
            let v: Vec<_> = rows.map(|r| part(r, width)).collect();
            for row in span.q..span.q + span.q_len {
                let at = row * width + head * size;
                let want = naive_attention(&q[at..at + size], &k, &v);
                let what = format!("{what} {span:?} head {head} row {row}");
                assert_close(&got[at..at + size], &want, &[1.0], ATTENTION_TOLERANCE, &what);
            }
        }
    }
}

#[test]
fn attention_equals_naive() {
    each_backend(|backend, name| {
        for (heads, size) in [(1, 1), (3, 20), (5, 12), (2, 64), (1, 80)] {
            for (q_len, kv_len) in [(1, 1), (1, 577), (23, 15), (24, 16), (25, 17), (7, 64), (50, 65), (31, 640)] {
                let span = [Span { q: 0, q_len, kv: 0, kv_len }];
                check_attention(backend, &span, (heads, size), 1.0, name);
            }
        }
    });
}

#[test]
fn attention_spans_are_separate() {
    let spans = [(0, 5, 4, 9), (5, 1, 0, 1), (6, 30, 13, 33), (36, 2, 0, 46)];
    let spans = spans.map(|(q, q_len, kv, kv_len)| Span { q, q_len, kv, kv_len });
    each_backend(|backend, name| check_attention(backend, &spans, (3, 20), 1.0, name));
}

#[test]
fn attention_survives_huge_scores() {
    let spans = [Span { q: 0, q_len: 9, kv: 0, kv_len: 40 }];
    each_backend(|backend, name| check_attention(backend, &spans, (2, 16), 1e4, name));
}

#[test]
fn patchify_takes_patches_row_by_row() {
    each_backend(|backend, name| {
        for (image_size, patch_size, images) in [(8, 4, 1), (9, 4, 2), (48, 16, 3), (5, 5, 1)] {
            let patches = Patches { image_size, patch_size };
            let pixels: Vec<u8> = (0..images * image_size * image_size * 3).map(|i| (i * 31 % 251) as u8).collect();
            let lut = std::array::from_fn(|c| std::array::from_fn(|v| (c * 1000 + v) as f32));
            let rows = images * patches.count();
            let mut out = poisoned(backend, rows, patches.values());
            backend.run(|backend| backend.patchify(&pixels, patches, &lut, &mut out));
            let got = read(backend, &out, rows, patches.values());
            for (i, value) in got.iter().enumerate() {
                let (row, at) = (i / patches.values(), i % patches.values());
                let (image, patch) = (row / patches.count(), row % patches.count());
                let (channel, y, x) = (at / patch_size / patch_size, at / patch_size % patch_size, at % patch_size);
                let y = patch / patches.side() * patch_size + y;
                let x = patch % patches.side() * patch_size + x;
                let sample = pixels[((image * image_size + y) * image_size + x) * 3 + channel];
                assert_eq!(*value, lut[channel][usize::from(sample)], "{name} {patches:?} row {row} value {at}");
            }
        }
    });
}

#[test]
fn image_tokens_prepend_the_class_row() {
    each_backend(|backend, name| {
        let (images, tokens, cols) = (3, 5, 19);
        let (patches, positions) = (values(images * (tokens - 1) * cols, 10), values(tokens * cols, 11));
        let patch_buf = backend.upload(images * (tokens - 1), cols, &patches).unwrap();
        let position_buf = backend.upload(tokens, cols, &positions).unwrap();
        let mut out = poisoned(backend, images * tokens, cols);
        backend.run(|backend| backend.image_tokens(&patch_buf, images, &position_buf, &mut out));
        let got = read(backend, &out, images * tokens, cols);
        for (i, value) in got.iter().enumerate() {
            let (image, token, col) = (i / cols / tokens, i / cols % tokens, i % cols);
            let patch = token.checked_sub(1).map_or(0.0, |p| patches[(image * (tokens - 1) + p) * cols + col]);
            assert_eq!(*value, patch + positions[token * cols + col], "{name} image {image} token {token}");
        }
    });
}

#[test]
fn embed_adds_and_norms() {
    each_backend(|backend, name| {
        let cols = 37;
        let (words, places) = (values(11 * cols, 12), values(7 * cols, 13));
        let (gain, bias) = (values(cols, 14), values(cols, 15));
        let tables = [(&words, 11), (&places, 7)].map(|(data, rows)| backend.upload(rows, cols, data).unwrap());
        let norm = backend.norm_weights(&gain, &bias, 1e-12).unwrap();
        let text = TextRows { ids: &[10, 0, 3, 3], places: &[0, 1, 6, 0] };
        let mut out = poisoned(backend, 4, cols);
        backend.run(|backend| backend.embed(text, (&tables[0], &tables[1]), &norm, &mut out));
        let got = read(backend, &out, 4, cols);
        for row in 0..4 {
            let (word, place) = (text.ids[row] as usize * cols, text.places[row] as usize * cols);
            let sum: Vec<f32> = (0..cols).map(|c| words[word + c] + places[place + c]).collect();
            let want = naive_norm(&sum, &gain, &bias, 1e-12);
            assert_close(&got[row * cols..][..cols], &want, &[1.0], NORM_TOLERANCE, name);
        }
    });
}

#[test]
fn rows_are_taken_and_copied() {
    each_backend(|backend, name| {
        let x = values(9 * 5, 16);
        let input = backend.upload(9, 5, &x).unwrap();
        let mut out = poisoned(backend, 4, 5);
        backend.run(|backend| backend.take_rows(&input, &[8, 0, 3, 3], &mut out));
        let got = read(backend, &out, 4, 5);
        for (row, from) in [8, 0, 3, 3].into_iter().enumerate() {
            assert_eq!(got[row * 5..][..5], x[from * 5..][..5], "{name}");
        }
        let mut out = poisoned(backend, 2, 5);
        backend.run(|backend| backend.copy_rows(&input, 2, &mut out));
        assert_eq!(read(backend, &out, 2, 5), x[..10], "{name}");
    });
}
