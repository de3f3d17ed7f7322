//! A card through the CUDA driver: context, streams, memory, launches. Nothing here is linked: the driver is looked for
//! when a card is opened, and its absence is an error like any other.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::{DriverError, result, sys};

use super::blas::Blas;
use super::device::{Address, Argument, Device, Product, Shape};
use super::kernels;
use super::staging::Staging;
use crate::{Error, Precision};

/// What `build.rs` made of `kernels/*.cu`: for each source, machine code for several architectures and PTX.
const IMAGES: &[&[u8]] = &include!(concat!(env!("OUT_DIR"), "/images.rs"));
/// The CUDA version whose driver this build needs.
const VERSION_MIN: i32 = 13_000;
/// The oldest architecture: tensor cores through mma.sync, cp.async.
const ARCHITECTURE_MIN: (i32, i32) = (8, 0);

/// Parameters of a kernel at most.
const ARGUMENTS_MAX: usize = 16;

/// The primary context of a card, held as long as anything uses the card.
pub(super) struct Context {
    pub(super) ordinal: usize,
    /// Bytes of the card that we hold.
    held: AtomicUsize,
    device: sys::CUdevice,
    handle: sys::CUcontext,
}

// SAFETY: a context handle may be used from any thread; each call makes it current on its own thread first.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks what its calls share.
unsafe impl Sync for Context {}

impl Context {
    /// Makes the context current on this thread.
    pub(super) fn enter(&self) -> Result<(), Error> {
        // SAFETY: the handle is retained until drop.
        self.check("select the card", unsafe { result::ctx::set_current(self.handle) })
    }

    pub(super) fn check<T>(&self, action: &'static str, result: Result<T, DriverError>) -> Result<T, Error> {
        result.map_err(|source| Error::Card { ordinal: self.ordinal, action, source: Box::new(source) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; nothing that used it is alive, for everything holds an Arc of it. A failure
        // means that the card is gone, and then there is nothing to release.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A block of the card's memory.
pub struct Memory {
    address: Address,
    bytes: usize,
    context: Arc<Context>,
}

impl Memory {
    pub(super) fn alloc(context: &Arc<Context>, bytes: usize) -> Result<Self, Error> {
        context.enter()?;
        let ordinal = context.ordinal;
        // SAFETY: the context is current; an empty allocation is none.
        match unsafe { result::malloc_sync(bytes.max(256)) } {
            Ok(address) => {
                context.held.fetch_add(bytes, Ordering::Relaxed);
                Ok(Self { address, bytes, context: Arc::clone(context) })
            }
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                let held = context.held.load(Ordering::Relaxed);
                Err(Error::CardOutOfMemory { ordinal, needed: held + bytes, free: held + free })
            }
            Err(source) => Err(Error::Card { ordinal, action: "allocate memory", source: Box::new(source) }),
        }
    }

    pub(super) fn address(&self) -> Address {
        self.address
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated in `alloc` and freed only here; freeing waits for the work that uses it.
            let _ = unsafe { result::free_sync(self.address) };
            self.context.held.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

/// A card.
pub struct Gpu {
    pub(super) context: Arc<Context>,
    pub(super) stream: sys::CUstream,
    functions: HashMap<&'static str, sys::CUfunction>,
    blas: Blas,
    staging: Option<Staging>,
    name: String,
}

/// A recorded stretch of work, ready to start.
pub struct Graph {
    handle: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: the handle belongs to this value alone and may be used from any thread.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made in `recorded`, destroyed only here; a run that has begun goes on to its end.
            let _ = unsafe { result::graph::exec_destroy(self.handle) };
        }
    }
}

// SAFETY: stream and function handles may be used from any thread with the context current, which every call sees to.
unsafe impl Send for Gpu {}

impl Gpu {
    /// Opens card `ordinal`. Errors: no driver, an old driver, no such card, an old card, no cuBLASLt; never a panic.
    pub fn open(ordinal: usize, precision: Precision) -> Result<Self, Error> {
        let unusable = |reason: String| Error::NoCuda { ordinal, reason };
        let version = driver_version().map_err(unusable)?;
        let driver = |error: DriverError| unusable(format!("the driver answers {error}"));
        result::init().map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => unusable("the driver sees no card".to_owned()),
            _ => driver(error),
        })?;
        let count = result::device::get_count().map_err(driver)?;
        let index = i32::try_from(ordinal).unwrap_or(i32::MAX);
        if index >= count {
            return Err(unusable(format!("the driver sees {count} cards, counted from 0")));
        }
        let device = result::device::get(index).map_err(driver)?;
        let name = result::device::get_name(device).map_err(driver)?;
        // SAFETY: the device handle was just given.
        let attribute = |name| unsafe { result::device::get_attribute(device, name) }.map_err(driver);
        use sys::CUdevice_attribute as Attribute;
        let architecture = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if architecture < ARCHITECTURE_MIN {
            let (major, minor) = architecture;
            return Err(unusable(format!("{name} has compute capability {major}.{minor}, 8.0 or later is needed")));
        }
        let shared_max = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        // SAFETY: the device handle is valid; released when the context drops.
        let handle = unsafe { result::primary_ctx::retain(device) }.map_err(driver)?;
        let context = Arc::new(Context { ordinal, held: AtomicUsize::new(0), device, handle });
        context.enter()?;
        let stream = context.check("make a stream", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        let functions = load_functions(&context, shared_max)?;
        let blas = Blas::open(&context, stream, &format!("{name} driver {version}"), precision)?;
        Ok(Self { context, stream, functions, blas, staging: None, name })
    }
}

/// The driver's version, asked through a handle of our own: cudarc panics where the library or a symbol is missing.
fn driver_version() -> Result<i32, String> {
    let names = if cfg!(windows) { ["nvcuda.dll", "nvcuda"] } else { ["libcuda.so.1", "libcuda.so"] };
    // SAFETY: the driver's library runs no code of ours when it is loaded.
    let library = names.iter().find_map(|name| unsafe { libloading::Library::new(*name) }.ok());
    let library = library.ok_or("no NVIDIA driver is installed (libcuda.so.1 is not found)")?;
    type GetVersion = unsafe extern "C" fn(*mut i32) -> sys::CUresult;
    // SAFETY: the symbol has this type in every driver.
    let version = unsafe { library.get::<GetVersion>(b"cuDriverGetVersion\0") };
    let version = version.map_err(|error| format!("the driver is damaged: {error}"))?;
    let mut found = 0;
    // SAFETY: the pointer is valid for a write.
    unsafe { version(&raw mut found) };
    if found < VERSION_MIN {
        let words = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(format!(
            "the driver supports CUDA {}, this build needs {}: update it",
            words(found),
            words(VERSION_MIN)
        ));
    }
    Ok(found)
}

fn load_functions(context: &Context, shared_max: i32) -> Result<HashMap<&'static str, sys::CUfunction>, Error> {
    let mut modules = Vec::new();
    for image in IMAGES {
        // SAFETY: a fat image made by nvcc; the driver copies what it keeps. Modules live as long as the context.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        modules.push(context.check("load the kernels", module)?);
    }
    let mut functions = HashMap::new();
    for name in kernels::NAMES {
        let symbol = || CString::new(*name).expect("names are ours");
        // SAFETY: the modules were just loaded.
        let found = modules.iter().find_map(|module| unsafe { result::module::get_function(*module, symbol()) }.ok());
        let function = found.unwrap_or_else(|| panic!("build.rs compiled no kernel {name}"));
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function was just given.
        let set = unsafe { result::function::set_function_attribute(function, attribute, shared_max) };
        context.check("prepare the kernels", set)?;
        functions.insert(*name, function);
    }
    Ok(functions)
}

impl Device for Gpu {
    type Memory = Memory;
    type Graph = Graph;

    fn name(&self) -> String {
        format!("cuda:{} ({})", self.context.ordinal, self.name)
    }

    fn alloc(&self, bytes: usize) -> Result<Memory, Error> {
        Memory::alloc(&self.context, bytes)
    }

    fn address(memory: &Memory) -> Address {
        memory.address
    }

    fn upload(&self, bytes: &[u8], to: Address) -> Result<(), Error> {
        self.context.enter()?;
        // SAFETY: `to` has room for the bytes (the caller's promise). From pageable memory the driver takes the bytes
        // before it returns, so they may change then; the copy itself is ordered with the stream's work.
        let copied = unsafe { result::memcpy_htod_async(to, bytes, self.stream) };
        self.context.check("take data", copied)
    }

    fn download(&self, from: Address, out: &mut [u8]) -> Result<(), Error> {
        self.context.enter()?;
        // SAFETY: `from` holds as many bytes (the caller's promise); `out` is borrowed until the stream is done.
        let copied = unsafe { result::memcpy_dtoh_async(out, from, self.stream) };
        // SAFETY: the stream is ours.
        let done = copied.and_then(|()| unsafe { result::stream::synchronize(self.stream) });
        self.context.check("compute", done)
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), Error> {
        self.context.enter()?;
        // SAFETY: both blocks hold as many bytes and do not overlap (the caller's promise).
        self.context.check("copy", unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
    }

    fn synchronise(&self) -> Result<(), Error> {
        self.context.enter()?;
        // SAFETY: the stream is ours.
        self.context.check("compute", unsafe { result::stream::synchronize(self.stream) })
    }

    fn open_stages(&mut self, bytes: usize) -> Result<(), Error> {
        self.staging = Some(Staging::new(&self.context, bytes)?);
        Ok(())
    }

    unsafe fn stage(&mut self, stage: usize, bytes: &[u8], to: Address) -> Result<(), Error> {
        self.context.enter()?;
        // SAFETY: passed on to the caller.
        unsafe { self.staging.as_mut().expect("stages are open").bring(stage, bytes, to) }
    }

    fn take_stage(&mut self, stage: usize) -> Result<(), Error> {
        self.context.enter()?;
        self.staging.as_ref().expect("stages are open").take(stage, self.stream)
    }

    fn release_stage(&mut self, stage: usize) -> Result<(), Error> {
        self.context.enter()?;
        self.staging.as_ref().expect("stages are open").release(stage, self.stream)
    }

    fn record(&mut self) -> Result<(), Error> {
        self.context.enter()?;
        // Only what this thread does counts: the scorers of other cards go on.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours.
        self.context.check("record", unsafe { result::stream::begin_capture(self.stream, mode) })
    }

    fn recorded(&mut self) -> Result<Graph, Error> {
        self.context.enter()?;
        // SAFETY: the stream is recording since `record`; the graph is destroyed once it is instantiated.
        let made = unsafe {
            result::stream::end_capture(self.stream).and_then(|graph| {
                let handle = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
                let _ = result::graph::destroy(graph);
                handle
            })
        };
        let handle = self.context.check("record", made)?;
        Ok(Graph { handle, context: Arc::clone(&self.context) })
    }

    unsafe fn replay(&mut self, graph: &Graph) -> Result<(), Error> {
        self.context.enter()?;
        // SAFETY: the graph is alive, and so is the memory it uses, says the caller.
        self.context.check("replay", unsafe { result::graph::launch(graph.handle, self.stream) })
    }

    unsafe fn launch(&self, kernel: &'static str, shape: Shape, arguments: &[Argument]) -> Result<(), Error> {
        self.context.enter()?;
        let function = self.functions[kernel];
        let mut pointers = [std::ptr::null_mut(); ARGUMENTS_MAX];
        for (pointer, (at, _)) in pointers.iter_mut().zip(arguments) {
            *pointer = at.cast_mut();
        }
        let pointers = &mut pointers[..arguments.len()];
        let (grid, shared) = ((shape.grid[0], shape.grid[1], shape.grid[2]), shape.shared_bytes as u32);
        // SAFETY: the caller vouches for the arguments; function and stream are ours.
        let queued =
            unsafe { result::launch_kernel(function, grid, (shape.threads, 1, 1), shared, self.stream, pointers) };
        self.context.check("start a kernel", queued)
    }

    unsafe fn product(&mut self, product: &Product) -> Result<(), Error> {
        self.context.enter()?;
        // SAFETY: passed on to the caller.
        unsafe { self.blas.product(product) }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the stream is ours; what it still runs is finished first.
            let _ = unsafe { result::stream::synchronize(self.stream) };
            // SAFETY: as above, and nothing uses it after this.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
    }
}
