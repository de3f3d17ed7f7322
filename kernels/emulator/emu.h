// Runs CUDA C++ kernels on the CPU, one fiber per CUDA thread: force-included (`-include emu.h`) where g++ or clang++
// compile kernels/*.cu for the tests, never seen by nvcc.
//
// What it checks, by ending the process with a message that names block, thread and source line:
//   * threads of a block that meet at different barriers, or return while others wait; deadlocks;
//   * lanes of a warp that meet at different collectives or masks; reads of lanes outside the mask;
//   * misaligned cp.async and ldmatrix; copies that nobody waited for.
// What it makes visible: shared memory begins as NaN; cp.async lands as late as its wait allows; threads run forwards,
// backwards or shuffled by seed, so that a missing barrier shows as a wrong result; with -fsanitize=address every
// access out of bounds stops. What it cannot show: memory ordering weaker than a barrier's, bank conflicts, speed.
#pragma once
#define KERNELS_ON_CPU 1
// NVIDIA's own host paths of the half types; before the macros below, whose names their prototypes use.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>
#undef __launch_bounds__
#undef __grid_constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(emu::dynamic_smem())

namespace emu {

// threadIdx and the like of the running CUDA thread.
struct ThreadContext {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern thread_local ThreadContext* current;

void* dynamic_smem();
int lane();
void block_barrier(const char* where);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What a lane hands to a collective.
struct Slot {
  alignas(16) unsigned char bytes[64];
};

// Every lane of `mask` hands in `size` bytes; returns the table of all lanes' bytes once all have arrived. `kind` must
// be the same for all, which it is not when a warp has diverged.
const Slot* warp_gather(unsigned mask, const char* kind, const void* in, size_t size, bool orders_memory);

// cp.async: performed as late as CUDA allows, at the wait.
void cp_async(void* to, const void* from, int bytes, int bytes_read);
void cp_async_commit();
void cp_async_wait(int newest_left);
// Fails where another thread's copy brought these bytes and no barrier has made it visible.
void check_published(const void* p, int bytes, const char* kind);

template <class T>
T shuffle(unsigned mask, const char* kind, T v, int from_lane, bool in_range) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles move at most 8 bytes");
  const Slot* slots = warp_gather(mask, kind, &v, sizeof v, false);
  if (!in_range) return v;
  if (!(mask >> from_lane & 1)) fail("%s reads lane %d, which is not in mask %08x", kind, from_lane, mask);
  T result;
  __builtin_memcpy(&result, slots[from_lane].bytes, sizeof result);
  return result;
}
template <class T>
T shuffle_xor(unsigned mask, const char* kind, T v, int x, int width = 32) {
  int from = lane() ^ x;
  return shuffle(mask, kind, v, from, (from & ~(width - 1)) <= (lane() & ~(width - 1)) && from < 32);
}
template <class T>
T shuffle_index(unsigned mask, const char* kind, T v, int index, int width = 32) {
  return shuffle(mask, kind, v, (lane() & ~(width - 1)) | (index & (width - 1)), true);
}
inline unsigned mask_or_full(unsigned mask = ~0u) { return mask; }

// Kernels by name, launched with the addresses of their arguments, as cuLaunchKernel does.
using Thunk = void (*)(void**);
struct Registrar {
  Registrar(const char* name, Thunk thunk, std::vector<size_t> argument_bytes);
};
template <auto K>
struct Unpack;
template <class... A, void (*K)(A...)>
struct Unpack<K> {
  template <size_t... I>
  static void call(void** p, std::index_sequence<I...>) {
    K(*static_cast<std::remove_cv_t<A>*>(p[I])...);
  }
  static void thunk(void** p) { call(p, std::index_sequence_for<A...>{}); }
  static std::vector<size_t> argument_bytes() { return {sizeof(A)...}; }
};
#define EXPORT_KERNEL(name) \
  static emu::Registrar emu_registrar_##name { #name, &emu::Unpack<&name>::thunk, emu::Unpack<&name>::argument_bytes() }

}  // namespace emu

#define threadIdx (emu::current->thread)
#define blockIdx (emu::current->block)
#define blockDim (emu::current->block_dim)
#define gridDim (emu::current->grid_dim)
#define EMU_TEXT2(x) #x
#define EMU_TEXT(x) EMU_TEXT2(x)
#define EMU_HERE(name) name " at " __FILE__ ":" EMU_TEXT(__LINE__)
#define __syncthreads() emu::block_barrier(EMU_HERE("__syncthreads"))
#define __syncwarp(...) \
  ((void)emu::warp_gather(emu::mask_or_full(__VA_ARGS__), EMU_HERE("__syncwarp"), nullptr, 0, true))
#define __shfl_xor_sync(mask, ...) emu::shuffle_xor(mask, EMU_HERE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_sync(mask, ...) emu::shuffle_index(mask, EMU_HERE("__shfl_sync"), __VA_ARGS__)

// Device arithmetic that the host's headers lack.
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
using std::max;
using std::min;
