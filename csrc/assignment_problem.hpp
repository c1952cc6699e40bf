// One linear assignment problem by shortest augmenting paths, after Jonker and Volgenant.
//
// min sum_i c[i, x_i] has the dual max sum u + sum v with u_i + v_j <= c_ij. A set of column duals
// v is kept, u_i = min_j c_ij - v_j follows, and every row that has a column has one where that
// minimum is taken. Column minima are the first v; augmenting row reduction (a free row takes its
// best column and lowers that column's dual until its second best is as good) places most rows;
// shortest paths place the others, one at a time.
//
// With more columns than rows some stay free, and the dual has v <= 0, and 0 for a free column. So
// the first v is 0: both steps lower duals of columns that are taken then, and stay so.
//
// The duals of columns only fall, so c_ij - v_j only grows: a lower bound of it, once computed,
// holds to the end. One float per row and block of 16 columns is kept, n m / 4 bytes. A later visit
// of the row reads the blocks that may hold one of its two smallest entries, or a path shorter than
// the best one known to a free column, and skips the others, nearly all of them where paths are
// short. Everything read is renewed at the same time.
//
// Costs are scaled by a power of two so that none exceeds 1; sums and differences of integers stay
// exact that way, and nothing overflows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "assignment.hpp"
#include "kernels.hpp"
#include "stop.hpp"
#include "threads.hpp"

namespace dotresize {

// Steps of row reduction per row. Between 4 and 16 the time hardly changed, at 1 or 2 it doubled;
// there must be a limit, as two rows may outbid each other by ever so little.
constexpr int64_t kStepsPerRow = 8;
// How often rows that were displaced without a price rise may try again.
constexpr int kReductionPasses = 6;
// A problem of which this share of rows is left is hard: its duals are improved first, by row
// reduction with extra rises of these shares of the costs' spread, as in an auction. Timings
// of two unrelated sets of 1536 neurons and of costs i * j chose the shares.
constexpr double kHardShare = 0.1;
constexpr double kRises[] = {3e-2, 6e-3, 1.2e-3};
constexpr int64_t kRiseStepsPerRow = 64;
// Given duals and rises are rounded to this, so that they are exact in sums with integer costs, and
// where all costs are integers to integers, which have the same ties. Given duals are kept within
// a range in which they are of use.
constexpr double kDualStep = 0x1p-30, kLargestDual = 8;

template <typename T>
class AssignmentProblem {
 public:
  explicit AssignmentProblem(Stop& stop) : stop_(stop), kernels_(assignment_kernels<T>()) {}

  // May be called for one problem after the other. Whoever asks to stop gets no assignment, and
  // whatever status: the operator throws then.
  AssignmentStatus solve(const AssignmentTask<T>& task) {
    p_ = task;
    make_room();
    const AssignmentStatus state = prepare();
    if (state != AssignmentStatus::kSolved) return state;
    if (!place_rows()) return AssignmentStatus::kInfeasible;
    for (int64_t i = 0; i < n_; ++i) {
      if (columns_[i] < 0 && !augment(i)) return AssignmentStatus::kInfeasible;
    }
    std::copy(columns_.begin(), columns_.end(), p_.columns);
    for (int64_t j = 0; j < m_; ++j) p_.v[j] = v_[j] / std::abs(scale_);
    return AssignmentStatus::kSolved;
  }

 private:
  void make_room() {
    if (n_ == p_.n && m_ == p_.m) return;
    n_ = p_.n;
    m_ = p_.m;
    blocks_ = (m_ + kColumnBlock - 1) / kColumnBlock;
    v_.resize(blocks_ * kColumnBlock);
    distance_.resize(v_.size());
    nearest_.resize((blocks_ + kColumnBlock - 1) / kColumnBlock * kColumnBlock);
    taken_.resize(v_.size());
    parent_.resize(v_.size());
    columns_.resize(n_);
    rows_.resize(m_);
    place_.resize(m_);
    places_.resize(nearest_.size());
    bounds_.reset();  // before there is another
    bounds_ = make_buffer<float>(n_ * nearest_.size());
  }

  // Steps over a row are short, and a look at the clock is not nothing beside one.
  bool stops() { return ++steps_ % 64 == 0 && stop_.asked(); }

  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  bool square() const { return n_ == m_; }
  AssignmentRow<T> row(int64_t i) const { return {p_.score + i * p_.row_stride, m_, scale_}; }
  double cost(int64_t i, int64_t j) const { return scale_ * p_.score[i * p_.row_stride + j]; }
  float* bounds(int64_t i) { return bounds_.get() + i * nearest_.size(); }

  // Checks the costs, and sets the scale, the first duals, no assignment and no bounds.
  AssignmentStatus prepare() {
    scale_ = p_.sign;
    CostSurvey survey = {-kInfinity, true, true};
    std::fill(v_.begin(), v_.end(), kInfinity);
    for (int64_t i = 0; i < n_ && !stops(); ++i) {
      kernels_.survey_row(row(i), v_.data(), &survey);
    }
    if (!survey.valid) return AssignmentStatus::kInvalid;
    const auto [low, high] = std::minmax_element(v_.begin(), v_.begin() + m_);
    // A square problem needs an allowed entry in every column, any other one at least in all.
    if ((square() ? *high : *low) == kInfinity) return AssignmentStatus::kInfeasible;
    const double largest = std::max(std::abs(*low), std::abs(survey.highest));
    // The limit keeps the scale itself a normal number.
    const int exponent = largest == 0 ? 0 : std::max(-1000, std::ilogb(largest) + 1);
    scale_ = std::ldexp(p_.sign, -exponent);
    const double scale = std::abs(scale_);
    spread_ = survey.highest * scale - *low * scale;
    step_ = survey.whole ? std::max(kDualStep, scale) : kDualStep;
    if (!square()) std::fill(v_.begin(), v_.end(), 0.0);
    for (int64_t j = 0; j < m_; ++j) {
      const double given = p_.start == nullptr ? 0 : p_.start[j] * scale;
      v_[j] = p_.start == nullptr
                  ? v_[j] * scale
                  : std::clamp(std::nearbyint(given / step_) * step_, -kLargestDual, kLargestDual);
    }
    std::fill(v_.begin() + m_, v_.end(), 0.0);
    for (int64_t i = 0; i < n_; ++i) {
      const auto infinity = std::numeric_limits<float>::infinity();
      std::fill_n(bounds(i), blocks_, -infinity);
      std::fill(bounds(i) + blocks_, bounds(i) + nearest_.size(), infinity);
    }
    release_all();
    return AssignmentStatus::kSolved;
  }

  void release_all() {
    std::fill(columns_.begin(), columns_.end(), -1);
    std::fill(rows_.begin(), rows_.end(), -1);
    std::fill(taken_.begin(), taken_.end(), 0.0);
    free_.resize(m_);
    for (int64_t j = 0; j < m_; ++j) free_[j] = place_[j] = j;
  }

  // All rows that can be placed without a search; false if some row has no allowed column.
  bool place_rows() {
    if (!reduce_rows(0, kStepsPerRow)) return false;
    // Rises would lower duals of columns that stay free.
    if (!square() || free_.size() <= kHardShare * n_) return true;
    for (const double share : kRises) {
      const double rise = std::floor(share * spread_ / step_) * step_;
      if (rise == 0) continue;
      // What it assigns is optimal only up to the rise; its duals are what is wanted.
      if (!reduce_rows(rise, kRiseStepsPerRow)) return false;
      release_all();
    }
    return reduce_rows(0, kStepsPerRow);
  }

  // Augmenting row reduction, with an extra fall of each column's dual by `rise` (the column's
  // price is minus its dual).
  bool reduce_rows(double rise, int64_t steps_per_row) {
    std::vector<int64_t> waiting, displaced;
    for (int64_t i = 0; i < n_; ++i) {
      if (columns_[i] < 0) waiting.push_back(i);
    }
    int64_t steps = steps_per_row * n_;
    for (int pass = 0; pass < kReductionPasses && !waiting.empty(); ++pass) {
      displaced.clear();
      for (int64_t i : waiting) {
        for (; i >= 0 && steps > 0; --steps) {
          if (stops()) return false;
          const TwoSmallest two = smallest(i);
          if (two.column < 0) return false;
          const bool rises = lower_dual(i, two, rise);
          const int64_t j = rises ? two.column : free_alternative(i, two);
          const int64_t before = rows_[j];
          give(i, j);
          if (before >= 0 && !rises) displaced.push_back(before);
          i = rises ? before : -1;
        }
      }
      std::swap(waiting, displaced);
    }
    return true;
  }

  TwoSmallest smallest(int64_t i) {
    const bool seen = bounds(i)[0] > -std::numeric_limits<float>::infinity();
    return seen ? kernels_.scan_again(row(i), v_.data(), bounds(i), places_.data())
                : kernels_.scan_all(row(i), v_.data(), bounds(i));
  }

  // Lowers the dual of the row's best column until the second best is as good, and by the rise;
  // false if nothing changes.
  bool lower_dual(int64_t i, const TwoSmallest& two, double rise) {
    if (two.second == kInfinity) return false;
    const double lower = cost(i, two.column) - two.second - rise;
    if (!(lower < v_[two.column])) return false;
    v_[two.column] = lower;
    return true;
  }

  // Of the columns that tie for the row's best, a free one if there is one.
  int64_t free_alternative(int64_t i, const TwoSmallest& two) const {
    if (rows_[two.column] < 0 || two.first < two.second) return two.column;
    for (const int64_t j : free_) {
      if (cost(i, j) - v_[j] == two.first) return j;
    }
    return two.column;
  }

  // Row i gets column j; whoever had it is free.
  void give(int64_t i, int64_t j) {
    const int64_t before = rows_[j];
    if (before >= 0) {
      columns_[before] = -1;
    } else {
      take_from_free(j);
    }
    rows_[j] = i;
    columns_[i] = j;
  }

  void take_from_free(int64_t j) {
    taken_[j] = kInfinity;
    place_[free_.back()] = place_[j];
    free_[place_[j]] = free_.back();
    free_.pop_back();
  }

  // Dijkstra from a free row to the nearest free column over costs c_ij - u_i - v_j >= 0, then the
  // exchange along the path. False if no free column can be reached.
  bool augment(int64_t start) {
    std::fill(distance_.begin(), distance_.end(), kInfinity);
    std::fill(nearest_.begin(), nearest_.end(), kInfinity);
    settled_.clear();
    const AssignmentTree tree = {distance_.data(), parent_.data(), taken_.data(), nearest_.data(),
                                 places_.data()};
    double shortest = kInfinity, base = 0;
    for (int64_t i = start;;) {
      if (stops()) return false;
      shortest = kernels_.relax_row(row(i), i, base, shortest, v_.data(), bounds(i), tree);
      const NearestColumn next = kernels_.nearest_column(tree, blocks_);
      if (next.distance >= shortest) break;  // also where both are infinite
      settle(next);
      i = rows_[next.column];
      base = next.distance - (cost(i, next.column) - v_[next.column]);
    }
    if (shortest == kInfinity) return false;
    for (const NearestColumn& s : settled_) v_[s.column] += s.distance - shortest;
    int64_t j = *std::find_if(free_.begin(), free_.end(),
                              [&](int64_t free) { return distance_[free] == shortest; });
    take_from_free(j);
    while (j >= 0) {
      const int64_t i = parent_[j];
      rows_[j] = i;
      std::swap(columns_[i], j);
    }
    return true;
  }

  void settle(const NearestColumn& column) {
    settled_.push_back(column);
    distance_[column.column] = std::numeric_limits<double>::quiet_NaN();
    const int64_t block = column.column / kColumnBlock;
    double rest = kInfinity;
    for (int64_t j = block * kColumnBlock; j < (block + 1) * kColumnBlock; ++j) {
      rest = distance_[j] < rest ? distance_[j] : rest;
    }
    nearest_[block] = rest;
  }

  AssignmentTask<T> p_ = {};
  Stop& stop_;
  int64_t steps_ = 0;
  int64_t n_ = 0, m_ = 0, blocks_ = 0;
  const AssignmentKernels<T>& kernels_;
  double scale_ = 1, spread_ = 0, step_ = 0;
  std::vector<double> v_, distance_, nearest_, taken_;
  std::vector<int64_t> parent_;
  std::vector<int64_t> columns_, rows_;  // of each row, of each column; -1: free
  std::vector<int64_t> free_, place_;    // free columns; where each of them is in the list
  std::vector<NearestColumn> settled_;
  std::vector<int32_t> places_;
  Buffer<float> bounds_;
};

}  // namespace dotresize
