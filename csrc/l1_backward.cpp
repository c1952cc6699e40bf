// The gradient of the L1 cost on a CPU.
//
// Every pair needs the sign of a difference, with 0 for equal activations: subtract, take the sign,
// put it on the incoming gradient, compare with 0, and the outcome is added to two sums; seven
// vector instructions where the cost takes three, of which three need an adder, not two.
//
// A thread owns all sums of some tokens. Per tile of the incoming gradient, which stays in the
// second-level cache, a panel of its rows stays in the first-level one while a few tokens pass it:
// the sums of x's neurons are registers, those of y's are added up beside the activations of y.
#include "l1_backward.hpp"

#include <algorithm>
#include <utility>

#include "stop.hpp"
#include "threads.hpp"

namespace dotresize {
namespace {

// Tokens of a task. A tile of the gradient is copied once for each task, so that few cost time.
constexpr int64_t kTokens = 256, kFewestTokens = 16;
// Tasks wanted per thread, so that the last one to finish does not keep the others waiting long.
constexpr int64_t kTasksPerThread = 4;
// Tile of the incoming gradient, and the tokens that pass a panel of it together.
constexpr int64_t kHeight = 256, kWidth = 512, kTogether = 4;

int64_t padded(int64_t count, int64_t multiple) { return ceil_div(count, multiple) * multiple; }

// What a thread works with: activations and sums of a task's tokens, padded, and a tile.
struct Scratch {
  Buffer<float> x, y, sum_x, sum_y, tile, columns;
};

class TokenSums {
 public:
  TokenSums(const Activations& x, const Activations& y, const float* gradient, float* grad_x,
            float* grad_y, const L1BackwardOptions& options, int64_t rows)
      : level_(kernels().l1_backward),
        x_(x),
        y_(y),
        gradient_(gradient),
        grad_x_(grad_x),
        grad_y_(grad_y),
        options_(options),
        rows_(rows),
        x_stride_(padded(x.count, level_.rows)),
        // Tokens a power of two apart would share their places in the first-level cache.
        y_stride_(padded(y.count, level_.lanes) + level_.lanes) {}

  Scratch scratch(int64_t tokens) const {
    return {make_buffer<float>(tokens * x_stride_), make_buffer<float>(tokens * y_stride_),
            make_buffer<float>(tokens * x_stride_), make_buffer<float>(tokens * y_stride_),
            make_buffer<float>(kHeight * kWidth),   make_buffer<float>(kTogether * kWidth)};
  }

  // All sums of `tokens` tokens of problem b, from token t0 on.
  void add(int64_t b, int64_t t0, int64_t tokens, Scratch& s, Stop& stop) const {
    for (int64_t t = 0; t < tokens; ++t) {
      pack(x_, b, t0 + t, x_stride_, s.x.get() + t * x_stride_);
      pack(y_, b, t0 + t, y_stride_, s.y.get() + t * y_stride_);
    }
    std::fill_n(s.sum_x.get(), tokens * x_stride_, 0.0f);
    std::fill_n(s.sum_y.get(), tokens * y_stride_, 0.0f);
    for (int64_t j = 0; j < y_.count; j += kWidth) {
      const int64_t width = std::min(kWidth, padded(y_.count - j, level_.lanes));
      for (int64_t i = 0; i < x_.count && !stop.asked(); i += kHeight) {
        const int64_t height = std::min(kHeight, x_stride_ - i);
        if (std::min(i + height, x_.count) <= options_.mirrored && j + width <= i) continue;
        copy_tile(b, i, height, j, width, s.tile.get());
        add_tile(i, height, j, width, tokens, s);
      }
    }
    write(b, t0, tokens, s);
  }

 private:
  void pack(const Activations& a, int64_t b, int64_t t, int64_t stride, float* out) const {
    const char* data = static_cast<const char*>(a.data);
    const int64_t offset = b * a.batch_stride + t * a.token_stride;
    const int64_t* index = a.index == nullptr ? nullptr : a.index + b * a.count;
    level_.pack_row(
        {a.dtype, data + offset * element_size(a.dtype), a.token_stride, 1, a.count, index}, out);
    std::fill(out + a.count, out + stride, 0.0f);
  }

  // Panels of the tile one after the other, zeros where there is no pair; of mirrored pairs only
  // those above the diagonal are.
  void copy_tile(int64_t b, int64_t i0, int64_t height, int64_t j0, int64_t width,
                 float* tile) const {
    for (int64_t i = i0; i < i0 + height; ++i, tile += width) {
      std::fill_n(tile, width, 0.0f);
      if (i >= x_.count) continue;
      const int64_t first = i < options_.mirrored ? std::max(j0, i + 1) : j0;
      const int64_t last = std::min(j0 + width, y_.count);
      const float* row = gradient_ + (b * x_.count + i) * y_.count;
      if (first < last) std::copy(row + first, row + last, tile + first - j0);
    }
  }

  void add_tile(int64_t i0, int64_t height, int64_t j0, int64_t width, int64_t tokens,
                Scratch& s) const {
    const bool both = grad_y_ != nullptr;
    for (int64_t t = 0; t < tokens; t += kTogether) {
      const int64_t together = std::min(kTogether, tokens - t);
      std::fill_n(s.columns.get(), together * width, 0.0f);
      for (int64_t i = 0; i < height; i += level_.rows) {
        // Left of the diagonal there is nothing.
        const bool mirrored = i0 + i + level_.rows <= options_.mirrored;
        const int64_t first = mirrored ? std::max<int64_t>(0, i0 + i - j0) : 0;
        const int64_t skipped = std::min(first / level_.lanes * level_.lanes, width);
        if (skipped == width) continue;
        const BackwardPanel panel = {together,
                                     width - skipped,
                                     width,
                                     s.x.get() + t * x_stride_ + i0 + i,
                                     s.y.get() + t * y_stride_ + j0 + skipped,
                                     x_stride_,
                                     y_stride_,
                                     s.sum_x.get() + t * x_stride_ + i0 + i,
                                     both ? s.columns.get() + skipped : nullptr,
                                     s.tile.get() + i * width + skipped};
        level_.panel(panel);
      }
      // Sums over the tile's rows join the total: two levels, as along the other axis.
      for (int64_t k = 0; both && k < together; ++k) {
        float* total = s.sum_y.get() + (t + k) * y_stride_ + j0;
        const float* columns = s.columns.get() + k * width;
        for (int64_t j = 0; j < width; ++j) total[j] += columns[j];
      }
    }
  }

  void write(int64_t b, int64_t t0, int64_t tokens, const Scratch& s) const {
    const float scale = static_cast<float>(options_.scale);
    const int64_t* order = x_.index == nullptr ? nullptr : x_.index + b * x_.count;
    const int64_t* index = y_.index == nullptr ? nullptr : y_.index + b * y_.count;
    const bool shared = grad_y_ == grad_x_;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t at = b * rows_ + t0 + t;
      float* out = grad_x_ + at * x_.count;
      for (int64_t i = 0; i < x_.count; ++i) {
        out[order == nullptr ? i : order[i]] = s.sum_x[t * x_stride_ + i] / scale;
      }
      if (grad_y_ == nullptr) continue;
      if (!shared) out = grad_y_ + at * y_.count;
      for (int64_t j = 0; j < y_.count; ++j) {
        const float value = -s.sum_y[t * y_stride_ + j] / scale;
        if (shared) {
          out[index == nullptr ? j : index[j]] += value;
        } else {
          out[j] = value;
        }
      }
    }
  }

  const L1BackwardKernels& level_;
  const Activations &x_, &y_;
  const float* gradient_;
  float *grad_x_, *grad_y_;
  const L1BackwardOptions options_;
  const int64_t rows_, x_stride_, y_stride_;
};

}  // namespace

void l1_backward(int64_t batch, int64_t rows, const Activations& x, const Activations& y,
                 const float* gradient, float* grad_x, float* grad_y,
                 const L1BackwardOptions& options) {
  const TokenSums sums(x, y, gradient, grad_x, grad_y, options, rows);
  const int64_t wanted = kTasksPerThread * options.num_threads;
  const int64_t fair = padded(ceil_div(batch * rows, wanted), kTogether);
  const int64_t tokens = std::clamp(fair, kFewestTokens, kTokens);
  const int64_t tasks = ceil_div(rows, tokens);
  Stop stop;
  share_out(batch * tasks, options.num_threads, stop, [&] {
    return [&, scratch = sums.scratch(tokens)](int64_t k) mutable {
      const int64_t t0 = k % tasks * tokens;
      sums.add(k / tasks, t0, std::min(tokens, rows - t0), scratch, stop);
    };
  });
}

}  // namespace dotresize
