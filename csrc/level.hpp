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

}  // namespace
}  // namespace dotresize

#include "level_l1.hpp"
#include "level_sinkhorn.hpp"

namespace dotresize {
namespace {

constexpr Kernels make_level(const char* name) {
  return {name, kFloatTile, kOctetTile, quantize, kSinkhorn<float>, kSinkhorn<double>};
}

}  // namespace
}  // namespace dotresize
