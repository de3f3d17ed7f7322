//! The whole model: images once, captions in packed chunks, the two heads.
//!
//! * matching: `softmax(itm_head(text row 0 | image))[1]`
//! * cosine: `<vision_proj(image row 0), text_proj(text row 0)>` after L2 normalisation

use super::bert::{Bert, Packed};
use super::chunk::Chunk;
use super::vit::Vit;
use super::{Loader, Observer};
use crate::backend::{Backend, Care, Epilogue, Images, TextRows};
use crate::checkpoint::Checkpoint;
use crate::{Batch, Error, Heads, Info, ItmToken, Options, PairScore, PixelLut, Scorer};

/// Norms below this count as this: transformers' `normalize` does the same.
const NORM_MIN: f32 = 1e-12;

struct Projections<B: Backend> {
    vision: B::Linear,
    text: B::Linear,
    itm: B::Linear,
}

/// A loaded model on a backend, and its buffers. Letters: B images, C captions of a chunk, P projection.
pub struct Model<B: Backend> {
    backend: B,
    net: Net<B>,
    info: Info,
    /// The images that are on their way to the device: [`Batch::images_id`].
    staged: Option<u64>,
}

struct Net<B: Backend> {
    vit: Vit<B>,
    bert: Bert<B>,
    projections: Projections<B>,
    heads: Heads,
    itm_token: ItmToken,
    enc_token: u32,
    tokens_max: usize,
    chunk: Chunk,
    /// `[B, V]` and `[C, T]`: the rows the heads read
    image_rows: B::Buf,
    text_rows: B::Buf,
    /// `[B, P]` and `[C, P]`
    image_features: B::Buf,
    text_features: B::Buf,
    /// `[C, 2]`
    logits: B::Buf,
    host_images: Vec<f32>,
    host_texts: Vec<f32>,
    host_logits: Vec<f32>,
    projection: usize,
}

impl<B: Backend> Model<B> {
    /// Loads the weights and allocates for `options`. Errors: a bad checkpoint, no memory.
    pub fn load(backend: B, checkpoint: &Checkpoint, lut: &PixelLut, options: &Options) -> Result<Self, Error> {
        let config = checkpoint.config().clone();
        // A chunk must take at least the longest caption.
        let tokens_max = options.tokens_max.max(config.text.positions);
        let net = Net::load(&Loader { backend: &backend, checkpoint }, lut, options, tokens_max)?;
        let (device, precision) = (backend.device(), backend.precision());
        let info = Info { config, device, precision, images_max: options.images_max, tokens_max };
        Ok(Self { backend, net, info, staged: None })
    }

    /// The backend, between two batches.
    pub(crate) fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// [`Scorer::score`] with a look at what happens inside.
    pub fn score_observed(
        &mut self,
        batch: &Batch,
        out: &mut Vec<PairScore>,
        observer: Observer<'_>,
    ) -> Result<(), Error> {
        self.score_between(batch, None, out, observer)
    }

    fn score_between(
        &mut self,
        batch: &Batch,
        next: Option<&Batch>,
        out: &mut Vec<PairScore>,
        mut observer: Observer<'_>,
    ) -> Result<(), Error> {
        batch.check(&self.info)?;
        out.clear();
        if self.staged.take() != Some(batch.images_id()) {
            self.backend.stage(None);
        }
        // A batch that cannot be scored is not brought either: its own call says why.
        let next = next.filter(|next| next.captions() > 0 && next.check(&self.info).is_ok());
        self.staged = next.filter(|_| batch.captions() > 0).map(Batch::images_id);
        let (net, pixels) = (&mut self.net, next.map(Batch::pixels));
        self.backend.run(|backend| net.score(backend, batch, pixels, out, &mut observer))
    }
}

impl<B: Backend> Scorer for Model<B> {
    fn info(&self) -> &Info {
        &self.info
    }

    fn score(&mut self, batch: &Batch, out: &mut Vec<PairScore>) -> Result<(), Error> {
        self.score_between(batch, None, out, None)
    }

    fn score_ahead(&mut self, batch: &Batch, next: &Batch, out: &mut Vec<PairScore>) -> Result<(), Error> {
        self.score_between(batch, Some(next), out, None)
    }
}

impl<B: Backend> Net<B> {
    fn load(loader: &Loader<'_, B>, lut: &PixelLut, options: &Options, tokens_max: usize) -> Result<Self, Error> {
        let (backend, config) = (loader.backend, loader.checkpoint.config());
        let (v, t, p) = (config.vision.hidden, config.text.hidden, config.projection);
        let heads = options.heads;
        let vit = Vit::load(loader, &config.vision, lut, options.images_max)?;
        let images_seen = if heads.itm { options.images_max } else { 0 };
        let images = Images { count: images_seen, tokens: vit.tokens(), width: v };
        let rows_max = tokens_max * (usize::from(heads.itm) + usize::from(heads.cosine));
        let captions_max = tokens_max;
        Ok(Self {
            bert: Bert::load(loader, &config.text, images, rows_max)?,
            vit,
            projections: Projections {
                vision: loader.linear(Care::Exact, "vision_proj", p, v)?,
                text: loader.linear(Care::Exact, "text_proj", p, t)?,
                itm: loader.linear(Care::Exact, "itm_head", 2, t)?,
            },
            heads,
            itm_token: options.itm_token,
            enc_token: config.text.enc_token_id,
            tokens_max,
            chunk: Chunk::new(rows_max, captions_max, options.images_max),
            image_rows: backend.alloc(options.images_max, v)?,
            text_rows: backend.alloc(captions_max, t)?,
            image_features: backend.alloc_results(options.images_max, p)?,
            text_features: backend.alloc_results(captions_max, p)?,
            logits: backend.alloc_results(captions_max, 2)?,
            host_images: vec![0.0; options.images_max * p],
            host_texts: vec![0.0; captions_max * p],
            host_logits: vec![0.0; captions_max * 2],
            projection: p,
        })
    }

    fn score(
        &mut self,
        backend: &mut B,
        batch: &Batch,
        next: Option<&[u8]>,
        out: &mut Vec<PairScore>,
        observer: &mut Observer<'_>,
    ) -> Result<(), Error> {
        if batch.captions() == 0 {
            return Ok(());
        }
        let images = self.vit.patchify(backend, batch.pixels());
        if observer.is_some() {
            self.vit.encode(backend, images, observer)?;
        } else {
            let mut seen = Ok(());
            backend.repeat(images, |backend| seen = self.vit.encode(backend, images, &mut None));
            seen?;
        }
        if self.heads.cosine {
            self.image_features(backend, images);
        }
        if next.is_some() {
            backend.stage(next);
        }
        let mut first = 0;
        while first < batch.captions() {
            let token = (self.itm_token == ItmToken::Enc).then_some(self.enc_token);
            let last = self.chunk.pack(batch, first, (self.heads, token), (self.tokens_max, self.vit.tokens()));
            self.score_chunk(backend, batch, first..last, out, observer)?;
            first = last;
        }
        Ok(())
    }

    /// Projects every image's class row, `[B, P]`.
    fn image_features(&mut self, backend: &mut B, images: usize) {
        let first_rows = self.chunk.image_rows(images, self.vit.tokens());
        backend.take_rows(self.vit.embeds(), first_rows, &mut self.image_rows);
        backend.linear(&self.image_rows, images, &self.projections.vision, Epilogue::Store, &mut self.image_features);
    }

    /// Brings the images' features to the host, normalised.
    fn read_image_features(&mut self, backend: &mut B, images: usize) -> Result<(), Error> {
        let host = &mut self.host_images[..images * self.projection];
        backend.read(&self.image_features, host)?;
        host.chunks_exact_mut(self.projection).for_each(normalize);
        Ok(())
    }

    fn score_chunk(
        &mut self,
        backend: &mut B,
        batch: &Batch,
        captions: std::ops::Range<usize>,
        out: &mut Vec<PairScore>,
        observer: &mut Observer<'_>,
    ) -> Result<(), Error> {
        let (chunk, p) = (&self.chunk, self.projection);
        let text = Packed {
            rows: TextRows { ids: &chunk.ids, places: &chunk.places },
            captions: &chunk.captions,
            cross_rows: chunk.cross_rows,
            images: &chunk.images,
            images_alone: &chunk.images_alone,
        };
        self.bert.forward(backend, &text, self.vit.embeds(), observer)?;
        let (itm_rows, cosine_rows) = chunk.first_rows.split_at(chunk.pairs);
        if self.heads.itm {
            backend.take_rows(self.bert.output(), itm_rows, &mut self.text_rows);
            let count = itm_rows.len();
            backend.linear(&self.text_rows, count, &self.projections.itm, Epilogue::Store, &mut self.logits);
        }
        if self.heads.cosine {
            backend.take_rows(self.bert.output(), cosine_rows, &mut self.text_rows);
            let count = cosine_rows.len();
            backend.linear(&self.text_rows, count, &self.projections.text, Epilogue::Store, &mut self.text_features);
        }
        // Everything is queued: only now does the host wait.
        if self.heads.itm {
            backend.read(&self.logits, &mut self.host_logits[..itm_rows.len() * 2])?;
        }
        if self.heads.cosine {
            let texts = &mut self.host_texts[..cosine_rows.len() * p];
            backend.read(&self.text_features, texts)?;
            texts.chunks_exact_mut(p).for_each(normalize);
            if captions.start == 0 {
                self.read_image_features(backend, batch.images())?;
            }
        }
        for (i, caption) in captions.enumerate() {
            let logits = self.heads.itm.then(|| {
                let pair = 2 * self.chunk.pair_of[i];
                [self.host_logits[pair], self.host_logits[pair + 1]]
            });
            let cosine = self.heads.cosine.then(|| {
                let (text, image) = (self.chunk.text_of[i] * p, batch.image_of(caption) * p);
                dot(&self.host_texts[text..][..p], &self.host_images[image..][..p])
            });
            out.push(PairScore::new(logits, cosine));
        }
        Ok(())
    }
}

/// `x / max(|x|, 1e-12)`
fn normalize(x: &mut [f32]) {
    let norm = dot(x, x).sqrt().max(NORM_MIN);
    for v in x {
        *v /= norm;
    }
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    // f64: 256 products per pair cost nothing, and a cosine of 1 should come out as 1.
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>() as f32
}
