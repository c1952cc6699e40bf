// The baseline of every 64-bit target: SSE2 on x86-64, NEON on arm64.
#define VECTOR_BYTES 16
// SSE2 has no three-operand form, so a register is left over for the copy.
#define PANEL_X 4
#define PANEL_Y_VECTORS 2
#define BACKWARD_ROWS 4
#include "level.hpp"
namespace dotresize {
static const Kernels level = make_level("portable");
const Kernels* const kPortable = &level;
}  // namespace dotresize
