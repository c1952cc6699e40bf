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
void survey_row(const AssignmentRow<T>& row, double* minima, CostSurvey* survey) {
  using V = Simd<double>::V;
  using I = Simd<double>::I;
  constexpr int L = kLanes<double>;
  const V round = V{} + Simd<double>::kRound;
  V highest = V{} + survey->highest;
  I bad = {}, broken = {};
  T padded[kColumnBlock];
  for (int64_t j = 0; j < row.n; j += kColumnBlock) {
    const T* score = block_of(row, j / kColumnBlock, padded);
#pragma GCC unroll 8
    for (int k = 0; k < kBlockVectors; ++k) {
      const V value = widen(score + k * L) * row.scale, before = load(minima + j + k * L);
      const I finite = value < V{} + kForbidden;
      bad |= ~(I)(value > V{} - kForbidden);
      // Numbers from 2^51 up are never called whole; they need not be.
      broken |= finite & (I)((value + round) - round != value);
      highest = finite & (I)(value > highest) ? value : highest;
      store(minima + j + k * L, value < before ? value : before);
    }
  }
  for (int lane = 0; lane < L; ++lane) {
    survey->valid &= bad[lane] == 0;
    survey->whole &= broken[lane] == 0;
    survey->highest = highest[lane] > survey->highest ? highest[lane] : survey->highest;
  }
}

// Over the blocks in places, or over all where that is null. Lane by lane; the lanes meet at the
// end only.
template <typename T>
inline TwoSmallest scan_blocks(const AssignmentRow<T>& row, const double* v, float* bounds,
                               const int32_t* places, int64_t count) {
  using V = Simd<double>::V;
  using I = Simd<double>::I;
  constexpr int L = kLanes<double>;
  V first[2] = {V{} + kForbidden, V{} + kForbidden}, second[2] = {first[0], first[0]};
  I column[2] = {I{} - 1, I{} - 1};
  T padded[kColumnBlock];
  for (int64_t p = 0; p < count; ++p) {
    V r[kBlockVectors];
    const int64_t b = places == nullptr ? p : places[p], start = b * kColumnBlock;
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
TwoSmallest scan_all(const AssignmentRow<T>& row, const double* v, float* bounds) {
  return scan_blocks(row, v, bounds, nullptr, (row.n + kColumnBlock - 1) / kColumnBlock);
}

// The block of the smallest bound.
inline int32_t lowest_block(const float* bounds, int64_t blocks) {
  using V = Simd<float>::V;
  constexpr int L = kLanes<float>;
  V lowest = load(bounds);
  for (int64_t b = L; b < blocks; b += L) {
    const V here = load(bounds + b);
    lowest = here < lowest ? here : lowest;
  }
  float least = lowest[0];
  for (int lane = 1; lane < L; ++lane) least = lowest[lane] < least ? lowest[lane] : least;
  int32_t block = 0;
  while (bounds[block] != least) ++block;
  return block;
}

template <typename T>
TwoSmallest scan_again(const AssignmentRow<T>& row, const double* v, float* bounds,
                       int32_t* places) {
  const int64_t blocks = (row.n + kColumnBlock - 1) / kColumnBlock;
  // The second smallest entry of two blocks is at least that of the row; with the lowest bounds
  // they most likely hold the very two. Every block that holds one as small is read: bounds are
  // strictly below their entries.
  places[0] = lowest_block(bounds, blocks);
  double limit = scan_blocks(row, v, bounds, places, 1).second;
  places[1] = lowest_block(bounds, blocks);
  if (places[1] != places[0]) limit = scan_blocks(row, v, bounds, places, 2).second;
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    places[count] = static_cast<int32_t>(b);
    count += bounds[b] <= limit;
  }
  return scan_blocks(row, v, bounds, places, count);
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
