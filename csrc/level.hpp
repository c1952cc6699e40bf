// Leaf kernels written once over vectors of VECTOR_BYTES bytes, compiled once per SIMD level.
//
// The compiler's vector extension gives AVX-512, AVX2, SSE2 and NEON code from one text. Included
// by level_*.cpp only; everything is in an anonymous namespace so that no function compiled for a
// wide level can be chosen by the linker for another.
#pragma once

#include <cstring>

#include "kernels.hpp"

namespace dotresize {
namespace {

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  using Int = int32_t;
  static constexpr Int kAbsMask = 0x7fffffff;
  // exp: below kMin the result would be subnormal and is flushed to 0; above kMax it saturates,
  // far outside the range in which callers trust a sum.
  static constexpr float kMin = -87.336544f, kMax = 88.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2e = 1.44269504f, kLn2Hi = 0.693145752f, kLn2Lo = 1.42860677e-6f;
  static constexpr int kMantissa = 23;
  // Minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln2 / 2, relative error of exp 3.1e-9.
  static constexpr int kTerms = 5;
  static constexpr float kPoly[kTerms] = {1.38146006e-3f, 8.36871691e-3f, 4.16683880e-2f,
                                          1.66665206e-1f, 4.99999934e-1f};
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  using Int = int64_t;
  static constexpr double kMin = -708.39641853226408, kMax = 709.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kLn2Hi = 0.693147180369123816490, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr int kMantissa = 52;
  // Taylor coefficients 1/13! ... 1/2!: the remainder is below 1e-17 on |r| <= ln2 / 2.
  static constexpr int kTerms = 12;
  static constexpr double kPoly[kTerms] = {
      1.6059043836821613e-10, 2.0876756987868099e-9, 2.5052108385441720e-8, 2.7557319223985888e-7,
      2.7557319223985893e-6,  2.4801587301587302e-5, 1.9841269841269841e-4, 1.3888888888888889e-3,
      8.3333333333333332e-3,  4.1666666666666664e-2, 1.6666666666666666e-1, 0.5};
};

template <typename T>
constexpr int kLanes = VECTOR_BYTES / sizeof(T);

template <typename T>
inline typename Simd<T>::V load(const T* p) {
  typename Simd<T>::V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
inline void store(T* p, typename Simd<T>::V v) {
  std::memcpy(p, &v, sizeof v);
}

// ---------------------------------------------------------------- L1 cost

constexpr int kPanelX = PANEL_X;
constexpr int kVectorsY = PANEL_Y_VECTORS;
constexpr int kPanelY = kVectorsY * kLanes<float>;

// kPanelX * kVectorsY accumulators stay in registers over the whole token block; per token
// kVectorsY loads of y and kPanelX broadcasts of x feed three instructions per vector of pairs.
void l1_tile(int64_t tokens, const float* x_panel, const float* y_panel, float* tile,
             int64_t stride) {
  using V = Simd<float>::V;
  using I = Simd<float>::I;
  const I mask = I{} + Simd<float>::kAbsMask;
  V sum[kPanelX][kVectorsY] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    V y[kVectorsY];
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsY; ++v) y[v] = load(y_panel + t * kPanelY + v * kLanes<float>);
#pragma GCC unroll 16
    for (int r = 0; r < kPanelX; ++r) {
      const V x = V{} + x_panel[t * kPanelX + r];
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsY; ++v) sum[r][v] += (V)((I)(x - y[v]) & mask);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kPanelX; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsY; ++v) {
      float* out = tile + r * stride + v * kLanes<float>;
      store(out, load(out) + sum[r][v]);
    }
  }
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Branch-free so that it vectorises without half-precision instructions. Normal numbers get their
// exponent re-biased by a multiplication, which also carries infinities and NaN through;
// subnormals are read off the mantissa of 0.5 + h * 2^-24.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t rebiased = (magnitude << 13) + (0xe0u << 23);
  const float normal = bits_to_float(rebiased) * 0x1.0p-112f;
  const float subnormal = bits_to_float(magnitude | 0x3f000000u) - 0.5f;
  uint32_t bits;
  const float value = magnitude < 0x0400u ? subnormal : normal;
  std::memcpy(&bits, &value, sizeof bits);
  return bits_to_float(bits | sign);
}

void to_float(Dtype dtype, const void* row, int64_t count, float* out) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(out, row, count * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(row);
  if (dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = bits_to_float(static_cast<uint32_t>(half[i]) << 16);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(half[i]);
  }
}

// ---------------------------------------------------------------- Sinkhorn

// exp to 2 ulp: x = n ln2 + r, a polynomial in r, then n added to the exponent field.
// -inf and everything below the normal range give exactly 0.
template <typename T>
inline typename Simd<T>::V exp_vector(typename Simd<T>::V x) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  const auto keep = x >= (V{} + S::kMin);
  x = x < (V{} + S::kMax) ? x : V{} + S::kMax;
  x = keep ? x : V{};
  const V rounded = x * S::kLog2e + S::kRound;
  const V n = rounded - S::kRound;
  const V r = (x - n * S::kLn2Hi) - n * S::kLn2Lo;
  V p = V{} + S::kPoly[0];
#pragma GCC unroll 16
  for (int i = 1; i < S::kTerms; ++i) p = p * r + S::kPoly[i];
  p = (p * (r * r) + r) + T(1);
  const I exponent = (I)rounded << S::kMantissa;  // the rounding constant's bits fall off the top
  const V value = (V)((I)p + exponent);
  return (V)((I)value & (I)keep);
}

template <typename T>
T row_max(int64_t m, const T* g, const T* k) {
  using V = typename Simd<T>::V;
  V best = load(g) - load(k);
  for (int64_t j = kLanes<T>; j < m; j += kLanes<T>) {
    const V z = load(g + j) - load(k + j);
    best = z > best ? z : best;
  }
  T result = best[0];
  for (int i = 1; i < kLanes<T>; ++i) result = best[i] > result ? best[i] : result;
  return result;
}

template <typename T>
T row_exp(int64_t m, T shift, const T* g, const T* k, T* e) {
  using V = typename Simd<T>::V;
  constexpr int L = kLanes<T>;
  // Independent partial sums: one chain of dependent adds would hide nothing.
  V sum0 = {}, sum1 = {};
  int64_t j = 0;
  for (; j + 2 * L <= m; j += 2 * L) {
    const V e0 = exp_vector<T>((load(g + j) - load(k + j)) + shift);
    const V e1 = exp_vector<T>((load(g + j + L) - load(k + j + L)) + shift);
    store(e + j, e0);
    store(e + j + L, e1);
    sum0 += e0;
    sum1 += e1;
  }
  if (j < m) {
    const V e0 = exp_vector<T>((load(g + j) - load(k + j)) + shift);
    store(e + j, e0);
    sum0 += e0;
  }
  sum0 += sum1;
  T total = 0;
  for (int i = 0; i < L; ++i) total += sum0[i];
  return total;
}

template <typename T>
void add_four_rows(int64_t m, const T* w, const T* e, int64_t stride, T* c) {
  for (int64_t j = 0; j < m; j += kLanes<T>) {
    const auto low = load(e + j) * w[0] + load(e + stride + j) * w[1];
    const auto high = load(e + 2 * stride + j) * w[2] + load(e + 3 * stride + j) * w[3];
    store(c + j, load(c + j) + (low + high));
  }
}

template <typename T>
constexpr SinkhornKernels<T> kSinkhorn = {kLanes<T>, row_max<T>, row_exp<T>, add_four_rows<T>};

constexpr Kernels make_level(const char* name) {
  return {name, kPanelX, kPanelY, l1_tile, to_float, kSinkhorn<float>, kSinkhorn<double>};
}

}  // namespace
}  // namespace dotresize
