// What kernels are made of that make many output channels of a tile 64 at a time, in buffers in shared memory, from where
// the copy engine stores them and where they are an operand of the next product. For compute capability 9.0.
#pragma once

#include "tile.cuh"

namespace fm_convolution {

constexpr int kMatrix = kRows * kDepth * 2;  // bytes of 64 channels of a tile, or of 64 x 64 weights

#ifdef FM_HOPPER

// Sums begin with their column's bias.
template <int COUNT>
__device__ __forceinline__ void begin_with(float (&sums)[COUNT], const float* bias) {
#pragma unroll
  for (int j = 0; j < COUNT / 4; j++) {
    const float2 two = *reinterpret_cast<const float2*>(bias + 8 * j + threadIdx.x % 4 * 2);
    sums[4 * j] = sums[4 * j + 2] = two.x;
    sums[4 * j + 1] = sums[4 * j + 3] = two.y;
  }
}

// Sums of 64 or 128 channels += rows of 64 numbers in shared memory, 8 of them every `group` bytes, times weights.
template <typename T, int COUNT>
__device__ __forceinline__ void multiply_rows(float (&sums)[COUNT], fm::SharedAddress rows, int group,
                                              fm::SharedAddress weights) {
  const uint64_t a = fm::operand(rows, group), b = fm::operand(weights);
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) fm::multiply<T, 2 * COUNT>(sums, a + 2 * k, b + 2 * k, 1);
}

// Where this thread's row of the 8 x 8 matrices lies in a buffer, in the copy engine's swizzle; for the k-th 16 channels
// bits 5 and 6 are flipped by k.
__device__ __forceinline__ uint32_t matrix_row() {
  const int lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
  return row * kDepth * 2 + ((lane / 16) ^ (row % 8)) * 16;
}

// A thread's numbers of 64 channels of the tile: of the k-th 16 those of its rows t and t + 8 of the 16 of its warp, t its
// lane / 4, columns 2 (lane % 4) and the next, and the same of columns 8 further. So a product takes its left operand.
using Held = uint32_t[kDepth / 16][4];

__device__ __forceinline__ void hold_rows(Held& held, fm::SharedAddress buffer) {
  const fm::SharedAddress row = buffer + matrix_row();
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) fm::load_matrices(held[k], row ^ (32 * k));
}

// 64 channels of a tile: the sums, from the `from`-th of a thread's on, with what is held added, ReLU, rounded, to a
// buffer.
template <typename T, int COUNT>
__device__ __forceinline__ void finish_channels(const float (&sums)[COUNT], const Held* held, fm::SharedAddress buffer,
                                                int from = 0) {
  const fm::SharedAddress row = buffer + matrix_row();
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 more = held != nullptr ? fm::unpack<T>((*held)[k][i]) : float2{};
      const float* const two = sums + from + 8 * k + 2 * i;
      const float x = held != nullptr ? two[0] + more.x : two[0], y = held != nullptr ? two[1] + more.y : two[1];
      packed[i] = larger<T>(fm::pack<T>(x, y), 0);
    }
    fm::store_matrices(row ^ (32 * k), packed);
  }
}

template <typename T>
__device__ __forceinline__ void multiply_held_rows(float (&sums)[kDepth / 2], const Held& held,
                                                   fm::SharedAddress weights) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) fm::multiply_held<T>(sums, held[k], fm::operand(weights) + 2 * k);
}

#endif

}  // namespace fm_convolution
