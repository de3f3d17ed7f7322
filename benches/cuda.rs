//! Each operation of the CUDA backend by itself, as JSON Lines: `cargo bench --features cuda --bench cuda -- STEP PRECISION`
//! with STEP ceiling, gemm, attention or rows. scripts/gpu-check runs them and puts PyTorch beside them.
//!
//! Buffers of the large batches exceed the card's L2, inputs are random: chips multiply zeros faster.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark prints, and stops at the first surprise")]

use std::time::Instant;

use capsieve_engine::Precision;
use capsieve_engine::testing::{Backend, Columns, CudaBackend, Epilogue, Gpu, Limits, Patches, Span};
use serde_json::{Value, json};

type Cuda = CudaBackend<Gpu>;

const ROUNDS: usize = 5;
/// Milliseconds of a round at least.
const ROUND_SECONDS: f64 = 0.03;
/// Image tokens, widths and heads of ViT-L/16 at 384 px and of BERT-base.
const TOKENS: usize = 577;
const IMAGE: (usize, usize, usize) = (1024, 4096, 16);
const TEXT: (usize, usize, usize) = (768, 3072, 12);

fn values(count: usize) -> Vec<f32> {
    let mut state = 1_u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| random()).collect()
}

/// Median seconds of `work`, over rounds long enough to be timed by the host.
fn seconds(backend: &mut Cuda, mut work: impl FnMut(&mut Cuda)) -> f64 {
    let mut round = |backend: &mut Cuda, runs: usize| {
        let start = Instant::now();
        (0..runs).for_each(|_| work(backend));
        backend.finish().unwrap();
        start.elapsed().as_secs_f64() / runs as f64
    };
    round(backend, 1);
    let once = round(backend, 1);
    let runs = (ROUND_SECONDS / once).ceil() as usize;
    let mut rounds: Vec<f64> = (0..ROUNDS).map(|_| round(backend, runs)).collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

fn say(step: &str, precision: Precision, mut what: Value, seconds: f64, (flops, bytes): (f64, f64)) {
    what["step"] = step.into();
    what["precision"] = precision.name().into();
    what["us"] = (seconds * 1e6).into();
    what["tflops"] = (flops / seconds / 1e12).into();
    what["gb_per_s"] = (bytes / seconds / 1e9).into();
    println!("{what}");
}

fn product(backend: &mut Cuda, (m, n, k): (usize, usize, usize), epilogue: Epilogue) -> f64 {
    let linear = backend.linear_weights(&values(n * k), &values(n), k).unwrap();
    let x = backend.upload(m, k, &values(m * k)).unwrap();
    let mut out = backend.upload(m, n, &values(m * n)).unwrap();
    seconds(backend, |backend| backend.linear(&x, m, &linear, epilogue, &mut out))
}

fn ceiling(backend: &mut Cuda, precision: Precision, bytes: f64) {
    let side = 8192;
    let time = product(backend, (side, side, side), Epilogue::Store);
    say("ceiling", precision, json!({"what": "product of 8192"}), time, (2.0 * (side as f64).powi(3), 0.0));
    let (rows, cols) = (58 * TOKENS, 4096);
    let from = backend.upload(rows, cols, &values(rows * cols)).unwrap();
    let mut to = backend.alloc(rows, cols).unwrap();
    let time = seconds(backend, |backend| backend.copy_rows(&from, rows, &mut to));
    say("ceiling", precision, json!({"what": "copy"}), time, (0.0, 2.0 * bytes * (rows * cols) as f64));
}

fn gemm(backend: &mut Cuda, precision: Precision, bytes: f64) {
    let ((v, f, _), (t, g, _)) = (IMAGE, TEXT);
    let image = [
        (3 * v, v, Epilogue::Store),
        (v, v, Epilogue::Accumulate),
        (f, v, Epilogue::Store),
        (f, v, Epilogue::Gelu),
        (v, f, Epilogue::Accumulate),
        (2 * t, v, Epilogue::Store),
    ];
    let text = [
        (3 * t, t, Epilogue::Store),
        (t, t, Epilogue::Accumulate),
        (g, t, Epilogue::Gelu),
        (t, g, Epilogue::Accumulate),
    ];
    let images = [1, 8, 16, 29, 32, 58, 64].map(|images| (images, images * TOKENS, &image[..]));
    let captions = [(58, 58 * 40, &text[..])];
    for (images, m, shapes) in images.into_iter().chain(captions) {
        for (n, k, epilogue) in shapes {
            let time = product(backend, (m, *n, *k), *epilogue);
            let what =
                json!({"images": images, "m": m, "n": n, "k": k, "epilogue": format!("{epilogue:?}").to_lowercase()});
            let moved = bytes * (m * k + n * k + m * n) as f64;
            say("gemm", precision, what, time, (2.0 * (m * n * k) as f64, moved));
        }
    }
}

fn attention(backend: &mut Cuda, precision: Precision, bytes: f64) {
    let images = |count: usize, tokens: usize| -> Vec<Span> {
        (0..count).map(|i| Span { q: i * tokens, q_len: tokens, kv: i * tokens, kv_len: tokens }).collect()
    };
    let cross = |images: usize, rows: usize| -> Vec<Span> {
        (0..images).map(|i| Span { q: i * rows, q_len: rows, kv: i * TOKENS, kv_len: TOKENS }).collect()
    };
    let cases = [
        ("image", images(1, TOKENS), IMAGE),
        ("image", images(8, TOKENS), IMAGE),
        ("image", images(58, TOKENS), IMAGE),
        ("caption", images(116, 20), TEXT),
        ("cross", cross(58, 20), TEXT),
        ("cross", cross(58, 100), TEXT),
    ];
    for (what, spans, (width, _, heads)) in cases {
        let last = *spans.last().unwrap();
        let (q_rows, kv_rows) = (last.q + last.q_len, last.kv + last.kv_len);
        let q = backend.upload(q_rows, width, &values(q_rows * width)).unwrap();
        let kv = backend.upload(kv_rows, 2 * width, &values(kv_rows * 2 * width)).unwrap();
        let mut out = backend.alloc(q_rows, width).unwrap();
        let time = seconds(backend, |backend| {
            let parts = [(&q, 0), (&kv, 0), (&kv, width)].map(|(buf, first)| Columns { buf, first });
            backend.attention(parts, &spans, heads, &mut out);
        });
        let scores: usize = spans.iter().map(|span| span.q_len * span.kv_len).sum();
        let case = json!({"what": what, "spans": spans.len(), "rows": last.q_len, "keys": last.kv_len, "heads": heads});
        let moved = bytes * (2 * (q_rows + kv_rows) * width) as f64;
        say("attention", precision, case, time, (4.0 * (scores * width) as f64, moved));
    }
}

fn rows(backend: &mut Cuda, precision: Precision, bytes: f64) {
    let (images, (v, f, _)) = (58, IMAGE);
    let rows = images * TOKENS;
    let x = backend.upload(rows, v, &values(rows * v)).unwrap();
    let mut out = backend.alloc(rows, v).unwrap();
    let norm = backend.norm_weights(&values(v), &values(v), 1e-5).unwrap();
    let time = seconds(backend, |backend| backend.layer_norm(&x, rows, &norm, &mut out));
    say("rows", precision, json!({"what": "layer norm"}), time, (0.0, 2.0 * bytes * (rows * v) as f64));

    // GELU runs in place behind a product; what the product alone takes is subtracted.
    let [store, gelu] = [Epilogue::Store, Epilogue::Gelu].map(|epilogue| product(backend, (rows, f, v), epilogue));
    say("rows", precision, json!({"what": "gelu"}), gelu - store, (0.0, 2.0 * bytes * (rows * f) as f64));

    let patches = Patches { image_size: 384, patch_size: 16 };
    let pixels: Vec<u8> = (0..images * 384 * 384 * 3).map(|i| (i * 31 % 251) as u8).collect();
    let lut = [[0.5; 256]; 3];
    let count = images * patches.count();
    let mut cut = backend.alloc(count, patches.values()).unwrap();
    let time = seconds(backend, |backend| backend.patchify(&pixels, patches, &lut, &mut cut));
    let moved = (1.0 + bytes) * (count * patches.values()) as f64;
    say("rows", precision, json!({"what": "upload and patchify"}), time, (0.0, moved));
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let [step, precision] = arguments.as_slice() else { panic!("STEP and PRECISION, see the top of benches/cuda.rs") };
    let all = [Precision::F32, Precision::Tf32, Precision::F16, Precision::Bf16];
    let precision = all.into_iter().find(|p| p.name() == precision).expect("f32, tf32, f16 or bf16");
    let bytes = if matches!(precision, Precision::F16 | Precision::Bf16) { 2.0 } else { 4.0 };
    let limits = Limits { images: 64, image_bytes: 384 * 384 * 3, rows: 8192 };
    let mut backend = CudaBackend::new(Gpu::open(0, precision).unwrap(), precision, limits).unwrap();
    match step.as_str() {
        "ceiling" => ceiling(&mut backend, precision, bytes),
        "gemm" => gemm(&mut backend, precision, bytes),
        "attention" => attention(&mut backend, precision, bytes),
        "rows" => rows(&mut backend, precision, bytes),
        _ => panic!("ceiling, gemm, attention or rows"),
    }
}
