//! The seam between the model and the hardware: coarse operations.
//!
//! The network in `model/` is written once over this trait. A backend owns its buffers' residency, padding and precision;
//! the model only names them. Rules every operation obeys:
//!
//! * matrices are row-major `[rows, cols]`; an operation touches the first `rows` rows only, and never relies on what
//!   the output held before (except [`Epilogue::Accumulate`] and [`Backend::mlp`], which add to it);
//! * inputs and outputs never alias (the borrow checker sees to it);
//! * shapes are the caller's promise: a violation is a bug and panics, it is never an `Err`;
//! * nothing is allocated after loading;
//! * work may be queued: what fails then is reported by the next [`Backend::read`], and what was queued after it is void.

use std::ops::Range;

use crate::{Error, Precision};

/// What happens to a product before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = x Wᵀ + b`
    Store,
    /// `out = gelu(x Wᵀ + b)` with the exact form `0.5 v (1 + erf(v / √2))`
    Gelu,
    /// `out += x Wᵀ + b`: the residual connection
    Accumulate,
}

/// How much rounding a layer bears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// That of the precision.
    Usual,
    /// No more than 16 bits, where the precision has bytes.
    Sensitive,
    /// That of attention's operands, for keys and values that [`Backend::attend_seen`] does without: which of the two ways it is
    /// depends on the rows beside it, and a score should not.
    Attention,
    /// As little as a backend can: what leaves the network, of which there is little.
    Exact,
}

/// A block of columns of a matrix: one of the q, k, v parts of a fused projection.
#[derive(Debug)]
pub struct Columns<'a, Buf> {
    /// The matrix.
    pub buf: &'a Buf,
    /// First column of the block; its width is the attention's `heads * head_size`.
    pub first: usize,
}

/// Rows that attend to each other: every query row of `q` sees every key row of `kv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First query row.
    pub q: usize,
    /// Number of query rows.
    pub q_len: usize,
    /// First key/value row.
    pub kv: usize,
    /// Number of key/value rows, at least 1.
    pub kv_len: usize,
}

/// Images that cross-attention sees at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Images {
    /// How many.
    pub count: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Values of a token.
    pub width: usize,
}

/// Image geometry of the patch operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patches {
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels; a remainder smaller than a patch is ignored.
    pub patch_size: usize,
}

impl Patches {
    /// Patches along one side.
    pub fn side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Patches of an image.
    pub fn count(&self) -> usize {
        self.side() * self.side()
    }

    /// Values of a patch in the order channel, row, column.
    pub fn values(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }
}

/// The operations of the model. Shapes: B images, N = patches + 1 image tokens, R packed text rows.
pub trait Backend: Send {
    /// A matrix `[rows, cols]` of activations or table rows.
    type Buf: Send + Sync;
    /// A linear layer's weight and bias in the backend's own layout.
    type Linear: Send + Sync;
    /// A layer norm's gain, bias and eps.
    type Norm: Send + Sync;
    /// A layer's weights for cross-attention to images that are [`Self::Seen`].
    type Absorbed: Send + Sync;
    /// Images as keys and values of all heads of all layers.
    type Seen: Send + Sync;

    /// What computes, in words: "cpu (avx512, 2 threads)".
    fn device(&self) -> String;

    /// Arithmetic of the products and storage of activations.
    fn precision(&self) -> Precision;

    /// A matrix of activations with room for `rows` rows. Errors: no memory.
    fn alloc(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error>;

    /// A matrix for the products that leave the network, logits and features: f32 in every precision.
    fn alloc_results(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error> {
        self.alloc(rows, cols)
    }

    /// A matrix with the given content, `data.len() == rows * cols`.
    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Self::Buf, Error>;

    /// A linear layer from `weight [out, in]` row-major and `bias [out]`.
    fn linear_weights(&self, weight: &[f32], bias: &[f32], inputs: usize) -> Result<Self::Linear, Error>;

    /// The same of a layer that may bear less rounding than others; a backend without bytes need not tell them apart.
    fn careful_weights(&self, care: Care, weight: &[f32], bias: &[f32], inputs: usize) -> Result<Self::Linear, Error> {
        let _ = care;
        self.linear_weights(weight, bias, inputs)
    }

    /// A layer norm from `gain [cols]` and `bias [cols]`.
    fn norm_weights(&self, gain: &[f32], bias: &[f32], eps: f32) -> Result<Self::Norm, Error>;

    /// The weights of keys and values, each `[out, inputs]` row-major, and the values' bias, for [`Self::attend_seen`]: a backend may
    /// know a way to do with fewer operations what it does for few rows. The keys' bias moves all scores of a row alike, and makes no
    /// difference.
    fn absorbed_weights(
        &self,
        key: &[f32],
        value: (&[f32], &[f32]),
        inputs_and_heads: (usize, usize),
    ) -> Result<Option<Self::Absorbed>, Error> {
        let _ = (key, value, inputs_and_heads);
        Ok(None)
    }

    /// Room for what [`Self::see`] makes; none where there is no such way.
    fn alloc_seen(&self, images: Images, head_size: usize) -> Result<Option<Self::Seen>, Error> {
        let _ = (images, head_size);
        Ok(None)
    }

    /// Makes keys and values of the tokens of each span's image, if that is the faster way for as many rows as the spans have: otherwise
    /// it does nothing and returns false.
    fn see(&mut self, images: &Self::Buf, spans: &[Span], head_size: usize, seen: &mut Self::Seen) -> bool {
        let _ = (images, spans, head_size, seen);
        false
    }

    /// What [`Self::attention`] gives for `q` and the keys and values of the images that were seen for the same spans.
    fn attend_seen(
        &mut self,
        q: &Self::Buf,
        spans: &[Span],
        seen: &Self::Seen,
        w: &Self::Absorbed,
        out: &mut Self::Buf,
    ) {
        let _ = (q, spans, seen, w, out);
        unreachable!("nothing was seen");
    }

    /// Begins to bring the images of the next [`Self::patchify`] to the device, beside other work: that one must get the
    /// same. None: other images come next. It saves time and changes nothing else.
    fn stage(&mut self, pixels: Option<&[u8]>) {
        let _ = pixels;
    }

    /// Does `work`, which queues the same operations on the same buffers whenever `images` is the same, reads nothing and
    /// takes nothing from the host: a backend may record it once and replay it.
    fn repeat(&mut self, images: usize, mut work: impl FnMut(&mut Self)) {
        let _ = images;
        work(self);
    }

    /// Waits for all queued work. Errors: what failed in it.
    fn finish(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// `out [B * patches, 3 p p]` from `pixels [B, S, S, 3]` u8: patches row by row, values in the order channel, row,
    /// column, each `lut[channel][value]`.
    fn patchify(&mut self, pixels: &[u8], patches: Patches, lut: &crate::PixelLut, out: &mut Self::Buf);

    /// `out [B * N, V]`: row 0 of an image is `positions[0]` (which holds class + position 0), row `1 + p` is
    /// `patches[p] + positions[1 + p]`.
    fn image_tokens(&mut self, patches: &Self::Buf, images: usize, positions: &Self::Buf, out: &mut Self::Buf);

    /// `out[r] = norm(words[ids[r]] + positions[places[r]])` for the R packed text rows.
    fn embed(&mut self, text: TextRows<'_>, tables: (&Self::Buf, &Self::Buf), norm: &Self::Norm, out: &mut Self::Buf);

    /// `out [rows, outputs]` from `x [rows, inputs]`; see [`Epilogue`].
    fn linear(&mut self, x: &Self::Buf, rows: usize, w: &Self::Linear, epilogue: Epilogue, out: &mut Self::Buf) {
        self.linear_of(x, 0..rows, w, epilogue, out);
    }

    /// The same of these rows of x: the first one's result is row 0 of `out`.
    fn linear_of(
        &mut self,
        x: &Self::Buf,
        rows: Range<usize>,
        w: &Self::Linear,
        epilogue: Epilogue,
        out: &mut Self::Buf,
    );

    /// `out [rows, outputs]` from the normed rows of x, for which `norm` brings room.
    fn linear_of_norm(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        norm: (&Self::Norm, &mut Self::Buf),
        w: &Self::Linear,
        out: &mut Self::Buf,
    ) {
        let (norm, normed) = norm;
        self.layer_norm(x, rows, norm, normed);
        self.linear(normed, rows, w, Epilogue::Store, out);
    }

    /// Room for what is between the products of [`Self::mlp`], of at most `rows` rows. Errors: no memory.
    fn alloc_hidden(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error> {
        self.alloc(rows, cols)
    }

    /// `x += fc2(gelu(fc1(x)))`, of the normed x where there is a norm, which brings room for it. `hidden` is [`Self::alloc_hidden`]'s
    /// with fc1's columns; what it and the norm's room hold afterwards is unsaid.
    fn mlp(
        &mut self,
        x: &mut Self::Buf,
        rows: usize,
        norm: Option<(&Self::Norm, &mut Self::Buf)>,
        layers: [&Self::Linear; 2],
        hidden: &mut Self::Buf,
    ) {
        let [fc1, fc2] = layers;
        match norm {
            Some((norm, normed)) => {
                self.layer_norm(x, rows, norm, normed);
                self.linear(normed, rows, fc1, Epilogue::Gelu, hidden);
            }
            None => self.linear(x, rows, fc1, Epilogue::Gelu, hidden),
        }
        self.linear(hidden, rows, fc2, Epilogue::Accumulate, x);
    }

    /// `out[r] = (x[r] - mean) / sqrt(var + eps) * gain + bias`, biased variance, for the first `rows` rows.
    fn layer_norm(&mut self, x: &Self::Buf, rows: usize, norm: &Self::Norm, out: &mut Self::Buf);

    /// `out = softmax(q kᵀ / sqrt(head_size)) v` for each span and head; heads are consecutive slices of the columns.
    /// `out` has `heads * head_size` columns. The scores of all heads are never stored.
    fn attention(&mut self, qkv: [Columns<'_, Self::Buf>; 3], spans: &[Span], heads: usize, out: &mut Self::Buf);

    /// `out = x` for the first `rows` rows.
    fn copy_rows(&mut self, x: &Self::Buf, rows: usize, out: &mut Self::Buf);

    /// `out[i] = x[rows[i]]`.
    fn take_rows(&mut self, x: &Self::Buf, rows: &[usize], out: &mut Self::Buf);

    /// Copies the first `out.len() / cols` rows to the host: the only synchronising call.
    fn read(&mut self, buf: &Self::Buf, out: &mut [f32]) -> Result<(), Error>;

    /// Runs `work` where the operations run best (a thread pool's own thread, a current device context).
    fn run<R: Send>(&mut self, work: impl FnOnce(&mut Self) -> R + Send) -> R;
}

/// Token ids and position ids of packed text rows, without padding.
#[derive(Clone, Copy, Debug)]
pub struct TextRows<'a> {
    /// Row of the word table for each text row.
    pub ids: &'a [u32],
    /// Row of the position table for each text row.
    pub places: &'a [u32],
}
