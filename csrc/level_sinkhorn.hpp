// Leaf kernels of the Sinkhorn sweep. Part of level.hpp.
#pragma once

namespace dotresize {
namespace {

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

}  // namespace
}  // namespace dotresize
