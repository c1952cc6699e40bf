// Batched pairwise L1 cost on a CPU.
//
// Bound: subtract, mask the sign, add: three vector instructions for a vector of pairs (x86 has no
// absolute-value modifier). Two adders a core make that lanes pairs a clock with AVX2, two ports
// for 512-bit vectors make it 2 / 3 of 16. Bytes need two instructions for eight tokens of a pair.
//
// A tile of the output is owned by one thread over all tokens. Per block of kTokenBlock tokens the
// tile's columns of x and y are packed into panels as wide as the register tile; a panel of y
// (32 KiB at most) stays in the first-level cache while the panels of x stream past it.
#include "l1_cost.hpp"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "stop.hpp"
#include "threads.hpp"

namespace dotresize {
namespace {

// Largest output tile. Packing costs (1 / height + 1 / width) elements per pair, and 256 columns of
// x over a block of 256 tokens fill half of a second-level cache of 512 KiB.
constexpr int64_t kHeight = 256, kWidth = 512;
// Tiles wanted per thread, so that the last one to finish does not keep the others waiting long.
constexpr int64_t kTilesPerThread = 4;

// The cut of every problem's output into tiles.
struct Grid {
  int64_t batch, tall, wide, height, width;

  template <typename Packed>
  Grid(int64_t problems, int64_t n, int64_t m, const L1Kernels<Packed>& level, int threads)
      : batch(problems), tall(ceil_div(n, kHeight)), wide(ceil_div(m, kWidth)) {
    const int64_t wanted = kTilesPerThread * threads;
    while (batch * tall * wide < wanted && ceil_div(n, tall) > kHeight / 4) ++tall;
    while (batch * tall * wide < wanted && ceil_div(m, wide) > kWidth / 4) ++wide;
    height = ceil_div(ceil_div(n, tall), level.panel_x) * level.panel_x;
    width = ceil_div(ceil_div(m, wide), level.panel_y) * level.panel_y;
    tall = ceil_div(n, height);
    wide = ceil_div(m, width);
  }

  int64_t size() const { return batch * tall * wide; }
};

struct Tile {
  int64_t b, i0, i1, j0, j1;
};

template <typename Packed>
struct Scratch {
  Buffer<Packed> x_panels, y_panels;
  Buffer<float> sums;
};

// Columns [first, last) of `rows` rows from t0.
Block block_of(const Activations& a, int64_t b, int64_t t0, int64_t rows, int64_t first,
               int64_t last) {
  const char* data = static_cast<const char*>(a.data);
  const int64_t offset =
      b * a.batch_stride + t0 * a.token_stride + (a.index == nullptr ? first : 0);
  return {a.dtype,        data + offset * element_size(a.dtype),
          a.token_stride, rows,
          last - first,   a.index == nullptr ? nullptr : a.index + b * a.count + first};
}

// The running sums live in `sums`; with `accumulate` they start from what `out` holds, so that
// chunked and single calls add the same numbers in the same order.
template <typename Packed>
class TileSum {
 public:
  TileSum(const Tile& tile, const Activations& x, const Activations& y, float* out,
          const L1Options& options, Scratch<Packed>& scratch)
      : level_(l1_kernels<Packed>()),
        tile_(tile),
        x_(x),
        y_(y),
        out_(out + tile.b * x.count * y.count),
        order_(x.index == nullptr ? nullptr : x.index + tile.b * x.count),
        options_(options),
        scratch_(scratch),
        stride_(ceil_div(tile.j1 - tile.j0, level_.panel_y) * level_.panel_y) {}

  void start() {
    const int64_t padded = ceil_div(tile_.i1 - tile_.i0, level_.panel_x) * level_.panel_x;
    std::fill_n(scratch_.sums.get(), padded * stride_, 0.0f);
    if (!options_.accumulate) return;
    for (int64_t i = tile_.i0; i < tile_.i1; ++i) {
      const int64_t first = i < options_.mirrored ? std::max(tile_.j0, i) : tile_.j0;
      for (int64_t j = first; j < tile_.j1; ++j) sum(i, j) = entry(i, j);
    }
  }

  void add(int64_t t0, int64_t rows, float step) {
    const int px = level_.panel_x, py = level_.panel_y;
    level_.pack_x(block_of(x_, tile_.b, t0, rows, tile_.i0, tile_.i1), scratch_.x_panels.get());
    level_.pack_y(block_of(y_, tile_.b, t0, rows, tile_.j0, tile_.j1), scratch_.y_panels.get());
    for (int64_t j = tile_.j0; j < tile_.j1; j += py) {
      const Packed* y_panel = scratch_.y_panels.get() + (j - tile_.j0) * rows;
      for (int64_t i = tile_.i0; i < tile_.i1; i += px) {
        if (std::min(i + px, tile_.i1) <= options_.mirrored && j + py <= i) continue;
        level_.tile(rows, scratch_.x_panels.get() + (i - tile_.i0) * rows, y_panel, step,
                    &sum(i, j), stride_);
      }
    }
  }

  void finish() {
    const float scale = static_cast<float>(options_.scale);
    for (int64_t i = tile_.i0; i < tile_.i1; ++i) {
      const bool mirrored = i < options_.mirrored;
      for (int64_t j = mirrored ? std::max(tile_.j0, i) : tile_.j0; j < tile_.j1; ++j) {
        const float value = sum(i, j) / scale;
        entry(i, j) = value;
        if (mirrored && j != i) entry(j, i) = value;
      }
    }
  }

 private:
  float& sum(int64_t i, int64_t j) {
    return scratch_.sums[(i - tile_.i0) * stride_ + j - tile_.j0];
  }
  float& entry(int64_t i, int64_t j) {
    return out_[(order_ == nullptr ? i : order_[i]) * y_.count + j];
  }

  const L1Kernels<Packed>& level_;
  const Tile tile_;
  const Activations &x_, &y_;
  float* out_;
  const int64_t* order_;
  const L1Options& options_;
  Scratch<Packed>& scratch_;
  const int64_t stride_;
};

template <typename Packed>
void l1_cost_packed(int64_t batch, int64_t rows, const Activations& x, const Activations& y,
                    float* out, const L1Options& options) {
  constexpr int64_t kBlock = std::is_same_v<Packed, float> ? kTokenBlock : kTokenBlock / 8;
  const Grid grid(batch, x.count, y.count, l1_kernels<Packed>(), options.num_threads);
  const int64_t blocks = ceil_div(rows, kBlock);
  Stop stop;
  share_out(grid.size(), options.num_threads, stop, [&] {
    Scratch<Packed> buffers = {make_buffer<Packed>(grid.height * kBlock),
                               make_buffer<Packed>(grid.width * kBlock),
                               make_buffer<float>(grid.height * grid.width)};
    return [&, scratch = std::move(buffers)](int64_t k) mutable {
      const int64_t b = k / (grid.tall * grid.wide);
      const int64_t i0 = k / grid.wide % grid.tall * grid.height, j0 = k % grid.wide * grid.width;
      const Tile tile = {b, i0, std::min(i0 + grid.height, x.count), j0,
                         std::min(j0 + grid.width, y.count)};
      if (tile.i1 <= options.mirrored && tile.j1 <= tile.i0) return;  // the mirror of another
      TileSum<Packed> sum(tile, x, y, out, options, scratch);
      sum.start();
      for (int64_t block = 0; block < blocks && !stop.asked(); ++block) {
        const float step = options.steps == nullptr ? 1.0f : options.steps[b * blocks + block];
        sum.add(block * kBlock, std::min(kBlock, rows - block * kBlock), step);
      }
      sum.finish();
    };
  });
}

}  // namespace

void l1_cost(int64_t batch, int64_t rows, const Activations& x, const Activations& y, float* out,
             const L1Options& options) {
  if (x.dtype == Dtype::kU8) {
    l1_cost_packed<uint64_t>(batch, rows, x, y, out, options);
  } else {
    l1_cost_packed<float>(batch, rows, x, y, out, options);
  }
}

int64_t l1_tile_alone(int64_t pairs, int num_threads) {
  const L1Kernels<float>& level = l1_kernels<float>();
  const int64_t block = kTokenBlock * level.panel_x * level.panel_y;
  const int64_t calls = ceil_div(pairs, block * num_threads);
  // All of it stays in the first-level cache. The panels are only read; each thread has its tile.
  const std::vector<float> x(kTokenBlock * level.panel_x), y(kTokenBlock * level.panel_y);
  std::vector<std::vector<float>> tiles(num_threads);
  for (auto& tile : tiles) tile.resize(level.panel_x * level.panel_y);
  std::atomic<int64_t> done{0};
  Stop stop;
#pragma omp parallel num_threads(num_threads)
  {
    float* tile = tiles[thread_index()].data();
    for (int64_t call = 0; call < calls && !stop.asked(); ++call) {
      level.tile(kTokenBlock, x.data(), y.data(), 1.0f, tile, level.panel_y);
    }
    done += calls * block;
  }
  stop.check();
  return done;
}

void quantize(int64_t batch, const Activations& x, const Quantization& plan, uint64_t* out,
              int num_threads) {
  const int64_t words = ceil_div(plan.tokens, 8), steps = ceil_div(plan.tokens, kTokenBlock);
  const char* data = static_cast<const char*>(x.data);
  const int64_t problem_size = x.batch_stride * element_size(x.dtype);
  Stop stop;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t k = 0; k < batch * words; ++k) {
    if (stop.asked()) continue;
    const int64_t b = k / words, t = k % words * 8, at = b * plan.tokens + t;
    const TokenOctet octet = {x.dtype,
                              data + b * problem_size,
                              x.token_stride,
                              plan.token + at,
                              static_cast<int>(std::min<int64_t>(8, plan.tokens - t)),
                              plan.low + at,
                              plan.dither + at,
                              1.0f / plan.steps[b * steps + t / kTokenBlock]};
    kernels().quantize(octet, x.count, out + k * x.count);
  }
  stop.check();
}

}  // namespace dotresize
