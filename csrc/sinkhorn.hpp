#pragma once

#include <cstdint>
#include <vector>

namespace dotresize {

enum class Status : int64_t { kConverged = 0, kMaxIter = 1, kInfeasible = 2, kInvalid = 3 };

// One problem. Rows of the cost are `stride` apart. g holds the initial column potentials and
// receives the final ones; f receives the row potentials. Gauge: plan_ij = exp(f_i + g_j - cost_ij
// / reg).
struct SinkhornProblem {
  int64_t n, m;
  const void* cost;  // float or double, as T
  int64_t stride;
  double reg, tol;
  bool momentum;
  const double *a, *b;
  double *f, *g;
  int64_t* n_iter;
  double* marginal_error;
  int64_t* status;
};

template <typename T>
void sinkhorn(const std::vector<SinkhornProblem>& problems, int64_t max_iter, int num_threads);

// plan_ij = exp(f_i + g_j - cost_ij / reg) of one problem, rows of the cost `stride` apart, into a
// contiguous (n, m) of the same type.
template <typename T>
void plan(int64_t n, int64_t m, const T* cost, int64_t stride, double reg, const double* f,
          const double* g, T* out, int num_threads);

}  // namespace dotresize
