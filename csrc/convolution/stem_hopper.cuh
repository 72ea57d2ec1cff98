// The stem of stem.cuh with products of warpgroups, for compute capability 9.0 and many images: four warps make 64
// positions of all channels at a time, with the weights in shared memory, so that a pixel is read for all channels at
// once, not for each half of them. Each of a block's warpgroups goes through tiles of its own: while one fetches or pools,
// another multiplies. Depth, order of channels and all else are those of stem.cuh.
#pragma once

#include "common/hopper.cuh"
#include "stem.cuh"

namespace fm_stem {

constexpr int kGroupRows = 64, kChunkSteps = 4;  // positions of a product; steps of 16 numbers that share a chunk of 64
constexpr int kWeightChunks = (kSteps + kChunkSteps - 1) / kChunkSteps;
constexpr int kWeightBytes = kWeightChunks * kChannels * 128;

// HEIGHT x WIDTH pooled positions by each of four warpgroups; a multiprocessor has one block.
template <int HEIGHT, int WIDTH>
struct GroupTile : Tile<HEIGHT, WIDTH, 2, 1> {
  using Base = Tile<HEIGHT, WIDTH, 2, 1>;
  static constexpr int kGroups = 4, kBlockThreads = kGroups * Base::kThreads;
  static constexpr int kRounds = (Base::kPositions + kGroupRows - 1) / kGroupRows;
  static constexpr int kGroupBytes = Base::kPixelBytes + kRounds * kGroupRows * kChannels * 2;
  static constexpr int kSharedBytes = kWeightBytes + kGroups * kGroupBytes;
  static_assert(Base::kThreads == 128 && kGroupBytes % 16 == 0 && kSharedBytes <= 227 * 1024);
  static __device__ __forceinline__ int thread() { return threadIdx.x % Base::kThreads; }
};

#ifdef FM_HOPPER

// The weights as rows of a product's right operand, a row per column of the sums, in the swizzle of the copy engine:
// packed for lanes (see _order in stem.py), a lane's 16 bytes are four words of two of the eight columns that it shares.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void scatter_weights(const Problem<T, Source>& p, unsigned char* to) {
  for (int i = threadIdx.x; i < 2 * kSteps * 2 * 32; i += Cut::kBlockThreads) {
    const int lane = i % 32, two = i / 32 % 2, step = i / 64 % kSteps, half = i / 64 / kSteps;
    const uint4 four = reinterpret_cast<const uint4*>(p.weight)[i];
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int word = 0; word < 4; word++) {
      const int column = 32 * half + 8 * (2 * two + word / 2) + lane / 4;
      const int eighth = step % kChunkSteps * 2 + word % 2;
      unsigned char* const row = to + step / kChunkSteps * kChannels * 128 + column * 128;
      *reinterpret_cast<uint32_t*>(row + (eighth ^ (column % 8)) * 16 + lane % 4 * 4) = words[word];
    }
  }
}

// A lane's share of the biases, as the sums have them: of column 8 j + 2 (lane % 4) and the next.
__device__ __forceinline__ void begin_with_bias(float (&sums)[kChannels / 2], const float* bias) {
#pragma unroll
  for (int j = 0; j < kChannels / 8; j++) {
    const float2 two = *reinterpret_cast<const float2*>(bias + j / 4 * kShare + threadIdx.x % 4 * 8 + j % 4 * 2);
    sums[4 * j] = sums[4 * j + 2] = two.x;
    sums[4 * j + 1] = sums[4 * j + 3] = two.y;
  }
}

// multiply of stem.cuh.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void multiply_groups(const Problem<T, Source>& p, const unsigned char* pixels,
                                                fm::SharedAddress results, fm::SharedAddress weights, const Place& place) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int round = 0; round < Cut::kRounds; round++) {
    const int first = round * kGroupRows + Cut::thread() / 32 * 16 + lane / 4;
    const Pairs low = pairs_of<Cut>(pixels, first, lane), high = pairs_of<Cut>(pixels, first + 8, lane);
    uint32_t held[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      held[step][0] = low.load<Cut::kPitch>(2 * step), held[step][1] = high.load<Cut::kPitch>(2 * step);
      held[step][2] = low.load<Cut::kPitch>(2 * step + 1), held[step][3] = high.load<Cut::kPitch>(2 * step + 1);
    }
    float sums[kChannels / 2];
    begin_with_bias(sums, p.bias);
    fm::products_begin();
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const uint64_t b = fm::operand(weights + step / kChunkSteps * kChannels * 128) + step % kChunkSteps * 2;
      fm::multiply_held<T>(sums, held[step], b);
    }
    fm::products_commit();
    fm::products_wait<0>();
    fm::keep(sums);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int position = first + 8 * row;
      const int y = 2 * place.row - 1 + position / Cut::kColumns, x = 2 * place.column - 1 + position % Cut::kColumns;
      const bool inside = y >= 0 && y < p.middle_height && x >= 0 && x < p.middle_width;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float* const two = sums + 16 * half + 4 * i + 2 * row;
          words[i] = inside ? fm::pack<T>(two[0], two[1]) : 0;
        }
        fm::store_shared(results + result_byte(position, half * 4 + lane % 4), uint4{words[0], words[1], words[2], words[3]});
      }
    }
  }
}

#endif

template <typename T, typename Cut, typename Source>
__global__ void __launch_bounds__(Cut::kBlockThreads, 1)
    stem_groups_kernel(const __grid_constant__ Problem<T, Source> p) {
#ifdef FM_HOPPER
  unsigned char* const weights = fm::dynamic_shared();  // at a multiple of 1024
  const int group = threadIdx.x / Cut::kThreads, step = gridDim.x * Cut::kGroups;
  unsigned char* const pixels = weights + kWeightBytes + group * Cut::kGroupBytes;
  const fm::SharedAddress pixels_address = fm::shared_address(pixels);
  const fm::SharedAddress results = pixels_address + Cut::kPixelBytes;
  fm::launch_dependents();
  scatter_weights<Cut>(p, weights);  // which are there before the kernel in front of this one has finished
  fm::shared_stores_ready();
  __syncthreads();
  fm::wait_for_previous_grid();

  int tile = blockIdx.x + group * gridDim.x;
  if (tile < p.tiles) load_tile<Cut>(p, pixels_address, place_of<Cut>(p, tile));
  for (; tile < p.tiles; tile += step) {
    const Place place = place_of<Cut>(p, tile);
    fm::copy_async_wait<0>();
    fm::group_sync(1 + group);  // the pixels are there, and the results of the tile before are pooled
    multiply_groups<Cut>(p, pixels, results, fm::shared_address(weights), place);
    fm::group_sync(1 + group);
    if (tile + step < p.tiles) load_tile<Cut>(p, pixels_address, place_of<Cut>(p, tile + step));
    finish<Cut>(p, results, place);
  }
#endif
}

}  // namespace fm_stem
