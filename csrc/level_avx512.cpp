#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VECTOR_BYTES 64
// 8 x 2 accumulators of 32 registers.
#define PANEL_X 8
#define PANEL_Y_VECTORS 2
#define BACKWARD_ROWS 8
#include "level.hpp"
namespace dotresize {
static const Kernels level = make_level("avx512");
const Kernels* const kAvx512 = &level;
}  // namespace dotresize
#else
#include "kernels.hpp"
namespace dotresize {
const Kernels* const kAvx512 = nullptr;
}
#endif
