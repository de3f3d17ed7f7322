//! The CUDA backend: the operations of [`Backend`] as our own kernels and cuBLASLt products, in f16, bf16, tf32 or f32.
//!
//! Work is queued and only `read` waits, so an operation cannot answer with an error: the first failure is kept, what
//! follows does nothing, and `read` reports it. Statistics, softmax and sums are f32 in every precision.
//!
//! Must not: allocate after loading, or hold anything of the network's shape.

#[cfg(feature = "cuda")]
mod blas;
mod buffers;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "emulator")]
mod emulated;
mod kernels;
mod spans;
#[cfg(feature = "cuda")]
mod staging;
#[cfg(feature = "cuda")]
mod tuned;

use std::convert::Infallible;
use std::ops::Range;

use self::buffers::{Buffer, Linear, Norm};
use self::buffers::{STRIDE, fill, matrix, parameters, vector};
use self::device::{Address, Device, Element, Product, STAGES};
#[cfg(feature = "cuda")]
pub use self::driver::Gpu;
#[cfg(feature = "emulator")]
pub use self::emulated::{Emulated, Order};
use self::kernels::Attention;
use self::spans::Spans;
use crate::backend::{Backend, Columns, Epilogue, Patches, Span, TextRows};
use crate::{Config, Error, Options, PixelLut, Precision};

/// Images up to which a batch's work is recorded and replayed: below, launches take longer than what they start.
const RECORDED_IMAGES_MAX: usize = 8;

/// What the backend's index buffers must hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most images of a batch.
    pub images: usize,
    /// Bytes of an image's pixels.
    pub image_bytes: usize,
    /// Most text rows of a chunk, of both heads.
    pub rows: usize,
}

impl Limits {
    /// What a model of this shape needs for `options`.
    pub fn new(config: &Config, options: &Options) -> Self {
        let side = config.vision.image_size;
        let rows = 2 * options.tokens_max.max(config.text.positions);
        Self { images: options.images_max, image_bytes: side * side * 3, rows }
    }
}

/// Whether the kernels can take a model of this shape. Errors: they cannot.
#[cfg(feature = "cuda")]
pub(crate) fn check_config(ordinal: usize, config: &Config) -> Result<(), Error> {
    let (vision, text) = (&config.vision, &config.text);
    let width = vision.hidden.max(text.hidden);
    let head = (vision.hidden / vision.heads).max(text.hidden / text.heads);
    if width <= kernels::NORM_COLS_MAX && head <= kernels::HEAD_SIZE_MAX {
        return Ok(());
    }
    let (most, head_max) = (kernels::NORM_COLS_MAX, kernels::HEAD_SIZE_MAX);
    let reason = format!("the model is {width} wide with heads of {head}, the kernels take {most} and {head_max}");
    Err(Error::NoCuda { ordinal, reason })
}

/// The backend on a device.
pub struct CudaBackend<D: Device> {
    device: D,
    precision: Precision,
    limits: Limits,
    /// Where images arrive, in turn.
    pixels: [D::Memory; STAGES],
    /// The place that the next images go to.
    stage: usize,
    /// Bytes that are on their way to it.
    staged: Option<usize>,
    lut: D::Memory,
    /// The table that `lut` holds.
    lut_host: Option<Box<PixelLut>>,
    ids: D::Memory,
    places: D::Memory,
    rows: D::Memory,
    spans: Spans<D>,
    /// Room for what is uploaded or read.
    bytes: Vec<u8>,
    failed: Option<Error>,
    /// By number of images.
    repeats: [Repeat<D::Graph>; RECORDED_IMAGES_MAX + 1],
    /// Whether the device can record.
    records: bool,
}

/// What is known of work that comes again and again.
enum Repeat<G> {
    New,
    /// Done once: products have their plans.
    Seen,
    Recorded(G),
}

impl<D: Device> CudaBackend<D> {
    /// A backend with index buffers for `limits`. Errors: no memory.
    pub fn new(mut device: D, precision: Precision, limits: Limits) -> Result<Self, Error> {
        let image_bytes = limits.images * limits.image_bytes;
        device.open_stages(image_bytes)?;
        let index = || device.alloc(limits.rows.max(limits.images) * 4);
        Ok(Self {
            pixels: [device.alloc(image_bytes)?, device.alloc(image_bytes)?],
            stage: 0,
            staged: None,
            lut: device.alloc(3 * 256 * 4)?,
            lut_host: None,
            ids: index()?,
            places: index()?,
            rows: index()?,
            spans: Spans::new(&device, limits.rows)?,
            bytes: Vec::with_capacity(limits.rows * 16),
            failed: None,
            repeats: [const { Repeat::New }; RECORDED_IMAGES_MAX + 1],
            records: true,
            device,
            precision,
            limits,
        })
    }

    fn element(&self) -> Element {
        match self.precision {
            Precision::F32 | Precision::Tf32 => Element::F32,
            Precision::F16 => Element::F16,
            Precision::Bf16 => Element::Bf16,
            Precision::Int8 => unreachable!("a card was asked for int8"),
        }
    }

    /// Does `work` unless something failed before; keeps its failure.
    fn queue(&mut self, work: impl FnOnce(&mut Self) -> Result<(), Error>) {
        if self.failed.is_none() {
            self.failed = work(self).err();
        }
    }

    /// `work` written down; none if the device cannot.
    fn recorded(&mut self, work: &mut impl FnMut(&mut Self)) -> Option<D::Graph> {
        self.device.record().ok()?;
        work(self);
        // What failed was not done: it is tried again without a record, and fails again if it must.
        let failed = self.failed.take().is_some();
        self.device.recorded().ok().filter(|_| !failed)
    }

    fn replay(&mut self, graph: &D::Graph) {
        // SAFETY: the model's buffers and weights and our own live as long as the backend.
        self.queue(|this| unsafe { this.device.replay(graph) });
    }

    /// Indices as i32 at `to`.
    fn upload_indices(&mut self, indices: impl Iterator<Item = u32>, to: Address) -> Result<(), Error> {
        self.bytes.clear();
        self.bytes.extend(indices.flat_map(u32::to_le_bytes));
        self.device.upload(&self.bytes, to)
    }
}

impl<D: Device> Backend for CudaBackend<D> {
    type Buf = Buffer<D::Memory>;
    type Linear = Linear<D::Memory>;
    type Norm = Norm<D::Memory>;
    type Absorbed = Infallible;
    type Seen = Infallible;

    fn device(&self) -> String {
        self.device.name()
    }

    fn precision(&self) -> Precision {
        self.precision
    }

    fn alloc(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error> {
        Buffer::new(&self.device, rows, cols, self.element())
    }

    fn alloc_results(&self, rows: usize, cols: usize) -> Result<Self::Buf, Error> {
        Buffer::new(&self.device, rows, cols, Element::F32)
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Self::Buf, Error> {
        assert_eq!(data.len(), rows * cols);
        let buffer = self.alloc(rows, cols)?;
        fill(&self.device, &buffer.memory, data, (cols, buffer.ld), buffer.element)?;
        Ok(buffer)
    }

    fn linear_weights(&self, weight: &[f32], bias: &[f32], inputs: usize) -> Result<Self::Linear, Error> {
        let (outputs, ld, element) = (bias.len(), inputs.next_multiple_of(STRIDE), self.element());
        assert_eq!(weight.len(), outputs * inputs, "weight of {outputs} x {inputs}");
        let largest = weight.iter().chain(bias).fold(0.0_f32, |most, v| most.max(v.abs()));
        if element == Element::F16 && largest > half::f16::MAX.to_f32() {
            return Err(Error::WeightRange { value: largest });
        }
        let memory = self.device.alloc(outputs * ld * element.bytes())?;
        fill(&self.device, &memory, weight, (inputs, ld), element)?;
        let (bias, bias_f32) = (vector(&self.device, bias, element)?, vector(&self.device, bias, Element::F32)?);
        Ok(Linear { weight: memory, bias, bias_f32, inputs, outputs, ld })
    }

    fn norm_weights(&self, gain: &[f32], bias: &[f32], eps: f32) -> Result<Self::Norm, Error> {
        let vector = |data| vector(&self.device, data, Element::F32);
        Ok(Norm { gain: vector(gain)?, bias: vector(bias)?, cols: gain.len(), eps })
    }

    fn stage(&mut self, pixels: Option<&[u8]>) {
        self.staged = pixels.map(<[u8]>::len);
        let Some(pixels) = pixels else { return };
        assert!(pixels.len() <= self.limits.images * self.limits.image_bytes);
        self.queue(|this| {
            let to = D::address(&this.pixels[this.stage]);
            // SAFETY: the place has room for the most images; `patchify` takes and releases it around its only reader.
            unsafe { this.device.stage(this.stage, pixels, to) }
        });
    }

    fn patchify(&mut self, pixels: &[u8], patches: Patches, lut: &PixelLut, out: &mut Self::Buf) {
        let Patches { image_size, patch_size } = patches;
        let images = pixels.len() / (image_size * image_size * 3);
        assert_eq!(pixels.len(), images * image_size * image_size * 3, "whole images of {image_size} px");
        if self.staged.is_none() {
            self.stage(Some(pixels));
        }
        assert_eq!(self.staged.take(), Some(pixels.len()), "the images that were staged");
        let stage = self.stage;
        self.stage = (stage + 1) % STAGES;
        self.queue(|this| {
            if this.lut_host.as_deref() != Some(lut) {
                fill(&this.device, &this.lut, lut.as_flattened(), (256 * 3, 256 * 3), Element::F32)?;
                this.lut_host = Some(Box::new(*lut));
            }
            let at = (D::address(&this.pixels[stage]), D::address(&this.lut));
            this.device.take_stage(stage)?;
            kernels::patchify(&this.device, at, images, (image_size, patch_size), matrix::<D>(out))?;
            this.device.release_stage(stage)
        });
    }

    fn image_tokens(&mut self, patches: &Self::Buf, images: usize, positions: &Self::Buf, out: &mut Self::Buf) {
        let (patches, positions, out) = (matrix::<D>(patches), matrix::<D>(positions), matrix::<D>(out));
        self.queue(|this| kernels::image_tokens(&this.device, patches, images, positions, out));
    }

    fn embed(
        &mut self,
        text: TextRows<'_>,
        (words, positions): (&Self::Buf, &Self::Buf),
        norm: &Self::Norm,
        out: &mut Self::Buf,
    ) {
        let rows = text.ids.len();
        assert!(text.places.len() == rows && rows <= self.limits.rows);
        let inside = |indices: &[u32], table: &Self::Buf| indices.iter().all(|i| (*i as usize) < table.rows);
        assert!(inside(text.ids, words) && inside(text.places, positions), "rows of their tables");
        let (tables, norm, out) =
            ((matrix::<D>(words), matrix::<D>(positions)), parameters::<D>(norm), matrix::<D>(out));
        self.queue(|this| {
            let at = (D::address(&this.ids), D::address(&this.places));
            this.upload_indices(text.ids.iter().copied(), at.0)?;
            this.upload_indices(text.places.iter().copied(), at.1)?;
            kernels::embed(&this.device, at, rows, tables, norm, out)
        });
    }

    fn linear_of(
        &mut self,
        x: &Self::Buf,
        rows: Range<usize>,
        w: &Self::Linear,
        epilogue: Epilogue,
        out: &mut Self::Buf,
    ) {
        assert!(x.cols == w.inputs && out.cols == w.outputs && rows.end <= x.rows && rows.len() <= out.rows);
        assert_eq!(x.element, self.element(), "results are no inputs");
        let bias = if out.element == Element::F32 { &w.bias_f32 } else { &w.bias };
        let product = Product {
            m: rows.len(),
            n: w.outputs,
            k: w.inputs,
            x: D::address(&x.memory) + (rows.start * x.ld * x.element.bytes()) as Address,
            ld_x: x.ld,
            w: D::address(&w.weight),
            ld_w: w.ld,
            bias: D::address(bias),
            out: D::address(&out.memory),
            ld_out: out.ld,
            element: x.element,
            out_element: out.element,
            accumulate: epilogue == Epilogue::Accumulate,
        };
        let out = matrix::<D>(out);
        self.queue(|this| {
            if rows.is_empty() {
                return Ok(());
            }
            // SAFETY: x has the rows of `inputs`, the weight `outputs` rows of `inputs`, the bias `outputs` values and
            // out as many rows of `outputs`, by the assertions and by how the weights were made; out is borrowed mutably,
            // so it is no other buffer.
            unsafe { this.device.product(&product)? };
            if epilogue == Epilogue::Gelu { kernels::gelu(&this.device, out, rows.len()) } else { Ok(()) }
        });
    }

    fn layer_norm(&mut self, x: &Self::Buf, rows: usize, norm: &Self::Norm, out: &mut Self::Buf) {
        let (x, norm, out) = (matrix::<D>(x), parameters::<D>(norm), matrix::<D>(out));
        self.queue(|this| if rows == 0 { Ok(()) } else { kernels::layer_norm(&this.device, x, rows, norm, out) });
    }

    fn attention(&mut self, qkv: [Columns<'_, Self::Buf>; 3], spans: &[Span], heads: usize, out: &mut Self::Buf) {
        let [q, k, v] = &qkv;
        for span in spans {
            let (q_end, kv_end) = (span.q + span.q_len, span.kv + span.kv_len);
            assert!(q_end <= q.buf.rows.min(out.rows) && kv_end <= k.buf.rows.min(v.buf.rows) && span.kv_len > 0);
        }
        let longest = |len: fn(&Span) -> usize| spans.iter().map(len).max().unwrap_or(0);
        let most = (longest(|span| span.q_len), longest(|span| span.kv_len));
        let first_cols = qkv.each_ref().map(|columns| columns.first);
        let kernel = Attention::choose(out.element, out.cols / heads, first_cols, most);
        let (qkv, out) = (qkv.map(|columns| (matrix::<D>(columns.buf), columns.first)), matrix::<D>(out));
        self.queue(|this| {
            if most.0 == 0 {
                return Ok(());
            }
            let work = this.spans.work(&this.device, spans, kernel.rows())?;
            kernels::attention(&this.device, kernel, qkv, work, heads, out)
        });
    }

    fn copy_rows(&mut self, x: &Self::Buf, rows: usize, out: &mut Self::Buf) {
        assert!(x.ld == out.ld && x.element == out.element && rows <= x.rows && rows <= out.rows);
        let (from, to, bytes) = (D::address(&x.memory), D::address(&out.memory), rows * x.ld * x.element.bytes());
        self.queue(|this| this.device.copy(from, to, bytes));
    }

    fn take_rows(&mut self, x: &Self::Buf, rows: &[usize], out: &mut Self::Buf) {
        assert!(rows.iter().all(|row| *row < x.rows) && rows.len() <= self.limits.rows.max(self.limits.images));
        let (x, out) = (matrix::<D>(x), matrix::<D>(out));
        self.queue(|this| {
            let at = D::address(&this.rows);
            this.upload_indices(rows.iter().map(|row| u32::try_from(*row).expect("rows fit in i32")), at)?;
            if rows.is_empty() { Ok(()) } else { kernels::take_rows(&this.device, x, at, rows.len(), out) }
        });
    }

    fn repeat(&mut self, images: usize, mut work: impl FnMut(&mut Self)) {
        if images > RECORDED_IMAGES_MAX || !self.records || self.failed.is_some() {
            return work(self);
        }
        match std::mem::replace(&mut self.repeats[images], Repeat::Seen) {
            Repeat::New => work(self),
            Repeat::Seen => match self.recorded(&mut work) {
                Some(graph) => {
                    self.replay(&graph);
                    self.repeats[images] = Repeat::Recorded(graph);
                }
                None => {
                    self.records = false;
                    work(self);
                }
            },
            Repeat::Recorded(graph) => {
                self.replay(&graph);
                self.repeats[images] = Repeat::Recorded(graph);
            }
        }
    }

    fn finish(&mut self) -> Result<(), Error> {
        match self.failed.take() {
            Some(error) => Err(error),
            None => self.device.synchronise(),
        }
    }

    fn read(&mut self, buf: &Self::Buf, out: &mut [f32]) -> Result<(), Error> {
        assert_eq!(out.len() % buf.cols, 0, "whole rows");
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let (rows, row_bytes) = (out.len() / buf.cols, buf.ld * buf.element.bytes());
        assert!(rows <= buf.rows);
        self.bytes.resize(rows * row_bytes, 0);
        self.device.download(D::address(&buf.memory), &mut self.bytes)?;
        for (row, bytes) in out.chunks_exact_mut(buf.cols).zip(self.bytes.chunks_exact(row_bytes)) {
            buf.element.decode(&bytes[..buf.cols * buf.element.bytes()], row);
        }
        Ok(())
    }

    fn run<R: Send>(&mut self, work: impl FnOnce(&mut Self) -> R + Send) -> R {
        work(self)
    }
}
