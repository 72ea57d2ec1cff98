// 16-bit numbers as matrix instructions read them. Not for kernels or callers.
#pragma once

#include <cstdint>

namespace fm_emulation {

inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t wide = magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : __builtin_bit_cast(uint32_t, scaled);
  return __builtin_bit_cast(float, wide | static_cast<uint32_t>(bits & 0x8000u) << 16);
}

inline float to_float(uint16_t bits, bool bfloat) {
  return bfloat ? __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

// The low (0) or high (1) half of a register.
inline float number(uint32_t word, int half, bool bfloat) {
  return to_float(static_cast<uint16_t>(word >> 16 * half), bfloat);
}

}  // namespace fm_emulation
