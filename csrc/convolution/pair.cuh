// Two pointwise convolutions in one kernel: the last of a residual block, with the shortcut, and the first of the next
// block. For compute capability 9.0.
//
// The first widens: its outputs are 128 for each block of a cluster. A block makes 64 positions of its 128 channels as
// forward.cuh does, stores them, because later kernels read them as the shortcut, and keeps them in shared memory as the
// pixels of the second product: its 128 channels are two chunks of that product's depth. The blocks of the cluster thus
// have parts of the sums of all NARROW outputs, and exchange and finish them like blocks that share a depth.
#pragma once

#include "tile.cuh"

namespace fm_convolution {

constexpr int kWide = 128, kWideChunks = kWide / kDepth;  // channels of a block

template <typename T>
struct Pair {
  Inputs inputs;
  Output<T> wide, narrow;
  fm::TensorMap next;  // weights of the second product, in boxes of NARROW outputs
  int split;           // blocks of a cluster
};

// Bytes of shared memory, in front of which up to 1023 are lost to alignment.
constexpr int pair_shared_bytes(int narrow, int stages) {
  const int ring = stages * (kRows + kWide) * kDepth * 2, kept = kRows * kWide * 2, weights = narrow * kWide * 2;
  return ring + kept + weights + kRows * (narrow + 8) * 4 + (2 * kMaxStages + 2) * 8 + 1024;
}

#ifdef FM_HOPPER

// Where eight channels of a row lie in the copy engine's swizzle: chunks of 64 channels, rows of 128 bytes.
__device__ __forceinline__ int swizzled(int row, int eighth) {
  return (eighth / 8) * kRows * 128 + row * 128 + ((eighth ^ row) % 8) * 16;
}

// The product of the block's own 128 channels and the second weights.
template <typename T, int NARROW>
__device__ __forceinline__ void multiply_kept(fm::SharedAddress kept, fm::SharedAddress weights,
                                              float (&sums)[NARROW / 2]) {
  fm::products_begin();
#pragma unroll
  for (int chunk = 0; chunk < kWideChunks; chunk++) {
    const uint64_t a = fm::operand(kept + chunk * kRows * kDepth * 2);
    const uint64_t b = fm::operand(weights + chunk * NARROW * kDepth * 2);
#pragma unroll
    for (int k = 0; k < kDepth / 16; k++) fm::multiply<T, NARROW>(sums, a + 2 * k, b + 2 * k, chunk > 0 || k > 0);
  }
  fm::products_commit();
  fm::products_wait<0>();
  fm::keep(sums);
}

#endif

template <typename T, int NARROW>
__global__ void __launch_bounds__(kWarpgroup + 32) pair_kernel(const __grid_constant__ Pair<T> p) {
#ifdef FM_HOPPER
  using MyTile = Tile<kWide, 1>;
  const fm::SharedAddress begin = (fm::shared_address(fm::dynamic_shared()) + 1023) & ~1023u;
  const fm::SharedAddress weights = begin + p.inputs.stages * MyTile::kPixels;
  const fm::SharedAddress kept = weights + p.inputs.stages * MyTile::kWeights;
  const fm::SharedAddress next = kept + kRows * kWide * 2;
  const fm::SharedAddress parts = next + NARROW * kWide * 2;
  const fm::SharedAddress full = parts + kRows * (NARROW + 8) * 4;
  const Ring ring{begin, weights, full, full + kMaxStages * 8};
  const fm::SharedAddress arrived = ring.empty + kMaxStages * 8, ready = arrived + 8;
  const int rank = blockIdx.x, own = kRows / static_cast<unsigned>(p.split);
  const MyTile tile{p.inputs, ring, static_cast<int>(blockIdx.y) * kRows, rank * kWide, 0,
                    p.inputs.first.depth + p.inputs.second.depth};

  fm::launch_dependents();
  if (threadIdx.x == kWarpgroup) {
    fm::prefetch_map(p.next);
    fm::barrier_init(ready, 1);
    prepare(p.inputs, ring, 1, arrived, kRows * NARROW * 4);
  }
  __syncthreads();
  fm::cluster_arrive<false>();

  if (threadIdx.x >= kWarpgroup) {
    if (threadIdx.x == kWarpgroup + 31) {
      fm::barrier_expect(ready, NARROW * kWide * 2);
      for (int chunk = 0; chunk < kWideChunks; chunk++) {
        fm::copy_weights(next + chunk * NARROW * kDepth * 2, p.next, ready, tile.column + chunk * kDepth, 0, 0);
      }
    }
    __syncwarp();
    ask(tile);
    __syncwarp();
    fm::cluster_wait();
  } else {
    Share<T, kWide, false> wide(p.wide, tile.row, tile.column, kRows);
    Share<T, NARROW, true> narrow(p.narrow, tile.row + rank * own, 0, own);
    const int3 position = tile.position(0);
    fm::cluster_wait();  // all barriers of the cluster are there
    fm::wait_for_previous_grid();
    ask_for_first_pixels(tile, 0, position);
    wide.load_residual(p.wide);
    {
      float sums[kWide / 2];
      multiply_chunks<T>(tile, 0, sums);
      fm::group_sync(1);  // the ring is read no more: rows are put together there
      lay_out_rows<kWide>(sums, begin);
      fm::group_sync(1);
    }
    const int eighth = threadIdx.x % (kWide / 8);
    wide.finish(p.wide, begin, kRows, 1, [&](int row, const uint4& result) {
      fm::store_shared(kept + swizzled(row, eighth), result);
    });
    fm::shared_stores_ready();  // for the products, which read as the copy engine does
    fm::group_sync(1);
    float sums[NARROW / 2];
    fm::barrier_wait(ready, 0);
    multiply_kept<T, NARROW>(kept, next, sums);
    exchange<NARROW>(sums, parts, arrived, own);
    narrow.load_residual(p.narrow);
    narrow.finish(p.narrow, parts, own, p.split);
  }
#endif  // No block leaves before all that is sent to it has come, and what it sends itself needs it no more.
}

}  // namespace fm_convolution
