//! The model on the CUDA backend: its kernels on the CPU, and by hand (`--ignored card::`, see scripts/gpu-check) on a card.

use super::precisions::assert_as_near_as_pytorch;
use super::*;

/// Largest move of a score when its neighbours change which kernel or tile it is computed in; measured 0, 5.2e-3, 3.9e-2.
const REGROUPED: [(Precision, f32); 3] = [(Precision::F32, 2e-6), (Precision::F16, 1e-2), (Precision::Bf16, 1e-1)];

type Choose = fn(Precision) -> Target;

macro_rules! on_the_emulator_and_a_card {
    ($($test:ident)*) => {
        #[cfg(feature = "emulator")]
        mod emulated {
            $(#[test] fn $test() { super::$test(super::Target::Cuda); })*
        }
        #[cfg(feature = "cuda")]
        mod card {
            $(#[test] #[ignore = "needs an NVIDIA card"] fn $test() { super::$test(super::Target::Card); })*
        }
    };
}

on_the_emulator_and_a_card! {
    sixteen_bits_are_as_near_as_pytorch
    batches_equal_their_pairs_alone
    replayed_work_equals_work_done
}

/// What the emulator does among the other f32 backends.
#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs an NVIDIA card"]
fn card_scores_equal_pytorch() {
    for oracle in sets() {
        let got = score(&mut load(&oracle, Target::Card(Precision::F32), &OPTIONS), &oracle, &all_pairs(&oracle));
        assert_scores(&oracle, &format!("{} on a card", oracle.name), &got);
    }
}

#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs an NVIDIA card"]
fn card_batches_scored_ahead_equal_batches_scored_alone() {
    for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
        check_scored_ahead(Target::Card(precision));
    }
}

fn sixteen_bits_are_as_near_as_pytorch(target: Choose) {
    for oracle in sets() {
        for precision in [Precision::F16, Precision::Bf16] {
            let got = score(&mut load(&oracle, target(precision), &OPTIONS), &oracle, &all_pairs(&oracle));
            assert_as_near_as_pytorch(&oracle, precision, &got);
        }
    }
}

/// The CUDA backend groups work by batch as the CPU does not: its own proof that neighbours do not matter.
fn batches_equal_their_pairs_alone(target: Choose) {
    let oracle = Oracle::load("wide");
    let pairs = all_pairs(&oracle);
    for (precision, tolerance) in REGROUPED {
        let mut model = load(&oracle, target(precision), &OPTIONS);
        let together = score(&mut model, &oracle, &pairs);
        let alone: Vec<_> = pairs.iter().flat_map(|pair| score(&mut model, &oracle, &[*pair])).collect();
        let mut cut = load(&oracle, target(precision), &Options { tokens_max: 1, ..OPTIONS });
        let chunks = score(&mut cut, &oracle, &pairs);
        let far = |other: &[PairScore]| {
            let moves = together.iter().zip(other).flat_map(|(a, b)| [a.itm - b.itm, a.cosine - b.cosine]);
            moves.map(f32::abs).fold(0.0, f32::max)
        };
        println!("{}: {:.1e} alone, {:.1e} in chunks", precision.name(), far(&alone), far(&chunks));
        assert!(far(&alone) <= tolerance && far(&chunks) <= tolerance, "{}", precision.name());
        assert!(together.iter().chain(&alone).all(|s| s.itm.is_finite() && s.cosine.is_finite()));
    }
}

/// The first time a number of images comes its work is done, the second time recorded, then replayed.
fn replayed_work_equals_work_done(target: Choose) {
    let oracle = Oracle::load("tiny");
    let mut model = load(&oracle, target(Precision::F16), &OPTIONS);
    let pairs = [(0, 1), (2, 0)];
    let done = pairs.map(|pair| score(&mut load(&oracle, target(Precision::F16), &OPTIONS), &oracle, &[pair]));
    let mut assert_same = |i: usize, what: &str| {
        assert_eq!(score(&mut model, &oracle, &pairs[i..=i]), done[i], "{what}");
    };
    assert_same(0, "done");
    assert_same(1, "recorded");
    assert_same(0, "replayed");
    assert_same(1, "replayed");
}
