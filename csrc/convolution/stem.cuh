// ResNet's beginning in one kernel: 7 x 7 convolution of stride 2 from 3 to 64 channels, bias, ReLU, and 3 x 3 max pooling
// of stride 2. For compute capability 8.0 and up.
//
// A block makes 4 x 7 pooled positions of all 64 channels, for which it needs 9 x 15 of the convolution and 23 x 35
// pixels. Under one row of taps a position sees 7 pixels of 3 channels, 21 consecutive numbers, and these are the depth of
// the product: 7 rows of 22, the last of them under a weight of zero, so that pairs of numbers are words. Rows of the
// product are read from the pixels as they lie: positions are 3 words apart, so that the 8 positions and 4 pairs that a
// warp reads at a time are 25 consecutive words, in as many banks. Weights stay in registers; eight warps share the product,
// four along positions, two along channels.
#pragma once

#include "common/device.cuh"

namespace fm_convolution {

struct StemSize {
  int height, width;            // of the images
  int rows, columns;            // of the convolution
  int pooled_rows, pooled_columns;
};

constexpr int kStemChannels = 64, kStemThreads = 256;
constexpr int kPooledRows = 4, kPooledColumns = 7;  // of a block
constexpr int kConvRows = 2 * kPooledRows + 1, kConvColumns = 2 * kPooledColumns + 1, kConv = kConvRows * kConvColumns;
constexpr int kPixelRows = 2 * kConvRows + 5, kPixelColumns = 2 * kConvColumns + 5;
constexpr int kPixelPitch = 3 * kPixelColumns + 1;         // numbers; one more is read, and an odd number of words
constexpr int kStemPairs = 11, kStemSteps = 10;            // of a row of taps; of 16 of the depth, 7 x 22 and 6 zeros
constexpr int kConvPitch = kStemChannels + 8;              // numbers: eight rows of four words are 32 banks
constexpr int kConvTiles = (kConv + 15) / 16;
static_assert(kPixelPitch % 4 == 2);

// Bytes of shared memory: pixels, then the convolution's positions.
constexpr int kStemPixelBytes = (kPixelRows * kPixelPitch * 2 + 15) / 16 * 16;
constexpr int kStemBytes = kStemPixelBytes + kConvTiles * 16 * kConvPitch * 2;

// Word of the pixels, from a position's first on, that lane column t reads for pairs 8 step + t (+ 4) of the depth.
__device__ __forceinline__ int stem_word(int pair) {
  return pair < 7 * kStemPairs ? pair / kStemPairs * (kPixelPitch / 2) + pair % kStemPairs : 0;
}

template <typename T>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const Pair most = __hmax2_nan(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&most);
}

// The block's pixels, zero outside the image; all are asked for before the first is waited for.
template <typename T>
__device__ __forceinline__ void load_stem_pixels(const T* image, const StemSize& size, T* pixels, int row, int column) {
  constexpr int kTurns = (kPixelRows * kPixelPitch + kStemThreads - 1) / kStemThreads;
  T loaded[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    const int i = threadIdx.x + turn * kStemThreads, place = i % kPixelPitch;
    const int y = row + i / kPixelPitch, x = 3 * column + place;
    const bool inside = place < 3 * kPixelColumns && y >= 0 && y < size.height && x >= 0 && x < 3 * size.width;
    loaded[turn] = static_cast<T>(0.f);
    if (inside) loaded[turn] = image[static_cast<int64_t>(y) * 3 * size.width + x];
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    const int i = threadIdx.x + turn * kStemThreads;
    if (i < kPixelRows * kPixelPitch) pixels[i] = loaded[turn];
  }
}

// A warp's 16 positions and 32 channels: sums of positions lane / 4 (+ 8), channels 8 n + 2 (lane % 4) and the next.
template <typename T>
__device__ __forceinline__ void multiply_stem(const T* pixels, int tile, const uint4 (&weights)[kStemSteps][2],
                                              float (&sums)[4][4]) {
  const int lane = threadIdx.x % 32;
  const uint32_t* first[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int position = min(tile * 16 + lane / 4 + 8 * half, kConv - 1);
    const int row = position / kConvColumns, column = position % kConvColumns;
    first[half] = reinterpret_cast<const uint32_t*>(pixels) + row * kPixelPitch + column * 3;  // two rows, two pixels
  }
#pragma unroll
  for (int step = 0; step < kStemSteps; step++) {
    const int low = stem_word(8 * step + lane % 4), high = stem_word(8 * step + lane % 4 + 4);
    const uint32_t a[4] = {first[0][low], first[1][low], first[0][high], first[1][high]};
    const uint4 &w0 = weights[step][0], &w1 = weights[step][1];
    fm::multiply_add_16x8x16<T>(sums[0], a, w0.x, w0.y);
    fm::multiply_add_16x8x16<T>(sums[1], a, w0.z, w0.w);
    fm::multiply_add_16x8x16<T>(sums[2], a, w1.x, w1.y);
    fm::multiply_add_16x8x16<T>(sums[3], a, w1.z, w1.w);
  }
}

// `weights`: [2 halves of the channels, steps, lanes, 16 numbers], see lay_out_stem.
template <typename T>
__global__ void __launch_bounds__(kStemThreads)
    stem_kernel(const T* __restrict__ images, const uint4* __restrict__ weights, const float* __restrict__ bias,
                T* __restrict__ out, StemSize size) {
  fm::launch_dependents();
  T* const pixels = reinterpret_cast<T*>(fm::dynamic_shared());
  T* const conv = reinterpret_cast<T*>(fm::dynamic_shared() + kStemPixelBytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = warp % 2;
  const int pooled_row = blockIdx.y * kPooledRows, pooled_column = blockIdx.x * kPooledColumns;
  const int conv_row = 2 * pooled_row - 1, conv_column = 2 * pooled_column - 1;

  uint4 mine[kStemSteps][2];
#pragma unroll
  for (int step = 0; step < kStemSteps; step++) {
    const uint4* from = weights + ((half * kStemSteps + step) * 32 + lane) * 2;
    mine[step][0] = from[0], mine[step][1] = from[1];
  }
  float2 add[4];
#pragma unroll
  for (int n = 0; n < 4; n++) add[n] = *reinterpret_cast<const float2*>(bias + half * 32 + n * 8 + lane % 4 * 2);

  fm::wait_for_previous_grid();
  load_stem_pixels(images + static_cast<int64_t>(blockIdx.z) * size.height * size.width * 3, size, pixels,
                   2 * conv_row - 3, 2 * conv_column - 3);
  __syncthreads();

  for (int tile = warp / 2; tile < kConvTiles; tile += kStemThreads / 64) {
    float sums[4][4] = {};
    multiply_stem(pixels, tile, mine, sums);
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const int position = tile * 16 + lane / 4 + 8 * part;
      const int row = conv_row + position / kConvColumns, column = conv_column + position % kConvColumns;
      // Positions outside count for no window: after the ReLU zero is as little as nothing.
      const bool inside = row >= 0 && row < size.rows && column >= 0 && column < size.columns;
#pragma unroll
      for (int n = 0; n < 4; n++) {
        float x = sums[n][2 * part] + add[n].x, y = sums[n][2 * part + 1] + add[n].y;
        x = x < 0.f || !inside ? 0.f : x, y = y < 0.f || !inside ? 0.f : y;  // keeps NaN
        *reinterpret_cast<uint32_t*>(conv + position * kConvPitch + half * 32 + n * 8 + lane % 4 * 2) = fm::pack<T>(x, y);
      }
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < kPooledRows * kPooledColumns * 8; i += kStemThreads) {
    const int position = i / 8, channel = i % 8 * 8, y = position / kPooledColumns, x = position % kPooledColumns;
    if (pooled_row + y >= size.pooled_rows || pooled_column + x >= size.pooled_columns) continue;
    uint4 most = {};
#pragma unroll
    for (int tap = 0; tap < 9; tap++) {
      const T* from = conv + ((2 * y + tap / 3) * kConvColumns + 2 * x + tap % 3) * kConvPitch + channel;
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      most.x = larger<T>(most.x, v.x), most.y = larger<T>(most.y, v.y);
      most.z = larger<T>(most.z, v.z), most.w = larger<T>(most.w, v.w);
    }
    const int64_t at = (static_cast<int64_t>(blockIdx.z) * size.pooled_rows + pooled_row + y) * size.pooled_columns +
                       pooled_column + x;
    *reinterpret_cast<uint4*>(out + at * kStemChannels + channel) = most;
  }
}

}  // namespace fm_convolution
