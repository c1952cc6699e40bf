// Batched linear assignment on a CPU; the method is in assignment_problem.hpp.
#pragma once

#include <cstdint>
#include <vector>

namespace dotresize {

enum class AssignmentStatus : int64_t { kSolved = 0, kInfeasible = 1, kInvalid = 2 };

// A problem of n rows and m >= n columns: minimise sum_i sign * score[i, columns[i]], sign = 1 or
// -1. Entries with sign * score = +inf are forbidden. What a problem that is not solved would write
// is left as it is.
template <typename T>
struct AssignmentTask {
  const T* score;  // consecutive columns
  int64_t row_stride, n, m;
  double sign;
  const double* start;  // m column duals of sign * score to start from, any finite, or null; n = m
  int64_t* columns;     // n
  double* v;            // m column duals; u_i = min_j sign * score[i, j] - v_j belongs to them
  int64_t* status;
};

template <typename T>
void assignment(const std::vector<AssignmentTask<T>>& tasks, int num_threads);

}  // namespace dotresize
