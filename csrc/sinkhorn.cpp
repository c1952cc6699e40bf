// Batches of Sinkhorn problems over threads: whole problems where there are enough of them, else
// the rows of one. The iteration itself is in sinkhorn_problem.hpp.
#include "sinkhorn.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "sinkhorn_problem.hpp"
#include "stop.hpp"
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
          Outcome& outcome, Stop& stop) {
  // The thread that hears of signals may be the one that waits, for another that is held up.
  const auto listen = [&] { stop.asked(); };
  problem.scan(member);
  barrier.wait(listen);
  problem.settle(member);
  barrier.wait(listen);
  if (problem.state() != Status::kMaxIter) return;
  problem.scale(member);
  for (int64_t it = 0;; ++it) {
    problem.sweep(member, it);
    barrier.wait(listen);
    if (problem.stopped(it)) return;
    const double error = problem.column_error(member, it);
    const bool converged = tol > 0 && error <= tol;
    if (converged || it == max_iter) {
      if (member == 0) outcome = {it, error, converged ? Status::kConverged : Status::kMaxIter};
      return;
    }
    if (problem.has_tiny_columns(member)) {
      problem.redo_columns(member);
      barrier.wait(listen);
    }
    problem.update_columns(member, error);
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
void solve(const SinkhornProblem& given, int team, int64_t max_iter, Stop& stop) {
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
      problem = std::make_unique<Problem<T>>(given, team_size(), stop);
      barrier = std::make_unique<Barrier>(team_size());
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
    if (!out_of_memory) {
      work(*problem, thread_index(), *barrier, given.tol, max_iter, outcome, stop);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
  if (problem->state() == Status::kMaxIter) {
    problem->write_potentials();
  } else {
    outcome = refuse(*problem);
  }
  *given.n_iter = outcome.n_iter;
  *given.marginal_error = outcome.error;
  *given.status = static_cast<int64_t>(outcome.status);
}

int64_t entries(const SinkhornProblem& problem) { return problem.n * problem.m; }

}  // namespace

template <typename T>
void sinkhorn(const std::vector<SinkhornProblem>& problems, int64_t max_iter, int num_threads) {
  std::vector<const SinkhornProblem*> order;
  int64_t total = 0;
  for (const SinkhornProblem& problem : problems) {
    order.push_back(&problem);
    total += entries(problem);
  }
  // The largest first, so that no thread is left alone with one at the end.
  std::stable_sort(order.begin(), order.end(),
                   [](auto* left, auto* right) { return entries(*left) > entries(*right); });
  // What is more than a thread's fair share is worked on by a team, the rest one by each thread.
  Stop stop;
  size_t first_small = 0;
  for (; first_small < order.size(); ++first_small) {
    const int64_t size = entries(*order[first_small]);
    const int64_t team = std::min<int64_t>(num_threads, size / kEntriesPerThread);
    if (size <= total / num_threads || team < 2) break;
    solve<T>(*order[first_small], static_cast<int>(team), max_iter, stop);
    stop.check();
  }
  share_out(static_cast<int64_t>(order.size() - first_small), num_threads, stop, [&] {
    return [&](int64_t index) { solve<T>(*order[first_small + index], 1, max_iter, stop); };
  });
}

template <typename T>
void plan(int64_t n, int64_t m, const T* cost, int64_t stride, double reg, const double* f,
          const double* g, T* out, int num_threads) {
  const auto& level = sinkhorn_kernels<T>();
  std::vector<double> columns(g, g + m);
  for (double& value : columns) value /= kLn2;
  const double per_reg = 1 / (reg * kLn2);
  Stop stop;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < n; ++i) {
    if (stop.asked()) continue;
    level.plan_row(m, f[i] / kLn2, columns.data(), cost + i * stride, per_reg, out + i * m);
  }
  stop.check();
}

template void plan<float>(int64_t, int64_t, const float*, int64_t, double, const double*,
                          const double*, float*, int);
template void plan<double>(int64_t, int64_t, const double*, int64_t, double, const double*,
                           const double*, double*, int);
template void sinkhorn<float>(const std::vector<SinkhornProblem>&, int64_t, int);
template void sinkhorn<double>(const std::vector<SinkhornProblem>&, int64_t, int);

}  // namespace dotresize
