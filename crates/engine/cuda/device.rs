//! The seam below the CUDA backend: memory, launches by name, products. The driver implements it for a card, the emulator
//! for the CPU, so that everything above (shapes, layouts, which kernel with which grid) is the same code in both.

use std::ffi::c_void;

use crate::Error;

/// How a value is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32 bits.
    F32,
    /// 16 bits, 10 of them mantissa.
    F16,
    /// 16 bits, 7 of them mantissa.
    Bf16,
}

impl Element {
    /// Bytes of a value.
    pub(super) fn bytes(self) -> usize {
        if self == Element::F32 { 4 } else { 2 }
    }

    /// `values` in this element, appended to `out`.
    pub(super) fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Element::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Element::F16 => out.extend(values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes())),
            Element::Bf16 => out.extend(values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())),
        }
    }

    /// The values of `bytes`; `bytes.len() == out.len() * self.bytes()`.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Element::F32 => {
                for (v, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *v = f32::from_le_bytes(*b);
                }
            }
            Element::F16 => {
                for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *v = half::f16::from_le_bytes(*b).to_f32();
                }
            }
            Element::Bf16 => {
                for (v, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *v = half::bf16::from_le_bytes(*b).to_f32();
                }
            }
        }
    }
}

/// An address on the device.
pub(super) type Address = u64;

/// The grid and block of a launch, and its bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared_bytes: usize,
}

/// `out[M, N] (+)= x[M, K] w[N, K]ᵀ + bias[N]`, all row-major with strides in elements; sums in f32.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub x: Address,
    pub ld_x: usize,
    pub w: Address,
    pub ld_w: usize,
    /// Stored as `out_element`.
    pub bias: Address,
    pub out: Address,
    pub ld_out: usize,
    /// Of x and w.
    pub element: Element,
    /// Of bias and out.
    pub out_element: Element,
    /// Adds to what out holds.
    pub accumulate: bool,
}

/// A kernel's argument: where it lies and how many bytes it has.
pub(super) type Argument = (*const c_void, usize);

/// Places that [`Device::stage`] fills in turn: one is read while the other is filled.
pub(super) const STAGES: usize = 2;

/// A card, or what stands in for one. Work is queued in order; only [`Device::download`] and [`Device::synchronise`] wait.
pub trait Device: Send {
    /// A block of device memory, freed when dropped.
    type Memory: Send + Sync;

    /// Queued work that was recorded.
    type Graph: Send;

    /// What computes, in words.
    fn name(&self) -> String;

    /// Memory of `bytes` bytes, aligned to 256. Errors: no memory, with what was needed and what is free.
    fn alloc(&self, bytes: usize) -> Result<Self::Memory, Error>;

    /// Where a block begins.
    fn address(memory: &Self::Memory) -> Address;

    /// Copies `bytes` to `to`, which has room for them. The bytes may change as soon as this returns.
    fn upload(&self, bytes: &[u8], to: Address) -> Result<(), Error>;

    /// Copies from `from` to `out` once all queued work is done.
    fn download(&self, from: Address, out: &mut [u8]) -> Result<(), Error>;

    /// Copies `bytes` bytes on the device.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), Error>;

    /// Waits for all queued work. Errors: what failed in it.
    fn synchronise(&self) -> Result<(), Error>;

    /// Makes room on the host for [`STAGES`] stretches of `bytes` bytes.
    fn open_stages(&mut self, bytes: usize) -> Result<(), Error>;

    /// Begins to copy `bytes` to `to` beside the queued work.
    ///
    /// # Safety
    /// `to` has room for the bytes. Work that touches it was queued before the stage's last [`Self::release_stage`], or is
    /// queued after [`Self::take_stage`].
    unsafe fn stage(&mut self, stage: usize, bytes: &[u8], to: Address) -> Result<(), Error>;

    /// Work queued from here on sees what the stage brings.
    fn take_stage(&mut self, stage: usize) -> Result<(), Error>;

    /// Work queued so far is the last that reads what the stage brought.
    fn release_stage(&mut self, stage: usize) -> Result<(), Error>;

    /// From here on launches, products and copies are written down and not done.
    fn record(&mut self) -> Result<(), Error>;

    /// What was written down since [`Self::record`]. Errors: something in it cannot be recorded.
    fn recorded(&mut self) -> Result<Self::Graph, Error>;

    /// Queues what was recorded.
    ///
    /// # Safety
    /// The memory that was used when it was recorded is still alive.
    unsafe fn replay(&mut self, graph: &Self::Graph) -> Result<(), Error>;

    /// Queues a kernel.
    ///
    /// # Safety
    /// `arguments` are values of the types of the kernel's parameters, in order, and what the kernel does with them
    /// stays within memory of this device: see the typed functions in [`super::kernels`], the only callers.
    unsafe fn launch(&self, kernel: &'static str, shape: Shape, arguments: &[Argument]) -> Result<(), Error>;

    /// Queues a product.
    ///
    /// # Safety
    /// The matrices lie within memory of this device, and `out` overlaps none of the others.
    unsafe fn product(&mut self, product: &Product) -> Result<(), Error>;
}
