// attention_tiles: fused attention of head size 64 on tensor cores, for images and for captions.
//
// A block has W warps of 16 query rows each; keys and values come in tiles of 64, the next tile's cp.async running
// while this one is used. Scores live in registers only, statistics and sums in f32, P is rounded to T before P V. Keys
// are walked in steps of 16 up to the last that exists, so 577 keys cost 592. A warp without query rows only helps to
// load.
//   W = 4 for long spans: 40 KiB of shared memory, at most 168 registers, 3 blocks a multiprocessor.
//   W = 1 for captions: 34 KiB, one warp per (caption, head) of up to 16 tokens.
// Preconditions: head size 64; q, k, v begin 16-byte aligned with strides of multiples of 8.
// Bound: tensor cores and exp2 about evenly (64 columns give 256 flop for one exp2).
#include "attention.cuh"

constexpr int KEYS = 64;

template <class T, int W>
__device__ __forceinline__ void attention_tiles(const AttentionArgs& a) {
  DYN_SMEM(T, shared);
  T *q_tile = shared, *k_tiles = q_tile + W * 16 * HEAD, *v_tiles = k_tiles + 2 * KEYS * HEAD;
  int first;
  const Span span = block_work(a, W * 16, first);
  const int column = blockIdx.y * HEAD, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, threads = W * WARP;
  const int row0 = span.q + first, rows = min(span.q_len - first, W * 16);
  const T* q = static_cast<const T*>(a.q) + row_offset(row0, a.ld_q) + column;
  const T* k = static_cast<const T*>(a.k) + row_offset(span.kv, a.ld_k) + column;
  const T* v = static_cast<const T*>(a.v) + row_offset(span.kv, a.ld_v) + column;
  auto load_keys = [&](int tile) {
    int key = tile * KEYS, stage = tile % 2 * KEYS * HEAD;
    load_tile(k_tiles + stage, k + row_offset(key, a.ld_k), a.ld_k, KEYS, span.kv_len - key, threadIdx.x, threads);
    load_tile(v_tiles + stage, v + row_offset(key, a.ld_v), a.ld_v, KEYS, span.kv_len - key, threadIdx.x, threads);
  };
  load_tile(q_tile, q, a.ld_q, W * 16, rows, threadIdx.x, threads);
  load_keys(0);
  ptx::cp_async_commit();

  const int tiles = (span.kv_len + KEYS - 1) / KEYS;
  const bool working = warp * 16 < rows;
  uint32_t queries[4][4];
  Rows16 sums;
  clear(sums);
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) load_keys(tile + 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    if (tile == 0) load_queries(queries, q_tile, warp * 16);
    if (working) {
      const int valid = span.kv_len - tile * KEYS;
      const T *kt = k_tiles + tile % 2 * KEYS * HEAD, *vt = v_tiles + tile % 2 * KEYS * HEAD;
      float s[KEYS / 8][4];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n += 2) {
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = s[n + 1][e] = 0.f;
        if (n * 8 < valid) scores16<T>(s[n], s[n + 1], queries, kt, n * 8);
      }
      if (valid < KEYS) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (n * 8 + lane % 4 * 2 + e % 2 >= valid) s[n][e] = -INFINITY;
      }
      online_softmax<KEYS>(s, sums, a.scale);
#pragma unroll
      for (int n = 0; n < KEYS / 8; n += 2)
        if (n * 8 < valid) add_values16<T>(sums, s[n], s[n + 1], vt, n * 8);
    }
    __syncthreads();  // the next round's copies overwrite this stage only after all warps have read it
  }
  ptx::cp_async_wait<0>();

  T* out = static_cast<T*>(a.out) + row_offset(row0, a.ld_out) + column;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float total = 1.f / quad_sum(sums.sum[h]);
    const int row = warp * 16 + lane / 4 + h * 8;
    if (row >= rows) continue;
#pragma unroll
    for (int n = 0; n < 8; n++)
      *reinterpret_cast<uint32_t*>(out + row_offset(row, a.ld_out) + n * 8 + lane % 4 * 2) =
          ptx::Pair<T>::pack(sums.out[n][2 * h] * total, sums.out[n][2 * h + 1] * total);
  }
}

#define TILES_KERNELS(suffix, T)                                            \
  extern "C" __global__ void __launch_bounds__(128, 3)                      \
      attention_tiles_##suffix(const __grid_constant__ AttentionArgs a) {   \
    attention_tiles<T, 4>(a);                                               \
  }                                                                         \
  EXPORT_KERNEL(attention_tiles_##suffix);                                  \
  extern "C" __global__ void __launch_bounds__(32)                          \
      attention_caption_##suffix(const __grid_constant__ AttentionArgs a) { \
    attention_tiles<T, 1>(a);                                               \
  }                                                                         \
  EXPORT_KERNEL(attention_caption_##suffix);

FOR_EACH_MMA_TYPE(TILES_KERNELS)
