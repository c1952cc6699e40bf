// Leaf kernels of the assignment solver. Part of level.hpp.
//
// All arithmetic is in double. Whole blocks of kColumnBlock columns are read where they lie; the
// rest of a row goes through a block padded with forbidden entries, which never win.
#pragma once

namespace dotresize {
namespace {

constexpr int kBlockVectors = kColumnBlock / kLanes<double>;
constexpr double kForbidden = __builtin_inf();

inline Simd<double>::V widen(const double* p) { return load(p); }

inline Simd<double>::V widen(const float* p) {
  typedef float Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Simd<double>::V);
}

inline double horizontal_min(Simd<double>::V v) {
  double lanes[kLanes<double>];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes<double> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] = lanes[i] < lanes[i + half] ? lanes[i] : lanes[i + half];
    }
  }
  return lanes[0];
}

// A float not above value, which is at least -1e30: one unit in the last place lower, then rounded.
inline float below(double value) {
  const double size = value < 0 ? -value : value;
  return static_cast<float>(value - (size * 0x1p-23 + 0x1p-126));
}

// The block's entries, in `padded` if the row ends within it.
template <typename T>
inline const T* block_of(const AssignmentRow<T>& row, int64_t block, T* padded) {
  const int64_t first = block * kColumnBlock, left = row.n - first;
  if (left >= kColumnBlock) return row.score + first;
  const T forbidden = static_cast<T>(row.scale < 0 ? -kForbidden : kForbidden);
  for (int64_t j = 0; j < kColumnBlock; ++j)
    padded[j] = j < left ? row.score[first + j] : forbidden;
  return padded;
}

// r[k] = scale * score - v over the block's vectors; returns their minimum.
template <typename T>
inline double reduce_block(const T* score, double scale, const double* v, Simd<double>::V* r) {
  constexpr int L = kLanes<double>;
#pragma GCC unroll 8
  for (int k = 0; k < kBlockVectors; ++k) r[k] = widen(score + k * L) * scale - load(v + k * L);
  Simd<double>::V smallest = r[0];
#pragma GCC unroll 8
  for (int k = 1; k < kBlockVectors; ++k) smallest = r[k] < smallest ? r[k] : smallest;
  return horizontal_min(smallest);
}

inline void include(TwoSmallest& two, double value, int64_t column) {
  if (value < two.first) {
    two = {value, two.first, column};
  } else if (value < two.second) {
    two.second = value;
  }
}

template <typename T>
bool survey_row(const AssignmentRow<T>& row, double* minima, double* largest) {
  using V = Simd<double>::V;
  using I = Simd<double>::I;
  constexpr int L = kLanes<double>;
  V most = V{} + *largest;
  I bad = {};
  T padded[kColumnBlock];
  for (int64_t j = 0; j < row.n; j += kColumnBlock) {
    const T* score = block_of(row, j / kColumnBlock, padded);
#pragma GCC unroll 8
    for (int k = 0; k < kBlockVectors; ++k) {
      const V value = widen(score + k * L) * row.scale, before = load(minima + j + k * L);
      const V size = value < V{} ? -value : value;
      bad |= ~(I)(value > V{} - kForbidden);
      most = (I)(size > most) & (I)(size < V{} + kForbidden) ? size : most;
      store(minima + j + k * L, value < before ? value : before);
    }
  }
  bool good = true;
  for (int lane = 0; lane < L; ++lane) {
    good &= bad[lane] == 0;
    *largest = most[lane] > *largest ? most[lane] : *largest;
  }
  return good;
}

// Lane by lane; the lanes meet at the end only.
template <typename T>
TwoSmallest scan_all(const AssignmentRow<T>& row, const double* v, float* bounds) {
  using V = Simd<double>::V;
  using I = Simd<double>::I;
  constexpr int L = kLanes<double>;
  V first[2] = {V{} + kForbidden, V{} + kForbidden}, second[2] = {first[0], first[0]};
  I column[2] = {I{} - 1, I{} - 1};
  T padded[kColumnBlock];
  const int64_t blocks = (row.n + kColumnBlock - 1) / kColumnBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    V r[kBlockVectors];
    const int64_t start = b * kColumnBlock;
    bounds[b] = below(reduce_block(block_of(row, b, padded), row.scale, v + start, r));
#pragma GCC unroll 8
    for (int k = 0; k < kBlockVectors; ++k) {
      const int s = k % 2;
      const I less = r[k] < first[s];
      const V larger = less ? first[s] : r[k];
      second[s] = larger < second[s] ? larger : second[s];
      column[s] = less ? I{} + (start + k * L) : column[s];
      first[s] = less ? r[k] : first[s];
    }
  }
  TwoSmallest two = {kForbidden, kForbidden, -1};
  for (int s = 0; s < 2; ++s) {
    for (int lane = 0; lane < L; ++lane) {
      include(two, first[s][lane], column[s][lane] + lane);
      if (second[s][lane] < two.second) two.second = second[s][lane];
    }
  }
  return two;
}

template <typename T>
inline void scan_block(const AssignmentRow<T>& row, int64_t block, const double* v, float* bounds,
                       TwoSmallest& two) {
  Simd<double>::V r[kBlockVectors];
  T padded[kColumnBlock];
  const int64_t start = block * kColumnBlock;
  const double smallest = reduce_block(block_of(row, block, padded), row.scale, v + start, r);
  bounds[block] = below(smallest);
  if (smallest >= two.second) return;
  double values[kColumnBlock];
  std::memcpy(values, r, sizeof values);
  for (int j = 0; j < kColumnBlock; ++j) include(two, values[j], start + j);
}

template <typename T>
TwoSmallest scan_again(const AssignmentRow<T>& row, const double* v, float* bounds,
                       int32_t* places) {
  const int64_t blocks = (row.n + kColumnBlock - 1) / kColumnBlock;
  // The two blocks of the lowest bounds most likely hold the two smallest entries.
  int64_t best = 0, next = -1;
  for (int64_t b = 1; b < blocks; ++b) {
    if (bounds[b] < bounds[best]) {
      next = best;
      best = b;
    } else if (next < 0 || bounds[b] < bounds[next]) {
      next = b;
    }
  }
  TwoSmallest two = {kForbidden, kForbidden, -1};
  scan_block(row, best, v, bounds, two);
  if (next >= 0) scan_block(row, next, v, bounds, two);
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    places[count] = static_cast<int32_t>(b);
    count += bounds[b] < two.second;
  }
  for (int64_t p = 0; p < count; ++p) {
    if (places[p] == best || places[p] == next) continue;
    scan_block(row, places[p], v, bounds, two);
  }
  return two;
}

template <typename T>
double relax_row(const AssignmentRow<T>& row, int64_t i, double base, double limit, const double* v,
                 float* bounds, const AssignmentTree& tree) {
  using V = Simd<double>::V;
  using I = Simd<double>::I;
  constexpr int L = kLanes<double>;
  const int64_t blocks = (row.n + kColumnBlock - 1) / kColumnBlock;
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    tree.places[count] = static_cast<int32_t>(b);
    count += base + bounds[b] < limit;
  }
  const I from = I{} + i;
  V shortest = V{} + limit;
  T padded[kColumnBlock];
  for (int64_t p = 0; p < count; ++p) {
    const int64_t b = tree.places[p], start = b * kColumnBlock;
    V r[kBlockVectors];
    bounds[b] = below(reduce_block(block_of(row, b, padded), row.scale, v + start, r));
    V nearest = V{} + kForbidden;
#pragma GCC unroll 8
    for (int k = 0; k < kBlockVectors; ++k) {
      double* distance = tree.distance + start + k * L;
      int64_t* parent = tree.parent + start + k * L;
      const V via = r[k] + base, before = load(distance);
      const I shorter = via < before;  // false for NaN, where the column is settled
      const V now = shorter ? via : before;
      I parents;
      std::memcpy(&parents, parent, sizeof parents);
      parents = shorter ? from : parents;
      store(distance, now);
      std::memcpy(parent, &parents, sizeof parents);
      nearest = now < nearest ? now : nearest;
      const V to_free = now + load(tree.taken + start + k * L);
      shortest = to_free < shortest ? to_free : shortest;
    }
    tree.nearest[b] = horizontal_min(nearest);
  }
  return horizontal_min(shortest);
}

inline NearestColumn nearest_column(const AssignmentTree& tree, int64_t blocks) {
  Simd<double>::V r[kBlockVectors];
#pragma GCC unroll 8
  for (auto& smallest : r) smallest = Simd<double>::V{} + kForbidden;
  for (int64_t b = 0; b < blocks; b += kColumnBlock) {
#pragma GCC unroll 8
    for (int k = 0; k < kBlockVectors; ++k) {
      const auto here = load(tree.nearest + b + k * kLanes<double>);
      r[k] = here < r[k] ? here : r[k];
    }
  }
#pragma GCC unroll 8
  for (int k = 1; k < kBlockVectors; ++k) r[0] = r[k] < r[0] ? r[k] : r[0];
  const double distance = horizontal_min(r[0]);
  if (distance == kForbidden) return {kForbidden, -1};
  int64_t column = 0;
  while (tree.nearest[column] != distance) ++column;
  column *= kColumnBlock;
  while (tree.distance[column] != distance) ++column;
  return {distance, column};
}

template <typename T>
constexpr AssignmentKernels<T> kAssignment = {survey_row<T>, scan_all<T>, scan_again<T>,
                                              relax_row<T>, nearest_column};

}  // namespace
}  // namespace dotresize
