#pragma once

#include <cstdint>

namespace dotresize {

enum class Status : int64_t { kConverged = 0, kMaxIter = 1, kInfeasible = 2, kInvalid = 3 };

// `batch` problems of one shape; cost contiguous (batch, n, m), marginals (batch, n) and (batch,
// m). Per-problem outputs have `batch` entries. g holds the initial column potentials and receives
// the final ones; f receives the row potentials. Gauge: plan_ij = exp(f_i + g_j - cost_ij / reg).
struct SinkhornProblems {
  int64_t batch, n, m;
  const void* cost;  // float or double, as T
  const double *reg, *tol;
  const double *a, *b;
  double *f, *g;
  int64_t* n_iter;
  double* marginal_error;
  int64_t* status;
};

template <typename T>
void sinkhorn(const SinkhornProblems& problems, int64_t max_iter, int num_threads);

// plan_ij = exp(f_i + g_j - cost_ij / reg) of one problem, rows of the cost `stride` apart, into a
// contiguous (n, m) of the same type.
template <typename T>
void plan(int64_t n, int64_t m, const T* cost, int64_t stride, double reg, const double* f,
          const double* g, T* out, int num_threads);

}  // namespace dotresize
