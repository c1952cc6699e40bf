// The rows of one Sinkhorn problem: sweeps over them, with exponentials or without.
//
// Potentials settle long before they converge. So a sweep with exponentials keeps the rows that it
// made, E_ij = 2^(reference_j - k_ij + base_i), and as long as g stays near that reference, later
// sweeps only scale its columns by v_j = 2^(g_j - reference_j):
//     sum_i = sum_j E_ij v_j,    c_j = v_j sum_i (a_i / sum_i) E_ij.
// This is the scaling form of Sinkhorn with absorption (Schmitzer, SIAM J. Sci. Comput. 41, 2019)
// under limits so narrow that no term that float32 would keep in the log domain is lost: E has
// rows that sum to 2^-16 ... 2^17 and v is within 2^-8 ... 2^8, so that an entry that underflowed,
// below 2^-126, can add 2^-94 = 5e-29 of the mass to a column, far below kTinyColumn.
//
// Bound: 15 vector instructions for an exponential, one for its sum and 1.5 for the column sums,
// per vector of entries, or 1 and 1.5 without exponentials: then the memory that E lies in.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.hpp"
#include "sinkhorn_limits.hpp"
#include "stop.hpp"
#include "threads.hpp"

namespace dotresize {

// The rows that one thread owns, with its own copy of everything that columns have.
template <typename T>
class Rows {
 public:
  // keep: whether sweeps without exponentials will be asked for, which need room for all of E.
  Rows(int64_t begin, int64_t end, int64_t stride, bool keep)
      : begin_(begin),
        end_(end),
        stride_(stride),
        e_step_(keep ? stride : 0),
        kernels_(sinkhorn_kernels<T>()),
        k_(make_buffer<T>((end - begin) * stride)),
        e_(make_buffer<T>((keep ? (end - begin + 3) / 4 * 4 : 4) * stride)),
        reference_(make_buffer<T>(stride)),
        v_(make_buffer<T>(stride)),
        c_(make_buffer<T>(stride)),
        base_(end - begin, 0.0),
        sum_(end - begin, 1.0) {
    std::fill_n(c_.get(), stride, T(0));
  }

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

  // The scaled cost, in units of log 2; what is beyond its m columns must be +inf.
  T* k(int64_t i) { return k_.get() + (i - begin_) * stride_; }
  const T* k(int64_t i) const { return k_.get() + (i - begin_) * stride_; }

  // f_i = base_i + log2(a_i / sum_i) of the last sweep.
  double potential(int64_t i, double a) const {
    return a == 0 ? -kInf : std::log2(a / sum_[i - begin_]) + base_[i - begin_];
  }

  // How far g_j is from the reference, in a column that is not closed.
  double drift(int64_t j, double g) const { return std::abs(g - reference_[j]); }

  // Adds the finished rows to `total`. False if sweeps without exponentials may not follow. Where
  // somebody asks to stop, the rest of the rows is left out.
  bool sweep(const double* a, const T* g, double* total, Stop& stop) {
    std::copy_n(g, stride_, reference_.get());
    std::fill_n(v_.get(), stride_, T(1));
    // A closed column stays closed: 2^(-inf - 0) = 0.
    for (int64_t j = 0; j < stride_; ++j) {
      if (reference_[j] == -kInf) reference_[j] = 0;
    }
    bool settled = true;
    for (int64_t i = begin_; i < end_; i += 4) {
      T weight[4] = {};
      for (int64_t r = i; r < i + 4; ++r) {
        if (r < end_ && a[r] > 0) {
          weight[r - i] = exponentials(a[r], g, r, e(i) + (r - i) * stride_);
          settled &= std::abs(exponent(sum_[r - begin_])) <= kSettled;
        } else {
          std::fill_n(e(i) + (r - i) * stride_, stride_, T(0));
        }
      }
      kernels_.add_four_rows(stride_, weight, e(i), stride_, c_.get());
      if ((i + 4 - begin_) % kRowBlock == 0) {
        flush(total);
        if (stop.asked()) break;
      }
    }
    flush(total);
    return settled;
  }

  // The same without exponentials, for g near the reference. Each step adds the four rows before.
  void sweep_scaled(const double* a, const T* g, double* total, Stop& stop) {
    if (begin_ == end_) return;
    kernels_.row_exp2(stride_, T(0), g, reference_.get(), v_.get());
    T weight[4] = {};
    const T* before = e_.get();
    for (int64_t i = begin_; i < end_; i += 4) {
      T sums[4];
      kernels_.dot_and_add_four_rows(stride_, v_.get(), e(i), stride_, sums, weight, before,
                                     c_.get());
      if ((i - begin_) % kRowBlock == 0) {
        flush(total);
        if (stop.asked()) return;
      }
      std::fill_n(weight, 4, T(0));
      for (int64_t r = i; r < std::min(i + 4, end_); ++r) {
        if (a[r] == 0) continue;
        sum_[r - begin_] = sums[r - i];
        weight[r - i] = static_cast<T>(a[r] / sums[r - i]);
      }
      before = e(i);
    }
    kernels_.add_four_rows(stride_, weight, before, stride_, c_.get());
    flush(total);
  }

 private:
  // The group of four rows that begins with i.
  T* e(int64_t i) { return e_.get() + (i - begin_) * e_step_; }

  // The block of column sums joins the total, and begins again.
  void flush(double* total) { kernels_.join_columns(stride_, v_.get(), c_.get(), total); }

  // Makes a row of E, and returns the factor that turns it into one of the plan.
  T exponentials(double a, const T* g, int64_t i, T* row) {
    double &base = base_[i - begin_], &sum = sum_[i - begin_];
    // The shift under which the previous sum would have been between 1 and 2.
    base = std::clamp(base - exponent(sum), -kLargestShift, kLargestShift);
    sum = kernels_.row_exp2(stride_, static_cast<T>(base), g, k(i), row);
    if (!(sum > kSafeLow && sum < kSafeHigh)) {
      base = -std::nearbyint(kernels_.row_max(stride_, g, k(i)));
      for (int64_t j = 0; j < stride_; ++j) row[j] = g[j] + static_cast<T>(base);
      sum = kernels_.row_exp2(stride_, T(0), row, k(i), row);
    }
    return static_cast<T>(a / sum);
  }

  const int64_t begin_, end_, stride_, e_step_;
  const SinkhornKernels<T>& kernels_;
  Buffer<T> k_, e_, reference_, v_;
  Buffer<T> c_;  // zero between sweeps
  // The row's integer shift, and its sum under that.
  std::vector<double> base_, sum_;
};

}  // namespace dotresize
