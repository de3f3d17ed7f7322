//! What this machine's multiply-adds can reach: the bound that benchmarks compare with.

use std::time::Instant;

use super::product_format;
use super::simd::Isa;
use super::tile::Tile;
use crate::Precision;

const MEASUREMENTS: usize = 5;
const ROUNDS: usize = 20_000_000;

/// Operations per second of a precision's products that never leave the registers, on `threads` threads (0: one per core), best
/// of some measurements: what this machine can reach. Multiplications and additions of values count one each.
///
/// # Panics
/// In precisions that the processor does not have.
pub fn ceiling(isa: Isa, precision: Precision, threads: usize) -> f64 {
    let tile = Tile::new(isa, product_format(precision));
    let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
    let measure = |_| {
        let start = Instant::now();
        let operations: usize = std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(|| tile.multiply_adds(ROUNDS))).collect();
            running.into_iter().map(|thread| thread.join().expect("additions do not panic")).sum()
        });
        operations as f64 / start.elapsed().as_secs_f64()
    };
    (0..MEASUREMENTS).map(measure).fold(0.0, f64::max)
}
