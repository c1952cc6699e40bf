#pragma once

#include <cstdint>

#include "l1_cost.hpp"

namespace dotresize {

struct L1BackwardOptions {
  // The first so many neurons of x are y's, in order: one half of these pairs is computed, with
  // the gradient's entries above its diagonal alone, which stand for both.
  int64_t mirrored;
  double scale;  // the sums are divided by this
  int num_threads;
};

// `gradient` is what arrives at the cost, contiguous (batch, x.count, y.count) in the order of x
// and y. With s_tij = sign(x[b, t, i] - y[b, t, j]), which is 0 for equal activations:
//     grad_x[b, t, i] =  sum_j gradient[b, i, j] s_tij / scale,
//     grad_y[b, t, j] = -sum_i gradient[b, i, j] s_tij / scale.
// grad_x is contiguous (batch, rows, x.count) with x's neurons where the index on x says; grad_y is
// (batch, rows, y.count), or null if it is not wanted. If it is grad_x itself, y is neurons of x,
// and what belongs to a neuron of y is added where y's index says (all in order, if it has none).
// A token's sums are one thread's: the result does not depend on the number of threads.
void l1_backward(int64_t batch, int64_t rows, const Activations& x, const Activations& y,
                 const float* gradient, float* grad_x, float* grad_y,
                 const L1BackwardOptions& options);

}  // namespace dotresize
