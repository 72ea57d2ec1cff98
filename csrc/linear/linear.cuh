// A linear layer of few rows with what surrounds it in a pre-norm transformer, for compute capability 9.0:
// act(norm(x) W^T + bias) + residual, and the moments of its rows for the layer norm behind it.
//
// The product is that of convolution/tile.cuh: a block makes 64 rows and COLUMNS columns, chunks of 64 of the depth
// come through a ring of copies, and the blocks of a cluster share the depth. The layer norm is taken behind the
// product: (x W^T - mean * sum(W)) / deviation, with mean and deviation merged from moments that the kernel in front
// has left for parts of the features (Chan, Golub and LeVeque 1979). Loads of moments and residual are under way before
// the products begin, loads of constants before the kernel in front has ended. Leading rows, which are copied, are rows
// of x in front of its first: the copy engine makes them 0, they have no bias, and what they are is their residual.
#pragma once

#include "convolution/tile.cuh"

namespace fm_linear {

using fm_convolution::Inputs;
using fm_convolution::kDepth;
using fm_convolution::kMaxStages;
using fm_convolution::kRows;
using fm_convolution::kWarpgroup;

// What stands around the product. Null where there is none.
template <typename T>
struct Around {
  const T* bias;            // [tokens, features], or [features] where tokens is 0
  const float* sums;        // [features], of the rows of the weight; with moments
  const float* moments;     // [rows, parts, 3]: count, mean, squared distances from it
  const T* residual;        // [rows, features]
  const T* leading;         // [leads, features], the first rows of the output
  T* out;                   // [rows, features]
  float* moments_out;       // [rows, tiles of columns, 3]
  int rows, features, tokens, parts, leads;  // rows of the output, with those that lead
  float width, epsilon;     // features of x
  bool relu;
};

template <typename T>
struct Problem {
  Inputs inputs;  // the pixels are the rows of x, a box of 64 at a time
  Around<T> around;
  int split;      // blocks of a cluster
};

constexpr int kPartsOfLane = 4;  // of the features, whose moments a lane merges

// Bytes of shared memory, in front of which up to 1023 are lost to alignment.
constexpr int shared_bytes(int columns, int split, int stages) {
  const int ring = stages * (kRows + columns) * kDepth * 2;
  const int sums = split > 1 ? kRows * (columns + 8) * 4 : 0;
  return ring + sums + (2 * kMaxStages + 1) * 8 + 1024;
}

#ifdef FM_HOPPER

template <int COLUMNS>
using Tile = fm_convolution::Tile<COLUMNS, 1>;

// A chunk of 64 rows of x, which is described like weights of one tap.
template <int COLUMNS>
__device__ __forceinline__ void copy_rows(const Tile<COLUMNS>& tile, int number, int stage, int leads) {
  fm::copy_weights(tile.ring.pixels + stage * tile.kPixels, tile.p.first.pixels, tile.ring.full + stage * 8,
                   (tile.from + number) * kDepth, 0, tile.row - leads);
}

// The warp that asks for weights, and as stages fall free for all that comes later.
template <int COLUMNS>
__device__ __forceinline__ void ask_for_chunks(const Tile<COLUMNS>& tile, int leads) {
  const int lane = threadIdx.x % 32, early = tile.early();
  if (lane < early) tile.copy_weights(fm_convolution::chunk_of(tile.p, tile.from + lane), lane);
  if (lane > 0) return;
  fm::wait_for_previous_grid();
  for (int i = early, stage = 0, phase = 0; i < tile.count; i++) {
    fm::barrier_wait(tile.ring.empty + stage * 8, phase);
    tile.copy_weights(fm_convolution::chunk_of(tile.p, tile.from + i), stage);
    copy_rows(tile, i, stage, leads);
    if (++stage == tile.p.stages) stage = 0, phase ^= 1;
  }
}

// The sum over the LANES lanes that finish a row.
template <int LANES>
__device__ __forceinline__ float sum_of_row(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// What a thread finishes: eight features, the same in each of its rows, which are those of so many turns. All lanes of
// a warp go through all turns, because those of a row add up together.
template <typename T, int COLUMNS, bool SHARED>
struct Share {
  static constexpr int kEighths = COLUMNS / 8, kStep = kWarpgroup / kEighths;
  static constexpr int kTurns = kRows / (SHARED ? 2 : 1) / kStep;
  const Around<T>& p;
  int first, own, row, feature;  // row of the first turn among the block's own, how many these are; in the output
  bool inside;                   // whether the features are
  float sums[8];
  uint4 bias[kTurns], kept[kTurns];
  float mean[kTurns], inverse[kTurns];

  __device__ __forceinline__ Share(const Around<T>& around, int begin, int column, int own_rows)
      : p(around), first(threadIdx.x / kEighths), own(own_rows), row(begin + first),
        feature(column + threadIdx.x % kEighths * 8), inside(feature < around.features) {}

  __device__ __forceinline__ bool there(int turn) const {
    return inside && first + turn * kStep < own && row + turn * kStep < p.rows;
  }
  __device__ __forceinline__ bool leads(int turn) const { return row + turn * kStep < p.leads; }
  __device__ __forceinline__ int64_t place(int turn) const {
    return static_cast<int64_t>(row + turn * kStep) * p.features + feature;
  }

  // What no kernel in front writes.
  __device__ __forceinline__ void load_constants() {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      bias[turn] = {};
      if (!there(turn) || leads(turn)) continue;
      const int token = p.tokens > 0 ? (row + turn * kStep - p.leads) % static_cast<unsigned>(p.tokens) : 0;
      bias[turn] = *reinterpret_cast<const uint4*>(p.bias + static_cast<int64_t>(token) * p.features + feature);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = p.moments != nullptr && inside ? p.sums[feature + i] : 0.f;
  }

  // What the kernel in front has written: residual, and moments, which are merged at once.
  __device__ __forceinline__ void load_rows() {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      kept[turn] = {};
      const T* const added = leads(turn) ? p.leading : p.residual;
      if (added != nullptr && there(turn)) kept[turn] = fm::load_coherent(added + place(turn));
    }
    if (p.moments == nullptr) return;
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) merge(turn);
  }

  __device__ __forceinline__ void merge(int turn) {
    const int lane = threadIdx.x % kEighths;
    const bool real = first + turn * kStep < own && row + turn * kStep < p.rows;
    const float* moments = p.moments + static_cast<int64_t>(row + turn * kStep) * p.parts * 3;
    float count[kPartsOfLane], middle[kPartsOfLane], squares = 0.f, total = 0.f;
#pragma unroll
    for (int i = 0; i < kPartsOfLane; i++) {
      const int part = lane + i * kEighths;
      const bool counts = real && part < p.parts;
      count[i] = counts ? fm::load_coherent_float(moments + 3 * part) : 0.f;
      middle[i] = counts ? fm::load_coherent_float(moments + 3 * part + 1) : 0.f;
      squares += counts ? fm::load_coherent_float(moments + 3 * part + 2) : 0.f;
      total += count[i] * middle[i];
    }
    mean[turn] = sum_of_row<kEighths>(total) / p.width;
#pragma unroll
    for (int i = 0; i < kPartsOfLane; i++) squares += count[i] * (middle[i] - mean[turn]) * (middle[i] - mean[turn]);
    inverse[turn] = rsqrtf(sum_of_row<kEighths>(squares) / p.width + p.epsilon);
  }

  __device__ __forceinline__ uint4 result(float (&total)[8], int turn) const {
    const uint32_t biases[4] = {bias[turn].x, bias[turn].y, bias[turn].z, bias[turn].w};
    const uint32_t more[4] = {kept[turn].x, kept[turn].y, kept[turn].z, kept[turn].w};
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 b = fm::unpack<T>(biases[i]), r = fm::unpack<T>(more[i]);
      float x = total[2 * i], y = total[2 * i + 1];
      if (p.moments != nullptr) {
        x = (x - mean[turn] * sums[2 * i]) * inverse[turn], y = (y - mean[turn] * sums[2 * i + 1]) * inverse[turn];
      }
      x += b.x, y += b.y;
      if (p.relu) x = x < 0.f ? 0.f : x, y = y < 0.f ? 0.f : y;  // what is not a number stays
      packed[i] = fm::pack<T>(x + r.x, y + r.y);
    }
    return {packed[0], packed[1], packed[2], packed[3]};
  }

  // Count, mean and squared distances from it of a row's features of this tile, as they were rounded.
  __device__ __forceinline__ void store_moments(const uint4& packed, int turn, int column) const {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    float values[8], total = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = fm::unpack<T>(words[i]);
      values[2 * i] = two.x, values[2 * i + 1] = two.y;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) total += inside ? values[i] : 0.f;
    const float count = static_cast<float>(min(COLUMNS, p.features - column));
    const float middle = sum_of_row<kEighths>(total) / count;
#pragma unroll
    for (int i = 0; i < 8; i++) squares += inside ? (values[i] - middle) * (values[i] - middle) : 0.f;
    squares = sum_of_row<kEighths>(squares);
    if (threadIdx.x % kEighths > 0 || !there(turn)) return;
    const int tiles = (p.features + COLUMNS - 1) / COLUMNS;
    float* to = p.moments_out + (static_cast<int64_t>(row + turn * kStep) * tiles + column / COLUMNS) * 3;
    to[0] = count, to[1] = middle, to[2] = squares;
  }

  __device__ __forceinline__ void finish(fm::SharedAddress parts, int split, int column) const {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      float total[8]{};
      const int of_own = first + turn * kStep;
      if (of_own < own) fm_convolution::add_in_order<COLUMNS>(total, parts, own, of_own, SHARED ? split : 1);
      const uint4 packed = result(total, turn);
      if (there(turn)) *reinterpret_cast<uint4*>(p.out + place(turn)) = packed;
      if (p.moments_out != nullptr) store_moments(packed, turn, column);
    }
  }
};

#endif

// SHARED: the blocks of a cluster share the depth; else a block is alone.
template <typename T, int COLUMNS, bool SHARED>
__global__ void __launch_bounds__(kWarpgroup + 32) linear_kernel(const __grid_constant__ Problem<T> p) {
#ifdef FM_HOPPER
  using MyTile = Tile<COLUMNS>;
  const fm::SharedAddress begin = (fm::shared_address(fm::dynamic_shared()) + 1023) & ~1023u;
  const fm::SharedAddress weights = begin + p.inputs.stages * MyTile::kPixels;
  const fm::SharedAddress parts = weights + p.inputs.stages * MyTile::kWeights;
  const fm::SharedAddress full = parts + (SHARED ? kRows * (COLUMNS + 8) * 4 : 0);
  const fm_convolution::Ring ring{begin, weights, full, full + kMaxStages * 8};
  const fm::SharedAddress arrived = ring.empty + kMaxStages * 8;
  const int split = SHARED ? p.split : 1, rank = SHARED ? blockIdx.x : 0, own = kRows / static_cast<unsigned>(split);
  const unsigned depth = p.inputs.first.depth;
  const int from = depth * rank / split, to = depth * (rank + 1) / split;
  const int row = blockIdx.y * kRows, column = blockIdx.z * COLUMNS;
  const MyTile tile{p.inputs, ring, row, column, from, to - from};

  fm::launch_dependents();
  if (threadIdx.x == kWarpgroup) prepare(p.inputs, ring, 1, arrived, SHARED ? kRows * COLUMNS * 4 : 0);
  __syncthreads();
  if constexpr (SHARED) fm::cluster_arrive<false>();

  if (threadIdx.x >= kWarpgroup) {
    ask_for_chunks(tile, p.around.leads);
    if constexpr (SHARED) {
      __syncwarp();
      fm::cluster_wait();
    }
  } else {
    Share<T, COLUMNS, SHARED> mine(p.around, row + rank * own, column, own);
    mine.load_constants();
    if constexpr (SHARED) fm::cluster_wait();  // all barriers of the cluster are there
    fm::wait_for_previous_grid();
    const int number = threadIdx.x / 32 + threadIdx.x % 32 * (kWarpgroup / 32);
    if (number < tile.early()) copy_rows(tile, number, number, p.around.leads);
    __syncwarp();
    mine.load_rows();
    float sums[COLUMNS / 2];
    fm_convolution::multiply_chunks<T>(tile, 0, sums);
    fm::SharedAddress rows = parts;
    if constexpr (SHARED) {
      fm_convolution::exchange<COLUMNS>(sums, parts, arrived, own);
    } else {
      rows = begin;  // the ring is read no more: rows are put together there
      fm::group_sync(1);
      fm_convolution::lay_out_rows<COLUMNS>(sums, rows);
      fm::group_sync(1);
    }
    mine.finish(rows, split, column);
  }
#endif  // No block leaves before all that is sent to it has come, and what it sends itself needs it no more.
}

}  // namespace fm_linear
