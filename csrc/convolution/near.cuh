// 3 x 3 convolutions of stride 1 with one copy of the pixels for all nine taps. For compute capability 9.0.
//
// Positions are numbered row by row with one more column than the image has: the copy engine fills that column, and rows
// above and below the image, with zeros, so that a neighbour is a fixed number of positions away, everywhere. A block makes
// 64 consecutive positions, of which those of the last column are not stored. For each chunk of 64 channels one box of whole
// rows comes to shared memory, and the product under a tap reads it from another row on: the swizzle goes by addresses, so
// it may begin anywhere. The im2col mode (forward.cuh) would bring the same pixels nine times.
#pragma once

#include <algorithm>

#include "tile.cuh"

namespace fm_convolution {

constexpr int kTaps = 9;

template <typename T>
struct Near {
  fm::TensorMap pixels, weights;
  Output<T> output;
  int height, width;  // of the image and of the output
  int tiles;          // of an image
  int box_bytes;      // of whole rows
  int chunks;         // of 64 channels
  int split, stages;  // blocks of a cluster; chunks under way
};

__host__ __device__ constexpr int near_stage_bytes(int columns, int box_bytes) {
  return (box_bytes + 1023) / 1024 * 1024 + kTaps * columns * kDepth * 2;
}

// Bytes of shared memory, in front of which up to 1023 are lost to alignment.
constexpr int near_shared_bytes(int columns, int box_bytes, int split, int stages) {
  const int sums = split > 1 ? kRows * (columns + 8) * 4 : 0;
  return stages * near_stage_bytes(columns, box_bytes) + sums + (2 * kMaxStages + 1) * 8 + 1024;
}

// First row of a tile's box: that of the neighbour up left of its first position.
__host__ __device__ constexpr int near_first_row(int position, int pitch) {
  return (position == 0 ? -1 : (position - 1) / pitch) - 1;
}

// Rows of the tallest box that a tile needs.
inline int near_box_rows(int height, int pitch) {
  int rows = 0;
  for (int position = 0; position < height * pitch; position += kRows) {
    rows = std::max(rows, (position + kRows) / pitch + 1 - near_first_row(position, pitch) + 1);
  }
  return rows;
}

#ifdef FM_HOPPER

template <int COLUMNS>
struct NearTile {
  fm::SharedAddress begin, full, empty;
  int stage_bytes, image, position, pitch, column, from, count, stages;

  __device__ __forceinline__ int early() const { return min(count, stages); }
  __device__ __forceinline__ fm::SharedAddress pixels(int stage) const { return begin + stage * stage_bytes; }
  __device__ __forceinline__ fm::SharedAddress weights(int stage, int tap) const {
    return begin + (stage + 1) * stage_bytes - (kTaps - tap) * COLUMNS * kDepth * 2;
  }
  __device__ __forceinline__ void copy_weights(const fm::TensorMap& map, int chunk, int stage, int tap) const {
    fm::copy_weights(weights(stage, tap), map, full + stage * 8, (from + chunk) * kDepth, tap, column);
  }
  __device__ __forceinline__ void copy_pixels(const fm::TensorMap& map, int chunk, int stage) const {
    fm::copy_box(pixels(stage), map, full + stage * 8, (from + chunk) * kDepth, 0, near_first_row(position, pitch), image);
  }
};

template <typename T, int COLUMNS>
__device__ __forceinline__ void ask_near(const Near<T>& p, const NearTile<COLUMNS>& tile) {
  const int lane = threadIdx.x % 32, early = tile.early(), bytes = p.box_bytes + kTaps * COLUMNS * kDepth * 2;
  for (int i = lane; i < early * kTaps; i += 32) {
    const int stage = i / kTaps, tap = i % kTaps;
    if (tap == 0) fm::barrier_expect(tile.full + stage * 8, bytes);
    tile.copy_weights(p.weights, stage, stage, tap);
  }
  if (lane > 0) return;
  fm::wait_for_previous_grid();
  for (int i = early, stage = 0, phase = 0; i < tile.count; i++) {
    fm::barrier_wait(tile.empty + stage * 8, phase);
    fm::barrier_expect(tile.full + stage * 8, bytes);
    tile.copy_pixels(p.pixels, i, stage);
    for (int tap = 0; tap < kTaps; tap++) tile.copy_weights(p.weights, i, stage, tap);
    if (++stage == tile.stages) stage = 0, phase ^= 1;
  }
}

template <typename T, int COLUMNS>
__device__ __forceinline__ void multiply_near(const NearTile<COLUMNS>& tile, float (&sums)[COLUMNS / 2]) {
  const int inside = tile.position - near_first_row(tile.position, tile.pitch) * tile.pitch;
  for (int i = 0, stage = 0, phase = 0, before = 0; i < tile.count; i++) {
    fm::barrier_wait(tile.full + stage * 8, phase);
    __syncwarp();
    fm::products_begin();
#pragma unroll
    for (int tap = 0; tap < kTaps; tap++) {
      const int row = inside + (tap / 3 - 1) * tile.pitch + tap % 3 - 1;
      const uint64_t a = fm::operand(tile.pixels(stage) + row * kDepth * 2);
      const uint64_t b = fm::operand(tile.weights(stage, tap));
#pragma unroll
      for (int k = 0; k < kDepth / 16; k++) {
        fm::multiply<T, COLUMNS>(sums, a + 2 * k, b + 2 * k, i > 0 || tap > 0 || k > 0);
      }
    }
    fm::products_commit();
    if (i > 0) {
      fm::products_wait<1>();  // the chunk before is done: its stage may be filled again
      if (threadIdx.x % 32 == 0) fm::barrier_arrive(tile.empty + before * 8);
    }
    before = stage;
    if (++stage == tile.stages) stage = 0, phase ^= 1;
  }
  fm::products_wait<0>();
  fm::keep(sums);
}

#endif

template <typename T, int COLUMNS, bool SHARED>
__global__ void __launch_bounds__(kWarpgroup + 32) near_kernel(const __grid_constant__ Near<T> p) {
#ifdef FM_HOPPER
  using Mine = Share<T, COLUMNS, SHARED>;
  const fm::SharedAddress begin = (fm::shared_address(fm::dynamic_shared()) + 1023) & ~1023u;
  const int stage_bytes = near_stage_bytes(COLUMNS, p.box_bytes);
  const fm::SharedAddress parts = begin + p.stages * stage_bytes;
  const fm::SharedAddress full = parts + (SHARED ? kRows * (COLUMNS + 8) * 4 : 0), empty = full + kMaxStages * 8;
  const fm::SharedAddress arrived = empty + kMaxStages * 8;
  const int split = SHARED ? p.split : 1, rank = SHARED ? blockIdx.x : 0, own = kRows / static_cast<unsigned>(split);
  const int from = static_cast<unsigned>(p.chunks * rank) / split, to = static_cast<unsigned>(p.chunks * (rank + 1)) / split;
  const int image = blockIdx.y / static_cast<unsigned>(p.tiles), pitch = p.width + 1;
  const NearTile<COLUMNS> tile{begin, full, empty, stage_bytes, image, static_cast<int>(blockIdx.y - image * p.tiles) * kRows,
                               pitch, static_cast<int>(blockIdx.z) * COLUMNS, from, to - from, p.stages};

  fm::launch_dependents();
  if (threadIdx.x == kWarpgroup) {
    fm::prefetch_map(p.pixels);
    fm::prefetch_map(p.weights);
    for (int i = 0; i < p.stages; i++) {
      fm::barrier_init(full + i * 8, 1);
      fm::barrier_init(empty + i * 8, kWarpgroup / 32);
    }
    fm::barrier_init(arrived, 1);
    fm::barriers_ready();
    if constexpr (SHARED) fm::barrier_expect(arrived, kRows * COLUMNS * 4);
  }
  __syncthreads();
  if constexpr (SHARED) fm::cluster_arrive<false>();

  if (threadIdx.x >= kWarpgroup) {
    ask_near(p, tile);
    if constexpr (SHARED) {
      __syncwarp();
      fm::cluster_wait();
    }
  } else {
    Output<T> all = p.output;
    all.rows = kRows;  // which of a block's rows are stored is worked out here
    Mine mine(all, 0, tile.column, own);
    const int channel = tile.column + threadIdx.x % Mine::kEighths * 8;
    int64_t at[Mine::kTurns];  // of a turn's results; negative where there are none
#pragma unroll
    for (int turn = 0; turn < Mine::kTurns; turn++) {
      const unsigned position = tile.position + rank * own + mine.first + turn * Mine::kStep;
      const unsigned y = position / pitch, x = position - y * pitch;
      const bool stored = turn < mine.turns && y < p.height && x < p.width;
      const int64_t row = (static_cast<int64_t>(image) * p.height + y) * p.width + x;
      at[turn] = stored ? row * p.output.channels + channel : -1;
    }
    if constexpr (SHARED) fm::cluster_wait();  // all barriers of the cluster are there
    fm::wait_for_previous_grid();
    if (threadIdx.x % 32 == 0) {
      for (int stage = threadIdx.x / 32; stage < tile.early(); stage += kWarpgroup / 32) {
        tile.copy_pixels(p.pixels, stage, stage);
      }
    }
    __syncwarp();
#pragma unroll
    for (int turn = 0; turn < Mine::kTurns; turn++) {
      mine.kept[turn] = {};
      if (p.output.residual != nullptr && at[turn] >= 0) mine.kept[turn] = fm::load_coherent(p.output.residual + at[turn]);
    }
    float sums[COLUMNS / 2];
    multiply_near<T>(tile, sums);
    fm::SharedAddress rows = parts;
    if constexpr (SHARED) {
      exchange<COLUMNS>(sums, parts, arrived, own);
    } else {
      rows = begin;  // the chunks are read no more
      fm::group_sync(1);
      lay_out_rows<COLUMNS>(sums, rows);
      fm::group_sync(1);
    }
#pragma unroll
    for (int turn = 0; turn < Mine::kTurns; turn++) {
      if (at[turn] < 0) continue;
      float total[8];
      mine.add_parts(total, rows, own, split, turn);
      *reinterpret_cast<uint4*>(p.output.out + at[turn]) = mine.result(total, mine.kept[turn], p.output);
    }
  }
#endif  // No block leaves before all that is sent to it has come, and what it sends itself needs it no more.
}

}  // namespace fm_convolution
