// Batched pairwise L1 cost on a CPU.
//
// Bound: subtract, mask the sign, add: three vector instructions for a vector of pairs (x86 has no
// absolute-value modifier), so at best lanes * clock * ports / 3 pairs a second and core.
// A tile of the output is owned by one thread over all tokens. Per block of kTokenBlock tokens the
// tile's columns of x and y are packed into panels as wide as the register tile; a panel of y
// (16 to 32 KiB) stays in the first-level cache while the panels of x stream past it.
#include "l1_cost.hpp"

#include <algorithm>
#include <atomic>

#include "threads.hpp"

namespace dotresize {
namespace {

// Panels per output tile. 16 panels of y of 256 tokens are 256 to 512 KiB: second-level cache.
constexpr int64_t kPanels = 16;

struct Tile {
  int64_t b, i0, i1, j0, j1;
};

struct Scratch {
  Buffer<float> row, x_panels, y_panels, sums;
};

std::size_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Packs neurons [first, last) of a token block as [panel][token][lane]; missing lanes are 0.
void pack(const Kernels& level, const Activations& a, int64_t b, int64_t t0, int64_t tokens,
          int64_t first, int64_t last, int panel, float* row, float* out) {
  const std::size_t size = element_size(a.dtype);
  const int64_t count = last - first;
  const int64_t padded = (count + panel - 1) / panel * panel;
  std::fill(row + count, row + padded, 0.0f);
  const int64_t* index = a.index == nullptr ? nullptr : a.index + b * a.count + first;
  for (int64_t t = 0; t < tokens; ++t) {
    const char* token =
        static_cast<const char*>(a.data) + (b * a.batch_stride + (t0 + t) * a.token_stride) * size;
    if (index == nullptr) {
      level.to_float(a.dtype, token + first * size, count, row);
    } else if (a.dtype == Dtype::kFloat32) {
      const float* values = reinterpret_cast<const float*>(token);
      for (int64_t i = 0; i < count; ++i) row[i] = values[index[i]];
    } else {
      for (int64_t i = 0; i < count; ++i) {
        level.to_float(a.dtype, token + index[i] * size, 1, row + i);
      }
    }
    for (int64_t p = 0; p * panel < padded; ++p) {
      std::copy_n(row + p * panel, panel, out + (p * tokens + t) * panel);
    }
  }
}

// The running sums live in `sums`; with `accumulate` they start from what `out` holds, so that
// chunked and single calls add the same numbers in the same order.
void compute_tile(const Kernels& level, const Tile& tile, int64_t tokens, const Activations& x,
                  const Activations& y, float* out, const L1Options& options, Scratch& scratch) {
  const int px = level.panel_x, py = level.panel_y;
  const int64_t width = kPanels * py, rows = tile.i1 - tile.i0, columns = tile.j1 - tile.j0;
  float* sums = scratch.sums.get();
  std::fill(sums, sums + kPanels * px * width, 0.0f);
  const int64_t* order = x.index == nullptr ? nullptr : x.index + tile.b * x.count;
  const auto entry = [&](int64_t i, int64_t j) -> float& {
    return out[(tile.b * x.count + (order == nullptr ? i : order[i])) * y.count + j];
  };
  if (options.accumulate) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t i = tile.i0 + r, j = tile.j0 + c;
        if (i >= options.mirrored || j >= i) sums[r * width + c] = entry(i, j);
      }
    }
  }
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokenBlock) {
    const int64_t block = std::min(kTokenBlock, tokens - t0);
    pack(level, x, tile.b, t0, block, tile.i0, tile.i1, px, scratch.row.get(),
         scratch.x_panels.get());
    pack(level, y, tile.b, t0, block, tile.j0, tile.j1, py, scratch.row.get(),
         scratch.y_panels.get());
    for (int64_t q = 0; q * py < columns; ++q) {
      for (int64_t p = 0; p * px < rows; ++p) {
        const int64_t i = tile.i0 + p * px, j_end = tile.j0 + (q + 1) * py;
        if (std::min(i + px, tile.i1) <= options.mirrored && j_end <= i) continue;
        level.l1_tile(block, scratch.x_panels.get() + p * block * px,
                      scratch.y_panels.get() + q * block * py, sums + p * px * width + q * py,
                      width);
      }
    }
  }
  const float scale = static_cast<float>(options.scale);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = tile.i0 + r, j = tile.j0 + c;
      const bool mirrored = i < options.mirrored;
      if (mirrored && j < i) continue;
      const float value = sums[r * width + c] / scale;
      entry(i, j) = value;
      if (mirrored && j != i) entry(j, i) = value;
    }
  }
}

}  // namespace

void l1_cost(int64_t batch, int64_t tokens, const Activations& x, const Activations& y, float* out,
             const L1Options& options) {
  const Kernels& level = kernels();
  const int64_t height = kPanels * level.panel_x, width = kPanels * level.panel_y;
  const int64_t tall = (x.count + height - 1) / height, wide = (y.count + width - 1) / width;
  const int64_t total = batch * tall * wide;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
#pragma omp parallel num_threads(options.num_threads)
  {
    Scratch scratch;
    try {
      scratch = {make_buffer<float>(std::max(height, width)),
                 make_buffer<float>(height * kTokenBlock), make_buffer<float>(width * kTokenBlock),
                 make_buffer<float>(height * width)};
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
    for (int64_t k = next++; k < total && !out_of_memory; k = next++) {
      const int64_t b = k / (tall * wide), i0 = k / wide % tall * height, j0 = k % wide * width;
      const Tile tile = {b, i0, std::min(i0 + height, x.count), j0, std::min(j0 + width, y.count)};
      if (tile.i1 <= options.mirrored && tile.j1 <= tile.i0) continue;  // the mirror of another
      compute_tile(level, tile, tokens, x, y, out, options, scratch);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace dotresize
