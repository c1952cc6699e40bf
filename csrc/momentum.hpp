// Over-relaxation of the column potentials by a factor that needs no tuning.
//
// One Sinkhorn iteration maps y to G(y) = y + log b - log c(y), a gradient step of the concave dual
// in the metric of b. Nesterov's extrapolation goes further along the last change,
//     y_next = G_k + beta_k (G_k - G_{k-1}),  beta_k = (k - 1) / (k + 1),
// and k starts again where the change turns against the gradient, sum_j b_j (G_k - y)_j (G_k -
// G_{k-1})_j < 0 (O'Donoghue and Candes, Found. Comput. Math. 15, 2015), or where a plain step is
// good enough by itself: the error fell below kFastEnough of the one before. Both tests look at the
// iteration before, as on a GPU, where this one's sums are not complete yet. It also starts again
// while potentials are so large that exponents lose digits: where forbidden pairs admit no plan
// they grow without end, and momentum would make them grow faster.
#pragma once

#include <cstdint>
#include <limits>

namespace dotresize {

// Both also in dotresize/ops/constants.py.
constexpr double kFastEnough = 0.4;
// Beyond this an exponent in units of log 2 is no better than 2^-10.
template <typename T>
constexpr double kFarPotential = 0x1p-10 / std::numeric_limits<T>::epsilon();

class Momentum {
 public:
  // beta for this iteration, from what the last two left.
  double next_factor() {
    if (against_ < 0 || error_ < kFastEnough * error_before_ || far_) age_ = 0;
    ++age_;
    return static_cast<double>(age_ - 1) / static_cast<double>(age_ + 1);
  }

  // After the iteration: its error, the inner product above, and whether a potential is far.
  void remember(double error, double inner_product, bool far) {
    error_before_ = error_;
    error_ = error;
    against_ = inner_product;
    far_ = far;
  }

 private:
  int64_t age_ = 0;
  double against_ = 0;
  bool far_ = false;
  double error_ = std::numeric_limits<double>::infinity();
  double error_before_ = std::numeric_limits<double>::infinity();
};

}  // namespace dotresize
