// Row-wise operations: layer norm, embeddings, GELU, position sums, gathers. All are bound by memory.
//
// layer_norm   out[r] = (x[r] - mean) / sqrt(var + eps) * gain + bias, biased variance, two passes over registers
// embed        out[r] = layer_norm(words[ids[r]] + positions[places[r]])
// gelu         x = 0.5 x (1 + erf(x / sqrt 2)), in place: cuBLASLt's own epilogue is the tanh form
// image_tokens out[b, 0] = positions[0], out[b, 1 + p] = patches[b, p] + positions[1 + p]
// take_rows    out[i] = x[rows[i]]
//
// Norms: one warp per row, 8 rows a block; a lane owns vectors lane, lane + 32, ... of its row and keeps them in
// registers, so a row is read once and written once. At most ROW_VECTORS * 256 columns. Statistics and affine in f32.
// The others: one thread per vector of 8, grid-stride.
#include "common.cuh"

constexpr int ROW_WARPS = 8;
constexpr int ROW_VECTORS = 4;

// Normalises the row this warp holds and stores it; columns beyond `cols` count as nothing.
template <class T>
__device__ __forceinline__ void norm_and_store(float (&v)[ROW_VECTORS][VEC], T* out, const float* gain,
                                               const float* bias, int cols, float eps) {
  const int lane = threadIdx.x % WARP;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < ROW_VECTORS; i++)
#pragma unroll
    for (int e = 0; e < VEC; e++) {
      bool inside = (i * WARP + lane) * VEC + e < cols;
      sum += inside ? v[i][e] : 0.f;
    }
  const float mean = warp_sum(sum) / cols;
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < ROW_VECTORS; i++)
#pragma unroll
    for (int e = 0; e < VEC; e++) {
      bool inside = (i * WARP + lane) * VEC + e < cols;
      float d = v[i][e] - mean;
      squares += inside ? d * d : 0.f;
    }
  const float scale = rsqrtf(warp_sum(squares) / cols + eps);
#pragma unroll
  for (int i = 0; i < ROW_VECTORS; i++) {
    int first = (i * WARP + lane) * VEC;
    if (first >= cols) continue;
    float g[VEC], b[VEC], y[VEC];
    load8(g, gain + first);
    load8(b, bias + first);
#pragma unroll
    for (int e = 0; e < VEC; e++) y[e] = (v[i][e] - mean) * scale * g[e] + b[e];
    store8(out + first, y);
  }
}

template <class T>
__device__ __forceinline__ void load_row(float (&v)[ROW_VECTORS][VEC], const T* row, int cols) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int i = 0; i < ROW_VECTORS; i++) {
    int first = (i * WARP + lane) * VEC;
    if (first < cols) load8(v[i], row + first);
  }
}

template <class T>
__device__ __forceinline__ void layer_norm(const T* x, const float* gain, const float* bias, T* out, int rows, int cols,
                                           int ld, float eps) {
  const int row = blockIdx.x * ROW_WARPS + threadIdx.x / WARP;
  if (row >= rows) return;
  float v[ROW_VECTORS][VEC] = {};
  load_row(v, x + row_offset(row, ld), cols);
  norm_and_store(v, out + row_offset(row, ld), gain, bias, cols, eps);
}

template <class T>
__device__ __forceinline__ void embed(const int* ids, const int* places, const T* words, const T* positions,
                                      const float* gain, const float* bias, T* out, int rows, int cols, int ld,
                                      float eps) {
  const int row = blockIdx.x * ROW_WARPS + threadIdx.x / WARP;
  if (row >= rows) return;
  const T* position = positions + row_offset(places[row], ld);
  float v[ROW_VECTORS][VEC] = {};
  load_row(v, words + row_offset(ids[row], ld), cols);
#pragma unroll
  for (int i = 0; i < ROW_VECTORS; i++) {
    int first = (i * WARP + threadIdx.x % WARP) * VEC;
    if (first >= cols) continue;
    float p[VEC];
    load8(p, position + first);
#pragma unroll
    for (int e = 0; e < VEC; e++) v[i][e] += p[e];
  }
  norm_and_store(v, out + row_offset(row, ld), gain, bias, cols, eps);
}

template <class T>
__device__ __forceinline__ void gelu(T* x, size_t vectors) {
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += step) {
    float v[VEC];
    load8(v, x + i * VEC);
#pragma unroll
    for (int e = 0; e < VEC; e++) v[e] = 0.5f * v[e] * (1.f + erff(v[e] * 0.707106781186547524f));
    store8(x + i * VEC, v);
  }
}

template <class T>
__device__ __forceinline__ void image_tokens(const T* patches, const T* positions, T* out, int rows, int tokens,
                                             int ld) {
  const int vectors = ld / VEC;
  const size_t total = static_cast<size_t>(rows) * vectors, step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    int row = static_cast<int>(i / vectors), first = static_cast<int>(i % vectors) * VEC;
    int image = row / tokens, token = row % tokens;
    float v[VEC];
    load8(v, positions + row_offset(token, ld) + first);
    if (token > 0) {
      float p[VEC];
      load8(p, patches + row_offset(image * (tokens - 1) + token - 1, ld) + first);
#pragma unroll
      for (int e = 0; e < VEC; e++) v[e] += p[e];
    }
    store8(out + row_offset(row, ld) + first, v);
  }
}

template <class T>
__device__ __forceinline__ void take_rows(const T* x, const int* rows, T* out, int count, int ld) {
  const int vectors = ld / VEC;
  const size_t total = static_cast<size_t>(count) * vectors, step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    int row = static_cast<int>(i / vectors), first = static_cast<int>(i % vectors) * VEC;
    float v[VEC];
    load8(v, x + row_offset(rows[row], ld) + first);
    store8(out + row_offset(row, ld) + first, v);
  }
}

#define ROW_KERNELS(suffix, T)                                                                                 \
  extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 2) layer_norm_##suffix(                        \
      const T* x, const float* gain, const float* bias, T* out, int rows, int cols, int ld, float eps) {       \
    layer_norm(x, gain, bias, out, rows, cols, ld, eps);                                                       \
  }                                                                                                            \
  EXPORT_KERNEL(layer_norm_##suffix);                                                                          \
  extern "C" __global__ void __launch_bounds__(ROW_WARPS* WARP, 2)                                             \
      embed_##suffix(const int* ids, const int* places, const T* words, const T* positions, const float* gain, \
                     const float* bias, T* out, int rows, int cols, int ld, float eps) {                       \
    embed(ids, places, words, positions, gain, bias, out, rows, cols, ld, eps);                                \
  }                                                                                                            \
  EXPORT_KERNEL(embed_##suffix);                                                                               \
  extern "C" __global__ void __launch_bounds__(256) gelu_##suffix(T* x, size_t vectors) { gelu(x, vectors); }  \
  EXPORT_KERNEL(gelu_##suffix);                                                                                \
  extern "C" __global__ void __launch_bounds__(256)                                                            \
      image_tokens_##suffix(const T* patches, const T* positions, T* out, int rows, int tokens, int ld) {      \
    image_tokens(patches, positions, out, rows, tokens, ld);                                                   \
  }                                                                                                            \
  EXPORT_KERNEL(image_tokens_##suffix);                                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                                            \
      take_rows_##suffix(const T* x, const int* rows, T* out, int count, int ld) {                             \
    take_rows(x, rows, out, count, ld);                                                                        \
  }                                                                                                            \
  EXPORT_KERNEL(take_rows_##suffix);

FOR_EACH_TYPE(ROW_KERNELS)
