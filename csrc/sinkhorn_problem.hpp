// Log-domain Sinkhorn on a CPU: one read and at most one exponential per entry and iteration.
//
// With k = cost / reg, for row i:    z_j = g_j - k_ij,   f_i = log a_i - logsumexp_j z_j,
// and exp(f_i + z_j) is the finished row of the plan, already at hand: it is added into the column
// sums c, and after the sweep g_j += log b_j - log c_j. Peers read the cost twice and take two
// exponentials, one for each log-sum-exp.
//
// Everything is kept in units of log 2: powers of two need no multiplication before and no
// two-step reduction inside. The exponent is shifted by the row's previous potential, rounded to an
// integer, instead of by its maximum, which saves a pass; a row whose sum leaves the safe range is
// redone with the maximum. The column update has no such shift and may underflow while g is far
// off (small reg, a far target): columns below kTinyColumn are redone by a shifted log-sum-exp.
//
// k is a copy whose row and column minima were subtracted before the division, so that at small reg
// float32 spends its digits where the plan is; the minima return with the potentials.
//
// Most sweeps need no exponential at all: see sinkhorn_rows.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.hpp"
#include "momentum.hpp"
#include "sinkhorn.hpp"
#include "sinkhorn_limits.hpp"
#include "sinkhorn_rows.hpp"
#include "stop.hpp"
#include "threads.hpp"

namespace dotresize {

// One problem and the team of threads that works on it: each member owns a share of the rows and
// its own copy of g, which all of them update alike from the same column sums. The calls of an
// iteration, with the barriers between them, are in sinkhorn.cpp.
template <typename T>
class Problem {
 public:
  Problem(const SinkhornProblem& p, int team, Stop& stop)
      : stop_(stop),
        n_(p.n),
        m_(p.m),
        team_(team),
        kernels_(sinkhorn_kernels<T>()),
        reg_(p.reg),
        momentum_(p.momentum),
        a_(p.a),
        cost_(static_cast<const T*>(p.cost)),
        cost_stride_(p.stride),
        f_out_(p.f),
        g_out_(p.g),
        stride_((m_ + kernels_.lanes - 1) / kernels_.lanes * kernels_.lanes),
        b_(stride_, 0.0),
        lowest_(stride_, -kInf),
        row_min_(n_, 0.0),
        column_min_(m_, kInf),
        log_sum_(m_, 0.0),
        members_(team) {
    for (int64_t j = 0; j < m_; ++j) {
      b_[j] = p.b[j];
      if (b_[j] == 0) continue;
      lowest_[j] = b_[j] < kSubnormal ? kInf : std::clamp(1e-3 * b_[j], kLostColumn, kTinyColumn);
      ++used_columns_;
    }
    scalable_ = std::none_of(b_.begin(), b_.end(), [](double b) { return b > 0 && b < kFaint; });
    for (int index = 0; index < team_; ++index) {
      Member& member = members_[index];
      member.rows = std::make_unique<Rows<T>>(n_ * index / team_, n_ * (index + 1) / team_, stride_,
                                              scalable_);
      member.g = make_buffer<T>(stride_);
      if (momentum_) member.before = make_buffer<double>(m_);
      for (auto& columns : member.columns) columns = make_buffer<double>(stride_);
      member.total = make_buffer<double>(stride_);
      member.log_quotient = make_buffer<double>(stride_);
      member.f = make_buffer<double>(n_);
    }
  }

  // Row minima of this member's rows over columns of positive mass, and what is left of each column
  // above them. A barrier belongs after it.
  void scan(int index) {
    Member& member = members_[index];
    T* closed = member.g.get();
    double* minima = member.columns[0].get();
    for (int64_t j = 0; j < m_; ++j) {
      closed[j] = b_[j] > 0 ? T(0) : std::numeric_limits<T>::infinity();
      minima[j] = kInf;
    }
    for (int64_t i = member.rows->begin(); i < member.rows->end() && !stop_.asked(); ++i) {
      T minimum;
      if (!kernels_.row_minimum(m_, cost_ + i * cost_stride_, closed, &minimum)) {
        member.state = Status::kInvalid;
        return;
      }
      if (minimum == std::numeric_limits<T>::infinity()) {
        if (a_[i] > 0) member.state = Status::kInfeasible;
        minimum = 0;
      }
      row_min_[i] = minimum;
      if (a_[i] > 0) kernels_.column_minima(m_, cost_ + i * cost_stride_, minimum, minima);
    }
  }

  // This member's share of the column minima. A barrier belongs after it.
  void settle(int index) {
    for (int64_t j = m_ * index / team_; j < m_ * (index + 1) / team_; ++j) {
      for (const Member& member : members_) {
        column_min_[j] = std::min(column_min_[j], member.columns[0][j]);
      }
      if (column_min_[j] == kInf) {
        if (b_[j] > 0 && members_[index].state == Status::kMaxIter) {
          members_[index].state = Status::kInfeasible;
        }
        column_min_[j] = 0;
      }
    }
  }

  // kMaxIter, or why the problem cannot be solved.
  Status state() const {
    Status worst = Status::kMaxIter;
    for (const Member& member : members_) worst = std::max(worst, member.state);
    return worst;
  }

  // The scaled costs of this member's rows, and its g.
  void scale(int index) {
    const double per_reg = 1.0 / (reg_ * kLn2);
    Rows<T>& rows = *members_[index].rows;
    for (int64_t i = rows.begin(); i < rows.end() && !stop_.asked(); ++i) {
      T* k = rows.k(i);
      kernels_.scale_row(m_, cost_ + i * cost_stride_, row_min_[i], column_min_.data(), per_reg, k);
      std::fill(k + m_, k + stride_, std::numeric_limits<T>::infinity());
    }
    T* g = members_[index].g.get();
    for (int64_t j = 0; j < m_; ++j) {
      const double start = g_out_[j] / kLn2 - column_min_[j] * per_reg;
      g[j] = b_[j] == 0 ? -std::numeric_limits<T>::infinity() : static_cast<T>(start);
      if (momentum_) members_[index].before[j] = g[j];
      if (b_[j] > 0) members_[index].centre += g[j] / used_columns_;
    }
    std::fill(g + m_, g + stride_, T(0));
  }

  // Row update and column sums of this member's rows. Consecutive sweeps write to different
  // halves of `columns` and `settled`, so that one barrier, after it, is enough.
  void sweep(int index, int64_t iteration) {
    Member& member = members_[index];
    double* total = member.columns[iteration % 2].get();
    std::fill(total, total + stride_, 0.0);
    if (may_scale(member, iteration)) {
      member.rows->sweep_scaled(a_, member.g.get(), total, stop_);
      member.settled[iteration % 2] = true;
    } else {
      member.settled[iteration % 2] = member.rows->sweep(a_, member.g.get(), total, stop_);
    }
    // One member decides for all, before the barrier: they must leave in the same iteration.
    if (index == 0) stopped_[iteration % 2] = stop_.asked();
  }

  // Whether somebody had asked to stop by the end of this iteration's sweep.
  bool stopped(int64_t iteration) const { return stopped_[iteration % 2]; }

  // The column sums over the team, in the same order for every member, and their distance from b.
  double column_error(int index, int64_t iteration) {
    double* total = members_[index].total.get();
    std::copy_n(members_[0].columns[iteration % 2].get(), stride_, total);
    for (int other = 1; other < team_; ++other) {
      const double* columns = members_[other].columns[iteration % 2].get();
      for (int64_t j = 0; j < stride_; ++j) total[j] += columns[j];
    }
    return kernels_.distance(stride_, total, b_.data());
  }

  // Whether some column has underflowed; then `redo_columns` and a barrier come first.
  bool has_tiny_columns(int index) const {
    const double* total = members_[index].total.get();
    bool tiny = false;
    for (int64_t j = 0; j < m_; ++j) tiny |= underflowed(total[j], j);
    return tiny;
  }

  // This member's share of the columns that underflowed: log2 sum_i 2^(f_i - k_ij).
  void redo_columns(int index) {
    const double* total = members_[index].total.get();
    double* f = members_[index].f.get();
    const auto each_row = [&](auto body) {
      for (const Member& owner : members_) {
        for (int64_t i = owner.rows->begin(); i < owner.rows->end(); ++i) {
          body(i, owner.rows->k(i));
        }
      }
    };
    for (const Member& owner : members_) write_row_potentials(*owner.rows, f);
    for (int64_t j = m_ * index / team_; j < m_ * (index + 1) / team_; ++j) {
      if (!underflowed(total[j], j)) continue;
      double best = -kInf, sum = 0;
      each_row([&](int64_t i, const T* k) { best = std::max(best, f[i] - k[j]); });
      each_row([&](int64_t i, const T* k) { sum += std::exp2(f[i] - k[j] - best); });
      log_sum_[j] = best + std::log2(sum);
    }
  }

  // g is kept centred: its constant is free, and digits are lost far from 0.
  void update_columns(int index, double error) {
    Member& member = members_[index];
    T* g = member.g.get();
    const double* total = member.total.get();
    double* log_quotient = member.log_quotient.get();
    kernels_.log2_quotients(stride_, b_.data(), total, log_quotient);
    const double factor = momentum_ ? member.momentum.next_factor() : 0.0;
    const double centre = member.centre;
    double next_centre = 0, inner = 0, largest = 0, drift = 0;
    for (int64_t j = 0; j < m_; ++j) {
      if (b_[j] == 0) continue;  // stays at -inf
      const double update =
          underflowed(total[j], j) ? std::log2(b_[j]) - log_sum_[j] : g[j] + log_quotient[j];
      double next = update - centre;
      if (momentum_) {
        const double change = next - member.before[j];
        inner += b_[j] * (update - g[j]) * change;
        member.before[j] = next;
        next += factor * change;
      }
      g[j] = static_cast<T>(next);
      next_centre += g[j];
      largest = std::max(largest, std::abs(next));
      drift = std::max(drift, member.rows->drift(j, next));
    }
    member.centre = next_centre / used_columns_;
    member.drift = drift;
    member.momentum.remember(error, inner, largest > kFarPotential<T>);
  }

  // Potentials of the caller's cost: the subtracted minima come back.
  void write_potentials() {
    const T* g = members_[0].g.get();
    for (const Member& owner : members_) write_row_potentials(*owner.rows, f_out_);
    for (int64_t i = 0; i < n_; ++i) f_out_[i] = f_out_[i] * kLn2 + row_min_[i] / reg_;
    for (int64_t j = 0; j < m_; ++j) g_out_[j] = g[j] * kLn2 + column_min_[j] / reg_;
  }

  void fill_potentials(double value) {
    std::fill_n(f_out_, n_, value);
    std::fill_n(g_out_, m_, value);
  }

  double mass() const { return std::accumulate(a_, a_ + n_, 0.0); }

 private:
  struct Member {
    std::unique_ptr<Rows<T>> rows;
    Buffer<T> g;
    Buffer<double> columns[2], total, log_quotient, f, before;
    double centre = 0, drift = kInf;  // the mean of g, and its distance from the rows' reference
    bool settled[2] = {};
    Momentum momentum;
    Status state = Status::kMaxIter;
  };

  // The same answer for every member: all have the same g, and look at everybody's rows.
  bool may_scale(const Member& member, int64_t iteration) const {
    if (!scalable_ || !(member.drift <= kDrift)) return false;
    return std::all_of(members_.begin(), members_.end(),
                       [&](const Member& other) { return other.settled[(iteration + 1) % 2]; });
  }

  void write_row_potentials(const Rows<T>& rows, double* f) const {
    for (int64_t i = rows.begin(); i < rows.end(); ++i) f[i] = rows.potential(i, a_[i]);
  }

  bool underflowed(double sum, int64_t j) const { return !(sum > lowest_[j]); }

  Stop& stop_;
  bool stopped_[2] = {};
  const int64_t n_, m_;
  const int team_;
  const SinkhornKernels<T>& kernels_;
  const double reg_;
  const bool momentum_;
  const double* a_;
  const T* cost_;
  const int64_t cost_stride_;
  double *f_out_, *g_out_;
  const int64_t stride_;
  // The columns' masses, and what their sums must exceed or be redone: -inf where there is none.
  std::vector<double> b_, lowest_;
  std::vector<double> row_min_, column_min_, log_sum_;
  std::vector<Member> members_;
  int64_t used_columns_ = 0;
  bool scalable_ = false;
};

}  // namespace dotresize
