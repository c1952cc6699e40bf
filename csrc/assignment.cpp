// Batches of assignment problems over threads, one problem on each.
#include "assignment.hpp"

#include <algorithm>
#include <atomic>
#include <new>

#include "assignment_problem.hpp"

namespace dotresize {

template <typename T>
void assignment(const AssignmentProblems& problems, int num_threads) {
  const int team = static_cast<int>(std::min<int64_t>(num_threads, problems.batch));
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
#pragma omp parallel num_threads(std::max(1, team)) if (team > 1)
  try {
    AssignmentProblem<T> problem(problems);
    for (int64_t index = next++; index < problems.batch && !out_of_memory; index = next++) {
      problems.status[index] = static_cast<int64_t>(problem.solve(index));
    }
  } catch (const std::bad_alloc&) {
    out_of_memory = true;
  }
  if (out_of_memory) throw std::bad_alloc();
}

template void assignment<float>(const AssignmentProblems&, int);
template void assignment<double>(const AssignmentProblems&, int);

}  // namespace dotresize
