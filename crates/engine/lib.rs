//! The inference engine: weights and a batch of image-caption pairs in, scores out.
//!
//! Owns checkpoints ([`Checkpoint`]), the model (written once, over the backend trait) and the backends (CPU and CUDA). Must not: decode
//! images, split words, touch the network or an async runtime. The only crate with `unsafe`.
//!
//! ```text
//! pixels [B, S, S, 3] u8 -> Vit -> image tokens [B * N, V] -+-> class rows -> vision_proj -> |u| -+
//!                                                           +-> keys, values of each layer        +-> cosine
//! token ids (packed)  -> Bert, both modes in one pass -> row 0 of each caption -> text_proj -> |w| +
//!                                                                              -> itm_head -> softmax -> itm
//! ```
//!
//! Shape letters, everywhere in this crate: B images, S image side in pixels, p patch side, N tokens of an image
//! (patches + 1), V image width, F image mlp width, R packed text rows, T text width, G text mlp width, C captions,
//! P shared projection width.

mod allocator;
mod backend;
mod batch;
mod checkpoint;
mod cpu;
#[cfg(any(feature = "cuda", feature = "emulator"))]
mod cuda;
mod error;
mod model;
mod profile;

pub use allocator::{give_large_buffers_back, share_heaps};
pub use batch::Batch;
pub use checkpoint::{Checkpoint, Config, SyntheticSize, TensorInfo, TextConfig, VisionConfig};
pub use error::Error;
pub use profile::Stage;

/// The parts of the engine that its tests compare with independent references; not for users.
#[doc(hidden)]
pub mod testing {
    pub use crate::backend::{Backend, Columns, Epilogue, Images, Patches, Span, TextRows};
    pub use crate::cpu::{AttentionLimits, CpuBackend, Isa, ceiling};
    #[cfg(feature = "cuda")]
    pub use crate::cuda::Gpu;
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub use crate::cuda::{CudaBackend, Limits};
    #[cfg(feature = "emulator")]
    pub use crate::cuda::{Emulated, Order};
    pub use crate::model::{Model, Observer, Tap};
}

/// Normalised value of each 8-bit sample: `lut[channel][value] = (value * rescale - mean[channel]) / std[channel]`.
pub type PixelLut = [[f32; 256]; 3];

/// First token of a caption in the matching head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ItmToken {
    /// `[CLS]`, as transformers does.
    #[default]
    Cls,
    /// `[ENC]`, as the published weights were trained.
    Enc,
}

/// Arithmetic of the products and storage of activations; statistics, softmax and sums are f32 in all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 32-bit floats, products without shortcuts: the reference.
    #[default]
    F32,
    /// 32-bit floats whose products round their inputs to 10 bits of mantissa.
    Tf32,
    /// 16-bit floats.
    F16,
    /// 16-bit floats with f32's range and 7 bits of mantissa.
    Bf16,
    /// Bytes: weights with a scale for each output, activations with one for each row; on the processor only.
    Int8,
}

impl Precision {
    /// "f32", "tf32", "f16", "bf16" or "int8".
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::F16 => "f16",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
        }
    }
}

/// Which scores to compute; at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// The probability that the caption matches.
    pub itm: bool,
    /// The cosine of the two embeddings.
    pub cosine: bool,
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA card, by the driver's number.
    Cuda(usize),
}

/// What a scorer is loaded for.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What computes.
    pub device: Device,
    /// In which arithmetic; processors have f32, bf16 and int8, cards all but int8.
    pub precision: Precision,
    /// Threads of the engine's pool; 0: one per core.
    pub threads: usize,
    /// Most images of a batch; a card without room for them takes fewer, see [`Info::images_max`].
    pub images_max: usize,
    /// Caption tokens that go through the text encoder at a time; raised to the longest possible caption.
    pub tokens_max: usize,
    /// Scores to compute.
    pub heads: Heads,
    /// First token of the matching head.
    pub itm_token: ItmToken,
}

/// What a scorer is.
#[derive(Clone, Debug)]
pub struct Info {
    /// The model's shape.
    pub config: Config,
    /// What computes: "cpu (avx512, 2 threads)".
    pub device: String,
    /// Arithmetic of the products.
    pub precision: Precision,
    /// Most images of a batch.
    pub images_max: usize,
    /// Caption tokens per text pass.
    pub tokens_max: usize,
}

/// Scores of one caption with its image; NaN where a head is off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairScore {
    /// The matching head's logits: no match, match.
    pub itm_logits: [f32; 2],
    /// Probability of a match, `softmax(itm_logits)[1]`.
    pub itm: f32,
    /// Cosine of the projected features, in [-1, 1].
    pub cosine: f32,
}

impl PairScore {
    fn new(itm_logits: Option<[f32; 2]>, cosine: Option<f32>) -> Self {
        let itm_logits = itm_logits.unwrap_or([f32::NAN; 2]);
        let itm = 1.0 / (1.0 + (itm_logits[0] - itm_logits[1]).exp());
        Self { itm_logits, itm, cosine: cosine.unwrap_or(f32::NAN) }
    }
}

/// A loaded model that scores batches.
pub trait Scorer: Send {
    /// What it is.
    fn info(&self) -> &Info;

    /// Scores every pair of the batch: `out` is cleared and then holds one entry per caption, in order.
    ///
    /// # Errors
    /// A batch beyond what the scorer was loaded for, or with tokens the model lacks.
    fn score(&mut self, batch: &Batch, out: &mut Vec<PairScore>) -> Result<(), Error>;

    /// [`Self::score`], and meanwhile begins to bring `next` to the device: the batch of the next call, which must then be
    /// the same. It saves time and changes nothing else.
    ///
    /// # Errors
    /// As [`Self::score`].
    fn score_ahead(&mut self, batch: &Batch, next: &Batch, out: &mut Vec<PairScore>) -> Result<(), Error> {
        let _ = next;
        self.score(batch, out)
    }
}

/// Whether the card can be used, and if not, why.
///
/// # Errors
/// [`Error::NoCuda`]: this build has no CUDA, or no driver, card or cuBLASLt that it can use is there.
pub fn check_cuda(ordinal: usize) -> Result<(), Error> {
    #[cfg(feature = "cuda")]
    return cuda::Gpu::open(ordinal, Precision::F16).map(drop);
    #[cfg(not(feature = "cuda"))]
    Err(no_cuda(ordinal))
}

#[cfg(not(feature = "cuda"))]
fn no_cuda(ordinal: usize) -> Error {
    Error::NoCuda { ordinal, reason: "this build has no CUDA: build it with --features cuda".to_owned() }
}

/// Loads a checkpoint onto a device.
///
/// # Errors
/// A missing or misshapen tensor, a weight that is not finite, no memory, no threads, no such device.
pub fn load(checkpoint: &Checkpoint, lut: &PixelLut, options: &Options) -> Result<Box<dyn Scorer>, Error> {
    assert!(options.heads.itm || options.heads.cosine, "at least one head");
    match options.device {
        Device::Cpu => Ok(Box::new(model::Model::load(cpu_backend(checkpoint, options)?, checkpoint, lut, options)?)),
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => load_cuda(ordinal, checkpoint, lut, options),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(ordinal) => Err(no_cuda(ordinal)),
    }
}

/// Seconds of each kind of operation in a pass over `batch`, on a model that is loaded for it; the mean of `passes`.
///
/// Every operation is waited for, so the sum is a little more than what a pass takes.
///
/// # Errors
/// As [`load`] and [`Scorer::score`].
pub fn profile(
    checkpoint: &Checkpoint,
    lut: &PixelLut,
    options: &Options,
    batch: &Batch,
    passes: usize,
) -> Result<Vec<Stage>, Error> {
    match options.device {
        Device::Cpu => profile::profile(cpu_backend(checkpoint, options)?, checkpoint, lut, options, (batch, passes)),
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => {
            let backend = cuda_backend(ordinal, checkpoint, options)?;
            profile::profile(backend, checkpoint, lut, options, (batch, passes))
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(ordinal) => Err(no_cuda(ordinal)),
    }
}

/// FLOP/s that the device reaches at best: a processor with multiply-adds between registers on all threads, a card with a
/// square product of 8192 in the options' precision.
///
/// # Errors
/// No such device, no memory.
pub fn ceiling(checkpoint: &Checkpoint, options: &Options) -> Result<f64, Error> {
    match options.device {
        Device::Cpu => Ok(cpu::ceiling(cpu::Isa::detect()?, options.precision, options.threads)),
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => profile::product_ceiling(cuda_backend(ordinal, checkpoint, options)?),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(ordinal) => {
            let _ = checkpoint;
            Err(no_cuda(ordinal))
        }
    }
}

fn cpu_backend(checkpoint: &Checkpoint, options: &Options) -> Result<cpu::CpuBackend, Error> {
    cpu::CpuBackend::new(options.threads, cpu::Isa::detect()?, options.precision, attention_limits(checkpoint.config()))
}

#[cfg(feature = "cuda")]
fn cuda_backend(
    ordinal: usize,
    checkpoint: &Checkpoint,
    options: &Options,
) -> Result<cuda::CudaBackend<cuda::Gpu>, Error> {
    cuda::check_config(ordinal, checkpoint.config())?;
    let gpu = cuda::Gpu::open(ordinal, options.precision)?;
    cuda::CudaBackend::new(gpu, options.precision, cuda::Limits::new(checkpoint.config(), options))
}

/// Halves the batch until it fits beside the weights.
#[cfg(feature = "cuda")]
fn load_cuda(
    ordinal: usize,
    checkpoint: &Checkpoint,
    lut: &PixelLut,
    options: &Options,
) -> Result<Box<dyn Scorer>, Error> {
    let mut options = *options;
    loop {
        let loaded = cuda_backend(ordinal, checkpoint, &options)
            .and_then(|backend| model::Model::load(backend, checkpoint, lut, &options));
        match loaded {
            Ok(model) => return Ok(Box::new(model)),
            Err(Error::CardOutOfMemory { .. }) if options.images_max > 1 => options.images_max /= 2,
            Err(error) => return Err(error),
        }
    }
}

fn attention_limits(config: &Config) -> cpu::AttentionLimits {
    let side = config.vision.image_size / config.vision.patch_size;
    cpu::AttentionLimits {
        keys: (side * side + 1).max(config.text.positions),
        head_size: (config.vision.hidden / config.vision.heads).max(config.text.hidden / config.text.heads),
    }
}
