// Leaf kernel of the L1 cost's gradient. Part of level.hpp.
#pragma once

namespace dotresize {
namespace {

constexpr int kBackwardRows = BACKWARD_ROWS;

// Sums of g_rj sign(x_r - y_j) along both axes, for one token and the panel's rows. Those of a row
// stay in registers, those of the columns in the first-level cache.
template <bool kColumns>
inline void backward_token(int64_t columns, int64_t stride, const float* x, const float* y,
                           const float* g, float* grad_x, float* grad_y) {
  using V = Simd<float>::V;
  using I = Simd<float>::I;
  constexpr int L = kLanes<float>;
  const I sign = I{} + ~Simd<float>::kAbsMask;
  V sum[kBackwardRows] = {};
  for (int64_t j = 0; j < columns; j += L) {
    const V y_j = load(y + j);
    V column = {};
#pragma GCC unroll 16
    for (int r = 0; r < kBackwardRows; ++r) {
      const V apart = x[r] - y_j;
      // The gradient takes the sign of the difference, and is nothing where there is none.
      const I value = ((I)apart & sign) ^ (I)load(g + r * stride + j);
      const V term = (V)((I)(apart != V{}) & value);
      sum[r] += term;
      if (kColumns) column += term;
    }
    if (kColumns) store(grad_y + j, load(grad_y + j) + column);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kBackwardRows; ++r) {
    float lanes[L];
    store(lanes, sum[r]);
#pragma GCC unroll 4
    for (int half = L / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    grad_x[r] += lanes[0];
  }
}

void backward_panel(const BackwardPanel& p) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    const float *x = p.x + t * p.x_stride, *y = p.y + t * p.y_stride;
    float* grad_x = p.grad_x + t * p.x_stride;
    if (p.grad_y == nullptr) {
      backward_token<false>(p.columns, p.g_stride, x, y, p.g, grad_x, nullptr);
    } else {
      backward_token<true>(p.columns, p.g_stride, x, y, p.g, grad_x, p.grad_y + t * p.g_stride);
    }
  }
}

void pack_row(const Block& block, float* out) {
  with_reader(block.dtype, [&](auto type, auto read) {
    using In = decltype(type);
    const In* data = static_cast<const In*>(block.data);
    const int64_t* index = block.index;
    for (int64_t i = 0; i < block.count; ++i) {
      out[i] = read(data[index == nullptr ? i : index[i]]);
    }
  });
}

constexpr L1BackwardKernels kBackward = {kBackwardRows, kLanes<float>, pack_row, backward_panel};

}  // namespace
}  // namespace dotresize
