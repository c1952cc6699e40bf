// Numbers between which the Sinkhorn sweep trusts its sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace dotresize {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kLn2 = 0.693147180559945309417;
// Row sums outside are redone with a maximum shift; far from float32's limits on both sides.
constexpr double kSafeLow = 1e-15, kSafeHigh = 1e15;
// The largest shift that row_exp2 takes in float32, with room to spare.
constexpr double kLargestShift = 1 << 20;
// Rows whose column sums are added in T before they join a double: a single float32 sum over 1e6
// rows is wrong in the third digit.
constexpr int64_t kRowBlock = 256;
// A column sum below this, unless its marginal is as small, may have lost terms that underflowed;
// below the second it has.
constexpr double kTinyColumn = 1e-22, kLostColumn = 1e-33;
// Quotients of smaller masses may be subnormal.
constexpr double kSubnormal = 1e-270;

// Sweeps without exponentials: how far a column's factor and a row's sum may be from 1, in powers
// of two, and the smallest mass of a column that they resolve.
constexpr double kDrift = 8, kSettled = 16, kFaint = 1e-18;

// floor(log2(value)) of a positive normal number.
inline double exponent(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<double>(static_cast<int64_t>(bits >> 52) - 1023);
}

}  // namespace dotresize
