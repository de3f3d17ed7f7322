//! The forward pass allocates nothing. A binary of its own, because it replaces the allocator of the whole process.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests stop at the first surprise and may print")]

use capsieve_engine::{Batch, Checkpoint, Device, Heads, ItmToken, Options, Precision, SyntheticSize};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// Bytes ten batches may allocate in all: the thread pool's queue of jobs grows by a small block now and then. One row of
/// the smallest buffer would be more.
const BYTES_MAX: usize = 8192;

#[test]
fn scoring_allocates_nothing() {
    for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
        // With keys and values of the images, and without.
        for captions in [60, 1] {
            assert_allocates_nothing(precision, captions);
        }
    }
}

/// `captions` of each image.
fn assert_allocates_nothing(precision: Precision, captions: u32) {
    let checkpoint = Checkpoint::synthetic(SyntheticSize::Tiny, 1);
    let heads = Heads { itm: true, cosine: true };
    let options = Options {
        device: Device::Cpu,
        precision,
        threads: 2,
        images_max: 4,
        tokens_max: 512,
        heads,
        itm_token: ItmToken::Cls,
    };
    let mut scorer = capsieve_engine::load(&checkpoint, &[[0.5; 256]; 3], &options).unwrap();
    let mut batch = Batch::new(64);
    for image in 0..4_u8 {
        batch.push_image(&[image * 50; 64 * 64 * 3]);
        for caption in 0..captions {
            let tokens: Vec<u32> = (0..5 + caption % 20).map(|i| 1000 + i * 7 + caption).collect();
            batch.push_caption(&tokens);
        }
    }
    let mut scores = Vec::new();
    // The first batches grow the result and start the pool's threads.
    (0..3).for_each(|_| scorer.score(&batch, &mut scores).unwrap());
    let region = Region::new(ALLOCATOR);
    (0..10).for_each(|_| scorer.score(&batch, &mut scores).unwrap());
    let change = region.change();
    let (bytes, times) = (change.bytes_allocated, change.allocations);
    println!("{} with {captions} captions: {bytes} bytes in {times} allocations", precision.name());
    assert_eq!(scores.len(), 4 * captions as usize);
    assert!(bytes <= BYTES_MAX, "{} with {captions} captions: {bytes} bytes in {times}", precision.name());
}
