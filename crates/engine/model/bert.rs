//! The text encoder: a post-norm BERT whose layers can look at the image between self-attention and MLP.
//!
//! Rows are packed: captions follow each other without padding. The rows of the matching head (with cross-attention)
//! come first, those of the cosine head (without) after them, so that both share every product of the shared weights.

use std::ops::Range;

use super::{Loader, Observer, Tap, observe};
use crate::Error;
use crate::backend::{Backend, Care, Columns, Epilogue, Images, Span, TextRows};
use crate::checkpoint::TextConfig;

struct Layer<B: Backend> {
    qkv: B::Linear,
    output: B::Linear,
    output_norm: B::Norm,
    cross_query: B::Linear,
    /// k and v of the image tokens side by side, from V to 2 T.
    cross_kv: B::Linear,
    /// What does without them, where the backend can and rows are few.
    absorbed: Option<B::Absorbed>,
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
    /// The same with the tokens counted from those of the first of these images.
    pub images_alone: &'a [Span],
}

impl Packed<'_> {
    /// Tokens of the images that are seen.
    fn image_rows(&self) -> Range<usize> {
        let end = self.images.last().map_or(0, |span| span.kv + span.kv_len);
        self.images.first().map_or(end, |span| span.kv)..end
    }
}

/// Weights and buffers of the text encoder. Letters: R packed rows, T width, G mlp width.
pub(super) struct Bert<B: Backend> {
    config: TextConfig,
    words: B::Buf,
    positions: B::Buf,
    embeddings_norm: B::Norm,
    layers: Vec<Layer<B>>,
    /// `[B * N, 2 T]`: a layer's cross-attention keys and values of the images, made once for all captions of a pass.
    cross: B::Buf,
    seen: Option<B::Seen>,
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
    /// `[R, G]`, or less: the backend's
    hidden: B::Buf,
}

impl<B: Backend> Bert<B> {
    /// Loads the encoder with buffers for `rows_max` packed rows and so many images (0: no matching head).
    /// Errors: a missing or misshapen tensor, no memory.
    pub(super) fn load(
        loader: &Loader<'_, B>,
        config: &TextConfig,
        images: Images,
        rows_max: usize,
    ) -> Result<Self, Error> {
        let (backend, t) = (loader.backend, config.hidden);
        let name = "text_encoder.embeddings";
        let layers = (0..config.layers).map(|j| Self::layer(loader, config, images, j));
        let seen = if images.count == 0 { None } else { backend.alloc_seen(images, t / config.heads)? };
        Ok(Self {
            config: config.clone(),
            words: loader.table(&format!("{name}.word_embeddings.weight"), config.vocab, t)?,
            positions: loader.table(&format!("{name}.position_embeddings.weight"), config.positions, t)?,
            embeddings_norm: loader.norm(&format!("{name}.LayerNorm"), t, config.eps)?,
            layers: layers.collect::<Result<_, _>>()?,
            cross: backend.alloc(images.count * images.tokens, 2 * t)?,
            seen,
            x: backend.alloc(rows_max, t)?,
            a: backend.alloc(rows_max, t)?,
            b: backend.alloc(rows_max, t)?,
            context: backend.alloc(rows_max, t)?,
            qkv: backend.alloc(rows_max, 3 * t)?,
            hidden: backend.alloc_hidden(rows_max, config.intermediate)?,
        })
    }

    fn layer(loader: &Loader<'_, B>, config: &TextConfig, images: Images, j: usize) -> Result<Layer<B>, Error> {
        let (name, t, g) = (format!("text_encoder.encoder.layer.{j}"), config.hidden, config.intermediate);
        let part = |part: &str| format!("{name}.{part}");
        let own = ["query", "key", "value"].map(|x| part(&format!("attention.self.{x}")));
        let image = ["key", "value"].map(|x| part(&format!("crossattention.self.{x}")));
        // A fiftieth of the operations.
        let text = Care::Sensitive;
        let (backend, width) = (loader.backend, images.width);
        let (weight, bias) = loader.side_by_side(&image.each_ref().map(String::as_str), t, width)?;
        let (key, value) = weight.split_at(t * width);
        let absorbed = match images.count {
            0 => None,
            _ => backend.absorbed_weights(key, (value, &bias[t..]), (width, config.heads))?,
        };
        Ok(Layer {
            absorbed,
            qkv: loader.fused(text, &own.each_ref().map(String::as_str), t, t)?,
            output: loader.linear(text, &part("attention.output.dense"), t, t)?,
            output_norm: loader.norm(&part("attention.output.LayerNorm"), t, config.eps)?,
            cross_query: loader.linear(text, &part("crossattention.self.query"), t, t)?,
            cross_kv: backend.careful_weights(Care::Attention, &weight, &bias, width)?,
            cross_output: loader.linear(text, &part("crossattention.output.dense"), t, t)?,
            cross_norm: loader.norm(&part("crossattention.output.LayerNorm"), t, config.eps)?,
            fc1: loader.linear(text, &part("intermediate.dense"), g, t)?,
            fc2: loader.linear(text, &part("output.dense"), t, g)?,
            mlp_norm: loader.norm(&part("output.LayerNorm"), t, config.eps)?,
        })
    }

    /// Encodes packed rows that see `image_embeds [B * N, V]`; the result, [`Self::output`], is `[R, T]`.
    pub(super) fn forward(
        &mut self,
        backend: &mut B,
        text: &Packed<'_>,
        image_embeds: &B::Buf,
        observer: &mut Observer<'_>,
    ) -> Result<(), Error> {
        let (t, heads) = (self.config.hidden, self.config.heads);
        let values = text.rows.ids.len() * t;
        let seen = self.seen.as_mut().filter(|_| text.cross_rows > 0);
        let sees = seen.is_some_and(|seen| backend.see(image_embeds, text.images, t / heads, seen));
        backend.embed(text.rows, (&self.words, &self.positions), &self.embeddings_norm, &mut self.x);
        observe(observer, backend, Tap::TextEmbeddings, &self.x, values)?;
        for j in 0..self.layers.len() {
            self.block(backend, j, text, (image_embeds, sees));
            observe(observer, backend, Tap::TextBlock(j), &self.x, values)?;
        }
        Ok(())
    }

    /// `a = LN(x + dense(self x)); b = LN(a + dense(cross a)); x = LN(b + fc2(gelu(fc1 b)))`; without an image b = a.
    fn block(&mut self, backend: &mut B, j: usize, text: &Packed<'_>, (image_embeds, sees): (&B::Buf, bool)) {
        let (layer, t, heads) = (&self.layers[j], self.config.hidden, self.config.heads);
        let (rows, cross_rows) = (text.rows.ids.len(), text.cross_rows);
        backend.linear(&self.x, rows, &layer.qkv, Epilogue::Store, &mut self.qkv);
        let qkv = [0, t, 2 * t].map(|first| Columns { buf: &self.qkv, first });
        backend.attention(qkv, text.captions, heads, &mut self.context);
        backend.linear(&self.context, rows, &layer.output, Epilogue::Accumulate, &mut self.x);
        backend.layer_norm(&self.x, rows, &layer.output_norm, &mut self.a);
        if cross_rows > 0 {
            backend.linear(&self.a, cross_rows, &layer.cross_query, Epilogue::Store, &mut self.b);
            match (&self.seen, &layer.absorbed) {
                (Some(seen), Some(w)) if sees => backend.attend_seen(&self.b, text.images, seen, w, &mut self.context),
                _ => {
                    let (rows, kv) = (text.image_rows(), &mut self.cross);
                    backend.linear_of(image_embeds, rows, &layer.cross_kv, Epilogue::Store, kv);
                    let qkv = [(&self.b, 0), (&*kv, 0), (&*kv, t)].map(|(buf, first)| Columns { buf, first });
                    backend.attention(qkv, text.images_alone, heads, &mut self.context);
                }
            }
            backend.linear(&self.context, cross_rows, &layer.cross_output, Epilogue::Accumulate, &mut self.a);
            // Only the matching rows pass this norm; the cosine rows stay as they are in a.
            backend.layer_norm(&self.a, cross_rows, &layer.cross_norm, &mut self.b);
            backend.copy_rows(&self.b, cross_rows, &mut self.a);
        }
        backend.mlp(&mut self.a, rows, None, [&layer.fc1, &layer.fc2], &mut self.hidden);
        backend.layer_norm(&self.a, rows, &layer.mlp_norm, &mut self.x);
    }

    /// The last layer's rows, `[R, T]`; a caption's first row is what the heads read.
    pub(super) fn output(&self) -> &B::Buf {
        &self.x
    }
}
