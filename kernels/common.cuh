// What all kernels share: element types, 8-value vectors, warp sums.
//
// Matrices are row-major; a row begins 16-byte aligned and its stride `ld` (in elements) is a multiple of 8, so rows
// move in vectors of 8. Columns from the width to the stride are padding: they may be written, and are never read as
// values.
#pragma once
#include <type_traits>

#include "ptx.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;
constexpr int VEC = 8;

// X(suffix of the kernel's name, element type) for each precision; MMA: for those that tensor cores take from memory.
#define FOR_EACH_TYPE(X) X(f16, __half) X(bf16, __nv_bfloat16) X(f32, float)
#define FOR_EACH_MMA_TYPE(X) X(f16, __half) X(bf16, __nv_bfloat16)

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same<T, float>::value)
    return x;
  else if constexpr (std::is_same<T, __half>::value)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

// 8 values to or from f32 registers, 16 bytes at a time.
template <class T>
__device__ __forceinline__ void load8(float (&v)[VEC], const T* from) {
  if constexpr (std::is_same<T, float>::value) {
    float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    uint4 u = *reinterpret_cast<const uint4*>(from);
    uint32_t pairs[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float2 f = ptx::Pair<T>::unpack(pairs[i]);
      v[2 * i] = f.x, v[2 * i + 1] = f.y;
    }
  }
}
template <class T>
__device__ __forceinline__ void store8(T* to, const float (&v)[VEC]) {
  if constexpr (std::is_same<T, float>::value) {
    reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    *reinterpret_cast<uint4*>(to) = make_uint4(ptx::Pair<T>::pack(v[0], v[1]), ptx::Pair<T>::pack(v[2], v[3]),
                                               ptx::Pair<T>::pack(v[4], v[5]), ptx::Pair<T>::pack(v[6], v[7]));
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = WARP / 2; o; o >>= 1) v += __shfl_xor_sync(ALL_LANES, v, o);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int o = WARP / 2; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, o));
  return v;
}

// A block's place in a flat grid as 64 bits: rows times columns pass 2^31 at large batches.
__device__ __forceinline__ size_t row_offset(int row, int ld) { return static_cast<size_t>(row) * ld; }
