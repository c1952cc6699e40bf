// Log-domain Sinkhorn on a CPU: one read and one exponential per entry and iteration.
//
// With k = cost / reg, for row i:    z_j = g_j - k_ij,   f_i = log a_i - logsumexp_j z_j,
// and exp(f_i + z_j) is the finished row of the plan, already at hand: it is added into the column
// sums c, and after the sweep g_j += log b_j - log c_j. Peers read the cost twice and take two
// exponentials, one for each log-sum-exp.
//
// The exponent is shifted by the row's previous potential instead of by its maximum, which saves a
// pass; a row whose sum leaves the safe range is redone with the maximum. The column update has
// no such shift and may underflow while g is far off (small reg, a far target): columns below
// kTinyColumn are redone by a shifted log-sum-exp.
//
// k is kept as a copy whose row and column minima were subtracted before the division, so that at
// small reg float32 spends its digits where the plan is; the minima return with the potentials.
// Bound: 17 vector instructions for the exponential and about 4 more per vector of entries.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.hpp"
#include "sinkhorn.hpp"
#include "threads.hpp"

namespace dotresize {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Row sums outside are redone with a maximum shift; far from float32's limits on both sides.
constexpr double kSafeLow = 1e-15, kSafeHigh = 1e15;
// Rows whose column sums are added in T before they join a double: a single float32 sum over 1e6
// rows is wrong in the third digit.
constexpr int64_t kRowBlock = 256;
// A column sum below this may have lost terms that underflowed.
constexpr double kTinyColumn = 1e-25;
// One problem and the threads that work on it. `sweep` and `finish` are called by every member of
// the team with its index; the barriers between them are the caller's.
template <typename T>
class Problem {
 public:
  Problem(const SinkhornProblems& p, int64_t index, int team)
      : n_(p.n),
        m_(p.m),
        team_(team),
        kernels_(sinkhorn_kernels<T>()),
        reg_(p.reg[index]),
        a_(p.a + index * p.n),
        b_(p.b + index * p.m),
        cost_(static_cast<const T*>(p.cost) + index * p.n * p.m),
        f_out_(p.f + index * p.n),
        g_out_(p.g + index * p.m) {
    stride_ = (m_ + kernels_.lanes - 1) / kernels_.lanes * kernels_.lanes;
    k_ = make_buffer<T>(n_ * stride_);
    g_ = make_buffer<T>(stride_);
    columns_ = make_buffer<double>(team * stride_);
    rows_ = make_buffer<T>(team * 5 * stride_);
    f_.assign(n_, T(0));
    error_.assign(team, 0.0);
    g_sum_.assign(team, 0.0);
    for (int64_t j = 0; j < m_; ++j) used_columns_ += b_[j] > 0;
    prepare();
  }

  Status state() const { return state_; }

  // Row update and column sums of this member's share of the rows.
  void sweep(int member) {
    T* e = rows_.get() + member * 5 * stride_;
    T* c = e + 4 * stride_;
    double* total = columns_.get() + member * stride_;
    std::fill(total, total + stride_, 0.0);
    std::fill(c, c + stride_, T(0));
    const int64_t begin = n_ * member / team_, end = n_ * (member + 1) / team_;
    for (int64_t i = begin; i < end; i += 4) {
      T weight[4] = {0, 0, 0, 0};
      const int64_t rows = std::min<int64_t>(4, end - i);
      for (int64_t r = 0; r < rows; ++r) weight[r] = update_row(i + r, e + r * stride_);
      for (int64_t r = rows; r < 4; ++r) std::fill_n(e + r * stride_, stride_, T(0));
      kernels_.add_four_rows(stride_, weight, e, stride_, c);
      if ((i - begin) % kRowBlock == kRowBlock - 4 || i + 4 >= end) {
        for (int64_t j = 0; j < stride_; ++j) {
          total[j] += c[j];
          c[j] = 0;
        }
      }
    }
  }

  // This member's share of the columns: totals over the team, their distance from b, and the sum
  // of g, which is kept centred: its constant is free, and digits are lost far from 0.
  void reduce(int member) {
    double error = 0, g_sum = 0;
    double* total = columns_.get();
    for (int64_t j = first_column(member); j < first_column(member + 1); ++j) {
      for (int other = 1; other < team_; ++other) total[j] += columns_[other * stride_ + j];
      error += std::abs(total[j] - b_[j]);
      if (b_[j] > 0) g_sum += g_[j];
    }
    error_[member] = error;
    g_sum_[member] = g_sum;
  }

  double marginal_error() const {
    double total = 0;
    for (double part : error_) total += part;
    return total;
  }

  void update_columns(int member) {
    const double* c = columns_.get();
    double centre = 0;
    for (double part : g_sum_) centre += part / used_columns_;
    for (int64_t j = first_column(member); j < first_column(member + 1); ++j) {
      if (b_[j] == 0) continue;  // stays at -inf
      const double log_sum = c[j] > kTinyColumn ? std::log(c[j]) - g_[j] : column_log_sum(j);
      g_[j] = static_cast<T>(std::log(b_[j]) - log_sum - centre);
    }
  }

  // Potentials of the caller's cost: the subtracted minima come back.
  void write_potentials() {
    for (int64_t i = 0; i < n_; ++i) f_out_[i] = f_[i] + row_min_[i] / reg_;
    for (int64_t j = 0; j < m_; ++j) g_out_[j] = g_[j] + column_min_[j] / reg_;
  }

  void fill_potentials(double value) {
    std::fill_n(f_out_, n_, value);
    std::fill_n(g_out_, m_, value);
  }

  double mass() const {
    double total = 0;
    for (int64_t i = 0; i < n_; ++i) total += a_[i];
    return total;
  }

 private:
  int64_t first_column(int member) const { return m_ * member / team_; }

  // Returns the factor that turns e into the row of the plan.
  T update_row(int64_t i, T* e) {
    if (a_[i] == 0) {
      std::fill_n(e, stride_, T(0));
      return 0;
    }
    const T* k = k_.get() + i * stride_;
    T shift = f_[i];
    double sum = kernels_.row_exp(stride_, shift, g_.get(), k, e);
    const double relative = sum / a_[i];
    if (!(relative > kSafeLow && relative < kSafeHigh)) {
      shift = -kernels_.row_max(stride_, g_.get(), k);
      sum = kernels_.row_exp(stride_, shift, g_.get(), k, e);
    }
    f_[i] = static_cast<T>(std::log(a_[i]) - std::log(sum) + shift);
    return static_cast<T>(a_[i] / sum);
  }

  double column_log_sum(int64_t j) const {
    double best = -kInf;
    for (int64_t i = 0; i < n_; ++i) {
      best = std::max(best, static_cast<double>(f_[i]) - k_[i * stride_ + j]);
    }
    double sum = 0;
    for (int64_t i = 0; i < n_; ++i) {
      sum += std::exp(static_cast<double>(f_[i]) - k_[i * stride_ + j] - best);
    }
    return best + std::log(sum);
  }

  // Minima over finite entries; columns and rows of mass zero are out of the problem.
  void prepare() {
    row_min_.assign(n_, kInf);
    column_min_.assign(m_, kInf);
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < m_; ++j) {
        const T value = cost_[i * m_ + j];
        if (std::isnan(value) || value == -std::numeric_limits<T>::infinity()) {
          state_ = Status::kInvalid;
          return;
        }
        if (b_[j] > 0) row_min_[i] = std::min<double>(row_min_[i], value);
      }
      if (row_min_[i] == kInf) {
        if (a_[i] > 0) state_ = Status::kInfeasible;
        row_min_[i] = 0;
      }
    }
    for (int64_t i = 0; i < n_; ++i) {
      if (a_[i] == 0) continue;
      for (int64_t j = 0; j < m_; ++j) {
        column_min_[j] = std::min<double>(column_min_[j], cost_[i * m_ + j] - row_min_[i]);
      }
    }
    for (int64_t j = 0; j < m_; ++j) {
      if (column_min_[j] == kInf) {
        if (b_[j] > 0) state_ = Status::kInfeasible;
        column_min_[j] = 0;
      }
    }
    if (state_ == Status::kInfeasible) return;
    for (int64_t i = 0; i < n_; ++i) {
      T* k = k_.get() + i * stride_;
      for (int64_t j = 0; j < m_; ++j) {
        k[j] = static_cast<T>((cost_[i * m_ + j] - row_min_[i] - column_min_[j]) / reg_);
      }
      std::fill(k + m_, k + stride_, std::numeric_limits<T>::infinity());
      if (a_[i] == 0) f_[i] = -std::numeric_limits<T>::infinity();
    }
    for (int64_t j = 0; j < m_; ++j) {
      const double start = g_out_[j] - column_min_[j] / reg_;
      g_[j] = b_[j] == 0 ? -std::numeric_limits<T>::infinity() : static_cast<T>(start);
    }
    std::fill(g_.get() + m_, g_.get() + stride_, T(0));
  }

  const int64_t n_, m_;
  const int team_;
  const SinkhornKernels<T>& kernels_;
  const double reg_;
  const double *a_, *b_;
  const T* cost_;
  double *f_out_, *g_out_;
  int64_t stride_;
  Buffer<T> k_, g_, rows_;  // rows_: per member four rows of the plan, and a block of column sums
  Buffer<double> columns_;
  std::vector<T> f_;
  std::vector<double> row_min_, column_min_, error_, g_sum_;
  int64_t used_columns_ = 0;
  Status state_ = Status::kMaxIter;
};

}  // namespace dotresize
