//! One typed launch function per kernel of `kernels/*.cu`: checks shapes and ranges, picks the grid, launches.
//!
//! Preconditions that all kernels share hold by construction of [`Matrix`]: a row begins 16-byte aligned, its stride is a
//! multiple of 8 elements, and there are as many rows as it says.

use std::ffi::c_void;

use super::device::{Address, Device, Element, Shape};
use crate::Error;

/// Every kernel that the build compiles, by precision.
#[cfg(feature = "cuda")]
pub(super) const NAMES: &[&str] = &[
    "patchify_f16",
    "patchify_bf16",
    "patchify_f32",
    "image_tokens_f16",
    "image_tokens_bf16",
    "image_tokens_f32",
    "embed_f16",
    "embed_bf16",
    "embed_f32",
    "layer_norm_f16",
    "layer_norm_bf16",
    "layer_norm_f32",
    "gelu_f16",
    "gelu_bf16",
    "gelu_f32",
    "take_rows_f16",
    "take_rows_bf16",
    "take_rows_f32",
    "attention_tiles_f16",
    "attention_tiles_bf16",
    "attention_caption_f16",
    "attention_caption_bf16",
    "attention_cross_f16",
    "attention_cross_bf16",
    "attention_rows_f16",
    "attention_rows_bf16",
    "attention_rows_f32",
];
/// Widest row of the norm kernels: `ROW_VECTORS * 32 * 8` of rows.cu.
pub(super) const NORM_COLS_MAX: usize = 1024;
/// Largest head of attention_rows.
pub(super) const HEAD_SIZE_MAX: usize = 128;
/// Head size of the tensor core kernels.
const TENSOR_CORE_HEAD: usize = 64;
/// Rows of a norm block: a warp each.
const NORM_ROWS: usize = 8;
/// Threads of the element-wise kernels, and blocks beyond which they go round again.
const FLAT_THREADS: u32 = 256;
const FLAT_BLOCKS_MAX: usize = 132 * 16;
const VECTOR: usize = 8;

/// A row-major matrix on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub at: Address,
    pub rows: usize,
    pub cols: usize,
    /// Row stride in elements, a multiple of 8.
    pub ld: usize,
    pub element: Element,
}

/// A layer norm's parameters, f32, padded to a multiple of 8.
#[derive(Clone, Copy, Debug)]
pub(super) struct NormParameters {
    pub gain: Address,
    pub bias: Address,
    pub cols: usize,
    pub eps: f32,
}

/// Arguments of a launch: values on the stack, their addresses in a list.
macro_rules! launch {
    ($device:expr, $kernel:expr, $shape:expr, $($argument:expr),+ $(,)?) => {{
        let arguments = ($($argument,)+);
        launch!(@go $device, $kernel, $shape, arguments, [] [0 1 2 3 4 5 6 7 8 9 10 11] $($argument,)+)
    }};
    (@go $device:expr, $kernel:expr, $shape:expr, $tuple:ident, [$($pointer:tt)*] [$index:tt $($rest:tt)*] $head:expr, $($tail:expr,)*) => {
        launch!(@go $device, $kernel, $shape, $tuple, [$($pointer)* $index] [$($rest)*] $($tail,)*)
    };
    (@go $device:expr, $kernel:expr, $shape:expr, $tuple:ident, [$($index:tt)*] [$($rest:tt)*]) => {{
        let pointers = [$((std::ptr::from_ref(&$tuple.$index).cast::<c_void>(), size_of_val(&$tuple.$index))),*];
        // SAFETY: each pointer names a value of the parameter's type (the caller's note says which and why what it
        // describes stays inside its buffers); the values live until the call returns, when they have been copied.
        unsafe { $device.launch($kernel, $shape, &pointers) }
    }};
}

/// The kernel's name for an element.
macro_rules! named {
    ($element:expr, $name:literal) => {
        match $element {
            Element::F16 => concat!($name, "_f16"),
            Element::Bf16 => concat!($name, "_bf16"),
            Element::F32 => concat!($name, "_f32"),
        }
    };
}

/// The same for kernels that there are in 16 bits only.
macro_rules! tensor_core {
    ($element:expr, $name:literal) => {
        match $element {
            Element::F16 => concat!($name, "_f16"),
            Element::Bf16 => concat!($name, "_bf16"),
            Element::F32 => unreachable!("Attention::choose gives f32 to attention_rows"),
        }
    };
}

fn int(value: usize) -> i32 {
    i32::try_from(value).expect("sizes are limited when buffers are made")
}

fn count(value: usize) -> u32 {
    u32::try_from(value).expect("sizes are limited when buffers are made")
}

fn line(blocks: usize, threads: u32, shared_bytes: usize) -> Shape {
    Shape { grid: [count(blocks), 1, 1], threads, shared_bytes }
}

/// A grid for a loop over `vectors` vectors.
fn flat(vectors: usize) -> Shape {
    line(vectors.div_ceil(FLAT_THREADS as usize).clamp(1, FLAT_BLOCKS_MAX), FLAT_THREADS, 0)
}

/// patchify.cu: `out [images * side², 3 p²]` from `pixels [images, size, size, 3]` u8 and `lut [3][256]` f32.
pub(super) fn patchify<D: Device>(
    device: &D,
    (pixels, lut): (Address, Address),
    images: usize,
    (size, patch): (usize, usize),
    out: Matrix,
) -> Result<(), Error> {
    let side = size / patch;
    assert!(images * side * side <= out.rows && out.cols == 3 * patch * patch);
    let shape = line(images * side, FLAT_THREADS, 3 * 256 * 4 + patch * side * patch * 3);
    // `pixels` holds images * size * size * 3 bytes and `lut` 768 floats: their only makers are CudaBackend's.
    launch!(device, named!(out.element, "patchify"), shape, pixels, lut, out.at, int(size), int(patch), int(out.ld))
}

/// rows.cu: `out [images * tokens, V]` from patches and positions `[tokens, V]`.
pub(super) fn image_tokens<D: Device>(
    device: &D,
    patches: Matrix,
    images: usize,
    positions: Matrix,
    out: Matrix,
) -> Result<(), Error> {
    let (tokens, rows) = (positions.rows, images * positions.rows);
    assert!(images * (tokens - 1) <= patches.rows && rows <= out.rows);
    assert!(patches.ld == out.ld && positions.ld == out.ld, "one width");
    assert!(patches.element == out.element && positions.element == out.element);
    let (name, shape) = (named!(out.element, "image_tokens"), flat(rows * out.ld / VECTOR));
    launch!(device, name, shape, patches.at, positions.at, out.at, int(rows), int(tokens), int(out.ld))
}

/// rows.cu: the sum of a word's and a position's row, normed; ids and places are i32 rows of their tables.
pub(super) fn embed<D: Device>(
    device: &D,
    (ids, places): (Address, Address),
    rows: usize,
    (words, positions): (Matrix, Matrix),
    norm: NormParameters,
    out: Matrix,
) -> Result<(), Error> {
    assert!(rows <= out.rows && norm.cols == out.cols && out.cols <= NORM_COLS_MAX);
    assert!(words.ld == out.ld && positions.ld == out.ld && words.element == out.element);
    let (name, shape) = (named!(out.element, "embed"), line(rows.div_ceil(NORM_ROWS), 256, 0));
    let (tables, NormParameters { gain, bias, cols, eps }) = ((words.at, positions.at), norm);
    // The caller has checked every id and place against its table.
    launch!(
        device,
        name,
        shape,
        ids,
        places,
        tables.0,
        tables.1,
        gain,
        bias,
        out.at,
        int(rows),
        int(cols),
        int(out.ld),
        eps
    )
}

/// rows.cu: layer norm of the first `rows` rows.
pub(super) fn layer_norm<D: Device>(
    device: &D,
    x: Matrix,
    rows: usize,
    norm: NormParameters,
    out: Matrix,
) -> Result<(), Error> {
    assert!(rows <= x.rows && rows <= out.rows && x.ld == out.ld && x.element == out.element);
    assert!(norm.cols == x.cols && out.cols == x.cols && x.cols <= NORM_COLS_MAX);
    let (name, shape) = (named!(out.element, "layer_norm"), line(rows.div_ceil(NORM_ROWS), 256, 0));
    let NormParameters { gain, bias, cols, eps } = norm;
    launch!(device, name, shape, x.at, gain, bias, out.at, int(rows), int(cols), int(out.ld), eps)
}

/// rows.cu: exact-erf GELU of the first `rows` rows, in place.
pub(super) fn gelu<D: Device>(device: &D, x: Matrix, rows: usize) -> Result<(), Error> {
    assert!(rows <= x.rows);
    let vectors = rows * x.ld / VECTOR;
    launch!(device, named!(x.element, "gelu"), flat(vectors), x.at, vectors)
}

/// rows.cu: `out[i] = x[rows[i]]` for `count` i32 rows, which the caller has checked against x.
pub(super) fn take_rows<D: Device>(
    device: &D,
    x: Matrix,
    rows: Address,
    count: usize,
    out: Matrix,
) -> Result<(), Error> {
    assert!(count <= out.rows && x.ld == out.ld && x.element == out.element);
    let shape = flat(count * out.ld / VECTOR);
    launch!(device, named!(out.element, "take_rows"), shape, x.at, rows, out.at, int(count), int(out.ld))
}

/// Which attention kernel, and with which tile of query rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attention {
    /// attention_tiles.cu with four warps: images.
    Tiles,
    /// attention_tiles.cu with one warp: captions.
    Caption,
    /// attention_cross.cu: few rows against many keys.
    Cross,
    /// attention_rows.cu: any head, f32 arithmetic.
    Rows,
}

impl Attention {
    /// The fastest kernel that can do it: spans of at most `q_max` rows and `kv_max` keys.
    pub(super) fn choose(
        element: Element,
        head_size: usize,
        first_cols: [usize; 3],
        (q_max, kv_max): (usize, usize),
    ) -> Self {
        let aligned = first_cols.iter().all(|first| first.is_multiple_of(VECTOR));
        match (element, head_size) {
            (Element::F16 | Element::Bf16, TENSOR_CORE_HEAD) if aligned => match (q_max, kv_max) {
                (_, 0..=64) => Attention::Caption,
                (0..=32, _) => Attention::Cross,
                _ => Attention::Tiles,
            },
            _ => Attention::Rows,
        }
    }

    /// Query rows of a work item.
    pub(super) fn rows(self) -> usize {
        match self {
            Attention::Tiles => 64,
            Attention::Caption | Attention::Rows => 16,
            Attention::Cross => 32,
        }
    }
}

/// `AttentionArgs` of attention.cuh.
#[repr(C)]
struct AttentionArgs {
    q: Address,
    k: Address,
    v: Address,
    out: Address,
    spans: Address,
    items: Address,
    tokens: i32,
    head_size: i32,
    ld_q: i32,
    ld_k: i32,
    ld_v: i32,
    ld_out: i32,
    scale: f32,
}

/// The work of an attention call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    /// Images of so many tokens, one after the other, which attend to themselves.
    Images { images: usize, tokens: usize },
    /// `items` pairs of i32 (span, first row) over spans of four i32 (q, q_len, kv, kv_len).
    Spans { spans: Address, items: Address, count: usize },
}

/// Fused attention. `qkv` are matrices and the first column of each part.
pub(super) fn attention<D: Device>(
    device: &D,
    kernel: Attention,
    qkv: [(Matrix, usize); 3],
    work: Work,
    heads: usize,
    out: Matrix,
) -> Result<(), Error> {
    let size = out.cols / heads;
    assert!(size * heads == out.cols && size <= HEAD_SIZE_MAX);
    assert!(qkv.iter().all(|(m, first)| m.element == out.element && first + out.cols <= m.cols));
    let rows = kernel.rows();
    let (tokens, blocks, spans, items) = match work {
        Work::Images { images, tokens } => (tokens, images * tokens.div_ceil(rows), 0, 0),
        Work::Spans { spans, items, count } => (0, count, spans, items),
    };
    let (name, threads, shared_bytes) = match kernel {
        Attention::Tiles => (tensor_core!(out.element, "attention_tiles"), 128, (64 + 4 * 64) * 64 * 2),
        Attention::Caption => (tensor_core!(out.element, "attention_caption"), 32, (16 + 4 * 64) * 64 * 2),
        Attention::Cross => (tensor_core!(out.element, "attention_cross"), 128, 32 * 64 * 2 + 4 * 32 * 66 * 4),
        Attention::Rows => (named!(out.element, "attention_rows"), 128, (80 * (size + 1) + 16 * 32) * 4),
    };
    let part = |(m, first): (Matrix, usize)| m.at + (first * m.element.bytes()) as Address;
    let [(q, _), (k, _), (v, _)] = qkv;
    let arguments = AttentionArgs {
        q: part(qkv[0]),
        k: part(qkv[1]),
        v: part(qkv[2]),
        out: out.at,
        spans,
        items,
        tokens: int(tokens),
        head_size: int(size),
        ld_q: int(q.ld),
        ld_k: int(k.ld),
        ld_v: int(v.ld),
        ld_out: int(out.ld),
        scale: std::f32::consts::LOG2_E / (size as f32).sqrt(),
    };
    // The caller has checked every span against the rows of q, k, v and out.
    let shape = Shape { grid: [count(blocks), count(heads), 1], threads, shared_bytes };
    launch!(device, name, shape, arguments)
}
