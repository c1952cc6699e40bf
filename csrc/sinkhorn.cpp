// Batches of Sinkhorn problems over threads: whole problems where there are enough of them, else
// the rows of one. The iteration itself is in sinkhorn_problem.hpp.
#include "sinkhorn.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "sinkhorn_problem.hpp"
#include "threads.hpp"

namespace dotresize {
namespace {

// Below this many entries a problem is not worth a second thread: a barrier per iteration.
constexpr int64_t kEntriesPerThread = 1 << 15;

struct Outcome {
  int64_t n_iter = 0;
  double error = kNan;
  Status status = Status::kMaxIter;
};

// What one member of the team does. Every sweep ends with exact rows and the column error of that
// very plan, so the test comes before the column update and no closing pass is owed: with max_iter
// updates of g there are max_iter + 1 sweeps.
template <typename T>
void work(Problem<T>& problem, int member, Barrier& barrier, double tol, int64_t max_iter,
          Outcome& outcome) {
  problem.scan(member);
  barrier.wait();
  problem.settle(member);
  barrier.wait();
  if (problem.state() != Status::kMaxIter) return;
  problem.scale(member);
  for (int64_t it = 0;; ++it) {
    problem.sweep(member, it);
    barrier.wait();
    const double error = problem.column_error(member, it);
    const bool converged = tol > 0 && error <= tol;
    if (converged || it == max_iter) {
      if (member == 0) outcome = {it, error, converged ? Status::kConverged : Status::kMaxIter};
      return;
    }
    if (problem.has_tiny_columns(member)) {
      problem.redo_columns(member);
      barrier.wait();
    }
    problem.update_columns(member);
  }
}

// What a problem that cannot be solved reports.
template <typename T>
Outcome refuse(Problem<T>& problem) {
  const bool invalid = problem.state() == Status::kInvalid;
  problem.fill_potentials(invalid ? kNan : -kInf);
  return {0, invalid ? kNan : problem.mass(), problem.state()};
}

template <typename T>
void solve(const SinkhornProblems& problems, int64_t index, int team, int64_t max_iter) {
  std::unique_ptr<Problem<T>> problem;
  std::unique_ptr<Barrier> barrier;
  Outcome outcome;
  bool out_of_memory = false;
  // One region for everything: the runtime may grant fewer threads than asked for, and each region
  // anew, so only this one's own count can be trusted.
#pragma omp parallel num_threads(team)
  {
#pragma omp single
    try {
      problem = std::make_unique<Problem<T>>(problems, index, team_size());
      barrier = std::make_unique<Barrier>(team_size());
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
    if (!out_of_memory) {
      work(*problem, thread_index(), *barrier, problems.tol[index], max_iter, outcome);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
  if (problem->state() == Status::kMaxIter) {
    problem->write_potentials();
  } else {
    outcome = refuse(*problem);
  }
  problems.n_iter[index] = outcome.n_iter;
  problems.marginal_error[index] = outcome.error;
  problems.status[index] = static_cast<int64_t>(outcome.status);
}

}  // namespace

template <typename T>
void sinkhorn(const SinkhornProblems& problems, int64_t max_iter, int num_threads) {
  const int64_t useful = std::max<int64_t>(1, problems.n * problems.m / kEntriesPerThread);
  const int team = static_cast<int>(std::min<int64_t>(num_threads, useful));
  if (problems.batch < num_threads && team > 1) {
    for (int64_t index = 0; index < problems.batch; ++index) {
      solve<T>(problems, index, team, max_iter);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
#pragma omp parallel num_threads(num_threads)
  for (int64_t index = next++; index < problems.batch && !out_of_memory; index = next++) {
    try {
      solve<T>(problems, index, 1, max_iter);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

template <typename T>
void plan(int64_t n, int64_t m, const T* cost, int64_t stride, double reg, const double* f,
          const double* g, T* out, int num_threads) {
  const auto& level = sinkhorn_kernels<T>();
  std::vector<double> columns(g, g + m);
  for (double& value : columns) value /= kLn2;
  const double per_reg = 1 / (reg * kLn2);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < n; ++i) {
    level.plan_row(m, f[i] / kLn2, columns.data(), cost + i * stride, per_reg, out + i * m);
  }
}

template void plan<float>(int64_t, int64_t, const float*, int64_t, double, const double*,
                          const double*, float*, int);
template void plan<double>(int64_t, int64_t, const double*, int64_t, double, const double*,
                           const double*, double*, int);
template void sinkhorn<float>(const SinkhornProblems&, int64_t, int);
template void sinkhorn<double>(const SinkhornProblems&, int64_t, int);

}  // namespace dotresize
