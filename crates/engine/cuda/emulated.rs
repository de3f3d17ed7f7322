//! A device that is none: kernels run on the CPU under `kernels/emulator`, products through the CPU backend's kernels.
//!
//! For tests. Memory has guard bytes on both sides, checked when it is freed, and begins as NaN; products round where the
//! card does: inputs and outputs in their element, sums in f32.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int, c_void};

use super::device::{Address, Argument, Device, Element, Product, STAGES, Shape};
use crate::backend::{Backend, Epilogue};
use crate::cpu::{AttentionLimits, CpuBackend, Isa};
use crate::{Error, Precision};

/// Bytes before and behind a block of memory that nobody may write.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xA5;
/// Every float made of these bytes is NaN.
const POISON: u8 = 0xFF;

unsafe extern "C" {
    fn emu_launch(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: usize,
        arguments: *mut *mut c_void,
        order: c_int,
        seed: u64,
    ) -> c_int;
    fn emu_guard(start: *mut u8, bytes: usize, on: c_int);
}

/// The order in which the threads of a block go on between barriers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// First to last.
    Forward,
    /// Last to first.
    Reverse,
    /// By a seeded shuffle.
    Shuffled(u64),
}

/// The emulated device.
pub struct Emulated {
    order: Order,
    cpu: RefCell<CpuBackend>,
    stages: [Stage; STAGES],
    /// What is recorded, while that is so.
    record: RefCell<Option<Vec<Queued>>>,
}

/// Bytes on their way: they arrive when they are taken and not before.
#[derive(Default)]
struct Stage {
    bytes: Vec<u8>,
    room: usize,
    to: Address,
    /// Taken and not yet released.
    in_use: bool,
}

/// A recorded call, its arguments copied as a card's driver does.
#[derive(Clone)]
pub enum Queued {
    /// A kernel and its arguments.
    Launch(&'static str, Shape, Vec<Vec<u8>>),
    /// A product.
    Product(Product),
    /// From, to, bytes.
    Copy(Address, Address, usize),
}

/// A block of memory between guards.
#[repr(C, align(256))]
#[derive(Clone, Copy)]
struct Line([u8; 256]);

/// Device memory: a slice of the heap.
pub struct Memory {
    lines: Vec<Line>,
    bytes: usize,
}

impl Memory {
    fn raw(&self) -> &[u8] {
        self.lines.as_flattened_bytes()
    }

    /// Forbids the kernels to touch the guards, or ends that; a sanitized build alone notices.
    fn guard(&mut self, on: bool) {
        let (start, behind) = (self.lines.as_mut_ptr().cast::<u8>(), GUARD + self.bytes);
        // SAFETY: both stretches lie in the block; no byte is changed.
        unsafe {
            emu_guard(start, GUARD, c_int::from(on));
            emu_guard(start.add(behind), self.lines.len() * size_of::<Line>() - behind, c_int::from(on));
        }
    }
}

/// The bytes of lines.
trait Flatten {
    fn as_flattened_bytes(&self) -> &[u8];
}

impl Flatten for Vec<Line> {
    fn as_flattened_bytes(&self) -> &[u8] {
        // SAFETY: Line is repr(C) around [u8; 256] with size 256, so the lines are len * 256 initialised bytes.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.len() * 256) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.guard(false);
        let (before, rest) = self.raw().split_at(GUARD);
        let intact = before.iter().chain(&rest[self.bytes..]).all(|byte| *byte == GUARD_BYTE);
        assert!(intact || std::thread::panicking(), "a kernel wrote outside a block of {} bytes", self.bytes);
    }
}

impl Emulated {
    /// A device whose threads run in `order`. Errors: no memory, no threads.
    pub fn new(order: Order) -> Result<Self, Error> {
        let limits = AttentionLimits { keys: 1, head_size: 1 };
        Ok(Self {
            order,
            cpu: RefCell::new(CpuBackend::new(1, Isa::detect()?, Precision::F32, limits)?),
            stages: Default::default(),
            record: RefCell::new(None),
        })
    }
}

impl Emulated {
    /// Writes the call down, if that is what is done.
    fn recorded_instead(&self, call: impl FnOnce() -> Queued) -> bool {
        let mut record = self.record.borrow_mut();
        record.as_mut().is_some_and(|calls| {
            calls.push(call());
            true
        })
    }

    fn assert_not_recording(&self, what: &str) {
        assert!(self.record.borrow().is_none(), "{what} cannot be recorded");
    }
}

/// `rows` rows of `cols` values at `at`.
///
/// # Safety
/// They lie within live memory of this device.
unsafe fn gather(at: Address, (rows, cols, ld): (usize, usize, usize), element: Element) -> Vec<f32> {
    let mut values = vec![0.0; rows * cols];
    for (row, out) in values.chunks_exact_mut(cols).enumerate() {
        let from = (at as usize + row * ld * element.bytes()) as *const u8;
        // SAFETY: the caller vouches for the rows.
        element.decode(unsafe { std::slice::from_raw_parts(from, cols * element.bytes()) }, out);
    }
    values
}

impl Device for Emulated {
    type Memory = Memory;
    type Graph = Vec<Queued>;

    fn name(&self) -> String {
        format!("cuda emulator ({:?} threads)", self.order)
    }

    fn alloc(&self, bytes: usize) -> Result<Memory, Error> {
        let mut lines = vec![Line([GUARD_BYTE; 256]); bytes.div_ceil(256) + 2];
        let start = lines.as_mut_ptr().cast::<u8>();
        // SAFETY: the block lies between the first and the last line.
        unsafe { start.add(GUARD).write_bytes(POISON, bytes) };
        let mut memory = Memory { lines, bytes };
        memory.guard(true);
        Ok(memory)
    }

    fn address(memory: &Memory) -> Address {
        memory.raw()[GUARD..].as_ptr() as Address
    }

    fn upload(&self, bytes: &[u8], to: Address) -> Result<(), Error> {
        self.assert_not_recording("an upload");
        // SAFETY: callers give addresses of their own blocks with room for the bytes; nothing else runs meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: Address, out: &mut [u8]) -> Result<(), Error> {
        self.assert_not_recording("a download");
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), Error> {
        if self.recorded_instead(|| Queued::Copy(from, to, bytes)) {
            return Ok(());
        }
        // SAFETY: as in `upload`; two blocks do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn synchronise(&self) -> Result<(), Error> {
        self.assert_not_recording("waiting");
        Ok(())
    }

    fn open_stages(&mut self, bytes: usize) -> Result<(), Error> {
        self.stages = [(); STAGES].map(|()| Stage { room: bytes, ..Stage::default() });
        Ok(())
    }

    unsafe fn stage(&mut self, stage: usize, bytes: &[u8], to: Address) -> Result<(), Error> {
        let stage = &mut self.stages[stage];
        assert!(bytes.len() <= stage.room && !stage.in_use, "a stage is filled before it is released");
        (stage.bytes, stage.to) = (bytes.to_vec(), to);
        Ok(())
    }

    fn take_stage(&mut self, stage: usize) -> Result<(), Error> {
        self.assert_not_recording("a stage");
        let Stage { bytes, to, .. } = std::mem::take(&mut self.stages[stage]);
        let room = self.stages[1 - stage].room;
        self.stages[stage] = Stage { room, in_use: true, ..Stage::default() };
        self.upload(&bytes, to)
    }

    fn release_stage(&mut self, stage: usize) -> Result<(), Error> {
        assert!(std::mem::take(&mut self.stages[stage].in_use), "a stage is released that nobody took");
        Ok(())
    }

    fn record(&mut self) -> Result<(), Error> {
        self.assert_not_recording("a record");
        *self.record.get_mut() = Some(Vec::new());
        Ok(())
    }

    fn recorded(&mut self) -> Result<Vec<Queued>, Error> {
        Ok(self.record.get_mut().take().expect("recording"))
    }

    unsafe fn replay(&mut self, graph: &Vec<Queued>) -> Result<(), Error> {
        for call in graph {
            match call {
                Queued::Launch(kernel, shape, arguments) => {
                    let arguments: Vec<_> = arguments.iter().map(|a| (a.as_ptr().cast(), a.len())).collect();
                    // SAFETY: recorded from a launch of ours, copies of its arguments.
                    unsafe { self.launch(kernel, *shape, &arguments)? };
                }
                // SAFETY: recorded from a product of ours; its memory lives, says the caller.
                Queued::Product(product) => unsafe { self.product(product)? },
                Queued::Copy(from, to, bytes) => self.copy(*from, *to, *bytes)?,
            }
        }
        Ok(())
    }

    unsafe fn launch(&self, kernel: &'static str, shape: Shape, arguments: &[Argument]) -> Result<(), Error> {
        // SAFETY: each argument is a value of so many bytes, says the caller.
        let copy = |(at, bytes): &Argument| unsafe { std::slice::from_raw_parts(at.cast::<u8>(), *bytes) }.to_vec();
        if self.recorded_instead(|| Queued::Launch(kernel, shape, arguments.iter().map(copy).collect())) {
            return Ok(());
        }
        let name = CString::new(kernel).expect("names are ours");
        let (order, seed) = match self.order {
            Order::Forward => (0, 0),
            Order::Reverse => (1, 0),
            Order::Shuffled(seed) => (2, seed),
        };
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(|(at, _)| at.cast_mut()).collect();
        let (block, pointers) = ([shape.threads, 1, 1], pointers.as_mut_ptr());
        // SAFETY: name, grid and block live through the call; the caller vouches for the arguments, which are only read.
        let missing = unsafe {
            emu_launch(name.as_ptr(), shape.grid.as_ptr(), block.as_ptr(), shape.shared_bytes, pointers, order, seed)
        };
        assert_eq!(missing, 0, "no kernel {kernel}");
        Ok(())
    }

    unsafe fn product(&mut self, p: &Product) -> Result<(), Error> {
        if self.recorded_instead(|| Queued::Product(*p)) {
            return Ok(());
        }
        // SAFETY: the caller vouches for the matrices.
        let (x, w, bias) = unsafe {
            (
                gather(p.x, (p.m, p.k, p.ld_x), p.element),
                gather(p.w, (p.n, p.k, p.ld_w), p.element),
                gather(p.bias, (1, p.n, p.n), p.out_element),
            )
        };
        let cpu = self.cpu.get_mut();
        let (linear, x) = (cpu.linear_weights(&w, &bias, p.k)?, cpu.upload(p.m, p.k, &x)?);
        let mut out = if p.accumulate {
            // SAFETY: the caller vouches for out.
            cpu.upload(p.m, p.n, &unsafe { gather(p.out, (p.m, p.n, p.ld_out), p.out_element) })?
        } else {
            cpu.alloc(p.m, p.n)?
        };
        let epilogue = if p.accumulate { Epilogue::Accumulate } else { Epilogue::Store };
        cpu.run(|cpu| cpu.linear(&x, p.m, &linear, epilogue, &mut out));
        let (mut values, mut bytes) = (vec![0.0; p.m * p.n], Vec::new());
        cpu.read(&out, &mut values)?;
        for (row, values) in values.chunks_exact(p.n).enumerate() {
            bytes.clear();
            p.out_element.encode(values, &mut bytes);
            self.upload(&bytes, p.out + (row * p.ld_out * p.out_element.bytes()) as Address)?;
        }
        Ok(())
    }
}
