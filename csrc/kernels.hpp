// The leaf kernels that exist once per SIMD level, and the table through which they are called.
//
// level_*.cpp compile level.hpp with different flags; everything that has branches, threads or
// allocations lives outside and is compiled once. dispatch.cpp picks a level when imported.
#pragma once

#include <cstdint>

namespace dotresize {

// Tokens summed in registers before the partial sum joins the total. Two levels keep the float32
// error of a sum over 1e5 tokens near 7e-7; a single running sum reaches 5e-6 after 4e3.
constexpr int64_t kTokenBlock = 256;

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Kernels over one floating type of the Sinkhorn sweep. Rows are padded to a multiple of
// `lanes`; padded entries of k are +inf and padded entries of g are 0, so they contribute 0.
template <typename T>
struct SinkhornKernels {
  int lanes;
  // max_j g[j] - k[j]
  T (*row_max)(int64_t m, const T* g, const T* k);
  // e[j] = exp(shift + g[j] - k[j]); returns sum_j e[j]
  T (*row_exp)(int64_t m, T shift, const T* g, const T* k, T* e);
  // c[j] += sum_r w[r] e[r * stride + j], r < 4
  void (*add_four_rows)(int64_t m, const T* w, const T* e, int64_t stride, T* c);
};

struct Kernels {
  const char* name;
  int panel_x;  // neurons of x in a register tile
  int panel_y;  // neurons of y in a register tile
  // tile[r * stride + s] += sum_t |x_panel[t * panel_x + r] - y_panel[t * panel_y + s]|
  void (*l1_tile)(int64_t tokens, const float* x_panel, const float* y_panel, float* tile,
                  int64_t stride);
  // out[i] = float(row[i]) for `count` entries of the given type
  void (*to_float)(Dtype dtype, const void* row, int64_t count, float* out);
  SinkhornKernels<float> sinkhorn_f32;
  SinkhornKernels<double> sinkhorn_f64;
};

// Null where the compiler or the architecture has no such level.
extern const Kernels* const kAvx512;
extern const Kernels* const kAvx2;
extern const Kernels* const kPortable;

// The level in use. DOTRESIZE_SIMD=avx512|avx2|portable, read once, forces one; throws
// std::runtime_error if it names a level that this machine cannot run.
const Kernels& kernels();

template <typename T>
const SinkhornKernels<T>& sinkhorn_kernels();

}  // namespace dotresize
