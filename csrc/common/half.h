// bfloat16 and IEEE half to and from float, as bits. Part of the per-instruction-set code: it uses the processor's
// conversion where the set has one, and the same arithmetic everywhere else.
#pragma once

#include <stdint.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace FM_SIMD_NS {

inline float from_bfloat16(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bfloat16(float x) {  // round to nearest even
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

inline float from_float16(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  // The exponents differ by 112; the product also turns subnormal halves into normal floats.
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0F800000u ? (magnitude | 0x7F800000u) : __builtin_bit_cast(uint32_t, scaled);
  return __builtin_bit_cast(float, sign | bits);
#endif
}

inline uint16_t to_float16(float x) {  // round to nearest even
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  const uint32_t all = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (all >> 16) & 0x8000u;
  const uint32_t bits = all & 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to 65536 or more
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 rounds at the weight of its last bit
    const float sum = __builtin_bit_cast(float, bits) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, sum) - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((bits + 0xFFFu + ((bits >> 13) & 1u) - 0x38000000u) >> 13));
#endif
}

}  // namespace FM_SIMD_NS
