// patchify: out[b * N + (y * side + x), (c * p + dy) * p + dx] = lut[c][pixels[b, y * p + dy, x * p + dx, c]]
//
// One block per strip of `side` patches. It brings the strip's pixel lines to shared memory in the order they have in
// memory, then writes whole patches, neighbouring threads neighbouring values: both sides of memory see full sectors.
// Shared memory: the table (3 KiB) and p lines of side * p * 3 bytes. Pixels right of and below the last whole patch
// are not read. Bound by memory: 1 byte in, sizeof(T) bytes out for each sample.
#include "common.cuh"

template <class T>
__device__ __forceinline__ void patchify(const uint8_t* pixels, const float* lut, T* out, int image_size, int patch,
                                         int ld) {
  DYN_SMEM(float, table);
  uint8_t* strip = reinterpret_cast<uint8_t*>(table + 3 * 256);
  const int side = image_size / patch, line = side * patch * 3, values = 3 * patch * patch;
  const int image = blockIdx.x / side, strip_y = blockIdx.x % side;
  const uint8_t* from = pixels + (static_cast<size_t>(image) * image_size + strip_y * patch) * image_size * 3;
  for (int i = threadIdx.x; i < 3 * 256; i += blockDim.x) table[i] = lut[i];
  for (int i = threadIdx.x; i < patch * line; i += blockDim.x)
    strip[i] = from[static_cast<size_t>(i / line) * image_size * 3 + i % line];
  __syncthreads();
  T* to = out + row_offset(blockIdx.x * side, ld);
  for (int i = threadIdx.x; i < side * values; i += blockDim.x) {
    int x = i / values, at = i % values;
    int channel = at / (patch * patch), dy = at / patch % patch, dx = at % patch;
    uint8_t sample = strip[dy * line + (x * patch + dx) * 3 + channel];
    to[row_offset(x, ld) + at] = from_float<T>(table[channel * 256 + sample]);
  }
}

#define PATCHIFY_KERNEL(suffix, T)                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                           \
      patchify_##suffix(const uint8_t* pixels, const float* lut, T* out, int image_size, int patch, int ld) { \
    patchify(pixels, lut, out, image_size, patch, ld);                                                        \
  }                                                                                                           \
  EXPORT_KERNEL(patchify_##suffix);

FOR_EACH_TYPE(PATCHIFY_KERNEL)
