// The leaf kernels that exist once per SIMD level, and the table through which they are called.
//
// level_*.cpp compile level.hpp with different flags; everything that has branches, threads or
// allocations lives outside and is compiled once. dispatch.cpp picks a level when imported.
#pragma once

#include <cstdint>

namespace dotresize {

// Tokens summed in registers before the partial sum joins the total. Two levels keep the float32
// error of a sum over 1e5 tokens near 7e-7; a single running sum reaches 5e-6 after 4e3.
constexpr int64_t kTokenBlock = 256;

// kU8: a 64-bit word that holds eight tokens of a neuron as bytes, made by `quantize`.
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kU8 = 3 };

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kU8 ? 8 : 2;
}

// Some rows of a matrix, and some of its columns, to be packed.
struct Block {
  Dtype dtype;
  const void* data;      // the first row; its first column unless `index` says which columns
  int64_t stride;        // elements from row to row
  int64_t rows, count;   // rows and columns taking part
  const int64_t* index;  // null: consecutive columns
};

// Up to eight tokens that become the bytes of one word per neuron.
struct TokenOctet {
  Dtype dtype;
  const void* data;      // the first token of the problem
  int64_t stride;        // elements from token to token
  const int64_t* token;  // which tokens
  int tokens;
  const float *low, *dither;
  float per_step;
};

// The L1 cost over packed panels. A row is a token of floats, or of 64-bit words that hold eight
// tokens' bytes each.
template <typename Packed>
struct L1Kernels {
  int panel_x;  // neurons of x in a register tile
  int panel_y;  // neurons of y in a register tile
  // out[(p * rows + t) * panel + lane] = column p * panel + lane of row t; missing columns are 0.
  // pack_y may put the columns of a panel in another order, which is the tile's affair.
  void (*pack_x)(const Block& block, Packed* out);
  void (*pack_y)(const Block& block, Packed* out);
  // tile[r * stride + s] += step * sum_t |x_panel[t * panel_x + r] - y_panel[t * panel_y + s]|
  void (*tile)(int64_t rows, const Packed* x_panel, const Packed* y_panel, float step, float* tile,
               int64_t stride);
};

// Rows of the incoming gradient, and the tokens that pass them. Rows of the gradient are `g_stride`
// apart, tokens by the strides of x and y; the sums are laid out as x and as (tokens, g_stride).
struct BackwardPanel {
  int64_t tokens, columns, g_stride;
  const float *x, *y;
  int64_t x_stride, y_stride;
  float *grad_x, *grad_y;  // grad_y may be null
  const float* g;
};

struct L1BackwardKernels {
  int rows;   // of a panel
  int lanes;  // its columns are a multiple of these
  // out[i] = column i of the block's only row
  void (*pack_row)(const Block& block, float* out);
  // With e = g[r, j] sign(x[t, r] - y[t, j]), 0 for equal ones: grad_x[t, r] += sum_j e and
  // grad_y[t, j] += sum_r e.
  void (*panel)(const BackwardPanel& panel);
};

// Kernels over one floating type of the Sinkhorn sweep, whose potentials and scaled costs k are
// in units of log 2. Rows of k are padded to a multiple of `lanes` with +inf, and g with 0, so that
// the padding contributes 0.
template <typename T>
struct SinkhornKernels {
  int lanes;
  // e[j] = 2^(shift + g[j] - k[j]) for an integer shift; returns sum_j e[j]
  T (*row_exp2)(int64_t m, T shift, const T* g, const T* k, T* e);
  // max_j g[j] - k[j]
  T (*row_max)(int64_t m, const T* g, const T* k);
  // c[j] += sum_r w[r] e[r * stride + j], r < 4
  void (*add_four_rows)(int64_t m, const T* w, const T* e, int64_t stride, T* c);
  // The same of four rows `before`, and sums[r] = sum_j v[j] e[r * stride + j]
  void (*dot_and_add_four_rows)(int64_t m, const T* v, const T* e, int64_t stride, T* sums,
                                const T* w, const T* before, T* c);
  // total[j] += c[j] v[j], c[j] = 0
  void (*join_columns)(int64_t m, const T* v, T* c, double* total);
  // sum_j |p[j] - q[j]|
  double (*distance)(int64_t m, const double* p, const double* q);
  // out[j] = log2(p[j] / q[j]) where the quotient is a normal number
  void (*log2_quotients)(int64_t m, const double* p, const double* q, double* out);
  // minimum = min_j cost[j] + closed[j]; false if the row holds a NaN or -inf
  bool (*row_minimum)(int64_t m, const T* cost, const T* closed, T* minimum);
  // minima[j] = min(minima[j], cost[j] - row_min)
  void (*column_minima)(int64_t m, const T* cost, double row_min, double* minima);
  // k[j] = (cost[j] - row_min - column_min[j]) per_reg
  void (*scale_row)(int64_t m, const T* cost, double row_min, const double* column_min,
                    double per_reg, T* k);
  // plan[j] = 2^(f + g[j] - cost[j] per_reg), in double until it is stored
  void (*plan_row)(int64_t m, double f, const double* g, const T* cost, double per_reg, T* plan);
};

// Columns of a score that share a lower bound in the assignment solver.
constexpr int64_t kColumnBlock = 16;

// A row of costs scale * score[j], j < n; scale is a power of two or its negative, thus exact.
template <typename T>
struct AssignmentRow {
  const T* score;
  int64_t n;
  double scale;
};

// Of the costs seen so far: the highest finite one, whether none is NaN or -inf, whether all are
// whole numbers.
struct CostSurvey {
  double highest;
  bool valid, whole;
};

// Of cost - v along a row: the smallest entry, the second smallest, the column of the first.
struct TwoSmallest {
  double first, second;
  int64_t column;
};

struct NearestColumn {
  double distance;
  int64_t column;
};

// Shortest paths from one row: columns are padded to whole blocks, and blocks to whole blocks of
// blocks. Settled columns are at NaN.
struct AssignmentTree {
  double* distance;     // of each column, +inf where not reached
  int64_t* parent;      // the row before each column
  const double* taken;  // 0 for each free column, +inf for the others
  double* nearest;      // smallest distance in each block
  int32_t* places;      // scratch: one entry per block, but two at least
};

// Kernels over rows of the assignment solver. bounds[b] is at most cost - v in block b; v is padded
// to whole blocks, the bounds to whole blocks of blocks, with +inf.
template <typename T>
struct AssignmentKernels {
  // Also minima[j] = min(minima[j], cost[j]).
  void (*survey_row)(const AssignmentRow<T>& row, double* minima, CostSurvey* survey);
  // Reads the whole row and sets its bounds.
  TwoSmallest (*scan_all)(const AssignmentRow<T>& row, const double* v, float* bounds);
  // The same from valid bounds, reading and renewing only the blocks that may matter.
  TwoSmallest (*scan_again)(const AssignmentRow<T>& row, const double* v, float* bounds,
                            int32_t* places);
  // distance[j] = min(distance[j], base + cost[j] - v[j]) with parent i, wherever that may be below
  // the limit, the shortest distance of a free column so far; renews the bounds of what it reads.
  // Returns the new limit.
  double (*relax_row)(const AssignmentRow<T>& row, int64_t i, double base, double limit,
                      const double* v, float* bounds, const AssignmentTree& tree);
  // The first column at the smallest distance; any at +inf if none is reached.
  NearestColumn (*nearest_column)(const AssignmentTree& tree, int64_t blocks);
};

struct Kernels {
  const char* name;
  L1Kernels<float> l1_float;
  L1Kernels<uint64_t> l1_u8;
  L1BackwardKernels l1_backward;
  // word i, byte k = clamp(floor((v_ki - low_k) per_step + dither_k), 0, 255); 0 for k >= tokens
  void (*quantize)(const TokenOctet& octet, int64_t count, uint64_t* out);
  SinkhornKernels<float> sinkhorn_f32;
  SinkhornKernels<double> sinkhorn_f64;
  AssignmentKernels<float> assignment_f32;
  AssignmentKernels<double> assignment_f64;
};

// Null where the compiler or the architecture has no such level.
extern const Kernels* const kAvx512;
extern const Kernels* const kAvx2;
extern const Kernels* const kPortable;

// The level in use. DOTRESIZE_SIMD=avx512|avx2|portable, read once, forces one; throws
// std::runtime_error if it names a level that this machine cannot run.
const Kernels& kernels();

template <typename Packed>
const L1Kernels<Packed>& l1_kernels();
template <typename T>
const SinkhornKernels<T>& sinkhorn_kernels();
template <typename T>
const AssignmentKernels<T>& assignment_kernels();

}  // namespace dotresize
