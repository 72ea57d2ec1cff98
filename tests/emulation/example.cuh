// c = a[rows] b for 16-bit numbers: the worked example of the emulator, with every instruction that it knows.
//
// It is a real kernel, which nvcc compiles as well. MISTAKE puts one of the usual mistakes into it, so that the tests
// can show that each is caught.
#pragma once

#include "common/device.cuh"

namespace fm_example {

enum class Mistake {
  none,
  no_wait,             // reads tiles whose copies may still be under way
  no_barrier_before,   // reads tiles that other warps have copied
  no_barrier_after,    // overwrites tiles that other warps still read
  past_shared_memory,  // the last tile lies behind what the launch asked for
  lane_leaves,         // one lane skips a shuffle
  lane_returns,        // one lane returns early
  barrier_in_branch,   // warps wait at different barriers
  past_the_input,      // reads one row too many of b
  writes_twice,        // two blocks write the same rows
  no_swizzle,          // right, but the rows of a matrix lie in the same banks
};

constexpr int kThreads = 64;
constexpr int kRows = 32;     // of a tile, 16 per warp
constexpr int kColumns = 64;  // of a tile
constexpr int kDepth = 64;    // of a step
constexpr int kRowBytes = 128;  // of both tiles
constexpr int kStageBytes = (kRows + kDepth) * kRowBytes;
constexpr int kSharedBytes = 2 * kStageBytes;

template <typename T>
struct Params {
  const T* a;           // [any, k]
  const int32_t* rows;  // [m] rows of a, -1 for a row of zeros
  const T* b;           // [k, n]
  float* c;             // [m, n]
  float* sums;          // [m, ceil(n / kColumns)] of c over the columns of a tile
  int m, n, k;          // n and k are multiples of 8
};

// Where 16 bytes of a tile lie: rotated within the row, so that the same column of eight rows takes all banks.
template <Mistake MISTAKE>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return row * kRowBytes + (MISTAKE == Mistake::no_swizzle ? chunk : chunk ^ (row & 7)) * 16;
}

template <typename T, Mistake MISTAKE>
__device__ __forceinline__ void copy_tiles(const Params<T>& p, fm::SharedAddress stage, int step) {
  const int first_row = blockIdx.y * kRows, first_column = blockIdx.x * kColumns, first_k = step * kDepth;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const int source = first_row + row < p.m ? __ldg(p.rows + first_row + row) : -1;
    const int k = first_k + chunk * 8;
    const bool valid = source >= 0 && k < p.k;
    const T* from = valid ? p.a + static_cast<int64_t>(source) * p.k + k : p.a;
    fm::copy_async_16(stage + tile_offset<MISTAKE>(row, chunk), from, valid);
  }
#pragma unroll
  for (int i = threadIdx.x; i < kDepth * 8; i += kThreads) {
    const int k = first_k + i / 8, column = first_column + i % 8 * 8;
    const bool valid = k < p.k + (MISTAKE == Mistake::past_the_input) && column < p.n;
    const T* from = valid ? p.b + static_cast<int64_t>(k) * p.n + column : p.b;
    fm::copy_async_16(stage + kRows * kRowBytes + tile_offset<MISTAKE>(i / 8, i % 8), from, valid);
  }
}

template <typename T, Mistake MISTAKE>
__device__ __forceinline__ void multiply_tiles(float (&c)[8][4], fm::SharedAddress stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    // Matrices of a: rows 0-7 and 8-15 of the first eight k, then of the second.
    uint32_t a[4];
    fm::load_matrices(a, stage + tile_offset<MISTAKE>(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      // Matrices of b, whose rows are k: the two halves of k of eight columns, then of the next eight.
      uint32_t b[4];
      fm::load_matrices_transposed(
          b, stage + kRows * kRowBytes + tile_offset<MISTAKE>(k * 16 + lane % 16, 2 * pair + lane / 16));
      fm::multiply_add_16x8x16<T>(c[2 * pair], a, b[0], b[1]);
      fm::multiply_add_16x8x16<T>(c[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

template <typename T, Mistake MISTAKE>
__global__ void __launch_bounds__(kThreads) gathered_product_kernel(const Params<T> p) {
  const fm::SharedAddress shared = fm::shared_address(fm::dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int steps = (p.k + kDepth - 1) / kDepth;
  if (MISTAKE == Mistake::lane_returns && threadIdx.x == 37) return;

  float c[8][4] = {};
  copy_tiles<T, MISTAKE>(p, shared, 0);
  fm::copy_async_commit();
  for (int step = 0; step < steps; ++step) {
    const int next = step + 1;
    const int behind = MISTAKE == Mistake::past_shared_memory && next == steps - 1 ? 1 : 0;
    if (next < steps) copy_tiles<T, MISTAKE>(p, shared + (next % 2 + behind) * kStageBytes, next);
    fm::copy_async_commit();
    if (MISTAKE != Mistake::no_wait) fm::copy_async_wait<1>();
    if (MISTAKE == Mistake::barrier_in_branch && warp == 1) {
      __syncthreads();
    } else if (MISTAKE != Mistake::no_barrier_before) {
      __syncthreads();
    }
    multiply_tiles<T, MISTAKE>(c, shared + step % 2 * kStageBytes);
    if (MISTAKE != Mistake::no_barrier_after) __syncthreads();
  }

  float sums[2] = {};
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i / 2] += c[tile][i];
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    if (MISTAKE == Mistake::lane_leaves && lane == 5) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) sums[half] += __shfl_xor_sync(0xffffffffu, sums[half], step);
  }

  const int block_row = MISTAKE == Mistake::writes_twice ? 0 : blockIdx.y;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = block_row * kRows + warp * 16 + half * 8 + lane / 4;
    if (row >= p.m) continue;
    if (lane % 4 == 0) p.sums[static_cast<int64_t>(row) * gridDim.x + blockIdx.x] = sums[half];
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      const int column = blockIdx.x * kColumns + tile * 8 + lane % 4 * 2;
      if (column >= p.n) continue;
      float2* to = reinterpret_cast<float2*>(p.c + static_cast<int64_t>(row) * p.n + column);
      *to = make_float2(c[tile][2 * half], c[tile][2 * half + 1]);
    }
  }
}

}  // namespace fm_example
