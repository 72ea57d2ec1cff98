// The beginning of an HRNet in one kernel: two 3 x 3 convolutions of stride 2 and padding 1, from 3 to 64 and from 64 to 64
// channels, each with bias and ReLU. Compute capability 8.0 and up.
//
// A block makes tiles of HEIGHT x 8 positions of the second convolution. The first one's positions that these need, one
// more row and column than twice as many, go to shared memory, rounded, and are in no other memory. Tensor cores multiply
// both; all weights stay in registers. Where there are more tiles than blocks, the pixels of a block's next tile are
// under way during the second convolution.
//
// Depth of the first: under a row of taps a position sees 9 consecutive numbers; with one in front under a weight of 0, so
// that they begin at a word, they are 5 words, three rows of them 15, and a 16th has weights of 0. Depth of the second:
// taps, then channels. Its operand is read from the first one's positions by ldmatrix: 8 positions side by side are two
// columns apart there, and the chunks of 8 channels are permuted by half of the column, so that all lie in other banks.
//
// Images may also come as float32 planes or as bytes (Source; raw_pixels.cuh): the kernel then is the network's first.
#pragma once

#include <type_traits>

#include "common/device.cuh"
#include "raw_pixels.cuh"

namespace fm_double_stem {

using fm_stem::kInputs;

constexpr int kChannels = 64, kTaps = 9;
constexpr int kWidth = 8;           // positions of a tile side by side
constexpr int kFirstSteps = 2;      // of 16 numbers of the depth
constexpr int kRowWords = 5;        // of the first convolution's depth under one row of taps
constexpr int kSecondSteps = kTaps * kChannels / 16;
constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kPositionBytes = kChannels * 2;

template <int HEIGHT>
struct Tile {
  static_assert(HEIGHT % 4 == 0, "two warps share the positions, 16 at a time");
  static constexpr int kHeight = HEIGHT, kThreads = fm_double_stem::kThreads;
  static constexpr int kRows = 2 * HEIGHT + 1, kColumns = 2 * kWidth + 1;  // of the first convolution
  static constexpr int kPositions = kRows * kColumns;
  static constexpr int kProducts = (kPositions + 15) / 16;  // of 16 positions
  static constexpr int kPixelRows = 2 * (kRows - 1) + 3;
  // The first number is the fourth before a tile's first pixel, and lies 6 behind a multiple of 8.
  static constexpr int kBefore = 6;
  static constexpr int kChunks = (kBefore + 6 * (kColumns - 1) + 2 * kRowWords + fm_stem::kChunk - 1) / fm_stem::kChunk;
  static constexpr int kPitch = kChunks * 16;
  static constexpr int kPixelBytes = (kPixelRows * kPitch + 127) / 128 * 128;
  static constexpr int kSharedBytes = kPixelBytes + kProducts * 16 * kPositionBytes;
  static __device__ __forceinline__ int thread() { return threadIdx.x; }  // of those of a tile
};

// Source: fm_stem::Images<T>, Planes or Bytes.
template <typename T, typename Source>
struct Problem {
  Source images;
  const T *first, *second;                // weights in the order of lay_out_double_stem
  const float *first_bias, *second_bias;  // [64] each
  T* out;                                 // [images, out_height, out_width, 64]
  int middle_height, middle_width;        // behind the first convolution
  int out_height, out_width;
  int tiles_down, tiles_across, tiles;
};

struct Place {
  int image, row, column;  // of a tile's first position
};

template <typename Cut, typename T, typename Source>
__device__ __forceinline__ Place place_of(const Problem<T, Source>& p, int tile) {
  const int across = tile % p.tiles_across, rest = tile / p.tiles_across;
  return {rest / p.tiles_down, rest % p.tiles_down * Cut::kHeight, across * kWidth};
}

// A tile's first pixel is 2 (2 row - 1) - 1 down, and as far across.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void load_tile(const Problem<T, Source>& p, fm::SharedAddress pixels, const Place& place) {
  const int first = kInputs * (4 * place.column - 3) - 1;
  fm_stem::load_images<Cut, T>(p.images, pixels, place.image, 4 * place.row - 3, first - Cut::kBefore);
}

// A lane's weights. Of the first convolution a warp makes 32 channels, of the second 16.
struct Weights {
  uint4 first[kFirstSteps][2];
  uint4 second[kSecondSteps];
};

template <typename T, typename Source>
__device__ __forceinline__ void load_weights(const Problem<T, Source>& p, Weights& weights) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint4* const first = reinterpret_cast<const uint4*>(p.first) + warp / 4 * kFirstSteps * 2 * 32 + lane;
#pragma unroll
  for (int i = 0; i < kFirstSteps * 2; i++) weights.first[i / 2][i % 2] = first[i * 32];
  const uint4* const second = reinterpret_cast<const uint4*>(p.second) + warp % 4 * kSecondSteps * 32 + lane;
#pragma unroll
  for (int i = 0; i < kSecondSteps; i++) weights.second[i] = second[i * 32];
}

// Byte of the eight channels `chunk` of a position of the first convolution in this column of the tile.
__device__ __forceinline__ int middle_byte(int position, int column, int chunk) {
  return position * kPositionBytes + (chunk ^ (column / 2 % 8)) * 16;
}

// Keeps NaN.
__device__ __forceinline__ float relu(float x) { return x < 0.f ? 0.f : x; }

template <typename T>
__device__ __forceinline__ uint32_t rounded(float low, float high) {
  return fm::pack<T>(relu(low), relu(high));
}

// Byte of the word that a lane reads as pair 8 step + 4 high + lane % 4 of the depth, from a position's first on.
template <typename Cut>
__device__ __forceinline__ int pair_byte(int pair) {
  const int known = min(pair, 3 * kRowWords - 1);  // the 16th meets weights of 0
  return known / kRowWords * Cut::kPitch + known % kRowWords * 4;
}

// Positions beyond the map are the second convolution's padding, 0.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void convolve_first(const Problem<T, Source>& p, const unsigned char* pixels,
                                               fm::SharedAddress middle, const Weights& weights, const Place& place) {
  const int lane = threadIdx.x % 32, half = threadIdx.x / 128;
  int words[2 * kFirstSteps];
#pragma unroll
  for (int i = 0; i < 2 * kFirstSteps; i++) words[i] = pair_byte<Cut>(4 * i + lane % 4);
  for (int product = threadIdx.x / 32 % 4; product < Cut::kProducts; product += 4) {
    const unsigned char* from[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int position = min(product * 16 + lane / 4 + 8 * row, Cut::kPositions - 1);
      const int y = position / Cut::kColumns, x = position % Cut::kColumns;
      from[row] = pixels + 2 * y * Cut::kPitch + (Cut::kBefore + 6 * x) * 2;
    }
    float sums[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float* const bias = p.first_bias + half * 32 + lane % 4 * 8 + 2 * j;
      sums[j][0] = sums[j][2] = bias[0];
      sums[j][1] = sums[j][3] = bias[1];
    }
#pragma unroll
    for (int step = 0; step < kFirstSteps; step++) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = *reinterpret_cast<const uint32_t*>(from[i % 2] + words[2 * step + i / 2]);
#pragma unroll
      for (int two = 0; two < 2; two++) {
        const uint4 b = weights.first[step][two];
        fm::multiply_add_16x8x16<T>(sums[2 * two], a, b.x, b.y);
        fm::multiply_add_16x8x16<T>(sums[2 * two + 1], a, b.z, b.w);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int position = product * 16 + lane / 4 + 8 * row, column = position % Cut::kColumns;
      const int y = 2 * place.row - 1 + position / Cut::kColumns, x = 2 * place.column - 1 + column;
      const bool inside = y >= 0 && y < p.middle_height && x >= 0 && x < p.middle_width;
      uint4 result{};
      if (inside) {
        result = {rounded<T>(sums[0][2 * row], sums[0][2 * row + 1]), rounded<T>(sums[1][2 * row], sums[1][2 * row + 1]),
                  rounded<T>(sums[2][2 * row], sums[2][2 * row + 1]), rounded<T>(sums[3][2 * row], sums[3][2 * row + 1])};
      }
      fm::store_shared(middle + middle_byte(position, column, half * 4 + lane % 4), result);
    }
  }
}

// 16 positions, two rows of the tile, and 16 channels at a time.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void convolve_second(const Problem<T, Source>& p, fm::SharedAddress middle,
                                                const Weights& weights, const Place& place) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int channel = warp % 4 * 16 + lane % 4 * 4;
  for (int product = warp / 4; product < Cut::kHeight / 2; product += 2) {
    float sums[2][4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      sums[j][0] = sums[j][2] = p.second_bias[channel + 2 * j];
      sums[j][1] = sums[j][3] = p.second_bias[channel + 2 * j + 1];
    }
    // Row of the operand that this lane points at, and which half of its 16 channels.
    const int row = product * 2 + lane % 16 / 8, column = lane % 8, high = lane / 16;
#pragma unroll
    for (int step = 0; step < kSecondSteps; step++) {
      const int tap = step / 4, y = 2 * row + tap / 3, x = 2 * column + tap % 3;
      uint32_t a[4];
      fm::load_matrices(a, middle + middle_byte(y * Cut::kColumns + x, x, step % 4 * 2 + high));
      const uint4 b = weights.second[step];
      fm::multiply_add_16x8x16<T>(sums[0], a, b.x, b.y);
      fm::multiply_add_16x8x16<T>(sums[1], a, b.z, b.w);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int y = place.row + product * 2 + i, x = place.column + lane / 4;
      if (y >= p.out_height || x >= p.out_width) continue;
      const int64_t at = (static_cast<int64_t>(place.image) * p.out_height + y) * p.out_width + x;
      *reinterpret_cast<uint2*>(p.out + at * kChannels + channel) = {
          rounded<T>(sums[0][2 * i], sums[0][2 * i + 1]), rounded<T>(sums[1][2 * i], sums[1][2 * i + 1])};
    }
  }
}

template <typename T, typename Cut, typename Source>
__global__ void __launch_bounds__(kThreads, 1) double_stem_kernel(const __grid_constant__ Problem<T, Source> p) {
  unsigned char* const pixels = fm::dynamic_shared();
  const fm::SharedAddress pixels_address = fm::shared_address(pixels);
  const fm::SharedAddress middle = pixels_address + Cut::kPixelBytes;
  fm::launch_dependents();
  Weights weights;  // are there before the kernel in front of this one has finished
  load_weights(p, weights);
  fm::wait_for_previous_grid();

  load_tile<Cut>(p, pixels_address, place_of<Cut>(p, blockIdx.x));
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const Place place = place_of<Cut>(p, tile);
    fm::copy_async_wait<0>();
    __syncthreads();  // the pixels are there, and the second convolution of the tile before has read the first
    convolve_first<Cut>(p, pixels, middle, weights, place);
    __syncthreads();
    if (tile + gridDim.x < p.tiles) load_tile<Cut>(p, pixels_address, place_of<Cut>(p, tile + gridDim.x));
    convolve_second<Cut>(p, middle, weights, place);
  }
}

// Every tile that the op knows. Calls `with(Tile{})` for the one of this height, and says whether there is one.
template <typename With>
bool choose_tile(int64_t height, const With& with) {
  if (height == 4) return with(Tile<4>{}), true;
  if (height == 8) return with(Tile<8>{}), true;
  return false;
}

// Fills in the sizes that follow from those of the images.
template <typename Cut, typename T, typename Source>
void measure(Problem<T, Source>& p, int images) {
  p.middle_height = (p.images.height - 1) / 2 + 1, p.middle_width = (p.images.width - 1) / 2 + 1;
  p.out_height = (p.middle_height - 1) / 2 + 1, p.out_width = (p.middle_width - 1) / 2 + 1;
  p.tiles_down = (p.out_height + Cut::kHeight - 1) / Cut::kHeight;
  p.tiles_across = (p.out_width + kWidth - 1) / kWidth;
  p.tiles = images * p.tiles_down * p.tiles_across;
}

}  // namespace fm_double_stem
