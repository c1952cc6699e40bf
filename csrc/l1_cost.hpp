#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace dotresize {

// One operand: `batch` matrices of (tokens, neurons), neurons contiguous, or a selection of their
// columns by `index` (batch, count), which is read in place and never gathered into a copy.
struct Activations {
  const void* data;
  Dtype dtype;           // kU8: a row is eight tokens, as written by quantize
  int64_t batch_stride;  // in elements
  int64_t token_stride;  // in elements, from row to row
  int64_t count;         // neurons taking part
  const int64_t* index;  // null: all of them, in order
};

struct L1Options {
  int64_t mirrored;    // the first so many neurons of x are y's, in order: one half is computed
  bool accumulate;     // add to `out`; otherwise overwrite it
  double scale;        // the sum is divided by this
  const float* steps;  // u8: the value of a byte's unit, (batch, blocks of kTokenBlock tokens)
  int num_threads;
};

// out[b, i, j] (+)= sum_t |x[b, t, i] - y[b, t, j]| / scale; out is contiguous (batch, n, m). With
// an index on x, which must then be a permutation, the row of a neuron is where the index says.
// Every entry is summed by one thread in token order: the result does not depend on the number of
// threads, and accumulating chunks of a multiple of kTokenBlock tokens equals one call.
void l1_cost(int64_t batch, int64_t rows, const Activations& x, const Activations& y, float* out,
             const L1Options& options);

// The bound of the float32 path, to be timed: the register tile alone, on panels that never leave
// the first-level cache. Returns the pairs of activations done, at least as many as asked for.
int64_t l1_tile_alone(int64_t pairs, int num_threads);

// How tokens become bytes. Arrays are (batch, tokens) in the order given by `token`, steps as
// above.
struct Quantization {
  int64_t tokens;
  const int64_t* token;
  const float *low, *dither, *steps;
};

// out: contiguous (batch, ceil(tokens / 8), x.count) words.
void quantize(int64_t batch, const Activations& x, const Quantization& plan, uint64_t* out,
              int num_threads);

}  // namespace dotresize
