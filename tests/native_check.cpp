// The C++ operators against plain loops in double, without Python: for emulators and for machines
// of another architecture. Prints the SIMD level and the largest errors; exits 1 if one is too big.
//
//   g++ -std=c++17 -O3 -fno-math-errno -Icsrc tests/native_check.cpp csrc/dispatch.cpp
//       csrc/assignment.cpp csrc/l1_*.cpp csrc/sinkhorn.cpp level_*.o      (level_*.cpp with
//       setup.py's flags)
//   DOTRESIZE_SIMD=avx512 ./a.out
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "assignment.hpp"
#include "l1_backward.hpp"
#include "l1_cost.hpp"
#include "sinkhorn.hpp"
#include "threads.hpp"

using namespace dotresize;

namespace {

bool failed = false;

void report(const char* what, double error, double accepted) {
  const bool good = error <= accepted;  // false for NaN
  failed |= !good;
  std::printf("%-34s %.2e (accepted %.0e)%s\n", what, error, accepted, good ? "" : "  WRONG");
}

uint64_t state = 1;
double uniform() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) * 0x1p-53;
}

std::vector<float> activations(int64_t count) {
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(uniform() * 4 - 2);
  return values;
}

// Largest relative distance from the plain sum over tokens.
double l1_error(const std::vector<float>& x, const std::vector<float>& y, int64_t tokens, int64_t n,
                int64_t m, const std::vector<float>& cost) {
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      double truth = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        truth += std::abs(static_cast<double>(x[t * n + i]) - y[t * m + j]);
      }
      worst = std::max(worst, std::abs(cost[i * m + j] - truth) / (truth + 1e-30));
    }
  }
  return worst;
}

void check_l1(int64_t tokens, int64_t n, int64_t m) {
  const auto x = activations(tokens * n), y = activations(tokens * m);
  std::vector<float> cost(n * m);
  const Activations a = {x.data(), Dtype::kFloat32, tokens * n, n, n, nullptr};
  const Activations b = {y.data(), Dtype::kFloat32, tokens * m, m, m, nullptr};
  l1_cost(1, tokens, a, b, cost.data(), {0, false, 1.0, nullptr, 2});
  report("l1 float32", l1_error(x, y, tokens, n, m, cost), 1e-5);

  std::vector<float> self(n * n);
  l1_cost(1, tokens, a, a, self.data(), {n, false, 1.0, nullptr, 2});
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) worst = std::max<double>(worst, self[i * n + i]);
  report("l1 float32, own diagonal", worst, 0.0);
  report("l1 float32, mirrored", l1_error(x, x, tokens, n, n, self), 1e-5);

  // Two problems of the same x, their targets by index, in two chunks; a permuted x.
  std::vector<int64_t> targets(2 * m), order(2 * n);
  std::vector<float> chosen[2] = {std::vector<float>(tokens * m), std::vector<float>(tokens * m)};
  for (int64_t i = 0; i < 2 * n; ++i) order[i] = i < n ? n - 1 - i : i - n;
  for (int64_t j = 0; j < 2 * m; ++j) {
    targets[j] = (j * 7 + 3) % n;
    for (int64_t t = 0; t < tokens; ++t) {
      chosen[j / m][t * m + j % m] = x[t * n + targets[j]];
    }
  }
  std::vector<float> both(2 * n * m);
  const int64_t first = std::min(tokens, kTokenBlock);
  for (const int64_t start : {int64_t{0}, first}) {
    const Activations part = {x.data() + start * n, Dtype::kFloat32, 0, n, n, order.data()};
    const Activations selected = {part.data, Dtype::kFloat32, 0, n, m, targets.data()};
    l1_cost(2, start == 0 ? first : tokens - first, part, selected, both.data(),
            {0, start > 0, 1.0, nullptr, 2});
  }
  for (int64_t b = 0; b < 2; ++b) {
    const std::vector<float> one(both.begin() + b * n * m, both.begin() + (b + 1) * n * m);
    report("l1 float32, index and chunks", l1_error(x, chosen[b], tokens, n, m, one), 1e-5);
  }

  // Multiples of 1/64 in [-2, 2) are bytes exactly.
  auto steps_x = x, steps_y = y;
  for (auto* values : {&steps_x, &steps_y}) {
    for (float& v : *values) v = std::floor(v * 64) / 64;
  }
  std::vector<int64_t> token(tokens);
  for (int64_t t = 0; t < tokens; ++t) token[t] = tokens - 1 - t;
  const std::vector<float> low(tokens, -2.0f), dither(tokens, 0.5f);
  const std::vector<float> steps(tokens / kTokenBlock + 1, 1.0f / 64);
  const Quantization plan = {tokens, token.data(), low.data(), dither.data(), steps.data()};
  const int64_t words = (tokens + 7) / 8;
  std::vector<uint64_t> words_x(words * n), words_y(words * m);
  quantize(1, {steps_x.data(), Dtype::kFloat32, 0, n, n, nullptr}, plan, words_x.data(), 2);
  quantize(1, {steps_y.data(), Dtype::kFloat32, 0, m, m, nullptr}, plan, words_y.data(), 2);
  l1_cost(1, words, {words_x.data(), Dtype::kU8, 0, n, n, nullptr},
          {words_y.data(), Dtype::kU8, 0, m, m, nullptr}, cost.data(),
          {0, false, 1.0, steps.data(), 2});
  report("l1 bytes", l1_error(steps_x, steps_y, tokens, n, m, cost), 1e-5);
}

// Both gradients of sum_ij g_ij C_ij, against plain loops; some activations are equal.
void check_l1_backward(int64_t tokens, int64_t n, int64_t m) {
  auto x = activations(tokens * n), y = activations(tokens * m);
  for (auto* values : {&x, &y}) {
    for (float& v : *values) v = std::floor(v * 4) / 4;
  }
  const auto g = activations(n * m);
  std::vector<double> by_x(tokens * n), by_y(tokens * m);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        const float apart = x[t * n + i] - y[t * m + j];
        const double term = g[i * m + j] * static_cast<double>((apart > 0) - (apart < 0));
        by_x[t * n + i] += term;
        by_y[t * m + j] -= term;
      }
    }
  }
  const Activations a = {x.data(), Dtype::kFloat32, tokens * n, n, n, nullptr};
  const Activations b = {y.data(), Dtype::kFloat32, tokens * m, m, m, nullptr};
  std::vector<float> found_x(tokens * n), found_y(tokens * m), alone(tokens * n);
  l1_backward(1, tokens, a, b, g.data(), found_x.data(), found_y.data(), {0, 1.0, 2});
  l1_backward(1, tokens, a, b, g.data(), alone.data(), nullptr, {0, 1.0, 1});
  double worst = 0, other = 0;
  for (int64_t i = 0; i < tokens * n; ++i) {
    worst = std::max(worst, std::abs(found_x[i] - by_x[i]));
    other = std::max(other, static_cast<double>(std::abs(found_x[i] - alone[i])));
  }
  for (int64_t j = 0; j < tokens * m; ++j) worst = std::max(worst, std::abs(found_y[j] - by_y[j]));
  report("l1 gradient", worst / std::max(n, m), 1e-6);
  report("l1 gradient, of x alone", other, 0.0);
}

void check_half() {
  // Every finite half and bfloat16 as one token of its own neuron, against 0.
  for (const Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
    const bool half = dtype == Dtype::kFloat16;
    const int mantissa = half ? 10 : 7, bias = half ? 15 : 127, top = half ? 31 : 255;
    std::vector<uint16_t> bits;
    std::vector<double> truth;
    for (int v = 0; v < 65536; ++v) {
      const int exponent = v >> mantissa & top, fraction = v & ((1 << mantissa) - 1);
      if (exponent == top) continue;
      const double scale = std::ldexp(1.0, (exponent == 0 ? 1 : exponent) - bias - mantissa);
      bits.push_back(static_cast<uint16_t>(v));
      truth.push_back((fraction + (exponent == 0 ? 0 : 1 << mantissa)) * scale);
    }
    const int64_t n = static_cast<int64_t>(bits.size());
    const uint16_t zero = 0;
    std::vector<float> cost(n);
    l1_cost(1, 1, {bits.data(), dtype, n, n, n, nullptr}, {&zero, dtype, 1, 1, 1, nullptr},
            cost.data(), {0, false, 1.0, nullptr, 1});
    double worst = 0;
    for (int64_t i = 0; i < n; ++i) worst = std::max(worst, std::abs(cost[i] - truth[i]));
    report(half ? "every float16" : "every bfloat16", worst, 0.0);
  }
}

// What the sweep makes of z: 2^(z + shift).
template <typename T>
std::vector<T> exp2_of(std::vector<T> z, double shift) {
  const size_t count = z.size();
  z.resize((count + 63) / 64 * 64);  // whole vectors
  std::vector<T> zeros(z.size()), out(z.size());
  sinkhorn_kernels<T>().row_exp2(z.size(), static_cast<T>(shift), z.data(), zeros.data(),
                                 out.data());
  out.resize(count);
  return out;
}

template <typename T>
void check_exp2(double smallest, double accepted) {
  const std::string type = sizeof(T) == 4 ? "exp2 float32, " : "exp2 float64, ";
  double worst = 0;
  for (const double shift : {0.0, 7.0, 17.0, -31.0, -300.0, 1048576.0}) {
    std::vector<T> z(64 * 256);
    for (T& v : z) v = static_cast<T>(uniform() * (124 - smallest) + smallest - shift);
    const std::vector<T> out = exp2_of(z, shift);
    for (size_t i = 0; i < z.size(); ++i) {
      const long double exponent = static_cast<long double>(z[i]) + shift;  // of z as rounded
      if (exponent < smallest) continue;
      const long double truth = std::exp2(exponent);
      const T rounded = static_cast<T>(truth);
      const long double ulp = std::nextafter(rounded, T(INFINITY)) - rounded;
      worst = std::max(worst, static_cast<double>(std::abs(out[i] - truth) / ulp));
    }
  }
  report((type + "ulp").c_str(), worst, accepted);
  double low = 0, high = 0, one = 0, below = 0;
  for (const double shift : {0.0, 900.0, -900.0}) {
    const T inf = static_cast<T>(INFINITY), largest = std::numeric_limits<T>::max();
    for (const T v : exp2_of<T>({-inf, -largest, T(-1e6), T(-1e5)}, shift)) {
      low = std::max(low, static_cast<double>(v));
    }
    // Saturated, and finite: a sum of it is seen to be too large.
    const std::vector<T> top = exp2_of<T>({inf, largest, T(1e6), T(1e5)}, shift);
    for (const T v : top) high += v != top[0] || !(v > T(1e37)) || !(v < inf);
    one = std::max(one, std::abs(static_cast<double>(exp2_of<T>({T(-shift)}, shift)[0]) - 1));
    std::vector<T> z(50);
    for (size_t i = 0; i < z.size(); ++i) z[i] = static_cast<T>(-1100 + 77.0 * i / 49 - shift);
    for (const T v : exp2_of(z, shift)) below += !(v >= 0 && v <= std::numeric_limits<T>::min());
  }
  report((type + "far below").c_str(), low, 0.0);
  report((type + "far above, wrong").c_str(), high, 0.0);
  report((type + "of 0").c_str(), one, 0.0);
  report((type + "subnormal, wrong").c_str(), below, 0.0);
}

template <typename T>
void check_sinkhorn(int64_t n, int64_t m, double accepted) {
  std::vector<T> cost(n * m);
  for (T& v : cost) v = static_cast<T>(uniform());
  if (n * m > 1) cost[n * m / 2] = static_cast<T>(INFINITY);
  std::vector<double> a(n, 1.0 / n), b(m, 1.0 / m), f(n), g(m, 0.0);
  double error;
  int64_t n_iter, status;
  const double reg = 0.05;
  sinkhorn<T>({{n, m, cost.data(), m, reg, accepted, true, a.data(), b.data(), f.data(), g.data(),
                &n_iter, &error, &status}},
              5000, 2);
  double rows = 0, columns = 0;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < m; ++j) sum += std::exp(f[i] + g[j] - cost[i * m + j] / reg);
    rows += std::abs(sum - a[i]);
  }
  for (int64_t j = 0; j < m; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += std::exp(f[i] + g[j] - cost[i * m + j] / reg);
    columns += std::abs(sum - b[j]);
  }
  report(sizeof(T) == 4 ? "sinkhorn float32, rows" : "sinkhorn float64, rows", rows, accepted);
  report("                  columns", columns, 2 * accepted);
}

// Costs floor(levels * uniform), or factors' products that no first guess solves; a tenth
// forbidden.
template <typename T>
void check_assignment(int64_t n, int64_t m, double levels, bool products) {
  std::vector<T> score(n * m);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const double value = products ? static_cast<double>(i * j) : std::floor(uniform() * levels);
      score[i * m + j] = static_cast<T>(uniform() < 0.1 && i != j ? INFINITY : value);
    }
  }
  std::vector<int64_t> columns(n), status(1);
  std::vector<double> v(m);
  const AssignmentTask<T> task = {score.data(), m, n, m, 1.0, nullptr, columns.data(), v.data(),
                                  status.data()};
  assignment<T>({task}, 2);
  double gap = 0, misplaced = static_cast<double>(status[0]);
  std::vector<int> used(m);
  for (int64_t i = 0; i < n; ++i) {
    double u = INFINITY;
    for (int64_t j = 0; j < m; ++j) u = std::min(u, score[i * m + j] - v[j]);
    gap += score[i * m + columns[i]] - u;
    misplaced += used[columns[i]]++;
  }
  for (const double dual : v) gap -= dual;
  report(sizeof(T) == 4 ? "assignment float32, gap" : "assignment float64, gap", gap, 0.0);
  report("                    misplaced", misplaced, 0.0);
}

}  // namespace

int main() {
  std::printf("level %s\n", kernels().name);
  check_l1(1, 1, 1);
  check_l1(7, 5, 3);
  check_l1(517, 67, 101);
  check_l1(40, 301, 523);
  check_l1_backward(1, 1, 1);
  check_l1_backward(7, 5, 3);
  check_l1_backward(130, 67, 101);
  check_l1_backward(9, 301, 1030);
  check_half();
  check_exp2<float>(-126, 2);
  check_exp2<double>(-1022, 2);
  check_sinkhorn<float>(1, 1, 1e-6);
  check_sinkhorn<float>(37, 61, 1e-5);
  check_sinkhorn<float>(300, 259, 1e-5);
  check_sinkhorn<double>(130, 67, 1e-11);
  for (const int64_t n : {1, 16, 37, 131}) {
    for (const int64_t more : {0, 1, 50}) {
      check_assignment<float>(n, n + more, 10, false);
      check_assignment<float>(n, n + more, 1e6, false);
      check_assignment<double>(n, n + more, 1e12, false);
      check_assignment<double>(n, n + more, 0, true);
    }
  }
  return failed;
}
