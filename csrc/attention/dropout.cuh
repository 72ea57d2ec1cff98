// Which attention weights are dropped: the arithmetic of fastmetro_kernels/attention/dropout.py.

#pragma once

#include "common/device.cuh"

namespace fm::attention {

__device__ __forceinline__ uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The Philox key of one (batch, head).
__device__ __forceinline__ uint32_t dropout_key(int64_t seed, int64_t batch_head) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return mix32(mix32(static_cast<uint32_t>(batch_head) ^ static_cast<uint32_t>(bits)) +
               static_cast<uint32_t>(bits >> 32));
}

// 32 random bits of one weight: Philox2x32-7 (Salmon et al., SC 2011).
__device__ __forceinline__ uint32_t dropout_bits(uint32_t key, int query_token, int key_token) {
  uint32_t x0 = static_cast<uint32_t>(key_token), x1 = static_cast<uint32_t>(query_token);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t product = static_cast<uint64_t>(x0) * 0xD256D193u;
    x0 = static_cast<uint32_t>(product >> 32) ^ key ^ x1;
    x1 = static_cast<uint32_t>(product);
    key += 0x9E3779B9u;
  }
  return x0;
}

}  // namespace fm::attention
