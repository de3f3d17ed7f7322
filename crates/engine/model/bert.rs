//! The text encoder: a post-norm BERT whose layers can look at the image between self-attention and MLP.
//!
//! Rows are packed: captions follow each other without padding. The rows of the matching head (with cross-attention)
//! come first, those of the cosine head (without) after them, so that both share every product of the shared weights.

use super::{Loader, Observer, Tap, observe};
use crate::Error;
use crate::backend::{Backend, Care, Columns, Epilogue, Span, TextRows};
use crate::checkpoint::TextConfig;

struct Layer<B: Backend> {
    qkv: B::Linear,
    output: B::Linear,
    output_norm: B::Norm,
    cross_query: B::Linear,
    /// k and v of the image tokens side by side, from V to 2 T.
    cross_kv: B::Linear,
    cross_output: B::Linear,
    cross_norm: B::Norm,
    fc1: B::Linear,
    fc2: B::Linear,
    mlp_norm: B::Norm,
}

/// The packed rows of one text pass. R rows in all, the first `cross_rows` of which see an image.
#[derive(Debug)]
pub(super) struct Packed<'a> {
    /// Token and position ids, R each.
    pub rows: TextRows<'a>,
    /// One span per caption and mode, over rows.
    pub captions: &'a [Span],
    /// Rows of the matching head.
    pub cross_rows: usize,
    /// One span per image: its captions' rows against its tokens.
    pub images: &'a [Span],
}

/// Weights and buffers of the text encoder. Letters: R packed rows, T width, G mlp width.
pub(super) struct Bert<B: Backend> {
    config: TextConfig,
    words: B::Buf,
    positions: B::Buf,
    embeddings_norm: B::Norm,
    layers: Vec<Layer<B>>,
    /// Per layer `[B * N, 2 T]`: the images' cross-attention keys and values, made once for all captions.
    cross: Vec<B::Buf>,
    /// `[R, T]`: input and output of a layer
    x: B::Buf,
    /// `[R, T]`: after the self-attention's norm
    a: B::Buf,
    /// `[R, T]`: after the cross-attention's norm
    b: B::Buf,
    /// `[R, T]`
    context: B::Buf,
    /// `[R, 3 T]`: q, k, v
    qkv: B::Buf,
    /// `[R, G]`
    hidden: B::Buf,
}

impl<B: Backend> Bert<B> {
    /// Loads the encoder with buffers for `rows_max` packed rows and `image_rows` image tokens (0: no matching head).
    /// Errors: a missing or misshapen tensor, no memory.
    pub(super) fn load(
        loader: &Loader<'_, B>,
        config: &TextConfig,
        image_width: usize,
        (rows_max, image_rows): (usize, usize),
    ) -> Result<Self, Error> {
        let (backend, t) = (loader.backend, config.hidden);
        let name = "text_encoder.embeddings";
        let layers = (0..config.layers).map(|j| Self::layer(loader, config, image_width, j));
        let cross_layers = if image_rows == 0 { 0 } else { config.layers };
        Ok(Self {
            config: config.clone(),
            words: loader.table(&format!("{name}.word_embeddings.weight"), config.vocab, t)?,
            positions: loader.table(&format!("{name}.position_embeddings.weight"), config.positions, t)?,
            embeddings_norm: loader.norm(&format!("{name}.LayerNorm"), t, config.eps)?,
            layers: layers.collect::<Result<_, _>>()?,
            cross: (0..cross_layers).map(|_| backend.alloc(image_rows, 2 * t)).collect::<Result<_, _>>()?,
            x: backend.alloc(rows_max, t)?,
            a: backend.alloc(rows_max, t)?,
            b: backend.alloc(rows_max, t)?,
            context: backend.alloc(rows_max, t)?,
            qkv: backend.alloc(rows_max, 3 * t)?,
            hidden: backend.alloc(rows_max, config.intermediate)?,
        })
    }

    fn layer(loader: &Loader<'_, B>, config: &TextConfig, image_width: usize, j: usize) -> Result<Layer<B>, Error> {
        let (name, t, g) = (format!("text_encoder.encoder.layer.{j}"), config.hidden, config.intermediate);
        let part = |part: &str| format!("{name}.{part}");
        let own = ["query", "key", "value"].map(|x| part(&format!("attention.self.{x}")));
        let image = ["key", "value"].map(|x| part(&format!("crossattention.self.{x}")));
        // A fiftieth of the operations.
        let text = Care::Sensitive;
        Ok(Layer {
            qkv: loader.fused(text, &own.each_ref().map(String::as_str), t, t)?,
            output: loader.linear(text, &part("attention.output.dense"), t, t)?,
            output_norm: loader.norm(&part("attention.output.LayerNorm"), t, config.eps)?,
            cross_query: loader.linear(text, &part("crossattention.self.query"), t, t)?,
            cross_kv: loader.fused(Care::Usual, &image.each_ref().map(String::as_str), t, image_width)?,
            cross_output: loader.linear(text, &part("crossattention.output.dense"), t, t)?,
            cross_norm: loader.norm(&part("crossattention.output.LayerNorm"), t, config.eps)?,
            fc1: loader.linear(text, &part("intermediate.dense"), g, t)?,
            fc2: loader.linear(text, &part("output.dense"), t, g)?,
            mlp_norm: loader.norm(&part("output.LayerNorm"), t, config.eps)?,
        })
    }

    /// Makes every layer's cross-attention keys and values from `image_embeds [rows, V]`.
    pub(super) fn see_images(&mut self, backend: &mut B, image_embeds: &B::Buf, rows: usize) {
        for (layer, kv) in self.layers.iter().zip(&mut self.cross) {
            backend.linear(image_embeds, rows, &layer.cross_kv, Epilogue::Store, kv);
        }
    }

    /// Encodes packed rows; the result, [`Self::output`], is `[R, T]`.
    pub(super) fn forward(
        &mut self,
        backend: &mut B,
        text: &Packed<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<(), Error> {
        let values = text.rows.ids.len() * self.config.hidden;
        backend.embed(text.rows, (&self.words, &self.positions), &self.embeddings_norm, &mut self.x);
        observe(observer, backend, Tap::TextEmbeddings, &self.x, values)?;
        for j in 0..self.layers.len() {
            self.block(backend, j, text);
            observe(observer, backend, Tap::TextBlock(j), &self.x, values)?;
        }
        Ok(())
    }

    /// `a = LN(x + dense(self x)); b = LN(a + dense(cross a)); x = LN(b + fc2(gelu(fc1 b)))`; without an image b = a.
    fn block(&mut self, backend: &mut B, j: usize, text: &Packed<'_>) {
        let (layer, t, heads) = (&self.layers[j], self.config.hidden, self.config.heads);
        let (rows, cross_rows) = (text.rows.ids.len(), text.cross_rows);
        backend.linear(&self.x, rows, &layer.qkv, Epilogue::Store, &mut self.qkv);
        let qkv = [0, t, 2 * t].map(|first| Columns { buf: &self.qkv, first });
        backend.attention(qkv, text.captions, heads, &mut self.context);
        backend.linear(&self.context, rows, &layer.output, Epilogue::Accumulate, &mut self.x);
        backend.layer_norm(&self.x, rows, &layer.output_norm, &mut self.a);
        if cross_rows > 0 {
            backend.linear(&self.a, cross_rows, &layer.cross_query, Epilogue::Store, &mut self.b);
            let kv = &self.cross[j];
            let qkv = [(&self.b, 0), (kv, 0), (kv, t)].map(|(buf, first)| Columns { buf, first });
            backend.attention(qkv, text.images, heads, &mut self.context);
            backend.linear(&self.context, cross_rows, &layer.cross_output, Epilogue::Accumulate, &mut self.a);
            // Only the matching rows pass this norm; the cosine rows stay as they are in a.
            backend.layer_norm(&self.a, cross_rows, &layer.cross_norm, &mut self.b);
            backend.copy_rows(&self.b, cross_rows, &mut self.a);
        }
        backend.linear(&self.a, rows, &layer.fc1, Epilogue::Gelu, &mut self.hidden);
        backend.linear(&self.hidden, rows, &layer.fc2, Epilogue::Accumulate, &mut self.a);
        backend.layer_norm(&self.a, rows, &layer.mlp_norm, &mut self.x);
    }

    /// The last layer's rows, `[R, T]`; a caption's first row is what the heads read.
    pub(super) fn output(&self) -> &B::Buf {
        &self.x
    }
}
