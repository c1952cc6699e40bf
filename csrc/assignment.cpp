// Batches of assignment problems over threads, one problem on each.
#include "assignment.hpp"

#include <memory>

#include "assignment_problem.hpp"
#include "stop.hpp"

namespace dotresize {

template <typename T>
void assignment(const std::vector<AssignmentTask<T>>& tasks, int num_threads) {
  Stop stop;
  share_out(static_cast<int64_t>(tasks.size()), num_threads, stop, [&] {
    auto solver = std::make_unique<AssignmentProblem<T>>(stop);
    return [&tasks, solver = std::move(solver)](int64_t index) {
      *tasks[index].status = static_cast<int64_t>(solver->solve(tasks[index]));
    };
  });
}

template void assignment<float>(const std::vector<AssignmentTask<float>>&, int);
template void assignment<double>(const std::vector<AssignmentTask<double>>&, int);

}  // namespace dotresize
