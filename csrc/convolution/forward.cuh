// A convolution with bias, residual and ReLU as one implicit product, for compute capability 9.0.
//
// The output is a matrix: a row per position (image, row, column), a column per output channel. A block makes 64 rows
// for each of its GROUPS of four warps and COLUMNS columns of it; its depth runs over taps and, within a tap, chunks of
// 64 input channels, and behind them over the chunks of a second input under a 1 x 1 kernel of its own (a block's
// downsampling branch). For each chunk the copy engine brings 64 positions' pixels under the tap, with zeros beyond the
// borders, and the weights; a ring of chunks is under way. One warp asks for the weights, the groups for the first
// pixels, and they multiply.
//
// The blocks of a cluster share the depth where there are few of them: each multiplies its chunks and sends every
// other block the rows that that one finishes, in a fixed order of addition.
#pragma once

#include "repeats.cuh"

namespace fm_convolution {

template <typename T>
struct Problem {
  Inputs inputs;
  Output<T> output;
  int split;         // blocks of a cluster
  long long* times;  // [blocks, kStamps] of a timed kernel
};

// Ordinary; for a timeline; with results that are repeated to a finer resolution.
enum Kind { kOrdinary, kTimed, kRepeats };

// Bytes of shared memory, in front of which up to 1023 are lost to alignment.
constexpr int shared_bytes(int columns, int groups, int split, int stages) {
  const int ring = stages * (groups * kRows + columns) * kDepth * 2;
  const int sums = split > 1 ? kRows * (columns + 8) * 4 : 0;
  return ring + sums + (2 * kMaxStages + 1) * 8 + 1024;
}

#ifdef FM_HOPPER

// Notes the time if the kernel is a timed one.
template <Kind KIND, typename T>
__device__ __forceinline__ void stamp(const Problem<T>& p, Stamp stamp) {
  if constexpr (KIND == kTimed) {
    if (threadIdx.x > 0) return;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    p.times[block * kStamps + stamp] = stamp == kMultiprocessor ? fm::multiprocessor() : clock64();
  }
}

#endif

// SHARED: the blocks of a cluster, of one group each, share the depth; else a block is alone.
template <typename T, int COLUMNS, int GROUPS, bool SHARED, Kind KIND>
__global__ void __launch_bounds__(GROUPS* kWarpgroup + 32) convolution_kernel(const __grid_constant__ Problem<T> p) {
  static_assert(GROUPS == 1 || (!SHARED && KIND != kRepeats));
#ifdef FM_HOPPER
  using MyTile = Tile<COLUMNS, GROUPS>;
  const fm::SharedAddress begin = (fm::shared_address(fm::dynamic_shared()) + 1023) & ~1023u;
  const fm::SharedAddress weights = begin + p.inputs.stages * GROUPS * MyTile::kPixels;
  const fm::SharedAddress parts = weights + p.inputs.stages * MyTile::kWeights;
  const fm::SharedAddress full = parts + (SHARED ? kRows * (COLUMNS + 8) * 4 : 0);
  const Ring ring{begin, weights, full, full + kMaxStages * 8};
  const fm::SharedAddress arrived = ring.empty + kMaxStages * 8;
  const int split = SHARED ? p.split : 1, rank = SHARED ? blockIdx.x : 0, own = kRows / static_cast<unsigned>(split);
  const unsigned depth = p.inputs.first.depth + p.inputs.second.depth;
  const int from = depth * rank / split, to = depth * (rank + 1) / split;
  const int row = blockIdx.y * GROUPS * kRows, column = blockIdx.z * COLUMNS;
  const MyTile tile{p.inputs, ring, row, column, from, to - from};

  stamp<KIND>(p, kStarted);
  fm::launch_dependents();
  if (threadIdx.x == GROUPS * kWarpgroup) prepare(p.inputs, ring, GROUPS, arrived, SHARED ? kRows * COLUMNS * 4 : 0);
  __syncthreads();
  if constexpr (SHARED) fm::cluster_arrive<false>();
  stamp<KIND>(p, kPrepared);

  if (threadIdx.x >= GROUPS * kWarpgroup) {
    ask(tile);
    if constexpr (SHARED) {
      __syncwarp();
      fm::cluster_wait();
    }
  } else {
    const int group = GROUPS > 1 ? threadIdx.x / kWarpgroup : 0;
    const int first = tile.row + group * kRows + rank * own;
    Share<T, COLUMNS, SHARED> mine(p.output, first, tile.column, own, KIND == kRepeats);
    Repeats<T, COLUMNS, SHARED> repeats(mine, p.output, p.inputs, first, own);
    const int3 position = tile.position(group);
    if constexpr (SHARED) fm::cluster_wait();  // all barriers of the cluster are there
    fm::wait_for_previous_grid();
    stamp<KIND>(p, kWaited);
    ask_for_first_pixels(tile, group, position);
    if constexpr (KIND == kRepeats) repeats.load_residual();
    else mine.load_residual(p.output);
    stamp<KIND>(p, kAsked);
    float sums[COLUMNS / 2];
    multiply_chunks<T>(tile, group, sums);
    stamp<KIND>(p, kMultiplied);
    fm::SharedAddress rows = parts;
    if constexpr (SHARED) {
      exchange<COLUMNS>(sums, parts, arrived, own);
    } else {
      // The ring is read no more: rows are put together there.
      rows = begin + group * kRows * (COLUMNS + 8) * 4;
      fm::group_sync<GROUPS * kWarpgroup>(1);
      lay_out_rows<COLUMNS>(sums, rows);
      fm::group_sync(2 + group);
    }
    stamp<KIND>(p, kExchanged);
    if constexpr (KIND == kRepeats) repeats.finish(rows, split);
    else mine.finish(p.output, rows, own, split);
    stamp<KIND>(p, kStored);
  }
  stamp<KIND>(p, kMultiprocessor);
#endif  // No block leaves before all that is sent to it has come, and what it sends itself needs it no more.
}

}  // namespace fm_convolution
