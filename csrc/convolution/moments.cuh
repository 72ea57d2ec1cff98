// What a block's results are on average, for a batch norm behind the convolution: of its rows of each channel their mean,
// and the sum of the squares of what they are off it. See forward.cuh.
#pragma once

#include "tile.cuh"

namespace fm_convolution {

#ifdef FM_HOPPER

// Stores eight results of each row as Share does, and the moments of all rows that the group shares.
template <typename T, int COLUMNS, bool SHARED>
struct Moments {
  using MyShare = Share<T, COLUMNS, SHARED>;
  static constexpr int kEighths = COLUMNS / 8, kWarps = kWarpgroup / 32;
  const MyShare& mine;
  uint4 results[MyShare::kTurns];

  __device__ __forceinline__ explicit Moments(const MyShare& mine) : mine(mine) {}

  // `parts` is free once all of a group have stored: sums of its warps go there, [warps, COLUMNS].
  __device__ __forceinline__ void finish(const Output<T>& p, float* moments, fm::SharedAddress parts, int own, int split,
                                         int row, int column, int barrier) {
    int turn = 0;
    mine.finish(p, parts, own, split, [&](int, const uint4& packed) { results[turn++] = packed; });
    const int count = min(own, p.rows - row);
    if (count <= 0) return;  // all of the group alike
    float sums[8] = {}, mean[8] = {};
    add_up(sums, mean, false);
    across_group(sums, parts, barrier);
#pragma unroll
    for (int i = 0; i < 8; i++) mean[i] = sums[i] / count, sums[i] = 0.f;
    add_up(sums, mean, true);
    across_group(sums, parts, barrier);
    const int channel = column + threadIdx.x % kEighths * 8;
    if (threadIdx.x % kWarpgroup >= kEighths || channel >= p.channels) return;
    const int groups = (p.rows + own - 1) / own;
    float* to = moments + static_cast<int64_t>(row / own) * p.channels + channel;
    store(to, mean);
    store(to + static_cast<int64_t>(groups) * p.channels, sums);
  }

 private:
  // Over the rows of a thread: the numbers, or the squares of what they are off the mean.
  __device__ __forceinline__ void add_up(float (&sums)[8], const float (&mean)[8], bool squares) const {
#pragma unroll
    for (int turn = 0; turn < MyShare::kTurns; turn++) {
      if (turn >= mine.turns) break;
      const uint32_t words[4] = {results[turn].x, results[turn].y, results[turn].z, results[turn].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 two = fm::unpack<T>(words[i]);
        const float x = two.x - mean[2 * i], y = two.y - mean[2 * i + 1];
        sums[2 * i] += squares ? x * x : x;
        sums[2 * i + 1] += squares ? y * y : y;
      }
    }
  }

  // Over the threads of a group that have the same channels, in a fixed order; all of them get the sums.
  __device__ __forceinline__ void across_group(float (&sums)[8], fm::SharedAddress parts, int barrier) const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
      for (int apart = kEighths; apart < 32; apart *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], apart);
    }
    fm::group_sync(barrier);  // what is there has been read
    const int thread = threadIdx.x % kWarpgroup;
    const fm::SharedAddress at = parts + threadIdx.x % kEighths * 32;
    if (thread % 32 < kEighths) {
      const fm::SharedAddress to = at + thread / 32 * COLUMNS * 4;
#pragma unroll
      for (int i = 0; i < 8; i += 2) fm::store_shared(to + i * 4, float2{sums[i], sums[i + 1]});
    }
    fm::group_sync(barrier);
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) {
      const float4 low = fm::load_shared<float4>(at + warp * COLUMNS * 4);
      const float4 high = fm::load_shared<float4>(at + warp * COLUMNS * 4 + 16);
      sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
      sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
    }
  }

  static __device__ __forceinline__ void store(float* to, const float (&values)[8]) {
    *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
    *reinterpret_cast<float4*>(to + 4) = {values[4], values[5], values[6], values[7]};
  }
};

#endif

}  // namespace fm_convolution
