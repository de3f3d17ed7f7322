// cuBLASLt without a card: the functions that the engine calls, products by a plain loop with f32 sums, queued on the
// emulated driver's streams. It stands in for libcublasLt.so.13 (tests/card.rs). FAKE_CUBLAS_VERSION, by environment.
//
// The algorithm it proposes first works for even numbers of rows only: one that was chosen for a bucket need not work
// for every size in it, and the engine must cope. Products too large for a test are not computed.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <vector>

#include "driver.h"

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Attribute { TRANSA = 3, EPILOGUE = 7, BIAS_POINTER = 8, BIAS_TYPE = 26 };
enum Type { F32 = 0, F16 = 2, BF16 = 14 };
constexpr int EPILOGUE_BIAS = 4;
constexpr uint64_t LARGEST = 1ull << 32;

struct Descriptor {
  int transposed = 0, epilogue = 1, bias_type = -1;
  uint64_t bias = 0;
};
struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
};
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

float load(const void* p, int type, size_t i) {
  if (type == F16) return __half2float(static_cast<const __half*>(p)[i]);
  if (type == BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}
void store(void* p, int type, size_t i, float v) {
  if (type == F16)
    static_cast<__half*>(p)[i] = __float2half_rn(v);
  else if (type == BF16)
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v);
  else
    static_cast<float*>(p)[i] = v;
}

// Columns of a as f32, one after the other.
std::vector<float> columns(const void* p, const Layout& a) {
  std::vector<float> values(a.rows * a.cols);
  for (size_t c = 0; c < a.cols; c++)
    for (size_t r = 0; r < a.rows; r++) values[c * a.rows + r] = load(p, a.type, c * size_t(a.ld) + r);
  return values;
}

bool works(uint64_t algorithm, uint64_t rows) { return algorithm != 1 || rows % 2 == 0; }

// d[N, M] = w[K, N]ᵀ x[K, M] + beta d + bias, all column-major.
void multiply(const Descriptor& descriptor, const void* w, const Layout& wl, const void* x, const Layout& xl,
              float beta, void* d, const Layout& dl) {
  const auto ws = columns(w, wl), xs = columns(x, xl);
  const auto bias = reinterpret_cast<const void*>(descriptor.bias);
  const size_t k = wl.rows;
  for (size_t m = 0; m < xl.cols; m++)
    for (size_t n = 0; n < wl.cols; n++) {
      float sum = 0.f;
      for (size_t i = 0; i < k; i++) sum += ws[n * k + i] * xs[m * k + i];
      const size_t at = m * size_t(dl.ld) + n;
      sum += load(bias, descriptor.bias_type, n) + (beta != 0.f ? beta * load(d, dl.type, at) : 0.f);
      store(d, dl.type, at, sum);
    }
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

extern "C" __attribute__((visibility("default"))) size_t cublasLtGetVersion() {
  return size_t(fake::setting("FAKE_CUBLAS_VERSION", 130000));
}
API cublasLtCreate(void** handle) { return *handle = new int, SUCCESS; }
API cublasLtDestroy(void* handle) { return delete static_cast<int*>(handle), SUCCESS; }
API cublasLtMatmulDescCreate(void** made, int, int) { return *made = new Descriptor, SUCCESS; }
API cublasLtMatmulDescDestroy(void* d) { return delete static_cast<Descriptor*>(d), SUCCESS; }
API cublasLtMatmulDescSetAttribute(void* handle, int attribute, const void* value, size_t bytes) {
  auto d = static_cast<Descriptor*>(handle);
  void* to = attribute == TRANSA         ? static_cast<void*>(&d->transposed)
             : attribute == EPILOGUE     ? static_cast<void*>(&d->epilogue)
             : attribute == BIAS_POINTER ? static_cast<void*>(&d->bias)
             : attribute == BIAS_TYPE    ? static_cast<void*>(&d->bias_type)
                                         : nullptr;
  if (!to || bytes != (attribute == BIAS_POINTER ? 8u : 4u)) return INVALID_VALUE;
  return memcpy(to, value, bytes), SUCCESS;
}
API cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  return *made = new Layout{type, rows, cols, ld}, SUCCESS;
}
API cublasLtMatrixLayoutDestroy(void* layout) { return delete static_cast<Layout*>(layout), SUCCESS; }
API cublasLtMatrixLayoutSetAttribute(void* layout, int attribute, const void* value, size_t bytes) {
  if (attribute != 3 || bytes != 8) return INVALID_VALUE;
  return memcpy(&static_cast<Layout*>(layout)->cols, value, 8), SUCCESS;
}
API cublasLtMatmulPreferenceCreate(void** made) { return *made = new int, SUCCESS; }
API cublasLtMatmulPreferenceDestroy(void* p) { return delete static_cast<int*>(p), SUCCESS; }
API cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return SUCCESS; }
API cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void* x, void*, void*, void*, int most, Heuristic* found,
                                   int* count) {
  *count = 0;
  for (uint64_t algorithm : {1, 0, 2})
    if (works(algorithm, static_cast<Layout*>(x)->cols) && *count < most)
      found[(*count)++] = Heuristic{{{algorithm}}, 0, SUCCESS, 1.f, {}};
  return SUCCESS;
}
API cublasLtMatmul(void*, void* descriptor, const void* alpha, const void* w, void* w_layout, const void* x,
                   void* x_layout, const void* beta, const void* c, void*, void* d, void* d_layout,
                   const Algorithm* algorithm, void*, size_t, void* stream) {
  const Descriptor how = *static_cast<Descriptor*>(descriptor);
  const Layout wl = *static_cast<Layout*>(w_layout), xl = *static_cast<Layout*>(x_layout);
  const Layout dl = *static_cast<Layout*>(d_layout);
  const float scale = *static_cast<const float*>(beta);
  if (*static_cast<const float*>(alpha) != 1.f || how.transposed != 1 || how.epilogue != EPILOGUE_BIAS || c != d ||
      wl.rows != xl.rows || dl.rows != wl.cols || dl.cols != xl.cols || how.bias_type != dl.type)
    return INVALID_VALUE;
  if (!works(algorithm->data[0], xl.cols)) return NOT_SUPPORTED;
  if (wl.rows * wl.cols * xl.cols >= LARGEST) return SUCCESS;
  return fake::queue(stream, [=] { return multiply(how, w, wl, x, xl, scale, d, dl), 0; }) ? NOT_SUPPORTED : SUCCESS;
}
