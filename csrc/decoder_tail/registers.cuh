// What a decoder layer's tail keeps in registers: 64 rows of a group of four warps, as sums and as operands of
// products.
#pragma once

#include "common/hopper.cuh"

namespace fm_tail {

constexpr int kRows = 64, kDepth = 64;  // of a matrix in shared memory; 64 16-bit numbers are a swizzled row
constexpr int kWidth = 128, kHalves = kWidth / kDepth, kSteps = kWidth / 16, kHeads = 8, kKeys = 64;
constexpr int kWarpgroup = 128, kGroups = 2, kStages = 2;
constexpr int kThreads = (kGroups + 1) * kWarpgroup;       // a group more, of which one warp brings weights
constexpr int kFewRegisters = 24, kManyRegisters = 240;
static_assert(kWarpgroup * (kFewRegisters + kGroups * kManyRegisters) <= 65536);
constexpr int kMatrix = kRows * kDepth * 2;                // bytes
constexpr int kSquare = kHalves * kHalves, kSquares = 3;   // matrices of a square weight: output halves, input halves
constexpr int kChunk = 2 * kHalves;                        // matrices of 64 hidden features: of W1, then of W2
constexpr int kMemory = 2 * kHalves;                       // matrices of a sample's keys, then of its values

#ifdef FM_HOPPER

// A thread's numbers of 128 columns of its warp's 16 rows, as products take their left operand: of the k-th 16 columns
// those of rows t and t + 8, t its lane / 4, in columns 2 (lane % 4) and the next, then the same of columns 8 further.
using Held = uint32_t[kSteps][4];
// And sums of 64 columns: of the j-th 8 columns 4 numbers, two of row t and two of row t + 8.
using Sums = float[kDepth / 2];

// This thread's first column of each 8.
__device__ __forceinline__ int own_column() { return threadIdx.x % 4 * 2; }

template <typename T>
__device__ __forceinline__ float2 load_two(const T* from) {
  return fm::unpack<T>(*reinterpret_cast<const uint32_t*>(from));
}

// 64 sums begin with their column's bias.
template <typename T>
__device__ __forceinline__ void begin_with(Sums& sums, const T* bias) {
#pragma unroll
  for (int j = 0; j < kDepth / 8; j++) {
    const float2 two = load_two(bias + 8 * j + own_column());
    sums[4 * j] = sums[4 * j + 2] = two.x;
    sums[4 * j + 1] = sums[4 * j + 3] = two.y;
  }
}

template <typename T>
__device__ __forceinline__ void add_bias(Sums (&stream)[kHalves], const T* bias) {
#pragma unroll
  for (int half = 0; half < kHalves; half++) {
#pragma unroll
    for (int j = 0; j < kDepth / 8; j++) {
      const float2 two = load_two(bias + half * kDepth + 8 * j + own_column());
      stream[half][4 * j] += two.x, stream[half][4 * j + 1] += two.y;
      stream[half][4 * j + 2] += two.x, stream[half][4 * j + 3] += two.y;
    }
  }
}

// Rounded sums as the left operand of a product, 64 columns of it.
template <typename T, bool RELU = false>
__device__ __forceinline__ void round_to(uint32_t (*held)[4], const Sums& sums) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float x = sums[8 * k + 2 * i], y = sums[8 * k + 2 * i + 1];
      // Not fmaxf: what is not a number stays so.
      if constexpr (RELU) x = x < 0.f ? 0.f : x, y = y < 0.f ? 0.f : y;
      held[k][i] = fm::pack<T>(x, y);
    }
  }
}

// sums += 128 columns that are held, times one half of the outputs of a square weight, or 64 outputs of W1.
template <typename T>
__device__ __forceinline__ void multiply_all(Sums& sums, const Held& held, fm::SharedAddress weights) {
#pragma unroll
  for (int k = 0; k < kSteps; k++) {
    fm::multiply_held<T>(sums, held[k], fm::operand(weights + k / 4 * kMatrix) + k % 4 * 2);
  }
}

// Both halves of a square weight's outputs.
template <typename T>
__device__ __forceinline__ void multiply_square(Sums (&sums)[kHalves], const Held& held, fm::SharedAddress weights) {
#pragma unroll
  for (int half = 0; half < kHalves; half++) fm::keep(sums[half]);  // in registers before, not among products
  fm::products_begin();
#pragma unroll
  for (int half = 0; half < kHalves; half++) multiply_all<T>(sums[half], held, weights + half * kHalves * kMatrix);
  fm::products_commit();
  fm::products_wait<0>();
#pragma unroll
  for (int half = 0; half < kHalves; half++) fm::keep(sums[half]);
}

// The layer norm of the stream, without gain and shift, rounded.
template <typename T>
__device__ __forceinline__ void normalize(Held& held, const Sums (&stream)[kHalves], float epsilon) {
  float mean[2], factor[2];
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < kWidth / 4; i++) sum += stream[i / 16][i % 16 / 2 * 4 + row * 2 + i % 2];
    mean[row] = fm::quad_sum(sum) / kWidth;
#pragma unroll
    for (int i = 0; i < kWidth / 4; i++) {
      const float apart = stream[i / 16][i % 16 / 2 * 4 + row * 2 + i % 2] - mean[row];
      squares += apart * apart;
    }
    factor[row] = rsqrtf(fm::quad_sum(squares) / kWidth + epsilon);
  }
#pragma unroll
  for (int k = 0; k < kSteps; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* two = stream[k / 4] + k % 4 * 8 + 2 * i;
      held[k][i] = fm::pack<T>((two[0] - mean[i % 2]) * factor[i % 2], (two[1] - mean[i % 2]) * factor[i % 2]);
    }
  }
}

#endif

}  // namespace fm_tail
