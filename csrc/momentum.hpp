// Over-relaxation of the column potentials by a factor that needs no tuning.
//
// One Sinkhorn iteration maps y to G(y) = y + log b - log c(y), a gradient step of the concave dual
// in the metric of b. Nesterov's extrapolation goes further along the last change,
//     y_next = G_k + beta_k (G_k - G_{k-1}),  beta_k = (k - 1) / (k + 1),
// and k starts again where the change turns against the gradient, sum_j b_j (G_k - y)_j (G_k -
// G_{k-1})_j < 0 (O'Donoghue and Candes, Found. Comput. Math. 15, 2015), or where a plain step is
// good enough by itself: the error fell below kFastEnough of the one before. Both tests look at the
// iteration before, as on a GPU, where this one's sums are not complete yet.
#pragma once

#include <limits>

namespace dotresize {

// Also in dotresize/acceleration.py and kernels/sinkhorn_sweep.py.
constexpr double kFastEnough = 0.4;

class Momentum {
 public:
  // beta for this iteration, from what the last two left.
  double next_factor() {
    if (against_ < 0 || error_ < kFastEnough * error_before_) age_ = 0;
    ++age_;
    return static_cast<double>(age_ - 1) / static_cast<double>(age_ + 1);
  }

  // After the iteration: its error, and the inner product above.
  void remember(double error, double inner_product) {
    error_before_ = error_;
    error_ = error;
    against_ = inner_product;
  }

 private:
  int64_t age_ = 0;
  double against_ = 0;
  double error_ = std::numeric_limits<double>::infinity();
  double error_before_ = std::numeric_limits<double>::infinity();
};

}  // namespace dotresize
