// Tiles of 16 rows x 64 gathered keys on tensor cores: reading fragments from slots, products, results to memory.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/stream.cuh"

namespace fm::attention {

constexpr int kGroups = kKeys / kGroup;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowest = -1e30f;  // stands for "no key seen yet" where -inf would give NaN

// |scale| log2(e), what scores are multiplied with after masked ones were set to -inf: so it must not be 0. Times the
// smallest normal number all others are as good as 0.
inline float forward_scale(double scale) {
  return std::max(static_cast<float>(std::abs(scale)) * kLog2e, std::numeric_limits<float>::min());
}

// The two rows (l / 4 and l / 4 + 8) of 16 rows that this lane holds scores of.
struct LaneRows {
  int low, high;
};

__device__ __forceinline__ LaneRows lane_rows() {
  const int row = threadIdx.x % kWarp / 4;
  return {row, row + 8};
}

// How a lane names the 16 rows that a matrix load reads: as rows (left factor, and transposed right factor) or as
// columns (right factor), so that the registers of every fragment are neighbours.
__device__ __forceinline__ int row_of_lane() { return threadIdx.x % 16; }
__device__ __forceinline__ int column_of_lane() { return threadIdx.x % 8 + threadIdx.x % kWarp / 16 * 8; }

// What the lane adds to the address of that row of a head.
template <int DIM>
__device__ __forceinline__ uint32_t row_piece(int head) {
  return head * (2 * DIM) + threadIdx.x % kWarp / 16 * 16;
}
template <int DIM>
__device__ __forceinline__ uint32_t column_piece(int head) {
  return head * (2 * DIM) + threadIdx.x % 16 / 8 * 16;
}

// Fragments of 16 rows as the left factor, for all of the head dim; `row` is where this lane reads.
template <typename T, int DIM>
__device__ __forceinline__ void read_rows(uint32_t (*a)[4], SharedAddress row) {
#pragma unroll
  for (int depth = 0; depth < DIM / 16; ++depth) load_matrices(a[depth], row + 32 * depth);
}

// scores[2], for 16 rows and 16 keys, = rows keys^T; `key` is where this lane reads as a column.
template <typename T, int DIM>
__device__ __forceinline__ void multiply_keys(float (*scores)[4], const uint32_t (*rows)[4], SharedAddress key) {
#pragma unroll
  for (int depth = 0; depth < DIM / 16; ++depth) {
    uint32_t b[4];
    load_matrices(b, key + 32 * depth);
    if (depth == 0) {
      multiply_16x8x16<T>(scores[0], rows[depth], b[0], b[1]);
      multiply_16x8x16<T>(scores[1], rows[depth], b[2], b[3]);
    } else {
      multiply_add_16x8x16<T>(scores[0], rows[depth], b[0], b[1]);
      multiply_add_16x8x16<T>(scores[1], rows[depth], b[2], b[3]);
    }
  }
}

// out, for 16 rows and the head dim, += weights (16 x 16 keys) values; `value` is where this lane reads as a row.
template <typename T, int DIM>
__device__ __forceinline__ void multiply_values(float (*out)[4], const uint32_t (&weights)[4], SharedAddress value) {
#pragma unroll
  for (int column = 0; column < DIM / 16; ++column) {
    uint32_t b[4];
    load_matrices_transposed(b, value + 32 * column);
    multiply_add_16x8x16<T>(out[2 * column], weights, b[0], b[1]);
    multiply_add_16x8x16<T>(out[2 * column + 1], weights, b[2], b[3]);
  }
}

// The scores of 16 rows and 16 keys as the left factor of the next product.
template <typename T>
__device__ __forceinline__ void as_weights(uint32_t (&a)[4], const float (*scores)[4]) {
  a[0] = pack<T>(scores[0][0], scores[0][1]);
  a[1] = pack<T>(scores[0][2], scores[0][3]);
  a[2] = pack<T>(scores[1][0], scores[1][1]);
  a[3] = pack<T>(scores[1][2], scores[1][3]);
}

// Transposes a 4 x 4 matrix of which each of four neighbouring lanes holds a row.
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4]) {
  const int lane = threadIdx.x;
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? r[i] : r[i + 1], 1);
    r[i] = odd ? got : r[i];
    r[i + 1] = odd ? r[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? r[i] : r[i + 2], 2);
    r[i] = upper ? got : r[i];
    r[i + 2] = upper ? r[i + 2] : got;
  }
}

// One row of an accumulator, its values `at` and `at + 1` of each tile, times a factor, as 16-bit numbers.
template <typename T, int DIM>
__device__ __forceinline__ void store_row(const float (*acc)[4], int at, float factor, T* row, bool has, int dim) {
  if constexpr (DIM == 16) {  // neighbours swap so that each holds four columns of one tile
    const bool odd = threadIdx.x & 1;
    const uint32_t first = pack<T>(acc[0][at] * factor, acc[0][at + 1] * factor);
    const uint32_t second = pack<T>(acc[1][at] * factor, acc[1][at + 1] * factor);
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
    const int column = threadIdx.x % 2 * 8 + threadIdx.x % 4 / 2 * 4;
    if (!has || column >= dim) return;
    *reinterpret_cast<uint2*>(row + column) = make_uint2(odd ? got : first, odd ? second : got);
  } else {
#pragma unroll
    for (int part = 0; part < DIM / 32; ++part) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&tile)[4] = acc[4 * part + i];
        r[i] = pack<T>(tile[at] * factor, tile[at + 1] * factor);
      }
      transpose_quad(r);
      const int column = 32 * part + 8 * (threadIdx.x % 4);
      if (has && column < dim) *reinterpret_cast<uint4*>(row + column) = make_uint4(r[0], r[1], r[2], r[3]);
    }
  }
}

// Stores rows l / 4 and l / 4 + 8 of an accumulator, times a factor each. The pointers name the head's first element of
// a row; a row is left alone where its flag is false.
template <typename T, int DIM>
__device__ __forceinline__ void store_rows(const float (*acc)[4], float factor_low, float factor_high, T* row_low,
                                           T* row_high, bool has_low, bool has_high, int dim) {
  store_row<T, DIM>(acc, 0, factor_low, row_low, has_low, dim);
  store_row<T, DIM>(acc, 2, factor_high, row_high, has_high, dim);
}

// Writes rows l / 4 and l / 4 + 8 of an accumulator, times a factor, to rows of `pitch` floats.
template <int DIM>
__device__ __forceinline__ void store_partial_rows(const float (*acc)[4], float factor, float* rows, int pitch,
                                                   bool has_low, bool has_high) {
  const LaneRows lane = lane_rows();
#pragma unroll
  for (int i = 0; i < DIM / 8; ++i) {
    const int column = 8 * i + 2 * (threadIdx.x % 4);
    const float2 low = make_float2(acc[i][0] * factor, acc[i][1] * factor);
    const float2 high = make_float2(acc[i][2] * factor, acc[i][3] * factor);
    if (has_low) *reinterpret_cast<float2*>(rows + lane.low * pitch + column) = low;
    if (has_high) *reinterpret_cast<float2*>(rows + lane.high * pitch + column) = high;
  }
}

// Sum of the products of eight pairs of 16-bit numbers.
template <typename T>
__device__ __forceinline__ float dot_pieces(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack<T>(x[i]), v = unpack<T>(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

}  // namespace fm::attention
