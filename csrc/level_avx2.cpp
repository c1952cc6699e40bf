#if defined(__AVX2__) && defined(__FMA__)
#define VECTOR_BYTES 32
// 6 x 2 accumulators, 2 of y, a broadcast and the mask: all 16 registers.
#define PANEL_X 6
#define PANEL_Y_VECTORS 2
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
