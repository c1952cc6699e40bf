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

// c[j] += the weighted sum of four rows, one vector of it.
template <typename T>
inline void add_four(int64_t j, const typename Simd<T>::V* w, const T* e, int64_t stride, T* c) {
  const auto low = load(e + j) * w[0] + load(e + stride + j) * w[1];
  const auto high = load(e + 2 * stride + j) * w[2] + load(e + 3 * stride + j) * w[3];
  store(c + j, load(c + j) + (low + high));
}

template <typename T>
void add_four_rows(int64_t m, const T* w, const T* e, int64_t stride, T* c) {
  using V = typename Simd<T>::V;
  const V weight[4] = {V{} + w[0], V{} + w[1], V{} + w[2], V{} + w[3]};
  for (int64_t j = 0; j < m; j += kLanes<T>) add_four<T>(j, weight, e, stride, c);
}

// Two things at once, so that the four rows' sums and the divisions after them, long chains both,
// are done while other rows are added.
template <typename T>
void dot_and_add_four_rows(int64_t m, const T* v, const T* e, int64_t stride, T* sums, const T* w,
                           const T* before, T* c) {
  constexpr int L = kLanes<T>;
  using V = typename Simd<T>::V;
  const V weight[4] = {V{} + w[0], V{} + w[1], V{} + w[2], V{} + w[3]};
  V even[4], odd[4];  // two accumulators a row: eight chains hide the latency of their additions
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) even[r] = odd[r] = V{};
  int64_t j = 0;
  for (; j + 2 * L <= m; j += 2 * L) {
    const V first = load(v + j), second = load(v + j + L);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      even[r] += first * load(e + r * stride + j);
      odd[r] += second * load(e + r * stride + j + L);
    }
    add_four<T>(j, weight, before, stride, c);
    add_four<T>(j + L, weight, before, stride, c);
  }
  if (j < m) {
    const V first = load(v + j);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) even[r] += first * load(e + r * stride + j);
    add_four<T>(j, weight, before, stride, c);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) sums[r] = horizontal_sum<T>(even[r] + odd[r]);
}

// ---------------------------------------------------------------- columns, in double

template <typename T>
void join_columns(int64_t m, const T* v, T* c, double* total) {
  for (int64_t j = 0; j < m; ++j) {
    total[j] += static_cast<double>(c[j]) * v[j];
    c[j] = 0;
  }
}

inline double distance(int64_t m, const double* p, const double* q) {
  using I = Simd<double>::I;
  const I mask = I{} + 0x7fffffffffffffff;
  Simd<double>::V sum[2] = {};
  for (int64_t j = 0; j < m; j += kLanes<double>) {
    sum[j / kLanes<double> % 2] += (Simd<double>::V)((I)(load(p + j) - load(q + j)) & mask);
  }
  return horizontal_sum<double>(sum[0] + sum[1]);
}

// x = 2^e y with y in [sqrt(1/2), sqrt(2)), and log y = 2 atanh s with s = (y - 1) / (y + 1), whose
// series ends at s^21: s^2 < 0.0295. Good to 3e-16 beside the whole part.
inline void log2_quotients(int64_t m, const double* p, const double* q, double* out) {
  using V = Simd<double>::V;
  using I = Simd<double>::I;
  typedef uint64_t U __attribute__((vector_size(VECTOR_BYTES)));
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd, kBias = 1024;
  constexpr double kTwoOverLn2 = 2.8853900817779268, kRound = Simd<double>::kRound;
  for (int64_t j = 0; j < m; j += kLanes<double>) {
    const U bits = (U)(load(p + j) / load(q + j));
    // Kept positive for a logical shift; AVX2 has no other.
    const U e = (bits - kRootHalf + (kBias << 52)) >> 52;
    const V y = (V)(bits - ((e - kBias) << 52));
    const V whole = (V)((I)e + (I)(V{} + kRound)) - (kRound + static_cast<double>(kBias));
    const V s = (y - 1.0) / (y + 1.0), z = s * s;
    V series = V{} + 1.0 / 21;
#pragma GCC unroll 10
    for (int k = 19; k > 0; k -= 2) series = series * z + 1.0 / k;
    store(out + j, whole + kTwoOverLn2 * s * series);
  }
}

// ---------------------------------------------------------------- the caller's cost

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
constexpr SinkhornKernels<T> kSinkhorn = {
    kLanes<T>,       row_exp2<T>, row_max<T>,     add_four_rows<T>, dot_and_add_four_rows<T>,
    join_columns<T>, distance,    log2_quotients, row_minimum<T>,   column_minima<T>,
    scale_row<T>,    plan_row<T>};

}  // namespace
}  // namespace dotresize
