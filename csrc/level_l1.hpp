// Leaf kernels of the L1 cost: packing, quantising and the two register tiles. Part of level.hpp.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dotresize {
namespace {

// ---------------------------------------------------------------- reading

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Branch-free so that it vectorises without half-precision instructions. Normal numbers get their
// exponent re-biased by a multiplication, which also carries infinities and NaN through;
// subnormals are read off the mantissa of 0.5 + h * 2^-24.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t rebiased = (magnitude << 13) + (0xe0u << 23);
  const float normal = bits_to_float(rebiased) * 0x1.0p-112f;
  const float subnormal = bits_to_float(magnitude | 0x3f000000u) - 0.5f;
  uint32_t bits;
  const float value = magnitude < 0x0400u ? subnormal : normal;
  std::memcpy(&bits, &value, sizeof bits);
  return bits_to_float(bits | sign);
}

// Calls `body` with the type that holds an element and the function that makes it a float.
template <typename Body>
inline void with_reader(Dtype dtype, Body body) {
  if (dtype == Dtype::kFloat32) {
    body(float{}, [](float v) { return v; });
  } else if (dtype == Dtype::kFloat16) {
    body(uint16_t{}, half_to_float);
  } else {
    body(uint16_t{}, [](uint16_t v) { return bits_to_float(static_cast<uint32_t>(v) << 16); });
  }
}

// ---------------------------------------------------------------- packing

// Rows copied together. Tokens are often a power of two apart, so that their lines share a set of
// the first-level cache: eight fit, and each line is used up by neighbouring panels before it goes.
constexpr int64_t kPackRows = 8;

inline int64_t in_order(int lane) { return lane; }

// out[(p * rows + t) * P + lane] = at(t, p * P + neuron(lane)), 0 past `count`.
template <int P, int64_t neuron(int) = in_order, typename Out, typename At>
inline void pack_panels(int64_t rows, int64_t count, Out* out, At at) {
  const int64_t panels = count / P;
  for (int64_t t0 = 0; t0 < rows; t0 += kPackRows) {
    const int64_t t1 = t0 + kPackRows < rows ? t0 + kPackRows : rows;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t t = t0; t < t1; ++t) {
        Out* to = out + (p * rows + t) * P;
        for (int lane = 0; lane < P; ++lane) to[lane] = at(t, p * P + neuron(lane));
      }
    }
  }
  if (panels * P == count) return;
  for (int64_t t = 0; t < rows; ++t) {
    for (int lane = 0; lane < P; ++lane) {
      const int64_t i = panels * P + neuron(lane);
      out[(panels * rows + t) * P + lane] = i < count ? at(t, i) : Out{};
    }
  }
}

template <int P>
void pack(const Block& block, float* out) {
  with_reader(block.dtype, [&](auto type, auto read) {
    using In = decltype(type);
    const In* data = static_cast<const In*>(block.data);
    const int64_t *index = block.index, stride = block.stride;
    if (index == nullptr) {
      pack_panels<P>(block.rows, block.count, out,
                     [=](int64_t t, int64_t i) { return read(data[t * stride + i]); });
    } else {
      pack_panels<P>(block.rows, block.count, out,
                     [=](int64_t t, int64_t i) { return read(data[t * stride + index[i]]); });
    }
  });
}

// ---------------------------------------------------------------- float32 tile

constexpr int kPanelX = PANEL_X;
constexpr int kVectorsY = PANEL_Y_VECTORS;
constexpr int kPanelY = kVectorsY * kLanes<float>;

// kPanelX * kVectorsY accumulators stay in registers over the whole token block; per token
// kVectorsY loads of y and kPanelX broadcasts of x feed three instructions per vector of pairs.
void tile_float(int64_t tokens, const float* x_panel, const float* y_panel, float step, float* tile,
                int64_t stride) {
  using V = Simd<float>::V;
  using I = Simd<float>::I;
  const I mask = I{} + Simd<float>::kAbsMask;
  // The sums are far away by now; without this the last loop waits for them.
  for (int r = 0; r < kPanelX; ++r) __builtin_prefetch(tile + r * stride, 1);
  V sum[kPanelX][kVectorsY] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    V y[kVectorsY];
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsY; ++v) y[v] = load(y_panel + t * kPanelY + v * kLanes<float>);
#pragma GCC unroll 16
    for (int r = 0; r < kPanelX; ++r) {
      // A scalar operand is broadcast straight from memory; `V{} + x` would be an addition first,
      // and its register two spilled accumulators: half the speed.
      const float x = x_panel[t * kPanelX + r];
#pragma GCC unroll 4
      for (int v = 0; v < kVectorsY; ++v) sum[r][v] += (V)((I)(x - y[v]) & mask);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kPanelX; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectorsY; ++v) {
      float* out = tile + r * stride + v * kLanes<float>;
      store(out, load(out) + step * sum[r][v]);
    }
  }
}

// ---------------------------------------------------------------- 8-bit tile

// One 64-bit lane holds eight tokens of one neuron, so that a sum of absolute differences over
// eight bytes is one pair's and nothing has to be added across lanes.
typedef uint64_t U8Words __attribute__((vector_size(VECTOR_BYTES)));
constexpr int kU8Lanes = VECTOR_BYTES / 8;
constexpr int kU8VectorsY = 2;  // converted to float in pairs
constexpr int kU8PanelX = PANEL_X;
constexpr int kU8PanelY = kU8VectorsY * kU8Lanes;

inline U8Words absolute_differences(U8Words a, U8Words b) {
#if VECTOR_BYTES == 64
  return (U8Words)_mm512_sad_epu8((__m512i)a, (__m512i)b);
#elif VECTOR_BYTES == 32
  return (U8Words)_mm256_sad_epu8((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (U8Words)_mm_sad_epu8((__m128i)a, (__m128i)b);
#else
  U8Words sum = {};
  for (int byte = 0; byte < 8; ++byte) {
    const U8Words u = a >> (8 * byte) & 0xff, v = b >> (8 * byte) & 0xff;
    sum += u > v ? u - v : v - u;
  }
  return sum;
#endif
}

// The sums of two vectors as floats, in the order of the neurons. Sums over a block stay below 2^16
// and so leave the upper half of their lanes to another.
inline Simd<float>::V to_floats(U8Words even, U8Words odd) {
  return __builtin_convertvector((Simd<float>::I)(even | odd << 32), Simd<float>::V);
}

void tile_u8(int64_t words, const uint64_t* x_panel, const uint64_t* y_panel, float step,
             float* tile, int64_t stride) {
  U8Words sum[kU8PanelX][kU8VectorsY] = {};
  for (int r = 0; r < kU8PanelX; ++r) __builtin_prefetch(tile + r * stride, 1);
  for (int64_t t = 0; t < words; ++t) {
    U8Words y[kU8VectorsY];
#pragma GCC unroll 4
    for (int v = 0; v < kU8VectorsY; ++v) {
      std::memcpy(&y[v], y_panel + t * kU8PanelY + v * kU8Lanes, sizeof y[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kU8PanelX; ++r) {
      const U8Words x = U8Words{} | x_panel[t * kU8PanelX + r];
#pragma GCC unroll 4
      for (int v = 0; v < kU8VectorsY; ++v) sum[r][v] += absolute_differences(x, y[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kU8PanelX; ++r) {
    float* out = tile + r * stride;
    store(out, load(out) + step * to_floats(sum[r][0], sum[r][1]));
  }
}

// The first vector of a panel of y has its even neurons, the second the odd ones: see to_floats.
inline int64_t even_then_odd(int lane) {
  return lane < kU8Lanes ? 2 * lane : 2 * (lane - kU8Lanes) + 1;
}

template <int P, int64_t neuron(int)>
void pack_u8(const Block& block, uint64_t* out) {
  const uint64_t* data = static_cast<const uint64_t*>(block.data);
  const int64_t *index = block.index, stride = block.stride;
  pack_panels<P, neuron>(block.rows, block.count, out, [=](int64_t t, int64_t i) {
    return data[t * stride + (index == nullptr ? i : index[i])];
  });
}

void quantize(const TokenOctet& octet, int64_t count, uint64_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = 0;
  with_reader(octet.dtype, [&](auto type, auto read) {
    using In = decltype(type);
    for (int k = 0; k < octet.tokens; ++k) {
      const In* row = static_cast<const In*>(octet.data) + octet.token[k] * octet.stride;
      const float low = octet.low[k], per_step = octet.per_step, dither = octet.dither[k];
      for (int64_t i = 0; i < count; ++i) {
        float q = (read(row[i]) - low) * per_step + dither;
        q = q > 0.0f ? q : 0.0f;  // and so truncation is floor
        q = q < 255.0f ? q : 255.0f;
        out[i] |= static_cast<uint64_t>(static_cast<uint32_t>(static_cast<int32_t>(q))) << (8 * k);
      }
    }
  });
}

constexpr L1Kernels<float> kFloatTile = {kPanelX, kPanelY, pack<kPanelX>, pack<kPanelY>,
                                         tile_float};
constexpr L1Kernels<uint64_t> kU8Tile = {kU8PanelX, kU8PanelY, pack_u8<kU8PanelX, in_order>,
                                         pack_u8<kU8PanelY, even_then_odd>, tile_u8};

}  // namespace
}  // namespace dotresize
