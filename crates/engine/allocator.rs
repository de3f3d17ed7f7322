//! How the process gives memory back.

/// From this many bytes on, a buffer is the system's again as soon as it is dropped.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE_BYTES: libc::c_int = 1 << 20;

/// Has glibc's allocator give large buffers back at once, for processes that live long: images and messages of megabytes come and
/// go for days. Left alone, glibc raises the bound as such buffers are freed (mallopt(3), M_MMAP_THRESHOLD), keeps them in
/// its heaps, and their holes add up: under 64 calls the worker grew by a quarter in three minutes, and half of it stayed
/// when they were over. Other systems' allocators are left alone.
pub fn give_large_buffers_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: mallopt takes two numbers and only sets a parameter of the allocator, under the allocator's own lock; any
        // time and any value are allowed, and a value it does not take leaves everything as it was.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES) };
    }
}
