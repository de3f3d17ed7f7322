//! The whole forward pass against PyTorch: scores of all pairs and values inside the network, on every instruction set.

#[cfg(any(feature = "cuda", feature = "emulator"))]
mod cuda;
mod precisions;

#[cfg(feature = "emulator")]
use capsieve_engine::testing::Order;
use capsieve_engine::testing::{AttentionLimits, Backend, CpuBackend, Isa, Model, Observer, Tap};
use capsieve_engine::{Batch, Checkpoint, Device, Heads, ItmToken, Options, PairScore, Precision, Scorer};

use crate::oracle::{Oracle, pixel_lut};

// The tolerances are the oracle's own; beside each, the error measured on sets tiny and wide (avx512, avx2, portable).
/// ITM probability; measured 7.0e-6.
const PROBABILITY_TOLERANCE: f64 = 5e-5;
/// ITM logit; measured 2.0e-5.
const LOGIT_TOLERANCE: f64 = 2e-4;
/// Cosine; measured 1.5e-6.
const COSINE_TOLERANCE: f64 = 1e-5;
/// Largest error of an intermediate over the tensor's root mean square; measured 8.7e-6.
const STATE_TOLERANCE: f64 = 1e-4;
/// A pair's score may move by rounding when others change the order in which it sees its image; measured 2.8e-6.
const REGROUPED_TOLERANCE: f32 = 1e-5;

const OPTIONS: Options = Options {
    device: Device::Cpu,
    precision: Precision::F32,
    threads: 2,
    images_max: 6,
    tokens_max: 200,
    heads: Heads { itm: true, cosine: true },
    itm_token: ItmToken::Cls,
};

const LIMITS: AttentionLimits = AttentionLimits { keys: 577, head_size: 64 };

/// What the same tests run on.
#[derive(Clone, Copy, Debug)]
enum Target {
    Cpu(Isa),
    #[cfg(feature = "emulator")]
    Cuda(Precision),
    #[cfg(feature = "cuda")]
    Card(Precision),
}

/// Every backend that computes in f32.
fn targets() -> Vec<Target> {
    let cpu = Isa::available_for(Precision::F32).into_iter().map(Target::Cpu);
    #[cfg(feature = "emulator")]
    let cpu = cpu.chain([Target::Cuda(Precision::F32)]);
    cpu.collect()
}

/// A model on any backend.
trait Watched: Scorer {
    fn watch(&mut self, batch: &Batch, out: &mut Vec<PairScore>, observer: Observer<'_>);
}

impl<B: Backend> Watched for Model<B> {
    fn watch(&mut self, batch: &Batch, out: &mut Vec<PairScore>, observer: Observer<'_>) {
        self.score_observed(batch, out, observer).unwrap();
    }
}

fn load(oracle: &Oracle, target: Target, options: &Options) -> Box<dyn Watched> {
    let checkpoint = Checkpoint::open(&oracle.folder).unwrap();
    let lut = pixel_lut(oracle.image_size);
    match target {
        Target::Cpu(isa) => {
            let backend = CpuBackend::new(options.threads, isa, options.precision, LIMITS).unwrap();
            Box::new(Model::load(backend, &checkpoint, &lut, options).unwrap())
        }
        #[cfg(feature = "emulator")]
        Target::Cuda(precision) => {
            let rows = 2 * options.tokens_max.max(checkpoint.config().text.positions);
            let backend = crate::support::emulated(Order::Shuffled(7), precision, rows);
            Box::new(Model::load(backend, &checkpoint, &lut, options).unwrap())
        }
        #[cfg(feature = "cuda")]
        Target::Card(precision) => {
            let rows = 2 * options.tokens_max.max(checkpoint.config().text.positions);
            Box::new(Model::load(crate::support::card(precision, rows), &checkpoint, &lut, options).unwrap())
        }
    }
}

fn best(oracle: &Oracle, options: &Options) -> Box<dyn Watched> {
    load(oracle, Target::Cpu(Isa::detect().unwrap()), options)
}

/// Pairs (image, caption) as a batch; consecutive pairs of an image share it.
fn batch(oracle: &Oracle, pairs: &[(usize, usize)]) -> Batch {
    let mut batch = Batch::new(oracle.image_size);
    let mut last = None;
    for (image, caption) in pairs {
        if last != Some(*image) {
            batch.push_image(&oracle.pixels[*image]);
            last = Some(*image);
        }
        batch.push_caption(&oracle.tokens[*caption]);
    }
    batch
}

fn score(model: &mut Box<dyn Watched>, oracle: &Oracle, pairs: &[(usize, usize)]) -> Vec<PairScore> {
    let mut out = Vec::new();
    model.score(&batch(oracle, pairs), &mut out).unwrap();
    assert_eq!(out.len(), pairs.len());
    out
}

fn all_pairs(oracle: &Oracle) -> Vec<(usize, usize)> {
    (0..oracle.pixels.len()).flat_map(|i| (0..oracle.tokens.len()).map(move |c| (i, c))).collect()
}

fn sets() -> [Oracle; 2] {
    [Oracle::load("tiny"), Oracle::load("wide")]
}

fn worst(name: &str, got: impl Iterator<Item = f32>, want: &[f64]) -> f64 {
    let got: Vec<f32> = got.collect();
    assert_eq!(got.len(), want.len(), "{name}");
    let errors = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs());
    errors.map(|e| if e.is_nan() { f64::INFINITY } else { e }).fold(0.0, f64::max)
}

fn assert_scores(oracle: &Oracle, what: &str, got: &[PairScore]) {
    let expected = |name: &str| oracle.expected.floats(name).1;
    let logits = worst(what, got.iter().flat_map(|s| s.itm_logits), &expected("itm_logits_f64"));
    let probability = worst(what, got.iter().map(|s| s.itm), &expected("itm_prob_f64"));
    let cosine = worst(what, got.iter().map(|s| s.cosine), &expected("cosine_f64"));
    println!("{what}: probability {probability:.1e}, logit {logits:.1e}, cosine {cosine:.1e}");
    assert!(probability <= PROBABILITY_TOLERANCE, "{what}: probability off by {probability:e}");
    assert!(logits <= LOGIT_TOLERANCE, "{what}: logit off by {logits:e}");
    assert!(cosine <= COSINE_TOLERANCE, "{what}: cosine off by {cosine:e}");
}

#[test]
fn scores_equal_pytorch() {
    for oracle in sets() {
        for target in targets() {
            let got = score(&mut load(&oracle, target, &OPTIONS), &oracle, &all_pairs(&oracle));
            assert_scores(&oracle, &format!("{} {target:?}", oracle.name), &got);
        }
    }
}

/// Values at a tap, with the rows of several text chunks appended.
fn observe(oracle: &Oracle, target: Target, pairs: &[(usize, usize)]) -> Vec<(Tap, Vec<f32>)> {
    let mut seen = Vec::new();
    let mut receive = |tap, values| seen.push((tap, values));
    let mut out = Vec::new();
    let mut model = load(oracle, target, &OPTIONS);
    model.watch(&batch(oracle, pairs), &mut out, Some(&mut receive));
    seen
}

fn assert_state(what: &str, got: &[f32], want: &[f64]) {
    let rms = (want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
    let error = worst(what, got.iter().copied(), want) / rms;
    println!("{what}: {error:.1e} of rms");
    assert!(error <= STATE_TOLERANCE, "{what}: off by {error:e} of the rms");
}

#[test]
fn image_states_equal_pytorch() {
    for oracle in sets() {
        let (_, rows) = oracle.expected.integers("token_rows");
        let first = |name: &str| oracle.expected.floats(name);
        for target in targets() {
            for image in 0..oracle.pixels.len() {
                let key = |part: &str| format!("vision.{image}.{part}");
                if !has(&oracle, &key("embeddings")) {
                    continue;
                }
                for (tap, values) in observe(&oracle, target, &[(image, 0)]) {
                    let (part, shift) = match tap {
                        Tap::Patches => ("patch", 1),
                        Tap::ImageEmbeddings => ("embeddings", 0),
                        Tap::ImageBlock(0) => ("block0", 0),
                        Tap::ImageEmbeds => ("image_embeds", 0),
                        _ => continue,
                    };
                    let (shape, want) = first(&key(part));
                    let cols = *shape.last().unwrap();
                    let taken = rows.iter().filter(|r| **r >= shift);
                    let got: Vec<f32> =
                        taken.flat_map(|r| values[(*r - shift) as usize * cols..][..cols].to_vec()).collect();
                    assert_state(&format!("{} {target:?} {}", oracle.name, key(part)), &got, &want);
                }
            }
        }
    }
}

fn has(oracle: &Oracle, name: &str) -> bool {
    let bytes = std::fs::read(oracle.folder.join("expected.safetensors")).unwrap();
    safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(name).is_ok()
}

#[test]
fn text_states_equal_pytorch() {
    for oracle in sets() {
        for target in targets() {
            let mut checked = 0;
            for caption in (0..oracle.tokens.len()).filter(|c| has(&oracle, &format!("text.{c}.embeddings"))) {
                let last = text_layers(&oracle) - 1;
                for (tap, values) in observe(&oracle, target, &[(0, caption)]) {
                    let (itm, cosine) = values.split_at(values.len() / 2);
                    let mut check = |part: &str, got: &[f32]| {
                        let name = format!("text.{caption}.{part}");
                        let what = format!("{} {target:?} {name}", oracle.name);
                        assert_state(&what, got, &oracle.expected.floats(&name).1);
                        checked += 1;
                    };
                    if tap == Tap::TextEmbeddings {
                        check("embeddings", itm);
                        check("embeddings", cosine);
                    }
                    if tap == Tap::TextBlock(0) {
                        check("itm_image0.block0", itm);
                        check("itc.block0", cosine);
                    }
                    if tap == Tap::TextBlock(last) {
                        check("itm_image0.final", itm);
                        check("itc.final", cosine);
                    }
                }
            }
            assert_eq!(checked, 18, "three captions with six values each");
        }
    }
}

fn text_layers(oracle: &Oracle) -> usize {
    Checkpoint::open(&oracle.folder).unwrap().config().text.layers
}

#[test]
fn each_head_alone_gives_the_same_scores() {
    for oracle in sets() {
        let pairs = all_pairs(&oracle);
        let both = score(&mut best(&oracle, &OPTIONS), &oracle, &pairs);
        for (itm, cosine) in [(true, false), (false, true)] {
            let options = Options { heads: Heads { itm, cosine }, ..OPTIONS };
            let one = score(&mut best(&oracle, &options), &oracle, &pairs);
            for (one, both) in one.iter().zip(&both) {
                assert_eq!((one.itm.is_nan(), one.cosine.is_nan()), (!itm, !cosine));
                assert!(!itm || (one.itm - both.itm).abs() <= REGROUPED_TOLERANCE);
                assert!(!cosine || (one.cosine - both.cosine).abs() <= REGROUPED_TOLERANCE);
            }
        }
    }
}

/// The largest difference; infinite where a score is no number.
fn furthest(a: &[PairScore], b: &[PairScore]) -> f32 {
    assert_eq!(a.len(), b.len());
    let far = |(a, b): (&PairScore, &PairScore)| [(a.itm - b.itm).abs(), (a.cosine - b.cosine).abs()];
    let differences = a.iter().zip(b).flat_map(far);
    differences.map(|far| if far.is_nan() { f32::INFINITY } else { far }).fold(0.0, f32::max)
}

fn assert_same(what: &str, a: &[PairScore], b: &[PairScore]) {
    let far = furthest(a, b);
    assert!(far <= REGROUPED_TOLERANCE, "{what}: scores differ by {far:e}");
}

#[test]
fn a_batch_equals_its_pairs_alone() {
    for oracle in sets() {
        let pairs = all_pairs(&oracle);
        let mut model = best(&oracle, &OPTIONS);
        let together = score(&mut model, &oracle, &pairs);
        let alone: Vec<_> = pairs.iter().flat_map(|pair| score(&mut model, &oracle, &[*pair])).collect();
        assert_same(oracle.name, &together, &alone);
    }
}

#[test]
fn shuffled_pairs_give_shuffled_scores() {
    for oracle in sets() {
        let pairs = all_pairs(&oracle);
        let mut model = best(&oracle, &OPTIONS);
        let want = score(&mut model, &oracle, &pairs);
        // Interleaved images are encoded again for each run of captions, so few pairs fit a batch.
        let order: Vec<usize> = (0..pairs.len()).map(|i| i * 29 % pairs.len()).collect();
        for chunk in order.chunks(OPTIONS.images_max) {
            let shuffled: Vec<_> = chunk.iter().map(|i| pairs[*i]).collect();
            let got = score(&mut model, &oracle, &shuffled);
            assert_same(oracle.name, &got, &chunk.iter().map(|i| want[*i]).collect::<Vec<_>>());
        }
    }
}

#[test]
fn two_runs_are_bit_equal_and_threads_do_not_matter() {
    for oracle in sets() {
        let pairs = all_pairs(&oracle);
        let first = score(&mut best(&oracle, &OPTIONS), &oracle, &pairs);
        for threads in [1, 2, 5] {
            let options = Options { threads, ..OPTIONS };
            let mut model = best(&oracle, &options);
            let again = score(&mut model, &oracle, &pairs);
            assert_eq!(first, again, "{threads} threads");
            assert_eq!(first, score(&mut model, &oracle, &pairs), "second run");
        }
    }
}

#[test]
fn text_chunks_do_not_matter() {
    for oracle in sets() {
        let pairs = all_pairs(&oracle);
        let whole = score(&mut best(&oracle, &Options { tokens_max: 5000, ..OPTIONS }), &oracle, &pairs);
        let cut = score(&mut best(&oracle, &Options { tokens_max: 1, ..OPTIONS }), &oracle, &pairs);
        assert_same(oracle.name, &whole, &cut);
    }
}

#[test]
fn enc_token_changes_only_the_matching_head() {
    for oracle in sets() {
        let pairs = all_pairs(&oracle);
        let cls = score(&mut best(&oracle, &OPTIONS), &oracle, &pairs);
        let options = Options { itm_token: ItmToken::Enc, ..OPTIONS };
        let mut model = best(&oracle, &options);
        let enc = score(&mut model, &oracle, &pairs);
        assert!(cls.iter().zip(&enc).any(|(c, e)| (c.itm - e.itm).abs() > 0.05), "the first token matters");
        for (c, e) in cls.iter().zip(&enc) {
            assert_eq!(c.cosine, e.cosine);
        }
        // The same ids spelled out give the same scores: [ENC] is the vocabulary's last row.
        let spelled = Checkpoint::open(&oracle.folder).unwrap().config().text.vocab as u32 - 1;
        let mut by_hand = Batch::new(oracle.image_size);
        by_hand.push_image(&oracle.pixels[0]);
        for tokens in &oracle.tokens {
            let mut tokens = tokens.clone();
            tokens[0] = spelled;
            by_hand.push_caption(&tokens);
        }
        let mut out = Vec::new();
        best(&oracle, &OPTIONS).score(&by_hand, &mut out).unwrap();
        for (a, b) in out.iter().zip(&enc) {
            assert_eq!(a.itm, b.itm);
        }
    }
}

#[test]
fn a_batch_the_model_cannot_take_is_refused() {
    let oracle = Oracle::load("tiny");
    let mut model = best(&oracle, &Options { images_max: 1, ..OPTIONS });
    let mut refused = |batch: &Batch, what: &str| {
        let error = model.score(batch, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    let one = |tokens: &[u32]| {
        let mut batch = Batch::new(384);
        batch.push_image(&oracle.pixels[0]);
        batch.push_caption(tokens);
        batch
    };
    refused(&one(&[]), "0 tokens");
    refused(&one(&[2; 97]), "97 tokens");
    refused(&one(&[2, 201]), "token 201");
    refused(&batch(&oracle, &[(0, 0), (1, 0)]), "2 images");
    let mut small = Batch::new(4);
    small.push_image(&[0; 48]);
    refused(&small, "4 px");
    let mut out = vec![];
    model.score(&Batch::new(384), &mut out).unwrap();
    assert!(out.is_empty(), "nothing in, nothing out");
    model.score(&one(&oracle.tokens[0]), &mut out).unwrap();
    assert_eq!(out.len(), 1, "a refused batch leaves the scorer usable");
}

/// What is brought ahead is what is scored, whatever comes next in truth.
#[test]
fn batches_scored_ahead_equal_batches_scored_alone() {
    for target in targets() {
        check_scored_ahead(target);
    }
}

fn check_scored_ahead(target: Target) {
    let oracle = Oracle::load("tiny");
    let batches = [(0, 1), (1, 0), (2, 1)].map(|pair| batch(&oracle, &[pair]));
    let mut model = load(&oracle, target, &OPTIONS);
    let mut ahead = |now: &Batch, next: &Batch| {
        let mut out = Vec::new();
        model.score_ahead(now, next, &mut out).unwrap();
        out
    };
    let nothing = Batch::new(oracle.image_size);
    let alone = batches.each_ref().map(|batch| ahead(batch, &nothing));
    // A promise that is kept, one that is broken, and one that changes after it was made.
    assert_eq!(ahead(&batches[0], &batches[1]), alone[0], "{target:?}");
    assert_eq!(ahead(&batches[1], &batches[2]), alone[1], "{target:?}: kept");
    let mut changing = batches[1].clone();
    assert_eq!(ahead(&batches[0], &changing), alone[0], "{target:?}: broken");
    changing.clear();
    changing.push_image(&oracle.pixels[2]);
    changing.push_caption(&oracle.tokens[1]);
    assert_eq!(ahead(&changing, &nothing), alone[2], "{target:?}: changed");
}
