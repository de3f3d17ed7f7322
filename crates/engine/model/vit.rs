//! The image encoder: a pre-norm vision transformer (arXiv 2010.11929) over square patches.

use super::{Loader, Observer, Tap, observe};
use crate::backend::{Backend, Care, Columns, Epilogue, Patches, Span};
use crate::checkpoint::VisionConfig;
use crate::{Error, PixelLut};

struct Layer<B: Backend> {
    norm1: B::Norm,
    qkv: B::Linear,
    projection: B::Linear,
    norm2: B::Norm,
    fc1: B::Linear,
    fc2: B::Linear,
}

/// Weights and buffers of the image encoder. Letters: B images, N tokens of an image, V width, F mlp width.
pub(super) struct Vit<B: Backend> {
    config: VisionConfig,
    patches: Patches,
    lut: PixelLut,
    patch_embedding: B::Linear,
    positions: B::Buf,
    layers: Vec<Layer<B>>,
    post_norm: B::Norm,
    spans: Vec<Span>,
    /// `[B * patches, 3 p p]`
    pixels: B::Buf,
    /// `[B * N, V]`: the residual stream
    x: B::Buf,
    /// `[B * N, V]`: room for normed rows, at last the result
    normed: B::Buf,
    /// `[B * N, V]`
    context: B::Buf,
    /// `[B * N, 3 V]`: q, k, v
    qkv: B::Buf,
    /// `[B * N, F]`, or less: the backend's
    hidden: B::Buf,
}

impl<B: Backend> Vit<B> {
    /// Loads the encoder with buffers for `images_max` images. Errors: a missing or misshapen tensor, no memory.
    pub(super) fn load(
        loader: &Loader<'_, B>,
        config: &VisionConfig,
        lut: &PixelLut,
        images_max: usize,
    ) -> Result<Self, Error> {
        let backend = loader.backend;
        let patches = Patches { image_size: config.image_size, patch_size: config.patch_size };
        let (v, tokens) = (config.hidden, patches.count() + 1);
        let layers = (0..config.layers).map(|i| Self::layer(loader, config, i)).collect::<Result<_, _>>()?;
        let name = "vision_model.embeddings";
        let p = config.patch_size;
        let weight = loader.read(&format!("{name}.patch_embedding.weight"), &[v, 3, p, p])?;
        let bias = loader.read(&format!("{name}.patch_embedding.bias"), &[v])?;
        let mut positions = loader.read(&format!("{name}.position_embedding"), &[1, tokens, v])?;
        let class = loader.read(&format!("{name}.class_embedding"), &[1, 1, v])?;
        for (position, class) in positions.iter_mut().zip(&class) {
            *position += class;
        }
        let rows = images_max * tokens;
        Ok(Self {
            config: config.clone(),
            patches,
            lut: *lut,
            patch_embedding: backend.careful_weights(Care::Sensitive, &weight, &bias, patches.values())?,
            positions: backend.upload(tokens, v, &positions)?,
            layers,
            post_norm: loader.norm("vision_model.post_layernorm", v, config.eps)?,
            spans: Vec::with_capacity(images_max),
            pixels: backend.alloc(images_max * patches.count(), patches.values())?,
            x: backend.alloc(rows, v)?,
            normed: backend.alloc(rows, v)?,
            context: backend.alloc(rows, v)?,
            qkv: backend.alloc(rows, 3 * v)?,
            hidden: backend.alloc_hidden(rows, config.intermediate)?,
        })
    }

    fn layer(loader: &Loader<'_, B>, config: &VisionConfig, i: usize) -> Result<Layer<B>, Error> {
        let (name, v, f) = (format!("vision_model.encoder.layers.{i}"), config.hidden, config.intermediate);
        Ok(Layer {
            norm1: loader.norm(&format!("{name}.layer_norm1"), v, config.eps)?,
            qkv: loader.linear(Care::Usual, &format!("{name}.self_attn.qkv"), 3 * v, v)?,
            projection: loader.linear(Care::Usual, &format!("{name}.self_attn.projection"), v, v)?,
            norm2: loader.norm(&format!("{name}.layer_norm2"), v, config.eps)?,
            fc1: loader.linear(Care::Usual, &format!("{name}.mlp.fc1"), f, v)?,
            fc2: loader.linear(Care::Usual, &format!("{name}.mlp.fc2"), v, f)?,
        })
    }

    /// Tokens of an image: patches and the class row.
    pub(super) fn tokens(&self) -> usize {
        self.patches.count() + 1
    }

    /// Cuts `pixels [B, S, S, 3]` into patches for [`Self::encode`]; returns B.
    pub(super) fn patchify(&mut self, backend: &mut B, pixels: &[u8]) -> usize {
        let (images, tokens) = (pixels.len() / (self.config.image_size.pow(2) * 3), self.tokens());
        backend.patchify(pixels, self.patches, &self.lut, &mut self.pixels);
        self.spans.clear();
        self.spans.extend((0..images).map(|i| Span { q: i * tokens, q_len: tokens, kv: i * tokens, kv_len: tokens }));
        images
    }

    /// Encodes the `images` images that were cut into patches; the result, [`Self::embeds`], is `[B * N, V]`.
    pub(super) fn encode(&mut self, backend: &mut B, images: usize, observer: &mut Observer<'_>) -> Result<(), Error> {
        let (v, patches, rows) = (self.config.hidden, images * self.patches.count(), images * self.tokens());
        backend.linear(&self.pixels, patches, &self.patch_embedding, Epilogue::Store, &mut self.context);
        observe(observer, backend, Tap::Patches, &self.context, patches * v)?;
        backend.image_tokens(&self.context, images, &self.positions, &mut self.x);
        observe(observer, backend, Tap::ImageEmbeddings, &self.x, rows * v)?;
        for i in 0..self.layers.len() {
            self.block(backend, i, rows);
            observe(observer, backend, Tap::ImageBlock(i), &self.x, rows * v)?;
        }
        backend.layer_norm(&self.x, rows, &self.post_norm, &mut self.normed);
        observe(observer, backend, Tap::ImageEmbeds, &self.normed, rows * v)
    }

    /// `x += proj(attention(ln1 x)); x += fc2(gelu(fc1(ln2 x)))`
    fn block(&mut self, backend: &mut B, i: usize, rows: usize) {
        let (layer, v) = (&self.layers[i], self.config.hidden);
        backend.linear_of_norm(&self.x, rows, (&layer.norm1, &mut self.normed), &layer.qkv, &mut self.qkv);
        let qkv = [0, v, 2 * v].map(|first| Columns { buf: &self.qkv, first });
        backend.attention(qkv, &self.spans, self.config.heads, &mut self.context);
        backend.linear(&self.context, rows, &layer.projection, Epilogue::Accumulate, &mut self.x);
        let norm = Some((&layer.norm2, &mut self.normed));
        backend.mlp(&mut self.x, rows, norm, [&layer.fc1, &layer.fc2], &mut self.hidden);
    }

    /// All tokens of all images after the final norm, `[B * N, V]`; row `b * N` is image b's class row.
    pub(super) fn embeds(&self) -> &B::Buf {
        &self.normed
    }
}
