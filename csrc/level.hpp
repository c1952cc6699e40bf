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
  static constexpr float kMinExponent = -126.0f, kMaxExponent = 126.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa = 23;
  // Minimax fit of (2^r - 1) / r on |r| <= 1/2, highest power first; 2^r to 2e-9 before rounding.
  static constexpr int kTerms = 6;
  static constexpr float kPoly[kTerms] = {1.53533620e-4f, 1.33988750e-3f, 9.61843692e-3f,
                                          5.55033237e-2f, 2.40226477e-1f, 6.93147182e-1f};
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  using Int = int64_t;
  static constexpr double kMinExponent = -1022.0, kMaxExponent = 1022.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  // Taylor coefficients ln(2)^i / i!, i = 13 ... 1: the remainder is below 1e-17.
  static constexpr int kTerms = 13;
  static constexpr double kPoly[kTerms] = {
      1.3691488853904124e-12, 2.5678435993488196e-11, 4.44553827187081e-10,
      7.054911620801121e-09,  1.0178086009239696e-07, 1.3215486790144305e-06,
      1.5252733804059838e-05, 0.00015403530393381606, 0.0013333558146428441,
      0.009618129107628477,   0.055504108664821576,   0.2402265069591007,
      0.6931471805599453};
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

#include "level_assignment.hpp"
#include "level_l1.hpp"
#include "level_l1_backward.hpp"
#include "level_sinkhorn.hpp"

namespace dotresize {
namespace {

constexpr Kernels make_level(const char* name) {
  return {name,
          kFloatTile,
          kU8Tile,
          kBackward,
          quantize,
          kSinkhorn<float>,
          kSinkhorn<double>,
          kAssignment<float>,
          kAssignment<double>};
}

}  // namespace
}  // namespace dotresize
