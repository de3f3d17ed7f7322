//! The CPU backend in f32, bf16 and int8: packed-weight products, fused attention, vectorised rows, one thread pool of its own.
//!
//! Must not: allocate after loading, or let a result depend on the number of threads.

mod absorbed;
mod attention;
mod bf16;
mod ceiling;
mod dot;
mod elementwise;
mod epilogue;
mod gemm;
mod memory;
mod mlp;
mod pack;
mod simd;
mod tile;

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use self::attention::Strided;
pub use self::ceiling::ceiling;
pub use self::simd::Isa;
use self::tile::Format;
use crate::backend::{Backend, Care, Columns, Epilogue, Images, Patches, Span, TextRows};
use crate::{Error, PixelLut, Precision};

/// Rows a task of a row-wise operation takes at least: below that, starting it costs more than its work.
const ROWS_PER_TASK: usize = 16;

/// What the scratch room of a thread must hold.
#[derive(Clone, Copy, Debug)]
pub struct AttentionLimits {
    /// Most keys of a span.
    pub keys: usize,
    /// Largest head.
    pub head_size: usize,
}

/// The CPU backend.
pub struct CpuBackend {
    isa: Isa,
    precision: Precision,
    pool: Option<rayon::ThreadPool>,
    threads: usize,
    blocks: Vec<Mutex<gemm::Block>>,
    hiddens: Vec<Mutex<mlp::Hidden>>,
    heads: Vec<Mutex<attention::Head>>,
}

/// A layer norm's parameters.
pub struct Norm {
    gain: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl CpuBackend {
    /// A backend with a pool of `threads` threads (0: one per logical processor), in f32, bf16 or int8. Errors: no memory, no threads.
    ///
    /// # Panics
    /// In other precisions.
    pub fn new(threads: usize, isa: Isa, precision: Precision, limits: AttentionLimits) -> Result<Self, Error> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("engine-{i}"))
            .build()
            .map_err(|source| Error::Threads { source })?;
        let threads = pool.current_num_threads();
        let blocks = (0..threads).map(|_| gemm::Block::new().map(Mutex::new)).collect::<Result<_, _>>()?;
        let hiddens = (0..threads).map(|_| mlp::Hidden::new().map(Mutex::new)).collect::<Result<_, _>>()?;
        let head = || {
            attention::Head::new(isa, attention_format(isa, precision), limits.keys, limits.head_size).map(Mutex::new)
        };
        let heads = (0..threads).map(|_| head()).collect::<Result<_, _>>()?;
        Ok(Self { isa, precision, pool: Some(pool), threads, blocks, hiddens, heads })
    }

    /// Work of loading in the threads that are there.
    fn in_pool<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.as_ref().expect("nothing is loaded while it runs").install(work)
    }

    fn rows_per_task(&self, rows: usize) -> usize {
        rows.div_ceil(4 * self.threads).max(ROWS_PER_TASK)
    }
}

impl Backend for CpuBackend {
    type Buf = memory::Mat;
    type Linear = pack::Packed;
    type Norm = Norm;
    type Absorbed = absorbed::Absorbed;
    type Seen = absorbed::Seen;

    fn device(&self) -> String {
        format!("cpu ({}, {} threads)", self.isa.name(), self.threads)
    }

    fn precision(&self) -> Precision {
        self.precision
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error> {
        memory::Mat::zeroed(rows, cols)
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Self::Buf, Error> {
        let mut mat = memory::Mat::zeroed(rows, cols)?;
        mat.head_mut(rows).copy_from_slice(data);
        Ok(mat)
    }

    fn linear_weights(&self, weight: &[f32], bias: &[f32], inputs: usize) -> Result<Self::Linear, Error> {
        self.careful_weights(Care::Usual, weight, bias, inputs)
    }

    fn careful_weights(&self, care: Care, weight: &[f32], bias: &[f32], inputs: usize) -> Result<Self::Linear, Error> {
        let format = match (care, product_format(self.precision)) {
            (Care::Exact, _) => Format::F32,
            (Care::Attention, _) => attention_format(self.isa, self.precision),
            (Care::Sensitive, Format::Int8) => Format::Bf16,
            (Care::Sensitive | Care::Usual, format) => format,
        };
        let packed = self.in_pool(|| pack::Packed::new(self.isa, format, weight, bias, inputs))?;
        for block in &self.blocks {
            block.lock().expect("nothing runs while weights are loaded").reserve(&packed)?;
        }
        Ok(packed)
    }

    fn norm_weights(&self, gain: &[f32], bias: &[f32], eps: f32) -> Result<Self::Norm, Error> {
        Ok(Norm { gain: gain.to_vec(), bias: bias.to_vec(), eps })
    }

    fn patchify(&mut self, pixels: &[u8], patches: Patches, lut: &PixelLut, out: &mut Self::Buf) {
        let Patches { image_size, patch_size: p } = patches;
        let images = pixels.len() / (image_size * image_size * 3);
        assert_eq!(pixels.len(), images * image_size * image_size * 3, "whole images of {image_size} px");
        assert_eq!(out.cols, patches.values());
        let (side, cols) = (patches.side(), out.cols);
        let rows = out.head_mut(images * patches.count());
        rows.par_chunks_exact_mut(side * cols).enumerate().for_each(|(strip, out)| {
            let (image, top) = (strip / side, strip % side * p);
            let image = &pixels[image * image_size * image_size * 3..];
            for (patch, out) in out.chunks_exact_mut(cols).enumerate() {
                for y in 0..p {
                    let line = &image[((top + y) * image_size + patch * p) * 3..][..p * 3];
                    for (x, rgb) in line.as_chunks::<3>().0.iter().enumerate() {
                        for (channel, value) in rgb.iter().enumerate() {
                            out[(channel * p + y) * p + x] = lut[channel][usize::from(*value)];
                        }
                    }
                }
            }
        });
    }

    fn image_tokens(&mut self, patches: &Self::Buf, images: usize, positions: &Self::Buf, out: &mut Self::Buf) {
        let (tokens, cols, isa) = (positions.rows, positions.cols, self.isa);
        assert!(patches.cols == cols && out.cols == cols);
        let patches = patches.head(images * (tokens - 1));
        out.head_mut(images * tokens).par_chunks_exact_mut(cols).enumerate().for_each(|(row, out)| {
            let (image, token) = (row / tokens, row % tokens);
            match token.checked_sub(1) {
                None => out.copy_from_slice(positions.row(0)),
                Some(patch) => {
                    let patch = &patches[(image * (tokens - 1) + patch) * cols..][..cols];
                    elementwise::add(isa, patch, positions.row(token), out);
                }
            }
        });
    }

    fn embed(
        &mut self,
        text: TextRows<'_>,
        (words, positions): (&Self::Buf, &Self::Buf),
        norm: &Self::Norm,
        out: &mut Self::Buf,
    ) {
        let cols = out.cols;
        for (i, (id, place)) in text.ids.iter().zip(text.places).enumerate() {
            // The sum is written where the norm reads it: a row is its own scratch room.
            let (word, position) = (words.row(*id as usize), positions.row(*place as usize));
            let rows = out.head_mut(i + 1);
            elementwise::add(self.isa, word, position, &mut rows[i * cols..]);
            elementwise::layer_norm_in_place(self.isa, &mut rows[i * cols..], &norm.gain, &norm.bias, norm.eps);
        }
    }

    fn linear_of(
        &mut self,
        x: &Self::Buf,
        rows: Range<usize>,
        w: &Self::Linear,
        epilogue: Epilogue,
        out: &mut Self::Buf,
    ) {
        assert!(x.cols == w.inputs && out.cols == w.outputs);
        let (x, out) = (&x.head(rows.end)[rows.start * x.cols..], out.head_mut(rows.len()));
        gemm::linear(self.isa, &self.blocks, (x, None), w, epilogue, out);
    }

    fn linear_of_norm(
        &mut self,
        x: &Self::Buf,
        rows: usize,
        (norm, _): (&Self::Norm, &mut Self::Buf),
        w: &Self::Linear,
        out: &mut Self::Buf,
    ) {
        assert!(x.cols == w.inputs && norm.gain.len() == w.inputs && out.cols == w.outputs);
        gemm::linear(self.isa, &self.blocks, (x.head(rows), Some(norm)), w, Epilogue::Store, out.head_mut(rows));
    }

    fn alloc_hidden(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error> {
        for hidden in &self.hiddens {
            hidden.lock().expect("nothing runs while weights are loaded").reserve(cols)?;
        }
        memory::Mat::zeroed(rows.min(mlp::rows_alone(self.threads)), cols)
    }

    fn mlp(
        &mut self,
        x: &mut Self::Buf,
        rows: usize,
        norm: Option<(&Self::Norm, &mut Self::Buf)>,
        [fc1, fc2]: [&Self::Linear; 2],
        hidden: &mut Self::Buf,
    ) {
        let norm = norm.map(|(norm, _)| norm);
        assert!(x.cols == fc1.inputs && hidden.cols == fc1.outputs);
        assert!(norm.is_none_or(|norm| norm.gain.len() == x.cols));
        if mlp::fits(rows, fc1, self.threads) {
            mlp::mlp(self.isa, (&self.blocks, &self.hiddens), norm, [fc1, fc2], x.head_mut(rows));
        } else {
            gemm::linear(self.isa, &self.blocks, (x.head(rows), norm), fc1, Epilogue::Gelu, hidden.head_mut(rows));
            self.linear(hidden, rows, fc2, Epilogue::Accumulate, x);
        }
    }

    fn layer_norm(&mut self, x: &Self::Buf, rows: usize, norm: &Self::Norm, out: &mut Self::Buf) {
        let (cols, isa) = (norm.gain.len(), self.isa);
        assert!(x.cols == cols && out.cols == cols);
        let chunk = self.rows_per_task(rows) * cols;
        let pairs = x.head(rows).par_chunks(chunk).zip(out.head_mut(rows).par_chunks_mut(chunk));
        pairs.for_each(|(x, out)| elementwise::layer_norm(isa, x, &norm.gain, &norm.bias, norm.eps, out));
    }

    fn attention(&mut self, qkv: [Columns<'_, Self::Buf>; 3], spans: &[Span], heads: usize, out: &mut Self::Buf) {
        let q_rows = spans.iter().map(|s| s.q + s.q_len).max().unwrap_or(0);
        let kv_rows = spans.iter().map(|s| s.kv + s.kv_len).max().unwrap_or(0);
        let [q, k, v] = qkv;
        let views = [strided(q, q_rows), strided(k, kv_rows), strided(v, kv_rows)];
        let cols = out.cols;
        let out = memory::Shared::new(out.head_mut(q_rows), cols);
        attention::attention(self.isa, &self.heads, views, spans, heads, &out);
    }

    fn absorbed_weights(
        &self,
        key: &[f32],
        value: (&[f32], &[f32]),
        (inputs, heads): (usize, usize),
    ) -> Result<Option<Self::Absorbed>, Error> {
        let format = attention_format(self.isa, self.precision);
        self.in_pool(|| absorbed::Absorbed::new((self.isa, format), key, value, (inputs, heads))).map(Some)
    }

    fn alloc_seen(&self, images: Images, head_size: usize) -> Result<Option<Self::Seen>, Error> {
        let tile = tile::Tile::new(self.isa, attention_format(self.isa, self.precision));
        absorbed::Seen::new(tile, (images.count, images.tokens, images.width, head_size), self.threads).map(Some)
    }

    fn see(&mut self, images: &Self::Buf, spans: &[Span], head_size: usize, seen: &mut Self::Seen) -> bool {
        let rows: usize = spans.iter().map(|span| span.q_len).sum();
        // `4 r N V` operations a head against `4 d N V`.
        if rows >= spans.len() * head_size {
            return false;
        }
        assert_eq!(images.cols, seen.width());
        let tokens = spans.iter().map(|span| span.kv + span.kv_len).max().unwrap_or(0);
        seen.see(self.isa, images.head(tokens), spans);
        true
    }

    fn attend_seen(
        &mut self,
        q: &Self::Buf,
        spans: &[Span],
        seen: &Self::Seen,
        w: &Self::Absorbed,
        out: &mut Self::Buf,
    ) {
        assert!(q.cols == out.cols && w.inputs() == seen.width());
        let (rows, cols) = (spans.iter().map(|s| s.q + s.q_len).max().unwrap_or(0), out.cols);
        let q = strided(Columns { buf: q, first: 0 }, rows);
        absorbed::attend(self.isa, q, spans, seen, w, &memory::Shared::new(out.head_mut(rows), cols));
    }

    fn copy_rows(&mut self, x: &Self::Buf, rows: usize, out: &mut Self::Buf) {
        assert_eq!(out.cols, x.cols);
        out.head_mut(rows).copy_from_slice(x.head(rows));
    }

    fn take_rows(&mut self, x: &Self::Buf, rows: &[usize], out: &mut Self::Buf) {
        let cols = x.cols;
        assert_eq!(out.cols, cols);
        for (row, out) in rows.iter().zip(out.head_mut(rows.len()).chunks_exact_mut(cols)) {
            out.copy_from_slice(x.row(*row));
        }
    }

    fn read(&mut self, buf: &Self::Buf, out: &mut [f32]) -> Result<(), Error> {
        assert_eq!(out.len() % buf.cols, 0, "whole rows");
        out.copy_from_slice(buf.head(out.len() / buf.cols));
        Ok(())
    }

    fn run<R: Send>(&mut self, work: impl FnOnce(&mut Self) -> R + Send) -> R {
        // The pool steps out of the backend while it runs, so that the work can borrow the rest.
        let pool = self.pool.take().expect("run is not nested");
        let result = pool.install(|| work(self));
        self.pool = Some(pool);
        result
    }
}

fn strided<'a>(columns: Columns<'a, memory::Mat>, rows: usize) -> Strided<'a> {
    Strided { data: columns.buf.head(rows), stride: columns.buf.cols, first: columns.first }
}

fn product_format(precision: Precision) -> Format {
    match precision {
        Precision::F32 => Format::F32,
        Precision::Bf16 => Format::Bf16,
        Precision::Int8 => Format::Int8,
        Precision::F16 | Precision::Tf32 => unreachable!("the processor has no {}", precision.name()),
    }
}

/// Of the products of queries, keys and values: f32, unless less is meant and is faster, for it takes rounding all of them.
fn attention_format(isa: Isa, precision: Precision) -> Format {
    match precision {
        Precision::Bf16 | Precision::Int8 if isa.level() >= simd::Level::Avx512Bf16 => Format::Bf16,
        _ => Format::F32,
    }
}
