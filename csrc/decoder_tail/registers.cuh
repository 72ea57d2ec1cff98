// What a decoder layer's tail keeps in registers: 64 rows of a group of four warps, as sums and as operands of
// products.
#pragma once

#include "common/hopper.cuh"

namespace fm_tail {

constexpr int kRows = 64, kDepth = 64;  // of a matrix in shared memory; 64 16-bit numbers are a swizzled row
constexpr int kWidth = 128, kHalves = kWidth / kDepth, kSteps = kWidth / 16, kHeads = 8, kKeys = 64;
constexpr int kWarpgroup = 128, kGroups = 2, kStages = 3;
constexpr int kThreads = (kGroups + 1) * kWarpgroup;       // a group more, of which one warp brings weights
constexpr int kFewRegisters = 24, kManyRegisters = 240;
static_assert(kWarpgroup * (kFewRegisters + kGroups * kManyRegisters) <= 65536);
constexpr int kMatrix = kRows * kDepth * 2;                // bytes
constexpr int kSquares = 3, kResident = 2;                 // weights of 128 x 128, and those that stay
constexpr int kPart = kHalves * kHalves;                   // matrices of one, or of 64 hidden features: W1, then W2
constexpr int kMemory = 2 * kHalves;                       // matrices of a sample's keys, then of its values

#ifdef FM_HOPPER

// A thread's numbers of 128 columns of its warp's 16 rows, as products take their left operand: of the k-th 16 columns
// those of rows t and t + 8, t its lane / 4, in columns 2 (lane % 4) and the next, then the same of columns 8 further.
using Held = uint32_t[kSteps][4];
// And sums of 128 columns, or of 64: of the j-th 8 columns 4 numbers, two of row t and two of row t + 8.
using Stream = float[kWidth / 2];
using Sums = float[kDepth / 2];

// This thread's first column of each 8.
__device__ __forceinline__ int own_column() { return threadIdx.x % 4 * 2; }

template <typename T>
__device__ __forceinline__ float2 load_two(const T* from) {
  return fm::unpack<T>(*reinterpret_cast<const uint32_t*>(from));
}

// Sums begin with their column's bias.
template <typename T, int N>
__device__ __forceinline__ void begin_with(float (&sums)[N], const T* bias) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    const float2 two = load_two(bias + 8 * j + own_column());
    sums[4 * j] = sums[4 * j + 2] = two.x;
    sums[4 * j + 1] = sums[4 * j + 3] = two.y;
  }
}

template <typename T>
__device__ __forceinline__ void add_bias(Stream& stream, const T* bias) {
#pragma unroll
  for (int j = 0; j < kWidth / 8; j++) {
    const float2 two = load_two(bias + 8 * j + own_column());
    stream[4 * j] += two.x, stream[4 * j + 1] += two.y;
    stream[4 * j + 2] += two.x, stream[4 * j + 3] += two.y;
  }
}

// Rounded sums, or their ReLU, as the left operand of a product.
template <typename T, bool RELU = false, int N>
__device__ __forceinline__ void round_to(uint32_t (&held)[N / 8][4], const float (&sums)[N]) {
#pragma unroll
  for (int k = 0; k < N / 8; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = sums[8 * k + 2 * i], y = sums[8 * k + 2 * i + 1];
      if constexpr (RELU) held[k][i] = fm::pack_relu<T>(x, y);
      else held[k][i] = fm::pack<T>(x, y);
    }
  }
}

// sums += 128 columns that are held, times 128 outputs of a square weight, or 64 of W1.
template <typename T, int N>
__device__ __forceinline__ void multiply_all(float (&sums)[N], const Held& held, fm::SharedAddress weights) {
  constexpr int kInputs = N == kWidth / 2 ? kHalves * kMatrix : kMatrix;  // bytes of the weights of 64 inputs
#pragma unroll
  for (int k = 0; k < kSteps; k++) {
    fm::multiply_held<T>(sums, held[k], fm::operand(weights + k / 4 * kInputs) + k % 4 * 2);
  }
}

// The layer norm of the stream, without gain and shift, rounded.
template <typename T>
__device__ __forceinline__ void normalize(Held& held, const Stream& stream, float epsilon) {
  float sum[4] = {}, squares[4] = {}, mean[2], factor[2];  // of row i / 2, in two parts: of even and odd columns
#pragma unroll
  for (int i = 0; i < kWidth / 2; i++) sum[i % 4] += stream[i];
#pragma unroll
  for (int row = 0; row < 2; row++) mean[row] = fm::quad_sum(sum[2 * row] + sum[2 * row + 1]) / kWidth;
#pragma unroll
  for (int i = 0; i < kWidth / 2; i++) {
    const float apart = stream[i] - mean[i % 4 / 2];
    squares[i % 4] += apart * apart;
  }
#pragma unroll
  for (int row = 0; row < 2; row++) {
    factor[row] = rsqrtf(fm::quad_sum(squares[2 * row] + squares[2 * row + 1]) / kWidth + epsilon);
  }
#pragma unroll
  for (int k = 0; k < kSteps; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* two = stream + 8 * k + 2 * i;
      held[k][i] = fm::pack<T>((two[0] - mean[i % 2]) * factor[i % 2], (two[1] - mean[i % 2]) * factor[i % 2]);
    }
  }
}

#endif

}  // namespace fm_tail
