//! How the process gives memory back. glibc's own choices suit programs that allocate little at a time; images, row groups and
//! messages are megabytes, and come and go for days. Other systems' allocators are left alone.

/// Has buffers of `bytes` and more be the system's again as soon as they are dropped. Left alone, glibc raises the bound as such
/// buffers are freed (mallopt(3), M_MMAP_THRESHOLD), keeps them in its heaps, and their holes add up: under 64 calls the worker
/// grew by a quarter in three minutes, and half of it stayed when they were over.
pub fn give_large_buffers_back(bytes: usize) {
    set(Parameter::LargeBytes, bytes);
}

/// Has threads share a few heaps, where each would get one of its own, with its own holes: over a hundred shards of 24 MB that
/// is 256 MB instead of 531 at the peak, for no time that could be measured on two cores. More cores get more heaps, for they
/// would wait for each other.
pub fn share_heaps() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    set(Parameter::Heaps, (cores / 4).max(2));
    set(Parameter::TrimBytes, 16 << 20);
}

#[derive(Clone, Copy)]
enum Parameter {
    LargeBytes,
    Heaps,
    /// Free bytes at the end of a heap that the system gets back.
    TrimBytes,
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set(parameter: Parameter, value: usize) {
    let parameter = match parameter {
        Parameter::LargeBytes => libc::M_MMAP_THRESHOLD,
        Parameter::Heaps => libc::M_ARENA_MAX,
        Parameter::TrimBytes => libc::M_TRIM_THRESHOLD,
    };
    let value = libc::c_int::try_from(value).unwrap_or(libc::c_int::MAX);
    // SAFETY: mallopt takes two numbers and only sets a parameter of the allocator, under the allocator's own lock; any
    // time and any value are allowed, and a value it does not take leaves everything as it was.
    unsafe { libc::mallopt(parameter, value) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn set(_: Parameter, _: usize) {}
