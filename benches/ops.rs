//! Each operation of the CPU backend beside its bound, in every precision: `cargo bench --bench ops [-- --threads N]`.
//!
//! Products and attention are compared with what multiply-adds between registers reach in the same run, layer norm with
//! nothing: compare its bytes per second with the machine's memory.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark prints, and stops at the first surprise")]

use std::time::Instant;

use capsieve_engine::Precision;
use capsieve_engine::testing::{AttentionLimits, Backend, Columns, CpuBackend, Epilogue, Isa, Span, ceiling};

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
    println!("layer norm {rows} x {cols}: {:.1} GB/s", 8.0 * (rows * cols) as f64 / seconds / 1e9);
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
            attention(&mut backend, peak);
            layer_norm(&mut backend);
        }
    }
}
