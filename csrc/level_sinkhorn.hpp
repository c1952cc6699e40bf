// Leaf kernels of the Sinkhorn sweep. Part of level.hpp.
#pragma once

namespace dotresize {
namespace {

// Vectors whose exponentials are taken in step: each is a chain of a dozen dependent instructions,
// and a scheduler does not look far enough ahead to overlap one vector's with the next one's.
constexpr int kInStep = 4;

// e[v] = 2^(z[v] + s) for an integer s, within 1 ulp: z = n + r with n an integer, a polynomial in
// r, then n + s added to the exponent field. Adding kRound + s rounds z and adds s at once, so that
// the shift is free; it must be far below 2^22. -inf and everything far below give exactly 0, as
// does the lower limit itself: r = 0, and the exponent field of 1 is cancelled. Results between
// there and the normal range are below it too, and not accurate. Above 2^kMaxExponent they
// saturate, far outside the range in which sums are trusted.
template <typename T, int N>
inline void exp2_in_step(const typename Simd<T>::V* z_in, T s, typename Simd<T>::V* e) {
  using S = Simd<T>;
  using V = typename S::V;
  using I = typename S::I;
  const V low = V{} + (S::kMinExponent - 1 - s), high = V{} + (S::kMaxExponent - s);
  const V round = V{} + (S::kRound + s);
  V r[N], rounded[N], p[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    r[v] = z_in[v] > low ? z_in[v] : low;
    r[v] = r[v] < high ? r[v] : high;
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) rounded[v] = r[v] + round;
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) r[v] -= rounded[v] - round;
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) p[v] = r[v] * S::kPoly[0] + S::kPoly[1];
#pragma GCC unroll 16
  for (int i = 2; i < S::kTerms; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) p[v] = p[v] * r[v] + S::kPoly[i];
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) p[v] = p[v] * r[v] + T(1);
#pragma GCC unroll 8
  // The rounding constant's own bits fall off the top.
  for (int v = 0; v < N; ++v) e[v] = (V)((I)p[v] + ((I)rounded[v] << S::kMantissa));
}

template <typename T>
inline T horizontal_sum(typename Simd<T>::V v) {
  T lanes[kLanes<T>];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// One step over N vectors from j on.
template <typename T, int N>
inline void row_step(int64_t j, T shift, const T* g, const T* k, T* e, typename Simd<T>::V* sum) {
  constexpr int L = kLanes<T>;
  typename Simd<T>::V z[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) z[v] = load(g + j + v * L) - load(k + j + v * L);
  exp2_in_step<T, N>(z, shift, z);
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    store(e + j + v * L, z[v]);
    sum[v % 2] += z[v];
  }
}

template <typename T>
T row_exp2(int64_t m, T shift, const T* g, const T* k, T* e) {
  constexpr int L = kLanes<T>;
  typename Simd<T>::V sum[2] = {};
  int64_t j = 0;
  for (; j + kInStep * L <= m; j += kInStep * L) row_step<T, kInStep>(j, shift, g, k, e, sum);
  for (; j < m; j += L) row_step<T, 1>(j, shift, g, k, e, sum);
  return horizontal_sum<T>(sum[0] + sum[1]);
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
void add_four_rows(int64_t m, const T* w, const T* e, int64_t stride, T* c) {
  for (int64_t j = 0; j < m; j += kLanes<T>) {
    const auto low = load(e + j) * w[0] + load(e + stride + j) * w[1];
    const auto high = load(e + 2 * stride + j) * w[2] + load(e + 3 * stride + j) * w[3];
    store(c + j, load(c + j) + (low + high));
  }
}

// The three passes below read the caller's cost, whose rows have no padding: whole vectors, then
// the rest of the row one by one.

template <typename T>
bool row_minimum(int64_t m, const T* cost, const T* closed, T* minimum) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  constexpr T kInfinity = __builtin_inf();
  V best = V{} + kInfinity;
  I bad = {};
  int64_t j = 0;
  for (; j + kLanes<T> <= m; j += kLanes<T>) {
    const V value = load(cost + j), open = value + load(closed + j);
    bad |= ~(I)(value > V{} - kInfinity);
    best = open < best ? open : best;
  }
  bool any_bad = false;
  T result = kInfinity;
  for (int i = 0; i < kLanes<T>; ++i) {
    any_bad |= bad[i] != 0;
    result = best[i] < result ? best[i] : result;
  }
  for (; j < m; ++j) {
    any_bad |= !(cost[j] > -kInfinity);
    const T open = cost[j] + closed[j];
    result = open < result ? open : result;
  }
  *minimum = result;
  return !any_bad;
}

template <typename T>
void column_minima(int64_t m, const T* cost, double row_min, double* minima) {
  for (int64_t j = 0; j < m; ++j) {
    const double value = cost[j] - row_min;
    minima[j] = value < minima[j] ? value : minima[j];
  }
}

template <typename T>
void scale_row(int64_t m, const T* cost, double row_min, const double* column_min, double per_reg,
               T* k) {
  for (int64_t j = 0; j < m; ++j) {
    k[j] = static_cast<T>((cost[j] - row_min - column_min[j]) * per_reg);
  }
}

// In double whatever T is: f, g and the scaled cost may be large numbers that nearly cancel.
template <typename T>
void plan_row(int64_t m, double f, const double* g, const T* cost, double per_reg, T* plan) {
  using V = Simd<double>::V;
  constexpr int kChunk = 4 * kInStep * kLanes<double>;
  double z[kChunk] = {};
  for (int64_t j0 = 0; j0 < m; j0 += kChunk) {
    const int64_t count = m - j0 < kChunk ? m - j0 : kChunk;
    for (int64_t j = 0; j < count; ++j) z[j] = (f + g[j0 + j]) - cost[j0 + j] * per_reg;
    for (int64_t j = 0; j < kChunk; j += kInStep * kLanes<double>) {
      V v[kInStep];
      std::memcpy(v, z + j, sizeof v);
      exp2_in_step<double, kInStep>(v, 0.0, v);
      std::memcpy(z + j, v, sizeof v);
    }
    for (int64_t j = 0; j < count; ++j) plan[j0 + j] = static_cast<T>(z[j]);
  }
}

template <typename T>
constexpr SinkhornKernels<T> kSinkhorn = {kLanes<T>,        row_exp2<T>,    row_max<T>,
                                          add_four_rows<T>, row_minimum<T>, column_minima<T>,
                                          scale_row<T>,     plan_row<T>};

}  // namespace
}  // namespace dotresize
