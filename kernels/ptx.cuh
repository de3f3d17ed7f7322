// Every PTX instruction the kernels use, each with a device body and a host body that does the same.
//
// The host bodies run under the emulator (emulator/emu.h is force-included there and defines KERNELS_ON_CPU) and follow
// the fragment layouts of the PTX ISA 9.0, section 9.7.14 (mma.m16n8k16, ldmatrix), so a kernel that mixes up a layout
// is wrong there too. `T` is __half or __nv_bfloat16 wherever a function takes a type.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#ifndef KERNELS_ON_CPU
// Shared memory whose size the launch gives, from offset 0, aligned for every instruction.
#define DYN_SMEM(T, name)                                         \
  extern __shared__ __align__(1024) unsigned char dynamic_smem[]; \
  T* name = reinterpret_cast<T*>(dynamic_smem)
// Names a kernel for the emulator's launch table.
#define EXPORT_KERNEL(name)
#endif

namespace ptx {

template <class T>
struct Pair;
template <>
struct Pair<__half> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    __half2 h = __floats2half2_rn(low, high);
    uint32_t u;
    memcpy(&u, &h, sizeof u);
    return u;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t u) {
    __half2 h;
    memcpy(&h, &u, sizeof h);
    return __half22float2(h);
  }
};
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
    uint32_t u;
    memcpy(&u, &h, sizeof u);
    return u;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t u) {
    __nv_bfloat162 h;
    memcpy(&h, &u, sizeof h);
    return __bfloat1622float2(h);
  }
};

#ifndef KERNELS_ON_CPU

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory; zeros when !valid, and then `from` is not read.
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are in flight. What they brought is visible to others after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8 and gets of each matrix
// row l / 4, columns 2 (l % 4) and the next; _trans: of the transposed matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8] with f32 sums. With g = lane / 4, t = lane % 4: d holds rows g, g, g + 8, g + 8 of
// columns 2t, 2t + 1, 2t, 2t + 1; a rows g, g + 8, g, g + 8 at k 2t.. (first two) and 2t + 8.. (last two); b column g.
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same<T, __half>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 2^x, relative error 2^-22; 0 for -infinity.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

inline void cp_async16(void* to, const void* from, bool valid) { emu::cp_async(to, from, 16, valid ? 16 : 0); }
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
void cp_async_wait() {
  emu::cp_async_wait(N);
}

inline void ldmatrix_x4_any(uint32_t (&r)[4], const void* row, bool transposed, const char* kind) {
  if (reinterpret_cast<uintptr_t>(row) & 15) emu::fail("%s: row address is not 16-byte aligned", kind);
  emu::check_published(row, 16, kind);
  const emu::Slot* rows = emu::warp_gather(~0u, kind, &row, sizeof row, false);
  int lane = emu::lane();
  for (int m = 0; m < 4; m++) {
    uint16_t pair[2];
    for (int j = 0; j < 2; j++) {
      int of = transposed ? lane % 4 * 2 + j : lane / 4, at = transposed ? lane / 4 : lane % 4 * 2 + j;
      const uint16_t* from;
      __builtin_memcpy(&from, rows[m * 8 + of].bytes, sizeof from);
      pair[j] = from[at];
    }
    r[m] = pair[0] | uint32_t(pair[1]) << 16;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix_x4_any(r, row, false, "ldmatrix.x4"); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix_x4_any(r, row, true, "ldmatrix.x4.trans"); }

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragment {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const emu::Slot* all = emu::warp_gather(~0u, "mma.m16n8k16", &mine, sizeof mine, false);
  auto of_lane = [&](int lane) {
    Fragment f;
    __builtin_memcpy(&f, all[lane].bytes, sizeof f);
    return f;
  };
  int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int quad = 0; quad < 4; quad++) {  // lane 4g + quad holds k = 2 quad, 2 quad + 1 and the same + 8
    Fragment x = of_lane(g * 4 + quad), left = of_lane(2 * t * 4 + quad), right = of_lane((2 * t + 1) * 4 + quad);
    for (int h = 0; h < 2; h++) {
      float2 top = Pair<T>::unpack(x.a[2 * h]), bottom = Pair<T>::unpack(x.a[2 * h + 1]);
      float2 l = Pair<T>::unpack(left.b[h]), r = Pair<T>::unpack(right.b[h]);
      d[0] += top.x * l.x + top.y * l.y;
      d[1] += top.x * r.x + top.y * r.y;
      d[2] += bottom.x * l.x + bottom.y * l.y;
      d[3] += bottom.x * r.x + bottom.y * r.y;
    }
  }
}

inline float exp2_approx(float x) { return exp2f(x); }

#endif

}  // namespace ptx
