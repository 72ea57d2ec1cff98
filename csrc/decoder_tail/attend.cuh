// Cross-attention of a group's 64 rows to a sample's keys and values, a head at a time.
#pragma once

#include "registers.cuh"

namespace fm_tail {

#ifdef FM_HOPPER

// A thread's scores of two rows with TILES times 8 keys.
template <int TILES>
using Scores = float[TILES][4];

// Where this thread's rows of keys, or of values, lie in a matrix of 64 columns. A head's 16 columns are 32 bytes, of
// which the swizzle moves the number alone: `head_at` is where another head's are.
__device__ __forceinline__ fm::SharedAddress own_keys(fm::SharedAddress matrix) {
  const int lane = threadIdx.x % 32;
  return matrix + (lane / 16 * 8 + lane % 8) * 128 + (lane / 8 % 2 ^ lane % 8) * 16;
}
__device__ __forceinline__ fm::SharedAddress own_values(fm::SharedAddress matrix) {
  const int lane = threadIdx.x % 32;
  return matrix + (lane / 8 % 2 * 8 + lane % 8) * 128 + (lane / 16 ^ lane % 8) * 16;
}
__device__ __forceinline__ fm::SharedAddress head_at(fm::SharedAddress own, int head) {
  return (own ^ head % 4 * 32) + head / 4 * kMatrix;
}

// Products of a head's 16 columns of queries with a sample's keys, which are this thread's from `keys` on.
template <typename T, int TILES>
__device__ __forceinline__ void score(Scores<TILES>& scores, const uint32_t (&query)[4], fm::SharedAddress keys) {
#pragma unroll
  for (int pair = 0; pair < (TILES + 1) / 2; pair++) {
    uint32_t b[4];
    fm::load_matrices(b, keys + pair * 16 * 128);
    fm::multiply_16x8x16<T>(scores[2 * pair], query, b[0], b[1]);
    if (2 * pair + 1 < TILES) fm::multiply_16x8x16<T>(scores[2 * pair + 1], query, b[2], b[3]);
  }
}

// The mean of the values that scores weigh, the left operand of one product. Of the keys only those below `count` are
// there; the first WHOLE tiles are known to be. `scale` is not negative, and changes to base 2, too.
template <typename T, int TILES, int WHOLE>
__device__ __forceinline__ void attend(uint32_t (&out)[4], Scores<TILES>& scores, fm::SharedAddress values, int count,
                                       float scale) {
  const auto there = [&](int tile, int i) { return tile < WHOLE || 8 * tile + own_column() + i % 2 < count; };
  // Of row i / 2, in two parts, which are shorter chains.
  float largest[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, peak[2];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) largest[i] = fmaxf(largest[i], there(tile, i) ? scores[tile][i] : -INFINITY);
  }
#pragma unroll
  for (int row = 0; row < 2; row++) peak[row] = scale * fm::quad_max(fmaxf(largest[2 * row], largest[2 * row + 1]));
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // What the peak is rounded by, all of its row's weights share, and the quotient loses it again.
      const float weight = fm::exp2_fast(fmaf(scores[tile][i], scale, -peak[i / 2]));
      scores[tile][i] = there(tile, i) ? weight : 0.f;
    }
  }
  const uint32_t ones = fm::pack<T>(1.f, 1.f);
  float found[2][4] = {}, sum[4] = {};  // every column of `sum` is that of the row's weights, as they were rounded
#pragma unroll
  for (int step = 0; step < (TILES + 1) / 2; step++) {
    uint32_t a[4] = {}, b[4];
    fm::load_matrices_transposed(b, values + step * 16 * 128);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (2 * step + i / 2 >= TILES) continue;
      const float* two = scores[2 * step + i / 2] + i % 2 * 2;
      a[i] = fm::pack<T>(two[0], two[1]);
    }
    fm::multiply_add_16x8x16<T>(found[0], a, b[0], b[1]);
    fm::multiply_add_16x8x16<T>(found[1], a, b[2], b[3]);
    fm::multiply_add_16x8x16<T>(sum, a, ones, ones);
  }
  const float share[2] = {fm::reciprocal_fast(sum[0]), fm::reciprocal_fast(sum[2])};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[i] = fm::pack<T>(found[i / 2][i % 2 * 2] * share[i % 2], found[i / 2][i % 2 * 2 + 1] * share[i % 2]);
  }
}

#endif

}  // namespace fm_tail
