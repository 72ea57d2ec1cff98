// Which instruction set the CPU kernels use. Files named *_simd.cpp are compiled once per level into the namespace
// FM_SIMD_NS; the dispatching file picks one at run time, so one build serves every x86-64 machine.
#pragma once

#include <cstdlib>
#include <cstring>

namespace fm {

enum class SimdLevel : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best level of this processor, capped by the environment variable FASTMETRO_SIMD=baseline|avx2|avx512.
inline SimdLevel simd_level() {
  static const SimdLevel level = [] {
    int best = 0;
#ifdef FM_HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      best = 1;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        best = 2;
      }
    }
#endif
    if (const char* cap = std::getenv("FASTMETRO_SIMD")) {
      const int wanted = std::strcmp(cap, "baseline") == 0 ? 0 : std::strcmp(cap, "avx2") == 0 ? 1 : 2;
      if (wanted < best) best = wanted;
    }
    return static_cast<SimdLevel>(best);
  }();
  return level;
}

}  // namespace fm
