//! Pillow's 8-bit bicubic resize (every release up to 12), bit for bit, fast enough to disappear behind the decoder.
//!
//! Owns the weights and the two passes. Must not know about formats: pixels in, pixels out.
//!
//! The result is defined by five steps that may not be reordered, because the values between the passes are rounded to
//! 8 bits: horizontal first, then vertical; weights in f64, normalised, then rounded to 22-bit fixed point.
//!
//! Both passes are the same kernel, `weigh`: a weighted sum of a few byte rows, with i32 accumulators side by side in
//! vector registers. The vertical pass has its rows in memory already. The horizontal pass makes them: it takes
//! a strip of 16 image rows, transposes it (four perfect shuffles, plain byte zips), and then 16 pixels of one column lie
//! next to each other. That costs under one instruction a byte and spares a reduction across lanes for every output pixel.

use crate::RgbImage;
use multiversion::multiversion;

/// Bytes of one pixel.
const CHANNELS: usize = 3;
/// Image rows that the horizontal pass works on at a time.
const STRIP_ROWS: usize = 16;
/// Accumulators kept in registers: one transposed pixel column, and 48 bytes of a row in the vertical pass.
const LANES: usize = STRIP_ROWS * CHANNELS;
/// Fraction bits of a weight.
const PRECISION_BITS: u32 = 22;
/// One half in that fixed point: where every sum starts, so that the shift at the end rounds.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// Resizes to exactly `width` x `height`, ignoring the aspect ratio. An axis whose size does not change is not filtered.
///
/// # Panics
/// When a side is zero or `img.pixels` does not hold `width * height * 3` bytes: both are mistakes of the caller.
#[must_use]
pub fn resize_bicubic(img: &RgbImage, width: usize, height: usize) -> RgbImage {
    assert!(img.width > 0 && img.height > 0 && width > 0 && height > 0, "a side of the image is zero");
    assert_eq!(img.pixels.len(), img.width * img.height * CHANNELS, "pixels do not fill the image");
    let narrowed = (img.width != width).then(|| {
        let mut out = vec![0; width * img.height * CHANNELS];
        horizontal(&img.pixels, img.width, &Weights::new(img.width, width), &mut out);
        out
    });
    if img.height == height {
        return RgbImage { width, height, pixels: narrowed.unwrap_or_else(|| img.pixels.clone()) };
    }
    let rows = narrowed.as_deref().unwrap_or(&img.pixels);
    let mut pixels = vec![0; width * height * CHANNELS];
    vertical(rows, width * CHANNELS, &Weights::new(img.height, height), &mut pixels);
    RgbImage { width, height, pixels }
}

/// The filter of one axis: for every output position the first input position and the fixed-point weights from there on.
struct Weights {
    taps: Vec<(usize, usize)>, // (first input position, number of weights)
    values: Vec<i32>,          // taps_max per output position
    taps_max: usize,
}

impl Weights {
    fn new(n_in: usize, n_out: usize) -> Self {
        let scale = n_in as f64 / n_out as f64;
        let filter_scale = scale.max(1.0); // shrinking widens the kernel: antialiasing
        let support = 2.0 * filter_scale;
        let taps_max = support.ceil() as usize * 2 + 1;
        let mut weights = Self { taps: Vec::with_capacity(n_out), values: vec![0; n_out * taps_max], taps_max };
        let mut exact = Vec::with_capacity(taps_max);
        for (i, values) in weights.values.chunks_exact_mut(taps_max).enumerate() {
            let centre = (i as f64 + 0.5) * scale;
            let lo = (centre - support + 0.5).max(0.0) as usize; // a cast of a positive f64 truncates
            let hi = ((centre + support + 0.5) as usize).min(n_in);
            exact.clear();
            exact.extend((lo..hi).map(|k| cubic((k as f64 - centre + 0.5) * (1.0 / filter_scale))));
            let sum: f64 = exact.iter().sum();
            for (value, weight) in values.iter_mut().zip(&exact) {
                *value = to_fixed(if sum == 0.0 { *weight } else { weight / sum });
            }
            weights.taps.push((lo, hi - lo));
        }
        weights
    }

    /// (first input position, weights) for each output position in order.
    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.taps
            .iter()
            .zip(self.values.chunks_exact(self.taps_max))
            .map(|(&(lo, count), values)| (lo, &values[..count]))
    }
}

/// The cubic convolution kernel with a = -0.5.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn to_fixed(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION_BITS);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

/// Every output row is a weighted sum of input rows of `stride` bytes.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2",
    "x86_64+avx2",
    "x86_64+sse4.1",
    "aarch64+neon"
))]
fn vertical(rows: &[u8], stride: usize, weights: &Weights, out: &mut [u8]) {
    for ((lo, weights), out_row) in weights.iter().zip(out.chunks_exact_mut(stride)) {
        let (blocks, tail) = out_row.as_chunks_mut::<LANES>();
        let mut at = lo * stride;
        for block in blocks {
            weigh(&rows[at..], stride, weights, block);
            at += LANES;
        }
        if !tail.is_empty() {
            weigh_tail(&rows[at..], stride, weights, tail);
        }
    }
}

/// Filters along the rows, a strip of [`STRIP_ROWS`] of them at a time. The weights belong to pixels.
#[multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2",
    "x86_64+avx2",
    "x86_64+sse4.1",
    "aarch64+neon"
))]
fn horizontal(pixels: &[u8], width: usize, weights: &Weights, out: &mut [u8]) {
    let (stride_in, stride_out) = (width * CHANNELS, weights.taps.len() * CHANNELS);
    let mut columns = vec![0; stride_in * STRIP_ROWS];
    let mut columns_out = vec![0; stride_out * STRIP_ROWS];
    let mut scratch = vec![0; stride_in.max(stride_out) * STRIP_ROWS];
    let strips = pixels.chunks(stride_in * STRIP_ROWS).zip(out.chunks_mut(stride_out * STRIP_ROWS));
    for (strip, strip_out) in strips {
        // The last strip may be short: what stands in for its missing rows is filtered too and not copied out.
        columns[..strip.len()].copy_from_slice(strip);
        let scratch_in = &mut scratch[..stride_in * STRIP_ROWS];
        for _ in 0..STRIP_ROWS.ilog2() / 2 {
            zip_halves(&columns, scratch_in);
            zip_halves(scratch_in, &mut columns);
        }
        for ((lo, weights), column) in weights.iter().zip(columns_out.as_chunks_mut::<LANES>().0) {
            weigh(&columns[lo * LANES..], LANES, weights, column);
        }
        let scratch_out = &mut scratch[..stride_out * STRIP_ROWS];
        for _ in 0..STRIP_ROWS.ilog2() / 2 {
            unzip_halves(&columns_out, scratch_out);
            unzip_halves(scratch_out, &mut columns_out);
        }
        let rows = strip_out.len();
        strip_out.copy_from_slice(&columns_out[..rows]);
    }
}

/// `out[j] = clip(round(sum over k of weights[k] * rows[k * stride + j]))` for one block of [`LANES`] bytes.
///
/// The sum stays inside i32: the weights of one output add up to 1 in 22 bits and their magnitudes to less than 1.6, so
/// it is below 1.6 * 255 * 2^22 < 2^31. Wrapping operators, because a checked one would keep the loop scalar.
#[inline(always)]
fn weigh(rows: &[u8], stride: usize, weights: &[i32], out: &mut [u8; LANES]) {
    let mut sums = [[HALF; 16]; LANES / 16];
    let mut rest = rows;
    for &weight in weights {
        let Some(row) = rest.first_chunk::<LANES>() else { break };
        sums[0] = add_weighted(sums[0], weight, &row[..16]);
        sums[1] = add_weighted(sums[1], weight, &row[16..32]);
        sums[2] = add_weighted(sums[2], weight, &row[32..]);
        rest = rest.get(stride..).unwrap_or_default();
    }
    out[..16].copy_from_slice(&to_samples(sums[0]));
    out[16..32].copy_from_slice(&to_samples(sums[1]));
    out[32..].copy_from_slice(&to_samples(sums[2]));
}

/// One vector register of sums, by value: through a reference the compiler leaves the sums in memory.
#[inline(always)]
fn add_weighted(sums: [i32; 16], weight: i32, samples: &[u8]) -> [i32; 16] {
    std::array::from_fn(|i| sums[i].wrapping_add(weight.wrapping_mul(i32::from(samples[i]))))
}

#[inline(always)]
fn to_samples(sums: [i32; 16]) -> [u8; 16] {
    std::array::from_fn(|i| to_sample(sums[i]))
}

#[inline(always)]
fn to_sample(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// `weigh` for the bytes at the end of a row that do not fill a block.
fn weigh_tail(rows: &[u8], stride: usize, weights: &[i32], out: &mut [u8]) {
    for (j, out) in out.iter_mut().enumerate() {
        let samples = rows[j..].iter().step_by(stride);
        let sum = samples
            .zip(weights)
            .fold(HALF, |sum, (&sample, &weight)| sum.wrapping_add(weight.wrapping_mul(i32::from(sample))));
        *out = to_sample(sum);
    }
}

/// out = a0 b0 a1 b1 ... for the two halves a, b of `input`. Four times over 16 rows is their transpose.
#[inline(always)]
fn zip_halves(input: &[u8], out: &mut [u8]) {
    let (first, second) = input.split_at(input.len() / 2);
    for ((pair, &a), &b) in out.as_chunks_mut::<2>().0.iter_mut().zip(first).zip(second) {
        *pair = [a, b];
    }
}

/// The inverse of [`zip_halves`].
#[inline(always)]
fn unzip_halves(input: &[u8], out: &mut [u8]) {
    let (first, second) = out.split_at_mut(input.len() / 2);
    for ((&[x, y], a), b) in input.as_chunks::<2>().0.iter().zip(first).zip(second) {
        *a = x;
        *b = y;
    }
}
