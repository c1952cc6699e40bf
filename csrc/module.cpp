// Python entry points over raw addresses: the callers in dotresize/ops own and check the tensors,
// so that this module needs no torch headers and one wheel serves every torch.
#include <pybind11/pybind11.h>

#include <vector>

#include "assignment.hpp"
#include "kernels.hpp"
#include "l1_backward.hpp"
#include "l1_cost.hpp"
#include "sinkhorn.hpp"
#include "stop.hpp"

namespace py = pybind11;
using namespace dotresize;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Activations operand(uintptr_t data, int dtype, int64_t batch_stride, int64_t token_stride,
                    int64_t count, uintptr_t index) {
  return {at<const void>(data),    static_cast<Dtype>(dtype), batch_stride, token_stride, count,
          at<const int64_t>(index)};
}

// `table` is (batch, 7): score, row stride, rows, columns, start, columns found, column duals; all
// but the three in the middle are addresses.
template <typename T>
std::vector<AssignmentTask<T>> assignment_tasks(int64_t batch, uintptr_t table, double sign,
                                                uintptr_t status) {
  std::vector<AssignmentTask<T>> all;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t* line = at<const int64_t>(table) + 7 * i;
    all.push_back({at<const T>(line[0]), line[1], line[2], line[3], sign, at<const double>(line[4]),
                   at<int64_t>(line[5]), at<double>(line[6]), at<int64_t>(status) + i});
  }
  return all;
}

// `table` is (batch, 4): address of the cost, stride, rows, columns. Marginals and potentials are
// those of all problems joined.
std::vector<SinkhornProblem> problems(int64_t batch, uintptr_t table, uintptr_t reg, uintptr_t tol,
                                      uintptr_t momentum, uintptr_t a, uintptr_t b, uintptr_t f,
                                      uintptr_t g, uintptr_t n_iter, uintptr_t marginal_error,
                                      uintptr_t status) {
  std::vector<SinkhornProblem> all;
  int64_t row = 0, column = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t* line = at<const int64_t>(table) + 4 * i;
    const int64_t n = line[2], m = line[3];
    all.push_back({n, m, at<const void>(line[0]), line[1], at<double>(reg)[i], at<double>(tol)[i],
                   at<bool>(momentum)[i], at<double>(a) + row, at<double>(b) + column,
                   at<double>(f) + row, at<double>(g) + column, at<int64_t>(n_iter) + i,
                   at<double>(marginal_error) + i, at<int64_t>(status) + i});
    row += n;
    column += m;
  }
  return all;
}

// Python runs signal handlers in its main thread alone. In others the look would be in vain, and
// would end the process where it meets an interpreter that is shutting down.
unsigned long main_thread = 0;
bool in_main_thread() { return PyThread_get_thread_ident() == main_thread; }

// Runs the handlers; what they raise stays set until the operator has returned.
bool python_raised() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return raised;
}

}  // namespace

PYBIND11_MODULE(_cpp, module) {
  main_thread =
      py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  hears_signals = in_main_thread;
  signal_raised = python_raised;
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Interrupted&) {
      // The handler's exception is set already.
    }
  });
  module.doc() = "CPU kernels of dotresize; called through dotresize.ops only.";
  module.attr("TOKEN_BLOCK") = kTokenBlock;
#ifdef _OPENMP
  module.attr("OPENMP") = true;
#else
  module.attr("OPENMP") = false;
#endif
  module.def("simd_level", [] { return kernels().name; });

  py::class_<Activations>(module, "Activations")
      .def(py::init(&operand), py::arg("data"), py::arg("dtype"), py::arg("batch_stride"),
           py::arg("token_stride"), py::arg("count"), py::arg("index"));
  module.def(
      "l1_cost",
      [](int64_t batch, int64_t rows, const Activations& x, const Activations& y, uintptr_t out,
         int64_t mirrored, bool accumulate, double scale, uintptr_t steps, int num_threads) {
        l1_cost(batch, rows, x, y, at<float>(out),
                {mirrored, accumulate, scale, at<const float>(steps), num_threads});
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("batch"), py::arg("rows"), py::arg("x"),
      py::arg("y"), py::arg("out"), py::arg("mirrored"), py::arg("accumulate"), py::arg("scale"),
      py::arg("steps"), py::arg("num_threads"));
  module.def(
      "l1_backward",
      [](int64_t batch, int64_t rows, const Activations& x, const Activations& y,
         uintptr_t gradient, uintptr_t grad_x, uintptr_t grad_y, int64_t mirrored, double scale,
         int num_threads) {
        l1_backward(batch, rows, x, y, at<const float>(gradient), at<float>(grad_x),
                    at<float>(grad_y), {mirrored, scale, num_threads});
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("batch"), py::arg("rows"), py::arg("x"),
      py::arg("y"), py::arg("gradient"), py::arg("grad_x"), py::arg("grad_y"), py::arg("mirrored"),
      py::arg("scale"), py::arg("num_threads"));
  module.def("l1_tile_alone", &l1_tile_alone, py::call_guard<py::gil_scoped_release>(),
             py::arg("pairs"), py::arg("num_threads"));
  module.def(
      "quantize",
      [](int64_t batch, const Activations& x, int64_t tokens, uintptr_t token, uintptr_t low,
         uintptr_t dither, uintptr_t steps, uintptr_t out, int num_threads) {
        const Quantization plan = {tokens, at<const int64_t>(token), at<const float>(low),
                                   at<const float>(dither), at<const float>(steps)};
        quantize(batch, x, plan, at<uint64_t>(out), num_threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("batch"), py::arg("x"), py::arg("tokens"),
      py::arg("token"), py::arg("low"), py::arg("dither"), py::arg("steps"), py::arg("out"),
      py::arg("num_threads"));

  module.def(
      "plan",
      [](int64_t n, int64_t m, uintptr_t cost, int64_t stride, double reg, uintptr_t f, uintptr_t g,
         uintptr_t out, bool use_float64, int num_threads) {
        const auto* rows = at<const double>(f);
        const auto* columns = at<const double>(g);
        if (use_float64) {
          plan(n, m, at<const double>(cost), stride, reg, rows, columns, at<double>(out),
               num_threads);
        } else {
          plan(n, m, at<const float>(cost), stride, reg, rows, columns, at<float>(out),
               num_threads);
        }
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("n"), py::arg("m"), py::arg("cost"),
      py::arg("stride"), py::arg("reg"), py::arg("f"), py::arg("g"), py::arg("out"),
      py::arg("use_float64"), py::arg("num_threads"));
  module.def(
      "sinkhorn",
      [](int64_t batch, uintptr_t table, uintptr_t reg, uintptr_t tol, uintptr_t momentum,
         uintptr_t a, uintptr_t b, uintptr_t f, uintptr_t g, uintptr_t n_iter,
         uintptr_t marginal_error, uintptr_t status, bool use_float64, int64_t max_iter,
         int num_threads) {
        const auto all =
            problems(batch, table, reg, tol, momentum, a, b, f, g, n_iter, marginal_error, status);
        use_float64 ? sinkhorn<double>(all, max_iter, num_threads)
                    : sinkhorn<float>(all, max_iter, num_threads);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("batch"), py::arg("table"), py::arg("reg"),
      py::arg("tol"), py::arg("momentum"), py::arg("a"), py::arg("b"), py::arg("f"), py::arg("g"),
      py::arg("n_iter"), py::arg("marginal_error"), py::arg("status"), py::arg("use_float64"),
      py::arg("max_iter"), py::arg("num_threads"));

  module.def(
      "assignment",
      [](int64_t batch, uintptr_t table, double sign, uintptr_t status, bool use_float64,
         int num_threads) {
        if (use_float64) {
          assignment(assignment_tasks<double>(batch, table, sign, status), num_threads);
        } else {
          assignment(assignment_tasks<float>(batch, table, sign, status), num_threads);
        }
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("batch"), py::arg("table"), py::arg("sign"),
      py::arg("status"), py::arg("use_float64"), py::arg("num_threads"));
}
