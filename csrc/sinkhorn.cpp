// Batches of Sinkhorn problems over threads: whole problems where there are enough of them, else
// the rows of one. The iteration itself is in sinkhorn_problem.hpp.
#include "sinkhorn.hpp"

#include <algorithm>
#include <atomic>
#include <memory>

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
void work(Problem<T>& problem, int member, Barrier& barrier, const SinkhornOptions& options,
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
    const bool converged = options.tol > 0 && error <= options.tol;
    if (converged || it == options.max_iter) {
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
void solve(const SinkhornProblems& problems, int64_t index, int team,
           const SinkhornOptions& options) {
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
    if (!out_of_memory) work(*problem, thread_index(), *barrier, options, outcome);
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
void sinkhorn(const SinkhornProblems& problems, const SinkhornOptions& options) {
  const int64_t entries = problems.n * problems.m;
  if (problems.batch < options.num_threads) {
    const int64_t useful = std::max<int64_t>(1, entries / kEntriesPerThread);
    const int team = static_cast<int>(std::min<int64_t>(options.num_threads, useful));
    for (int64_t index = 0; index < problems.batch; ++index) {
      solve<T>(problems, index, team, options);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
#pragma omp parallel num_threads(options.num_threads)
  for (int64_t index = next++; index < problems.batch && !out_of_memory; index = next++) {
    try {
      solve<T>(problems, index, 1, options);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

template void sinkhorn<float>(const SinkhornProblems&, const SinkhornOptions&);
template void sinkhorn<double>(const SinkhornProblems&, const SinkhornOptions&);

}  // namespace dotresize
