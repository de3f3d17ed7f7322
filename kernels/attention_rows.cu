// attention_rows: fused attention of any head size up to 128 in f32 arithmetic: the reference kernel, and the one that
// the f32 and tf32 modes use.
//
// A block has 4 warps of 4 query rows each. Keys and values come in tiles of 32 as f32, rows padded by one value so
// that a lane per key reads different banks. Lane = key for the scores, lane = column for the sums; maximum and sum of
// each row as in every online softmax. Shared memory: 16 query rows, 32 keys, 32 values of head size + 1, and 16 x 32
// weights. Bound: shared memory reads, far from the tensor core kernels; that is what the f32 mode costs.
#include "attention.cuh"

constexpr int ROW_BLOCK = 16, ROWS_PER_WARP = 4, ROW_KEYS = 32, HEAD_MAX = 128;

template <class T>
__device__ __forceinline__ void attention_rows(const AttentionArgs& a) {
  DYN_SMEM(float, shared);
  const int d = a.head_size, stride = d + 1, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  float *q = shared, *k = q + ROW_BLOCK * stride, *v = k + ROW_KEYS * stride, *weights = v + ROW_KEYS * stride;
  int first;
  const Span span = block_work(a, ROW_BLOCK, first);
  const int column = blockIdx.y * d, row0 = span.q + first, rows = min(span.q_len - first, ROW_BLOCK);
  for (int i = threadIdx.x; i < ROW_BLOCK * d; i += blockDim.x) {
    int row = i / d, at = i % d;
    const T* from = static_cast<const T*>(a.q) + row_offset(row0 + min(row, rows - 1), a.ld_q) + column;
    q[row * stride + at] = row < rows ? to_float(from[at]) : 0.f;
  }
  float out[ROWS_PER_WARP][HEAD_MAX / WARP] = {}, top[ROWS_PER_WARP], total[ROWS_PER_WARP];
#pragma unroll
  for (int r = 0; r < ROWS_PER_WARP; r++) top[r] = -INFINITY, total[r] = 0.f;

  for (int key0 = 0; key0 < span.kv_len; key0 += ROW_KEYS) {
    const int keys = min(span.kv_len - key0, ROW_KEYS);
    __syncthreads();  // the tile before is read
    for (int i = threadIdx.x; i < keys * d; i += blockDim.x) {
      int key = i / d, at = i % d;
      size_t row = span.kv + key0 + key;
      k[key * stride + at] = to_float(static_cast<const T*>(a.k)[row * a.ld_k + column + at]);
      v[key * stride + at] = to_float(static_cast<const T*>(a.v)[row * a.ld_v + column + at]);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS_PER_WARP; r++) {
      const float* query = q + (warp * ROWS_PER_WARP + r) * stride;
      float score = -INFINITY;
      if (lane < keys) {
        score = 0.f;
        for (int at = 0; at < d; at++) score = fmaf(query[at], k[lane * stride + at], score);
        score *= a.scale;
      }
      const float best = fmaxf(top[r], warp_max(score)), keep = exp2f(top[r] - best), weight = exp2f(score - best);
      total[r] = total[r] * keep + warp_sum(weight);
      top[r] = best;
      float* mine = weights + (warp * ROWS_PER_WARP + r) * ROW_KEYS;
      mine[lane] = weight;
      __syncwarp();
#pragma unroll
      for (int c = 0; c < HEAD_MAX / WARP; c++) {
        int at = c * WARP + lane;
        if (at >= d) continue;
        float sum = out[r][c] * keep;
        for (int key = 0; key < keys; key++) sum = fmaf(mine[key], v[key * stride + at], sum);
        out[r][c] = sum;
      }
      __syncwarp();
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS_PER_WARP; r++) {
    const int row = warp * ROWS_PER_WARP + r;
    if (row >= rows) continue;
    T* to = static_cast<T*>(a.out) + row_offset(row0 + row, a.ld_out) + column;
#pragma unroll
    for (int c = 0; c < HEAD_MAX / WARP; c++)
      if (c * WARP + lane < d) to[c * WARP + lane] = from_float<T>(out[r][c] / total[r]);
  }
}

#define ROWS_KERNEL(suffix, T)                                           \
  extern "C" __global__ void __launch_bounds__(128, 4)                   \
      attention_rows_##suffix(const __grid_constant__ AttentionArgs a) { \
    attention_rows<T>(a);                                                \
  }                                                                      \
  EXPORT_KERNEL(attention_rows_##suffix);

FOR_EACH_TYPE(ROWS_KERNEL)
