// Batched linear assignment on a CPU; the method is in assignment_problem.hpp.
#pragma once

#include <cstdint>

namespace dotresize {

enum class AssignmentStatus : int64_t { kSolved = 0, kInfeasible = 1, kInvalid = 2 };

// `batch` problems of n rows and columns: minimise sum_i sign * score[i, columns[i]], sign = 1 or
// -1. Entries with sign * score = +inf are forbidden. Outputs are contiguous (batch, n), status
// (batch,); those of a problem that is not solved are left as they are.
struct AssignmentProblems {
  int64_t batch, n;
  const void* score;  // float or double, as T; consecutive columns
  int64_t batch_stride, row_stride;
  double sign;
  const double* start;  // column duals of sign * score to start from, any finite; null: none
  int64_t* columns;
  double* v;  // the column duals found; u_i = min_j sign * score[i, j] - v_j belongs to them
  int64_t* status;
};

template <typename T>
void assignment(const AssignmentProblems& problems, int num_threads);

}  // namespace dotresize
