//! Seeded random weights, for benchmarks on machines to which no checkpoint can be carried.
//!
//! A value depends on the seed, the tensor's name and its index only, through integer mixing and one multiply-add, so it
//! is the same on every machine and can be made in any order.

use rayon::prelude::*;

use super::{Config, TextConfig, VisionConfig};

/// Part of a synthetic checkpoint's hash: raised when the values change.
pub(super) const VERSION: u32 = 1;

/// Shapes synthetic weights come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyntheticSize {
    /// Two layers of width 64 over images of 64 px: for tests.
    Tiny,
    /// The public base checkpoints.
    Base,
    /// The public large checkpoints.
    Large,
}

impl std::fmt::Display for SyntheticSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            SyntheticSize::Tiny => "tiny",
            SyntheticSize::Base => "base",
            SyntheticSize::Large => "large",
        })
    }
}

impl SyntheticSize {
    pub(super) fn config(self) -> Config {
        let (vision, image_size, heads) = match self {
            SyntheticSize::Tiny => ((64, 128, 2), 64, 2),
            SyntheticSize::Base => ((768, 3072, 12), 384, 12),
            SyntheticSize::Large => ((1024, 4096, 24), 384, 16),
        };
        let (text, text_heads, projection) = match self {
            SyntheticSize::Tiny => ((64, 128, 2), 2, 32),
            _ => ((768, 3072, 12), 12, 256),
        };
        let vocab = 30_524;
        Config {
            vision: VisionConfig {
                hidden: vision.0,
                intermediate: vision.1,
                layers: vision.2,
                heads,
                image_size,
                patch_size: 16,
                eps: 1e-5,
            },
            text: TextConfig {
                hidden: text.0,
                intermediate: text.1,
                layers: text.2,
                heads: text_heads,
                positions: 512,
                vocab,
                eps: 1e-12,
                enc_token_id: vocab as u32 - 1,
            },
            projection,
        }
    }
}

/// How far a tensor's values spread around their centre. The aim is a network whose scores differ between pairs: layer
/// norm gains near 1, attention scores and mlp inputs of size about 1, biases that matter, a matching head without a
/// favourite.
fn centre_and_spread(name: &str, shape: &[usize]) -> (f32, f32) {
    let inputs: usize = shape[1..].iter().product();
    // A uniform variable in [-1, 1] has variance 1/3.
    let linear = (3.0 / inputs.max(1) as f32).sqrt();
    let norm = name.contains("layer_norm") || name.contains("layernorm") || name.contains("LayerNorm");
    match name.rsplit('.').next() {
        Some("weight") if norm => (1.0, 0.2),
        Some("bias") if name == "itm_head.bias" => (0.0, 0.0),
        Some("bias") => (0.0, 0.1),
        _ if name.contains("embeddings.position") || name.contains("class_embedding") => (0.0, 0.5),
        _ if name.contains("word_embeddings") => (0.0, 1.0),
        _ if name.contains(".query.") || name.contains(".key.") || name.contains(".qkv.") => (0.0, 1.2 * linear),
        // The residual stream grows with every layer; half-size branches keep the last layers from drowning the first.
        _ if name.contains(".projection.") || name.contains(".fc2.") => (0.0, 0.5 * linear),
        _ => (0.0, linear),
    }
}

/// The values of a tensor.
pub(super) fn values(seed: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let (centre, spread) = centre_and_spread(name, shape);
    let key = name.bytes().fold(mix(seed ^ 0x6361_7073_6965_7665), |key, byte| mix(key ^ u64::from(byte)));
    let count: usize = shape.iter().product();
    let value = |i: usize| {
        let bits = mix(key.wrapping_add((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15))) >> 40;
        // 24 bits to [-1, 1), exact in f32.
        let unit = (bits as i32 - (1 << 23)) as f32 / (1 << 23) as f32;
        centre + spread * unit
    };
    (0..count).into_par_iter().with_min_len(1 << 14).map(value).collect()
}

/// The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
