#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace dotresize {
namespace {

bool cpu_has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool cpu_has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

const Kernels& choose() {
  const Kernels* avx512 = cpu_has_avx512() ? kAvx512 : nullptr;
  const Kernels* avx2 = cpu_has_avx2() ? kAvx2 : nullptr;
  const char* wanted = std::getenv("DOTRESIZE_SIMD");
  if (wanted == nullptr || *wanted == '\0') {
    return avx512 ? *avx512 : avx2 ? *avx2 : *kPortable;
  }
  const std::string name(wanted);
  for (const Kernels* level : {avx512, avx2, kPortable}) {
    if (level != nullptr && name == level->name) return *level;
  }
  throw std::runtime_error("DOTRESIZE_SIMD=" + name + ": this machine runs " +
                           (avx512 ? "avx512, " : "") + (avx2 ? "avx2, " : "") + "portable");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

template <>
const L1Kernels<float>& l1_kernels<float>() {
  return kernels().l1_float;
}

template <>
const L1Kernels<uint64_t>& l1_kernels<uint64_t>() {
  return kernels().l1_u8;
}

template <>
const SinkhornKernels<float>& sinkhorn_kernels<float>() {
  return kernels().sinkhorn_f32;
}

template <>
const SinkhornKernels<double>& sinkhorn_kernels<double>() {
  return kernels().sinkhorn_f64;
}

template <>
const AssignmentKernels<float>& assignment_kernels<float>() {
  return kernels().assignment_f32;
}

template <>
const AssignmentKernels<double>& assignment_kernels<double>() {
  return kernels().assignment_f64;
}

}  // namespace dotresize
