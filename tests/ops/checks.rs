//! The checks of `ops`, generic over the backend.

use capsieve_engine::Precision;
use capsieve_engine::testing::{Backend, Columns, Epilogue, Patches, Span, TextRows};

use super::{
    ATTENTION_TOLERANCE, GELU_TOLERANCE, NORM_TOLERANCE, On, PRODUCT_TOLERANCE, SPARE_ROWS, naive_gelu, poisoned, read,
};

pub(super) fn linear_equals_naive<B: Backend>(backend: &mut B, on: &On) {
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
    for (m, n, k) in shapes {
        let (x, w, b) = (on.values(m * k, 1), on.values(n * k, 2), on.values(n, 3));
        let linear = backend.linear_weights(&w, &b, k).unwrap();
        let input = backend.upload(m, k, &x).unwrap();
        let before = on.values(m * n, 4);
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
            // GELU reads the stored sum; its slope is below 1.13.
            let roundings = if epilogue == Epilogue::Gelu { 2.2 } else { 1.0 };
            let (tolerance, what) = ((PRODUCT_TOLERANCE, roundings), format!("{m}x{n}x{k} {epilogue:?}"));
            on.assert_close(&got, &want, &scales, tolerance, &what);
        }
    }
}

pub(super) fn gelu_is_the_erf_form<B: Backend>(backend: &mut B, on: &On) {
    // The tanh form is off by up to 4.7e-4 near 2.7.
    let x: Vec<f32> = (-1200..=1200).map(|i| on.stored(i as f32 / 100.0)).collect();
    let linear = backend.linear_weights(&[1.0], &[0.0], 1).unwrap();
    let input = backend.upload(x.len(), 1, &x).unwrap();
    let mut out = poisoned(backend, x.len(), 1);
    backend.run(|backend| backend.linear(&input, x.len(), &linear, Epilogue::Gelu, &mut out));
    let want: Vec<f64> = x.iter().map(|v| naive_gelu(f64::from(*v))).collect();
    on.assert_close(&read(backend, &out, x.len(), 1), &want, &[1.0], (GELU_TOLERANCE, 1.0), "gelu");
}

fn naive_norm(x: &[f32], gain: &[f32], bias: &[f32], eps: f64) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
    let parameters = gain.iter().zip(bias);
    let normed = x.iter().map(|v| (f64::from(*v) - mean) / (variance + eps).sqrt());
    normed.zip(parameters).map(|(v, (g, b))| v * f64::from(*g) + f64::from(*b)).collect()
}

pub(super) fn layer_norm_equals_naive<B: Backend>(backend: &mut B, on: &On) {
    for (rows, cols) in [(1, 1), (1, 15), (3, 16), (5, 17), (40, 60), (130, 192), (3, 1024)] {
        for (scale, offset, eps) in [(1.0, 0.0, 1e-5), (1e-3, 0.0, 1e-5), (1e-4, 0.0, 1e-12), (1.0, 100.0, 1e-12)] {
            let x: Vec<f32> = on.values(rows * cols, 5).iter().map(|v| on.stored(v * scale + offset)).collect();
            let (gain, bias) = (on.values(cols, 6), on.values(cols, 7));
            let norm = backend.norm_weights(&gain, &bias, eps).unwrap();
            let input = backend.upload(rows, cols, &x).unwrap();
            let mut out = poisoned(backend, rows, cols);
            backend.run(|backend| backend.layer_norm(&input, rows, &norm, &mut out));
            let want: Vec<f64> = x.chunks(cols).flat_map(|x| naive_norm(x, &gain, &bias, f64::from(eps))).collect();
            // A mean of 100 costs two digits of what is left: the inputs themselves are only that exact (measured 2.3e-5).
            let tolerance = if offset == 0.0 { NORM_TOLERANCE } else { 20.0 * NORM_TOLERANCE };
            let what = format!("{rows}x{cols} scale {scale} offset {offset}");
            on.assert_close(&read(backend, &out, rows, cols), &want, &[1.0], (tolerance, 1.0), &what);
        }
    }
}

/// One head's attention in f64.
pub(super) fn naive_attention(q: &[f32], k: &[&[f32]], v: &[&[f32]]) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let scores: Vec<f64> = k.iter().map(|k| dot(q, k) / (q.len() as f64).sqrt()).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let weighted = |d: usize| scores.iter().zip(v).map(|(s, v)| (s - max).exp() * f64::from(v[d])).sum::<f64>();
    (0..q.len()).map(|d| weighted(d) / total).collect()
}

fn check_attention<B: Backend>(backend: &mut B, on: &On, spans: &[Span], (heads, size): (usize, usize), scale: f32) {
    let width = heads * size;
    let q_rows = spans.iter().map(|s| s.q + s.q_len).max().unwrap();
    let kv_rows = spans.iter().map(|s| s.kv + s.kv_len).max().unwrap();
    let q: Vec<f32> = on.values(q_rows * width, 8).iter().map(|v| on.stored(v * scale)).collect();
    let kv = on.values(kv_rows * 3 * width, 9);
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
                let what = format!("{heads} x {size} {span:?} head {head} row {row}");
                // The weights are rounded before they meet values of up to 2, then the result.
                on.assert_close(&got[at..at + size], &want, &[1.0], (ATTENTION_TOLERANCE, 3.0), &what);
            }
        }
    }
}

pub(super) fn attention_equals_naive<B: Backend>(backend: &mut B, on: &On) {
    for (heads, size) in [(1, 1), (3, 20), (5, 12), (2, 64), (1, 80)] {
        for (q_len, kv_len) in [(1, 1), (1, 577), (23, 15), (24, 16), (25, 17), (7, 64), (50, 65), (31, 640)] {
            let span = [Span { q: 0, q_len, kv: 0, kv_len }];
            check_attention(backend, on, &span, (heads, size), 1.0);
        }
    }
}

/// Heads of 64, which tensor cores take: around every tile edge of the three kernels.
pub(super) fn attention_of_real_heads_equals_naive<B: Backend>(backend: &mut B, on: &On) {
    let list = |lengths: &[(usize, usize)], shared: usize| -> Vec<Span> {
        let (mut q, mut kv) = (0, 0);
        let mut span = |(q_len, kv_len): (usize, usize)| {
            let span = Span { q, q_len, kv, kv_len };
            (q, kv) = (q + q_len, kv + kv_len - shared.min(kv_len));
            span
        };
        lengths.iter().map(|lengths| span(*lengths)).collect()
    };
    let images = [Span { q: 0, q_len: 145, kv: 0, kv_len: 145 }, Span { q: 145, q_len: 145, kv: 145, kv_len: 145 }];
    check_attention(backend, on, &images, (3, 64), 1.0);
    check_attention(backend, on, &[Span { q: 0, q_len: 577, kv: 0, kv_len: 577 }], (1, 64), 1.0);
    // Captions: at most 64 keys.
    check_attention(
        backend,
        on,
        &list(&[(1, 1), (5, 5), (16, 16), (17, 17), (20, 20), (64, 64), (33, 63)], 0),
        (2, 64),
        1.0,
    );
    // Few rows against many keys, which the spans share in part.
    check_attention(backend, on, &list(&[(1, 65), (20, 577), (32, 577), (31, 16), (16, 17)], 15), (2, 64), 1.0);
    // Many rows.
    check_attention(backend, on, &list(&[(33, 577), (64, 64), (65, 66), (128, 129), (1, 80)], 15), (1, 64), 1.0);
}

pub(super) fn attention_spans_are_separate<B: Backend>(backend: &mut B, on: &On) {
    let spans = [(0, 5, 4, 9), (5, 1, 0, 1), (6, 30, 13, 33), (36, 2, 0, 46)];
    let spans = spans.map(|(q, q_len, kv, kv_len)| Span { q, q_len, kv, kv_len });
    check_attention(backend, on, &spans, (3, 20), 1.0);
}

pub(super) fn attention_survives_huge_scores<B: Backend>(backend: &mut B, on: &On) {
    let spans = [Span { q: 0, q_len: 9, kv: 0, kv_len: 40 }];
    for (heads, size) in [(2, 16), (1, 64)] {
        check_attention(backend, on, &spans, (heads, size), 1e4);
    }
}

/// Equal weights over values whose mean is the value itself: exact with f32 sums, a unit off with 16-bit ones.
pub(super) fn attention_sums_are_f32<B: Backend>(backend: &mut B, on: &On) {
    let (keys, width) = (640, 64);
    // Steps of a unit in the last place of 1: 16-bit sums lose them at some of these.
    let unit = if on.precision == Precision::Bf16 { 128.0 } else { 1024.0 };
    let row: Vec<f32> = (0..width).map(|c| 1.0 + (c % 16) as f32 / unit).collect();
    let kv: Vec<f32> = (0..keys).flat_map(|_| row.clone()).collect();
    let kv = backend.upload(keys, width, &kv).unwrap();
    for rows in [20, 40] {
        let q = backend.upload(rows, width, &vec![0.0; rows * width]).unwrap();
        let mut out = poisoned(backend, rows, width);
        let parts = [&q, &kv, &kv].map(|buf| Columns { buf, first: 0 });
        let span = [Span { q: 0, q_len: rows, kv: 0, kv_len: keys }];
        backend.run(|backend| backend.attention(parts, &span, 1, &mut out));
        let tolerance = if on.precision == Precision::F32 { 1e-6 } else { 0.0 };
        for (i, got) in read(backend, &out, rows, width).iter().enumerate() {
            assert!(
                (got - row[i % width]).abs() <= tolerance,
                "{} {rows} rows: {got}, not {}",
                on.name,
                row[i % width]
            );
        }
    }
}

pub(super) fn patchify_takes_patches_row_by_row<B: Backend>(backend: &mut B, on: &On) {
    for (image_size, patch_size, images) in [(8, 4, 1), (9, 4, 2), (48, 16, 3), (5, 5, 1)] {
        let patches = Patches { image_size, patch_size };
        let pixels: Vec<u8> = (0..images * image_size * image_size * 3).map(|i| (i * 31 % 251) as u8).collect();
        let lut: [[f32; 256]; 3] = std::array::from_fn(|c| std::array::from_fn(|v| (c * 1000 + v) as f32));
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
            let want = on.kept(lut[channel][usize::from(sample)]);
            assert_eq!(*value, want, "{} {patches:?} row {row} value {at}", on.name);
        }
    }
}

/// Images that go to the card beside its work must not reach it before that work is done with their place.
pub(super) fn images_that_follow_leave_those_before_alone<B: Backend>(backend: &mut B, on: &On) {
    let patches = Patches { image_size: 4, patch_size: 4 };
    let lut: [[f32; 256]; 3] = std::array::from_fn(|_| std::array::from_fn(|v| v as f32));
    let batches: Vec<Vec<u8>> = (1..=5_u8).map(|batch| vec![batch; 4 * 4 * 3]).collect();
    let mut outs: Vec<_> = batches.iter().map(|_| poisoned(backend, 1, patches.values())).collect();
    for (i, out) in outs.iter_mut().enumerate() {
        backend.patchify(&batches[i], patches, &lut, out);
        backend.stage(batches.get(i + 1).map(Vec::as_slice));
    }
    for (i, out) in outs.iter().enumerate() {
        let got = read(backend, out, 1, patches.values());
        assert_eq!(got, vec![f32::from(batches[i][0]); patches.values()], "{} batch {i}", on.name);
    }
}

pub(super) fn image_tokens_prepend_the_class_row<B: Backend>(backend: &mut B, on: &On) {
    let (images, tokens, cols) = (3, 5, 19);
    let (patches, positions) = (on.values(images * (tokens - 1) * cols, 10), on.values(tokens * cols, 11));
    let patch_buf = backend.upload(images * (tokens - 1), cols, &patches).unwrap();
    let position_buf = backend.upload(tokens, cols, &positions).unwrap();
    let mut out = poisoned(backend, images * tokens, cols);
    backend.run(|backend| backend.image_tokens(&patch_buf, images, &position_buf, &mut out));
    let got = read(backend, &out, images * tokens, cols);
    for (i, value) in got.iter().enumerate() {
        let (image, token, col) = (i / cols / tokens, i / cols % tokens, i % cols);
        let patch = token.checked_sub(1).map_or(0.0, |p| patches[(image * (tokens - 1) + p) * cols + col]);
        let want = on.kept(patch + positions[token * cols + col]);
        assert_eq!(*value, want, "{} image {image} token {token}", on.name);
    }
}

pub(super) fn embed_adds_and_norms<B: Backend>(backend: &mut B, on: &On) {
    let cols = 37;
    let (words, places) = (on.values(11 * cols, 12), on.values(7 * cols, 13));
    let (gain, bias) = (on.values(cols, 14), on.values(cols, 15));
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
        on.assert_close(&got[row * cols..][..cols], &want, &[1.0], (NORM_TOLERANCE, 1.0), "embed");
    }
}

pub(super) fn rows_are_taken_and_copied<B: Backend>(backend: &mut B, on: &On) {
    let x = on.values(9 * 5, 16);
    let input = backend.upload(9, 5, &x).unwrap();
    let mut out = poisoned(backend, 4, 5);
    backend.run(|backend| backend.take_rows(&input, &[8, 0, 3, 3], &mut out));
    let got = read(backend, &out, 4, 5);
    for (row, from) in [8, 0, 3, 3].into_iter().enumerate() {
        assert_eq!(got[row * 5..][..5], x[from * 5..][..5], "{}", on.name);
    }
    let mut out = poisoned(backend, 2, 5);
    backend.run(|backend| backend.copy_rows(&input, 2, &mut out));
    assert_eq!(read(backend, &out, 2, 5), x[..10], "{}", on.name);
}

/// What is fused is what it is made of, to the bit: each part has a test against f64.
pub(super) fn fused_operations_equal_their_parts<B: Backend>(backend: &mut B, on: &On) {
    // Around blocks of rows and fewer than threads have tiles; then passes over K in both products, and of bytes in the second.
    for (rows, cols, between) in
        [(1, 20, 50), (5, 24, 7), (13, 20, 50), (40, 16, 64), (200, 33, 70), (7, 1030, 1100), (19, 6, 4100)]
    {
        let layer = |seed: u64, inputs: usize, outputs: usize| {
            let weight: Vec<f32> = on.values(outputs * inputs, seed).iter().map(|w| w / 16.0).collect();
            backend.linear_weights(&weight, &on.values(outputs, seed + 1), inputs).unwrap()
        };
        let (fc1, fc2) = (layer(1, cols, between), layer(3, between, cols));
        let norm = backend.norm_weights(&on.values(cols, 5), &on.values(cols, 6), 1e-5).unwrap();
        let x = on.values(rows * cols, 7);
        let matrix = |backend: &B| backend.upload(rows, cols, &x).unwrap();
        // Cards norm rows of up to 1024.
        for normed in [false, cols <= 1024] {
            let (mut got, mut want, mut product) = (matrix(backend), matrix(backend), poisoned(backend, rows, between));
            let (mut room, mut parts) = (poisoned(backend, rows, cols), poisoned(backend, rows, between));
            let mut hidden = backend.alloc_hidden(rows, between).unwrap();
            backend.run(|backend| {
                let norm_and_room = normed.then_some((&norm, &mut room));
                backend.mlp(&mut got, rows, norm_and_room, [&fc1, &fc2], &mut hidden);
                if normed {
                    backend.linear_of_norm(&want, rows, (&norm, &mut room), &fc1, &mut product);
                    backend.layer_norm(&want, rows, &norm, &mut room);
                } else {
                    backend.copy_rows(&want, rows, &mut room);
                    backend.linear(&want, rows, &fc1, Epilogue::Store, &mut product);
                }
                backend.linear(&room, rows, &fc1, Epilogue::Gelu, &mut parts);
                backend.linear(&parts, rows, &fc2, Epilogue::Accumulate, &mut want);
                backend.linear(&room, rows, &fc1, Epilogue::Store, &mut parts);
            });
            let read_all = |backend: &mut B, buf: &B::Buf, cols: usize| {
                let mut all = vec![0.0; rows * cols];
                backend.read(buf, &mut all).unwrap();
                all
            };
            let what = format!("{} {rows} x {cols} x {between} {normed}", on.name);
            assert_eq!(read_all(backend, &got, cols), read_all(backend, &want, cols), "{what}");
            assert_eq!(read_all(backend, &product, between), read_all(backend, &parts, between), "{what}");
        }
    }
}

/// Rows from the middle of a matrix, as images that follow others are.
pub(super) fn products_of_later_rows_are_theirs<B: Backend>(backend: &mut B, on: &On) {
    let (rows, k, n) = (37, 20, 19);
    let (x, w, b) = (on.values(rows * k, 1), on.values(n * k, 2), on.values(n, 3));
    let linear = backend.linear_weights(&w, &b, k).unwrap();
    let input = backend.upload(rows, k, &x).unwrap();
    for part in [0..rows, 0..1, 5..6, 7..30, 36..37, 9..9] {
        let alone = backend.upload(rows, k, &[&x[part.start * k..], &x[..part.start * k]].concat()).unwrap();
        let (mut got, mut want) = (poisoned(backend, part.len(), n), poisoned(backend, part.len(), n));
        backend.run(|backend| {
            backend.linear_of(&input, part.clone(), &linear, Epilogue::Store, &mut got);
            backend.linear(&alone, part.len(), &linear, Epilogue::Store, &mut want);
        });
        let [got, want] = [got, want].map(|buf| read(backend, &buf, part.len(), n));
        assert_eq!(got, want, "{} {part:?}", on.name);
    }
}

pub(super) fn reruns_are_identical<B: Backend>(backend: &mut B, on: &On) {
    let (rows, heads, size) = (145, 3, 64);
    let width = heads * size;
    let linear = backend.linear_weights(&on.values(3 * width * width, 17), &on.values(3 * width, 18), width).unwrap();
    let x = backend.upload(rows, width, &on.values(rows * width, 19)).unwrap();
    let mut run = || {
        let (mut qkv, mut out) = (poisoned(backend, rows, 3 * width), poisoned(backend, rows, width));
        let span = [Span { q: 0, q_len: rows, kv: 0, kv_len: rows }];
        backend.run(|backend| {
            backend.linear(&x, rows, &linear, Epilogue::Store, &mut qkv);
            let parts = [0, width, 2 * width].map(|first| Columns { buf: &qkv, first });
            backend.attention(parts, &span, heads, &mut out);
        });
        read(backend, &out, rows, width)
    };
    let first = run();
    assert!(first.iter().all(|v| v.is_finite()));
    for _ in 0..3 {
        assert_eq!(run(), first, "{}", on.name);
    }
}
