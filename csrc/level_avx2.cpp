#if defined(__AVX2__) && defined(__FMA__)
#define VECTOR_BYTES 32
// 4 x 2 accumulators, 2 of y, a broadcast, the mask and a difference fit 16 registers; 6 x 2 spill.
#define PANEL_X 4
#define PANEL_Y_VECTORS 2
#define BACKWARD_ROWS 4
#include "level.hpp"
namespace dotresize {
static const Kernels level = make_level("avx2");
const Kernels* const kAvx2 = &level;
}  // namespace dotresize
#else
#include "kernels.hpp"
namespace dotresize {
const Kernels* const kAvx2 = nullptr;
}
#endif
