// Batches of assignment problems over threads, one problem on each.
#include "assignment.hpp"

#include <memory>

#include "assignment_problem.hpp"
#include "stop.hpp"

namespace dotresize {

template <typename T>
void assignment(const AssignmentProblems& problems, int num_threads) {
  Stop stop;
  share_out(problems.batch, num_threads, stop, [&] {
    auto solver = std::make_unique<AssignmentProblem<T>>(problems, stop);
    return [&problems, solver = std::move(solver)](int64_t index) {
      problems.status[index] = static_cast<int64_t>(solver->solve(index));
    };
  });
}

template void assignment<float>(const AssignmentProblems&, int);
template void assignment<double>(const AssignmentProblems&, int);

}  // namespace dotresize
