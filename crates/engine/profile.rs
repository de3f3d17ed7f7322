//! Where the time goes: a backend around a backend that waits after every operation and adds up, and the ceiling that
//! products can be compared with.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

use crate::backend::{Backend, Care, Columns, Epilogue, Images, Patches, Span, TextRows};
use crate::checkpoint::Checkpoint;
use crate::model::Model;
use crate::{Batch, Error, Options, PixelLut, Precision, Scorer};

/// Operations of one kind in a pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// "product 1024 -> 4096, gelu"
    pub name: String,
    /// How often it is done.
    pub calls: usize,
    /// Seconds of all calls together, each waited for.
    pub seconds: f64,
    /// Multiply-adds times two of all calls together; 0 where they do not matter.
    pub flops: f64,
}

/// Side of the square product that a card's ceiling is measured with.
#[cfg(feature = "cuda")]
const CEILING_SIDE: usize = 8192;
#[cfg(feature = "cuda")]
const CEILING_RUNS: usize = 20;
/// Passes before those that are counted: plans, tuning, first touch of the memory.
const PASSES_WARM: usize = 1;

/// Times of each kind of operation in one pass over `batch`, most costly first.
pub(crate) fn profile<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    lut: &PixelLut,
    options: &Options,
    (batch, passes): (&Batch, usize),
) -> Result<Vec<Stage>, Error> {
    let mut model = Model::load(Profiled::new(backend), checkpoint, lut, options)?;
    let mut scores = Vec::new();
    for _ in 0..PASSES_WARM {
        model.score(batch, &mut scores)?;
    }
    model.backend_mut().stages.clear();
    for _ in 0..passes {
        model.score(batch, &mut scores)?;
    }
    let mut stages: Vec<Stage> = std::mem::take(&mut model.backend_mut().stages).into_values().collect();
    for stage in &mut stages {
        (stage.calls, stage.seconds) = (stage.calls / passes, stage.seconds / passes as f64);
        stage.flops /= passes as f64;
    }
    stages.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(stages)
}

/// FLOP/s of a large square product of random numbers, as the network's products are done.
#[cfg(feature = "cuda")]
pub(crate) fn product_ceiling<B: Backend>(mut backend: B) -> Result<f64, Error> {
    let side = CEILING_SIDE;
    // Random numbers on purpose: chips multiply zeros and small integers faster.
    let mut state = 1_u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..side * side).map(|_| random()).collect();
    let weights = backend.linear_weights(&values, &vec![0.0; side], side)?;
    let x = backend.upload(side, side, &values)?;
    let mut out = backend.alloc(side, side)?;
    let mut best = f64::INFINITY;
    for _ in 0..CEILING_RUNS {
        let start = Instant::now();
        backend.linear(&x, side, &weights, Epilogue::Store, &mut out);
        backend.finish()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (side as f64).powi(3) / best)
}

/// A backend that times another.
struct Profiled<B> {
    inner: B,
    stages: HashMap<String, Stage>,
    failed: Option<Error>,
}

struct Sized<M> {
    inner: M,
    cols: usize,
}

struct Heads<A> {
    inner: A,
    heads: usize,
}

struct Layer<L> {
    inner: L,
    inputs: usize,
    outputs: usize,
}

impl<B: Backend> Profiled<B> {
    fn new(inner: B) -> Self {
        Self { inner, stages: HashMap::new(), failed: None }
    }

    /// Does `work`, waits for it and adds it to a stage. What fails is reported by the next `read`.
    fn time(&mut self, name: String, flops: f64, work: impl FnOnce(&mut B) + Send) {
        let start = Instant::now();
        // Here and not around the whole pass: there the backend is ours.
        self.inner.run(work);
        let failed = self.inner.finish().err();
        let stage = self.stages.entry(name.clone()).or_insert(Stage { name, calls: 0, seconds: 0.0, flops: 0.0 });
        stage.calls += 1;
        stage.seconds += start.elapsed().as_secs_f64();
        stage.flops += flops;
        self.failed = self.failed.take().or(failed);
    }
}

impl<B: Backend> Backend for Profiled<B> {
    type Buf = Sized<B::Buf>;
    type Linear = Layer<B::Linear>;
    type Norm = B::Norm;
    type Absorbed = Heads<B::Absorbed>;
    type Seen = Sized<B::Seen>;

    fn device(&self) -> String {
        self.inner.device()
    }

    fn precision(&self) -> Precision {
        self.inner.precision()
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error> {
        Ok(Sized { inner: self.inner.alloc(rows, cols)?, cols })
    }

    fn alloc_results(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error> {
        Ok(Sized { inner: self.inner.alloc_results(rows, cols)?, cols })
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Self::Buf, Error> {
        Ok(Sized { inner: self.inner.upload(rows, cols, data)?, cols })
    }

    fn linear_weights(&self, weight: &[f32], bias: &[f32], inputs: usize) -> Result<Self::Linear, Error> {
        Ok(Layer { inner: self.inner.linear_weights(weight, bias, inputs)?, inputs, outputs: bias.len() })
    }

    fn careful_weights(&self, care: Care, weight: &[f32], bias: &[f32], inputs: usize) -> Result<Self::Linear, Error> {
        let inner = self.inner.careful_weights(care, weight, bias, inputs)?;
        Ok(Layer { inner, inputs, outputs: bias.len() })
    }

    fn norm_weights(&self, gain: &[f32], bias: &[f32], eps: f32) -> Result<Self::Norm, Error> {
        self.inner.norm_weights(gain, bias, eps)
    }

    fn patchify(&mut self, pixels: &[u8], patches: Patches, lut: &PixelLut, out: &mut Self::Buf) {
        self.time("upload, patchify".to_owned(), 0.0, |inner| inner.patchify(pixels, patches, lut, &mut out.inner));
    }

    fn image_tokens(&mut self, patches: &Self::Buf, images: usize, positions: &Self::Buf, out: &mut Self::Buf) {
        self.time("image tokens".to_owned(), 0.0, |inner| {
            inner.image_tokens(&patches.inner, images, &positions.inner, &mut out.inner);
        });
    }

    fn embed(&mut self, text: TextRows<'_>, tables: (&Self::Buf, &Self::Buf), norm: &B::Norm, out: &mut Self::Buf) {
        let tables = (&tables.0.inner, &tables.1.inner);
        self.time("embed".to_owned(), 0.0, |inner| inner.embed(text, tables, norm, &mut out.inner));
    }

    fn absorbed_weights(
        &self,
        key: &[f32],
        value: (&[f32], &[f32]),
        (inputs, heads): (usize, usize),
    ) -> Result<Option<Self::Absorbed>, Error> {
        let inner = self.inner.absorbed_weights(key, value, (inputs, heads))?;
        Ok(inner.map(|inner| Heads { inner, heads }))
    }

    fn alloc_seen(&self, images: Images, head_size: usize) -> Result<Option<Self::Seen>, Error> {
        let inner = self.inner.alloc_seen(images, head_size)?;
        Ok(inner.map(|inner| Sized { inner, cols: images.width }))
    }

    fn see(&mut self, images: &Self::Buf, spans: &[Span], head_size: usize, seen: &mut Self::Seen) -> bool {
        let mut sees = false;
        self.time("images seen".to_owned(), 0.0, |inner| {
            sees = inner.see(&images.inner, spans, head_size, &mut seen.inner);
        });
        sees
    }

    fn attend_seen(
        &mut self,
        q: &Self::Buf,
        spans: &[Span],
        seen: &Self::Seen,
        w: &Self::Absorbed,
        out: &mut Self::Buf,
    ) {
        let name = format!("cross-attention to {} values", seen.cols);
        let (rows, scores) =
            spans.iter().fold((0, 0), |(rows, scores), span| (rows + span.q_len, scores + span.q_len * span.kv_len));
        // From each head's size to the width of the tokens and back, and with all of them.
        let flops = 4.0 * (rows * out.cols * seen.cols + scores * w.heads * seen.cols) as f64;
        self.time(name, flops, |inner| inner.attend_seen(&q.inner, spans, &seen.inner, &w.inner, &mut out.inner));
    }

    fn linear_of(
        &mut self,
        x: &Self::Buf,
        rows: Range<usize>,
        w: &Self::Linear,
        epilogue: Epilogue,
        out: &mut Self::Buf,
    ) {
        let behind = match epilogue {
            Epilogue::Store => "",
            Epilogue::Gelu => ", gelu",
            Epilogue::Accumulate => ", residual",
        };
        let name = format!("product {} -> {}{behind}", w.inputs, w.outputs);
        let flops = 2.0 * (rows.len() * w.inputs * w.outputs) as f64;
        self.time(name, flops, |inner| inner.linear_of(&x.inner, rows, &w.inner, epilogue, &mut out.inner));
    }

    fn linear_of_norm(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        (norm, normed): (&B::Norm, &mut Self::Buf),
        w: &Self::Linear,
        out: &mut Self::Buf,
    ) {
        let name = format!("norm, product {} -> {}", w.inputs, w.outputs);
        let flops = 2.0 * (rows * w.inputs * w.outputs) as f64;
        self.time(name, flops, |inner| {
            inner.linear_of_norm(&x.inner, rows, (norm, &mut normed.inner), &w.inner, &mut out.inner);
        });
    }

    fn alloc_hidden(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error> {
        Ok(Sized { inner: self.inner.alloc_hidden(rows, cols)?, cols })
    }

    fn mlp(
        &mut self,
        x: &mut Self::Buf,
        rows: usize,
        norm: Option<(&B::Norm, &mut Self::Buf)>,
        [fc1, fc2]: [&Self::Linear; 2],
        hidden: &mut Self::Buf,
    ) {
        let before = if norm.is_some() { "norm, " } else { "" };
        let name = format!("{before}MLP {} -> {} -> {}", fc1.inputs, fc1.outputs, fc2.outputs);
        let flops = 2.0 * (rows * (fc1.inputs * fc1.outputs + fc2.inputs * fc2.outputs)) as f64;
        let norm = norm.map(|(norm, normed)| (norm, &mut normed.inner));
        self.time(name, flops, |inner| {
            inner.mlp(&mut x.inner, rows, norm, [&fc1.inner, &fc2.inner], &mut hidden.inner);
        });
    }

    fn layer_norm(&mut self, x: &Self::Buf, rows: usize, norm: &B::Norm, out: &mut Self::Buf) {
        let name = format!("layer norm of {}", x.cols);
        self.time(name, 0.0, |inner| inner.layer_norm(&x.inner, rows, norm, &mut out.inner));
    }

    fn attention(&mut self, qkv: [Columns<'_, Self::Buf>; 3], spans: &[Span], heads: usize, out: &mut Self::Buf) {
        let own = spans.iter().all(|span| span.q == span.kv && span.q_len == span.kv_len);
        let kind = if own { "self" } else { "cross" };
        let name = format!("{kind}-attention, {heads} heads of {}", out.cols / heads);
        let scores: usize = spans.iter().map(|span| span.q_len * span.kv_len).sum();
        let qkv = qkv.map(|columns| Columns { buf: &columns.buf.inner, first: columns.first });
        let flops = 4.0 * (scores * out.cols) as f64;
        self.time(name, flops, |inner| inner.attention(qkv, spans, heads, &mut out.inner));
    }

    fn copy_rows(&mut self, x: &Self::Buf, rows: usize, out: &mut Self::Buf) {
        self.time("copy rows".to_owned(), 0.0, |inner| inner.copy_rows(&x.inner, rows, &mut out.inner));
    }

    fn take_rows(&mut self, x: &Self::Buf, rows: &[usize], out: &mut Self::Buf) {
        self.time("take rows".to_owned(), 0.0, |inner| inner.take_rows(&x.inner, rows, &mut out.inner));
    }

    fn read(&mut self, buf: &Self::Buf, out: &mut [f32]) -> Result<(), Error> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        self.inner.read(&buf.inner, out)
    }

    fn run<R: Send>(&mut self, work: impl FnOnce(&mut Self) -> R + Send) -> R {
        work(self)
    }
}
