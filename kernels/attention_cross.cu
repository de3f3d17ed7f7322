// attention_cross: few query rows against many keys, head size 64: all captions of an image against its patches.
//
// A block has 4 warps and 32 query rows (two tiles of 16). The keys are dealt to the warps in tiles of 16, so every key
// and value is read once for all 32 rows and from 4 places at a time: the bound is memory, not tensor cores. Each warp
// keeps its own shift, sum and output; at the end they are merged through shared memory:
//   out = sum_w out_w 2^(shift_w - shift) / sum_w sum_w 2^(shift_w - shift)
// Shared memory: 4 KiB of queries, then 4 warps x 2 stages x 16 keys and values (32 KiB), reused for the merge (34
// KiB). Preconditions: head size 64; q, k, v begin 16-byte aligned with strides of multiples of 8.
#include "attention.cuh"

constexpr int CROSS_WARPS = 4;
constexpr int CROSS_ROWS = 32;
constexpr int CROSS_KEYS = 16;

// What a warp hands over: its output rows, then their maxima and sums.
constexpr int MERGE_STRIDE = HEAD + 2;

template <class T>
__device__ __forceinline__ void scan_keys(Rows16 (&sums)[2], const uint32_t (&queries)[2][4][4], T* stages, const T* k,
                                          const T* v, int keys, const AttentionArgs& a) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int tiles = (keys + CROSS_KEYS - 1) / CROSS_KEYS, tile_size = CROSS_KEYS * HEAD;
  auto load = [&](int tile, int stage) {
    int key = tile * CROSS_KEYS;
    T* to = stages + stage * 2 * tile_size;
    load_tile(to, k + row_offset(key, a.ld_k), a.ld_k, CROSS_KEYS, keys - key, lane, WARP);
    load_tile(to + tile_size, v + row_offset(key, a.ld_v), a.ld_v, CROSS_KEYS, keys - key, lane, WARP);
  };
  if (warp < tiles) load(warp, 0);
  ptx::cp_async_commit();
  for (int tile = warp, stage = 0; tile < tiles; tile += CROSS_WARPS, stage ^= 1) {
    if (tile + CROSS_WARPS < tiles) load(tile + CROSS_WARPS, stage ^ 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncwarp();
    const T *kt = stages + stage * 2 * tile_size, *vt = kt + tile_size;
    const int valid = keys - tile * CROSS_KEYS;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      float s[2][4] = {};
      scores16<T>(s[0], s[1], queries[m], kt, 0);
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (n * 8 + lane % 4 * 2 + e % 2 >= valid) s[n][e] = -INFINITY;
      online_softmax<CROSS_KEYS>(s, sums[m], a.scale);
      add_values16<T>(sums[m], s[0], s[1], vt, 0);
    }
    __syncwarp();  // the copies of the round after next overwrite this stage
  }
  ptx::cp_async_wait<0>();
}

template <class T>
__device__ __forceinline__ void attention_cross(const AttentionArgs& a) {
  DYN_SMEM(T, shared);
  T *q_tile = shared, *stages = q_tile + CROSS_ROWS * HEAD;
  int first;
  const Span span = block_work(a, CROSS_ROWS, first);
  const int column = blockIdx.y * HEAD, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int row0 = span.q + first, rows = min(span.q_len - first, CROSS_ROWS);
  const T* q = static_cast<const T*>(a.q) + row_offset(row0, a.ld_q) + column;
  const T* k = static_cast<const T*>(a.k) + row_offset(span.kv, a.ld_k) + column;
  const T* v = static_cast<const T*>(a.v) + row_offset(span.kv, a.ld_v) + column;
  load_tile(q_tile, q, a.ld_q, CROSS_ROWS, rows, threadIdx.x, CROSS_WARPS * WARP);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t queries[2][4][4];
  Rows16 sums[2];
#pragma unroll
  for (int m = 0; m < 2; m++) {
    load_queries(queries[m], q_tile, m * 16);
    clear(sums[m]);
  }
  scan_keys<T>(sums, queries, stages + warp * 4 * CROSS_KEYS * HEAD, k, v, span.kv_len, a);

  __syncthreads();  // all stages are read: their memory now takes the warps' results
  float* merge = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float* mine = merge + (warp * CROSS_ROWS + m * 16 + h * 8 + lane / 4) * MERGE_STRIDE;
      const float total = quad_sum(sums[m].sum[h]);
#pragma unroll
      for (int n = 0; n < 8; n++) {
        mine[n * 8 + lane % 4 * 2] = sums[m].out[n][2 * h];
        mine[n * 8 + lane % 4 * 2 + 1] = sums[m].out[n][2 * h + 1];
      }
      if (lane % 4 == 0) mine[HEAD] = sums[m].shift[h], mine[HEAD + 1] = total;
    }
  __syncthreads();
  T* out = static_cast<T*>(a.out) + row_offset(row0, a.ld_out) + column;
  for (int i = threadIdx.x; i < rows * HEAD; i += CROSS_WARPS * WARP) {
    int row = i / HEAD, at = i % HEAD;
    const float* theirs = merge + row * MERGE_STRIDE;
    float top = -INFINITY, total = 0.f, value = 0.f;
    for (int w = 0; w < CROSS_WARPS; w++) top = fmaxf(top, theirs[w * CROSS_ROWS * MERGE_STRIDE + HEAD]);
    for (int w = 0; w < CROSS_WARPS; w++) {
      const float* part = theirs + w * CROSS_ROWS * MERGE_STRIDE;
      const float weight = ptx::exp2_approx(part[HEAD] - top);
      total += weight * part[HEAD + 1];
      value += weight * part[at];
    }
    out[row_offset(row, a.ld_out) + at] = from_float<T>(value / total);
  }
}

#define CROSS_KERNEL(suffix, T)                                           \
  extern "C" __global__ void __launch_bounds__(CROSS_WARPS* WARP)         \
      attention_cross_##suffix(const __grid_constant__ AttentionArgs a) { \
    attention_cross<T>(a);                                                \
  }                                                                       \
  EXPORT_KERNEL(attention_cross_##suffix);

FOR_EACH_MMA_TYPE(CROSS_KERNEL)
