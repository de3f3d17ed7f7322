// What the attention kernels share: their argument, the work of a block, an online softmax over fragments.
//
//   out[i] = sum_j softmax_j(q[i] k[j] / sqrt(d)) v[j]     for the rows i and keys j of one span, each head by itself
//
// A span is a run of query rows that all see the same run of keys: an image, a caption, or all captions of an image.
// The grid is (work items, heads); an item is a tile of query rows of one span. Heads are consecutive slices of the
// columns.
#pragma once
#include "common.cuh"

// Rows that attend to each other, as in backend.rs.
struct Span {
  int q, q_len, kv, kv_len;
};

// A tile of query rows: `first` counts from the span's first.
struct Item {
  int span, first;
};

struct AttentionArgs {
  const void *q, *k, *v;
  void* out;
  // Null: spans are images of `tokens` rows, one after the other, and items their tiles in order.
  const Span* spans;
  const Item* items;
  int tokens, head_size;
  int ld_q, ld_k, ld_v, ld_out;
  // log2(e) / sqrt(head_size): scores are exponents of 2.
  float scale;
};

// The span and first query row of this block, whose tile has `rows` rows.
__device__ __forceinline__ Span block_work(const AttentionArgs& a, int rows, int& first) {
  if (a.items) {
    Item item = a.items[blockIdx.x];
    first = item.first;
    return a.spans[item.span];
  }
  const int tiles = (a.tokens + rows - 1) / rows, image = blockIdx.x / tiles;
  first = blockIdx.x % tiles * rows;
  return Span{image * a.tokens, a.tokens, image * a.tokens, a.tokens};
}

constexpr int HEAD = 64;  // head size of the tensor core kernels

// Place of 16-byte chunk `chunk` of row `row` in a tile of HEAD columns: rows are rotated so that ldmatrix, which reads
// one chunk of 8 rows at a time, meets every bank once.
__device__ __forceinline__ int swizzle(int row, int chunk) { return row * HEAD + ((chunk ^ (row & 7)) << 3); }

// Accumulators of 16 query rows of a warp: 8 column tiles, and for rows lane / 4 and lane / 4 + 8 the exponent that was
// taken off every score (the greatest so far, times the scale) and the sum of weights.
struct Rows16 {
  float out[8][4];
  float shift[2], sum[2];
};

__device__ __forceinline__ void clear(Rows16& r) {
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) r.out[n][e] = 0.f;
  r.shift[0] = r.shift[1] = -INFINITY;
  r.sum[0] = r.sum[1] = 0.f;
}

// Scores s of 16 rows against KEYS keys become 2^(s scale - shift); what was summed before is brought to the new shift.
// Both sides take off the same rounded shift, so its rounding cancels however large the scores are. The caller has set
// scores of keys that do not exist to -infinity; each row has at least one finite score.
template <int KEYS>
__device__ __forceinline__ void online_softmax(float (&s)[KEYS / 8][4], Rows16& r, float scale) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
    const float shift = fmaxf(r.shift[h], top * scale), keep = ptx::exp2_approx(r.shift[h] - shift);
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; e++) {
        s[n][e] = ptx::exp2_approx(s[n][e] * scale - shift);
        sum += s[n][e];
      }
#pragma unroll
    for (int n = 0; n < 8; n++) r.out[n][2 * h] *= keep, r.out[n][2 * h + 1] *= keep;
    r.shift[h] = shift;
    r.sum[h] = r.sum[h] * keep + sum;
  }
}

// s[16 rows, 16 keys] of keys nb * 16.. from query fragments and a K tile in shared memory.
template <class T>
__device__ __forceinline__ void scores16(float (&left)[4], float (&right)[4], const uint32_t (&q)[4][4], const T* k,
                                         int key) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int kk = 0; kk < HEAD / 16; kk++) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, k + swizzle(key + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
    ptx::mma_16816<T>(left, q[kk], b[0], b[1]);
    ptx::mma_16816<T>(right, q[kk], b[2], b[3]);
  }
}

// out += p[16 rows, 16 keys] v[16 keys, HEAD]; p is rounded to T, as every fused attention does.
template <class T>
__device__ __forceinline__ void add_values16(Rows16& r, const float (&left)[4], const float (&right)[4], const T* v,
                                             int key) {
  const int lane = threadIdx.x % WARP;
  const uint32_t p[4] = {ptx::Pair<T>::pack(left[0], left[1]), ptx::Pair<T>::pack(left[2], left[3]),
                         ptx::Pair<T>::pack(right[0], right[1]), ptx::Pair<T>::pack(right[2], right[3])};
#pragma unroll
  for (int n = 0; n < HEAD / 16; n++) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, v + swizzle(key + lane % 16, n * 2 + lane / 16));
    ptx::mma_16816<T>(r.out[2 * n], p, b[0], b[1]);
    ptx::mma_16816<T>(r.out[2 * n + 1], p, b[2], b[3]);
  }
}

// Query fragments of 16 rows from a Q tile in shared memory.
template <class T>
__device__ __forceinline__ void load_queries(uint32_t (&q)[4][4], const T* tile, int row) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int kk = 0; kk < HEAD / 16; kk++) ptx::ldmatrix_x4(q[kk], tile + swizzle(row + lane % 16, kk * 2 + lane / 16));
}

// Begins the copy of `rows` rows of HEAD columns into a tile, by `threads` threads of which this is `thread`; rows from
// `valid` on become zeros.
template <class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int ld, int rows, int valid, int thread,
                                          int threads) {
  for (int i = thread; i < rows * (HEAD / VEC); i += threads) {
    int row = i / (HEAD / VEC), chunk = i % (HEAD / VEC);
    bool exists = row < valid;
    ptx::cp_async16(tile + swizzle(row, chunk), from + row_offset(exists ? row : 0, ld) + chunk * VEC, exists);
  }
}

// The sum of a row's four lanes.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(ALL_LANES, v, 1);
  return v + __shfl_xor_sync(ALL_LANES, v, 2);
}
