// Cross-attention of a group's 64 rows to a sample's keys and values, a head at a time.
#pragma once

#include "registers.cuh"

namespace fm_tail {

#ifdef FM_HOPPER

// Attention of a head's 16 columns of queries, the left operand of one product, to a sample's keys: `keys` and `values`
// are matrices of 64 columns, of which the head's begin with the `unit`-th 16 bytes. TILES: 8 keys each.
template <typename T, int TILES>
__device__ __forceinline__ void attend(uint32_t (&out)[4], const uint32_t (&query)[4], fm::SharedAddress keys,
                                       fm::SharedAddress values, int unit, int count, float scale) {
  constexpr float kLog2e = 1.44269504088896340736f;
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  float scores[TILES + TILES % 2][4];
#pragma unroll
  for (int pair = 0; pair < (TILES + 1) / 2; pair++) {
    uint32_t b[4];
    const int key = 16 * pair + matrix / 2 * 8 + lane % 8;
    fm::load_matrices(b, keys + key * 128 + ((unit + matrix % 2) ^ (key % 8)) * 16);
    fm::multiply_16x8x16<T>(scores[2 * pair], query, b[0], b[1]);
    fm::multiply_16x8x16<T>(scores[2 * pair + 1], query, b[2], b[3]);
  }
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      scores[tile][i] = 8 * tile + own_column() + i % 2 < count ? scores[tile][i] * scale : -INFINITY;
      largest[i / 2] = fmaxf(largest[i / 2], scores[tile][i]);
    }
  }
#pragma unroll
  for (int row = 0; row < 2; row++) largest[row] = fm::quad_max(largest[row]);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // The change to base 2 comes after the maximum is subtracted: large scores keep their digits.
      scores[tile][i] = fm::exp2_fast((scores[tile][i] - largest[i / 2]) * kLog2e);
      sum[i / 2] += scores[tile][i];
    }
  }
  float found[2][4] = {};
#pragma unroll
  for (int step = 0; step < (TILES + 1) / 2; step++) {
    uint32_t a[4] = {}, b[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* two = scores[2 * step + i / 2] + i % 2 * 2;
      if (2 * step + i / 2 < TILES) a[i] = fm::pack<T>(two[0], two[1]);
    }
    const int key = 16 * step + matrix % 2 * 8 + lane % 8;
    fm::load_matrices_transposed(b, values + key * 128 + ((unit + matrix / 2) ^ (key % 8)) * 16);
    fm::multiply_add_16x8x16<T>(found[0], a, b[0], b[1]);
    fm::multiply_add_16x8x16<T>(found[1], a, b[2], b[3]);
  }
  const float share[2] = {1.f / fm::quad_sum(sum[0]), 1.f / fm::quad_sum(sum[1])};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[i] = fm::pack<T>(found[i / 2][i % 2 * 2] * share[i % 2], found[i / 2][i % 2 * 2 + 1] * share[i % 2]);
  }
}

#endif

}  // namespace fm_tail
