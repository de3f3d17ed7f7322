//! Products by cuBLASLt with plans that are made once.
//!
//! A plan is a descriptor, three layouts and an algorithm. Text batches differ by a few rows each time, so plans are kept
//! for sizes of rows an eighth of an octave apart and only the layouts' row counts are set per call. For large products
//! the algorithm is the fastest of those that cuBLASLt proposes, timed once and remembered in a file ([`Tuned`]).
//!
//! Row-major `out[M, N] = x[M, K] w[N, K]ᵀ` is column-major `out[N, M] = w[K, N]ᵀ x[K, M]`: the first operand is w,
//! transposed, and the bias runs along the rows, as the epilogue wants it.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::result as driver;
use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream};

use super::device::{Element, Product};
use super::driver::{Context, Memory};
use super::tuned::Tuned;
use crate::{Error, Precision};

/// Room for algorithms that split the sums; what NVIDIA recommends for Hopper is 32 MiB.
const WORKSPACE_BYTES: usize = 64 << 20;
/// Algorithms that are asked for and timed.
const CANDIDATES: usize = 32;
/// Runs of an algorithm before and while it is timed.
const RUNS_WARM: usize = 2;
const RUNS: usize = 8;
/// Operations from which timing pays: below, the launch decides.
const TUNED_FLOPS: usize = 2_000_000_000;
/// cuBLASLt 13 is what this build's symbols and enumerations come from.
const VERSION_MIN: usize = 130_000;

/// What decides a plan.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    rows: usize,
    n: usize,
    k: usize,
    strides: [usize; 3],
    element: Element,
    out_element: Element,
    accumulate: bool,
}

impl Key {
    fn new(p: &Product) -> Self {
        let Product { n, k, element, out_element, accumulate, .. } = *p;
        Self { rows: bucket(p.m), n, k, strides: [p.ld_x, p.ld_w, p.ld_out], element, out_element, accumulate }
    }

    /// Its name in the file of timings.
    fn name(&self) -> String {
        let Self { rows, n, k, strides, element, out_element, accumulate } = self;
        format!("{rows}x{n}x{k} {strides:?} {element:?} {out_element:?} {accumulate}").to_lowercase()
    }
}

/// `rows` rounded up to a multiple of an eighth of its power of two.
fn bucket(rows: usize) -> usize {
    rows.next_multiple_of((rows.next_power_of_two() / 16).max(16))
}

struct Plan {
    descriptor: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `Plan::new`, destroyed only here. Failures leave host memory behind, nothing else.
        unsafe {
            let _ = result::destroy_matmul_desc(self.descriptor);
            for layout in [self.w, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// The library on one card.
pub(super) struct Blas {
    context: Arc<Context>,
    handle: sys::cublasLtHandle_t,
    stream: CUstream,
    workspace: Memory,
    compute: sys::cublasComputeType_t,
    plans: HashMap<Key, Plan>,
    tuned: Tuned,
    /// Whether products are timed; else cuBLASLt's first proposal is taken.
    tunes: bool,
}

impl Blas {
    /// Errors: the library is missing or too old, no memory for its workspace.
    pub(super) fn open(
        context: &Arc<Context>,
        stream: CUstream,
        card: &str,
        precision: Precision,
    ) -> Result<Self, Error> {
        let unusable = |reason: String| Error::NoCuda { ordinal: context.ordinal, reason };
        // SAFETY: only looks whether the library can be loaded.
        if !unsafe { sys::is_culib_present() } {
            let hint = "install it (PyPI: nvidia-cublas) and put its folder on LD_LIBRARY_PATH";
            return Err(unusable(format!("libcublasLt.so.13 is not found: {hint}")));
        }
        // SAFETY: the library is there, and every version has this symbol.
        let version = unsafe { sys::cublasLtGetVersion() };
        if version < VERSION_MIN {
            return Err(unusable(format!(
                "libcublasLt {version} is found first, version {VERSION_MIN} or later is needed"
            )));
        }
        let handle = result::create_handle().map_err(|error| unusable(format!("cuBLASLt does not start: {error}")))?;
        let compute = match precision {
            Precision::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        Ok(Self {
            workspace: Memory::alloc(context, WORKSPACE_BYTES)?,
            context: Arc::clone(context),
            handle,
            stream,
            compute,
            plans: HashMap::new(),
            tunes: std::env::var_os("CAPSIEVE_TUNING").is_none_or(|value| value != "off"),
            tuned: Tuned::open(&format!("{card} cublaslt {version} {}", precision.name())),
        })
    }

    /// Queues a product.
    ///
    /// # Safety
    /// As for [`super::device::Device::product`].
    pub(super) unsafe fn product(&mut self, p: &Product) -> Result<(), Error> {
        let key = Key::new(p);
        if !self.plans.contains_key(&key) {
            let plan = self.plan(&key, p)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let set = plan.set_rows(p.m).and_then(|()| plan.set_bias(p.bias));
        self.check("set up a product", set)?;
        // SAFETY: the caller vouches for the matrices, the layouts describe them.
        let mut queued = unsafe { self.run(plan, &plan.algorithm, p) };
        if queued.is_err() {
            // The algorithm was chosen for another number of rows of the bucket: ask for these.
            for algorithm in self.candidates(plan)?.iter().take(1) {
                // SAFETY: as above.
                queued = unsafe { self.run(plan, algorithm, p) };
            }
        }
        self.check("multiply", queued)
    }

    /// # Safety
    /// As for `product`; the plan's layouts describe p's matrices.
    unsafe fn run(
        &self,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        p: &Product,
    ) -> Result<(), result::CublasError> {
        let (one, beta) = (1.0_f32, if p.accumulate { 1.0_f32 } else { 0.0 });
        // SAFETY: handle, plan and workspace are ours; the caller vouches for the matrices. C is D: the library reads
        // and writes each element in one place.
        unsafe {
            result::matmul(
                self.handle,
                plan.descriptor,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                p.w as *const c_void,
                plan.w,
                p.x as *const c_void,
                plan.x,
                p.out as *const c_void,
                plan.out,
                p.out as *mut c_void,
                plan.out,
                algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
                self.stream.cast(),
            )
        }
    }

    fn plan(&mut self, key: &Key, p: &Product) -> Result<Plan, Error> {
        let made = Plan::new(key, p, self.compute);
        let mut plan = self.check("describe a product", made)?;
        let candidates = self.candidates(&plan)?;
        let none = Error::NoProduct { m: p.m, n: p.n, k: p.k };
        let first = *candidates.first().ok_or(none)?;
        plan.algorithm = match self.tuned.get(&key.name()) {
            _ if !self.tunes => first,
            Some(data) => sys::cublasLtMatmulAlgo_t { data },
            None if 2 * p.m * p.n * p.k >= TUNED_FLOPS => {
                let best = self.fastest(&plan, &candidates, p)?;
                self.tuned.put(key.name(), best.data);
                best
            }
            None => first,
        };
        Ok(plan)
    }

    /// What cuBLASLt proposes, best guess first.
    fn candidates(&self, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, Error> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        use sys::cublasLtReductionScheme_t as Reduction;
        let preference = self.check("tune", result::create_matmul_pref())?;
        // Partial sums stay f32: 16-bit ones would cost more accuracy than all the rest.
        let schemes = Reduction::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let mut found = [const { std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit() }; CANDIDATES];
        let mut count = 0;
        // SAFETY: the attributes have these types; `found` has room for CANDIDATES results, of which `count` are written.
        let asked = unsafe {
            let workspace = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let bytes = WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference, workspace, (&raw const bytes).cast(), size_of_val(&bytes))
                .and_then(|()| {
                    let mask = Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
                    result::set_matmul_pref_attribute(
                        preference,
                        mask,
                        (&raw const schemes).cast(),
                        size_of_val(&schemes),
                    )
                })
                .and_then(|()| {
                    sys::cublasLtMatmulAlgoGetHeuristic(
                        self.handle,
                        plan.descriptor,
                        plan.w,
                        plan.x,
                        plan.out,
                        plan.out,
                        preference,
                        CANDIDATES as i32,
                        found.as_mut_ptr().cast(),
                        &raw mut count,
                    )
                    .result()
                })
        };
        // SAFETY: made above, used nowhere else.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        if asked.is_err() {
            return Ok(Vec::new());
        }
        let count = usize::try_from(count).unwrap_or(0).min(CANDIDATES);
        // SAFETY: the library has written the first `count` results.
        let found = found[..count].iter().map(|result| unsafe { result.assume_init_ref() });
        let works = |result: &&sys::cublasLtMatmulHeuristicResult_t| {
            result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE_BYTES
        };
        Ok(found.filter(works).map(|result| result.algo).collect())
    }

    /// Times the candidates on this product's inputs, into memory of their own.
    fn fastest(
        &self,
        plan: &Plan,
        candidates: &[sys::cublasLtMatmulAlgo_t],
        p: &Product,
    ) -> Result<sys::cublasLtMatmulAlgo_t, Error> {
        let scratch = match Memory::alloc(&self.context, p.m * p.ld_out * p.out_element.bytes()) {
            Err(Error::CardOutOfMemory { .. }) => return Ok(candidates[0]),
            scratch => scratch?,
        };
        let trial = Product { out: scratch.address(), ..*p };
        self.check("set up a product", plan.set_rows(p.m).and_then(|()| plan.set_bias(p.bias)))?;
        let event = || driver::event::create(CUevent_flags::CU_EVENT_DEFAULT);
        let events = (self.context.check("tune", event())?, self.context.check("tune", event())?);
        let mut best = (f32::INFINITY, candidates[0]);
        for algorithm in candidates {
            // SAFETY: the inputs are the caller's, the output is as large as theirs and our own.
            if let Some(seconds) = unsafe { self.time(plan, algorithm, &trial, events) }
                && seconds < best.0
            {
                best = (seconds, *algorithm);
            }
        }
        // SAFETY: made above; all work is done.
        unsafe {
            let _ = driver::event::destroy(events.0);
            let _ = driver::event::destroy(events.1);
        }
        Ok(best.1)
    }

    /// Milliseconds of a run; none where the algorithm fails.
    ///
    /// # Safety
    /// As for `product`.
    unsafe fn time(
        &self,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        p: &Product,
        (start, end): (CUevent, CUevent),
    ) -> Option<f32> {
        // SAFETY: the caller vouches for the matrices; events and stream are ours.
        unsafe {
            for _ in 0..RUNS_WARM {
                self.run(plan, algorithm, p).ok()?;
            }
            driver::event::record(start, self.stream).ok()?;
            for _ in 0..RUNS {
                self.run(plan, algorithm, p).ok()?;
            }
            driver::event::record(end, self.stream).ok()?;
            driver::event::synchronize(end).ok()?;
            driver::event::elapsed(start, end).ok()
        }
    }

    fn check<T>(&self, action: &'static str, result: Result<T, result::CublasError>) -> Result<T, Error> {
        result.map_err(|source| Error::Card { ordinal: self.context.ordinal, action, source: Box::new(source) })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        if self.context.enter().is_ok() {
            // SAFETY: made in `open`, destroyed only here, after its plans.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

impl Plan {
    fn new(key: &Key, p: &Product, compute: sys::cublasComputeType_t) -> Result<Self, result::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let layout = |element, rows: usize, cols: usize, ld: usize| {
            result::create_matrix_layout(data_type(element), rows as u64, cols as u64, ld as i64)
        };
        let plan = Self {
            descriptor: result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)?,
            w: layout(key.element, p.k, p.n, p.ld_w)?,
            x: layout(key.element, p.k, p.m, p.ld_x)?,
            out: layout(key.out_element, p.n, p.m, p.ld_out)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        // cublasOperation_t: 1 is transposed.
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &1_i32)?;
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &data_type(key.out_element))?;
        plan.set_bias(p.bias)?;
        Ok(plan)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), result::CublasError> {
        let pointer = std::ptr::from_ref(value).cast();
        // SAFETY: the descriptor is ours, and the attribute has the type T: see the calls.
        unsafe { result::set_matmul_desc_attribute(self.descriptor, attribute, pointer, size_of::<T>()) }
    }

    fn set_bias(&self, bias: u64) -> Result<(), result::CublasError> {
        self.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)
    }

    fn set_rows(&self, rows: usize) -> Result<(), result::CublasError> {
        let (cols, rows) = (sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS, rows as u64);
        let pointer = (&raw const rows).cast();
        for layout in [self.x, self.out] {
            // SAFETY: the layout is ours; COLS is 64 bits.
            unsafe { result::set_matrix_layout_attribute(layout, cols, pointer, size_of_val(&rows))? };
        }
        Ok(())
    }
}

fn data_type(element: Element) -> sys::cudaDataType_t {
    match element {
        Element::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Element::F16 => sys::cudaDataType_t::CUDA_R_16F,
        Element::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_are_near_and_never_below() {
        assert_eq!([1, 16, 17, 577, 1160, 33466].map(bucket), [16, 16, 32, 640, 1280, 36864]);
        for rows in 1..5000 {
            assert!(bucket(rows) >= rows && bucket(rows) <= (rows * 9 / 8).max(rows + 15), "{rows}");
        }
    }
}
