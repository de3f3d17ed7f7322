//! Each operation of the CPU backend beside its bound, in every precision: `cargo bench --bench ops [-- --threads N]`.
//!
//! Products and attention are compared with what multiply-adds between registers reach in the same run, layer norm with what a copy
//! of as many bytes does.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark prints, and stops at the first surprise")]

use std::time::Instant;

use capsieve_engine::Precision;
use capsieve_engine::testing::{AttentionLimits, Backend, Columns, CpuBackend, Epilogue, Images, Isa, Span, ceiling};

const ROUNDS: usize = 5;

/// Best of [`ROUNDS`] rounds, in seconds.
fn best(mut work: impl FnMut()) -> f64 {
    let round = |_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
}

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i * 7919 % 1001) as f32 / 500.0 - 1.0).collect()
}

fn products(backend: &mut CpuBackend, peak: f64) {
    println!("{:>20} {:>10} {:>10} {:>10}", "M x N x K", "GFLOP/s", "with gelu", "of peak");
    for (m, n, k) in [
        (577, 3072, 1024),
        (577, 1024, 4096),
        (4616, 1024, 1024),
        (4616, 3072, 1024),
        (4616, 4096, 1024),
        (4616, 1024, 4096),
        (240, 2304, 768),
        (20, 768, 768),
    ] {
        let linear = backend.linear_weights(&values(n * k), &values(n), k).unwrap();
        let input = backend.upload(m, k, &values(m * k)).unwrap();
        let mut out = backend.alloc(m, n).unwrap();
        let seconds = [Epilogue::Store, Epilogue::Gelu]
            .map(|epilogue| best(|| backend.run(|backend| backend.linear(&input, m, &linear, epilogue, &mut out))));
        let [store, gelu] = seconds.map(|seconds| 2.0 * (m * n * k) as f64 / seconds / 1e9);
        let (shape, share) = (format!("{m} x {n} x {k}"), 100.0 * store / peak);
        println!("{shape:>20} {store:>10.0} {gelu:>10.0} {share:>9.0}%");
    }
}

fn mlp(backend: &mut CpuBackend, peak: f64) {
    let (width, between) = (1024, 4096);
    let layer = |outputs: usize, inputs: usize| {
        let weight: Vec<f32> = values(outputs * inputs).iter().map(|w| w / 32.0).collect();
        backend.linear_weights(&weight, &vec![0.0; outputs], inputs).unwrap()
    };
    let (fc1, fc2) = (layer(between, width), layer(width, between));
    let norm = backend.norm_weights(&vec![1.0; width], &vec![0.0; width], 1e-5).unwrap();
    for rows in [577, 4616] {
        let (mut x, mut room) =
            (backend.upload(rows, width, &values(rows * width)).unwrap(), backend.alloc(rows, width).unwrap());
        let mut hidden = backend.alloc_hidden(rows, between).unwrap();
        let seconds = best(|| {
            backend.run(|backend| backend.mlp(&mut x, rows, Some((&norm, &mut room)), [&fc1, &fc2], &mut hidden));
        });
        let rate = 4.0 * (rows * width * between) as f64 / seconds / 1e9;
        println!("norm and MLP {rows} x {width} x {between}: {rate:.0} GFLOP/s, {:.0}% of peak", 100.0 * rate / peak);
    }
}

/// One caption of 20 tokens an image.
fn absorbed_attention(backend: &mut CpuBackend, peak: f64) {
    let (images, tokens, width, heads, size, rows) = (8, 577, 1024, 12, 64, 20);
    let hidden = heads * size;
    let weight: Vec<f32> = values(hidden * width).iter().map(|w| w / 32.0).collect();
    let absorbed = backend.absorbed_weights(&weight, (&weight, &vec![0.0; hidden]), (width, heads)).unwrap().unwrap();
    let mut seen = backend.alloc_seen(Images { count: images, tokens, width }, size).unwrap().unwrap();
    let x = backend.upload(images * tokens, width, &values(images * tokens * width)).unwrap();
    let q = backend.upload(images * rows, hidden, &values(images * rows * hidden)).unwrap();
    let mut out = backend.alloc(images * rows, hidden).unwrap();
    let span = |i| Span { q: i * rows, q_len: rows, kv: i * tokens, kv_len: tokens };
    let spans: Vec<Span> = (0..images).map(span).collect();
    let see = best(|| assert!(backend.run(|backend| backend.see(&x, &spans, size, &mut seen))));
    let seconds = best(|| backend.run(|backend| backend.attend_seen(&q, &spans, &seen, &absorbed, &mut out)));
    let rate = 4.0 * (images * rows * heads * width) as f64 * (tokens + size) as f64 / seconds / 1e9;
    let (share, see) = (100.0 * rate / peak, see * 1e3);
    println!("images seen, once for all layers: {see:.1} ms");
    println!("cross-attention {images} x {rows} to {tokens} x {width}: {rate:.0} GFLOP/s, {share:.0}% of peak");
}

fn attention(backend: &mut CpuBackend, peak: f64) {
    for (images, tokens, heads, size) in [(1, 577, 16, 64), (8, 577, 16, 64)] {
        let (rows, width) = (images * tokens, heads * size);
        let qkv = backend.upload(rows, 3 * width, &values(rows * 3 * width)).unwrap();
        let mut out = backend.alloc(rows, width).unwrap();
        let span = |i| Span { q: i * tokens, q_len: tokens, kv: i * tokens, kv_len: tokens };
        let spans: Vec<Span> = (0..images).map(span).collect();
        let seconds = best(|| {
            let views = [0, width, 2 * width].map(|first| Columns { buf: &qkv, first });
            backend.run(|backend| backend.attention(views, &spans, heads, &mut out));
        });
        let rate = 4.0 * (rows * tokens * width) as f64 / seconds / 1e9;
        let share = 100.0 * rate / peak;
        println!("attention {images} x {tokens} x {heads} x {size}: {rate:.0} GFLOP/s, {share:.0}% of peak");
    }
}

fn layer_norm(backend: &mut CpuBackend) {
    let (rows, cols) = (4616, 1024);
    let norm = backend.norm_weights(&values(cols), &values(cols), 1e-5).unwrap();
    let x = backend.upload(rows, cols, &values(rows * cols)).unwrap();
    let mut out = backend.alloc(rows, cols).unwrap();
    let seconds = best(|| backend.run(|backend| backend.layer_norm(&x, rows, &norm, &mut out)));
    let rate = |seconds: f64| 8.0 * (rows * cols) as f64 / seconds / 1e9;
    let copy = best(|| backend.run(|backend| backend.copy_rows(&x, rows, &mut out)));
    println!(
        "layer norm {rows} x {cols}: {:.1} GB/s, where a copy on one thread does {:.1}",
        rate(seconds),
        rate(copy)
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let position = arguments.iter().position(|a| a == "--threads");
    let threads = position.map_or(0, |i| arguments[i + 1].parse().unwrap());
    for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
        for isa in Isa::available_for(precision) {
            let limits = AttentionLimits { keys: 577, head_size: 64 };
            let mut backend = CpuBackend::new(threads, isa, precision, limits).unwrap();
            let peak = ceiling(isa, precision, threads) / 1e9;
            let (device, name) = (backend.device(), precision.name());
            println!("\n{device}, {name}: multiply-adds reach {peak:.0} GFLOP/s");
            products(&mut backend, peak);
            mlp(&mut backend, peak);
            attention(&mut backend, peak);
            absorbed_attention(&mut backend, peak);
            layer_norm(&mut backend);
        }
    }
}
