// What both passes of the batch norm share: who has which rows, how they come to shared memory, and sums of channels.
//
// A cluster of blocks has 8, 4 or 2 lanes of 16 bytes of all rows, and its blocks share the rows out evenly. A sweep is
// one read of every thread: 256 / LANES rows. The first sweeps of a block stay in shared memory, where a thread reads
// what it has copied itself; they are all asked for at once, without a register. Further ones are read again for the
// second half of a pass: from L2, as a rule.
#pragma once

#include "common/device.cuh"

namespace fm_batch_norm {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWide = 8;                    // channels of a lane: 16 bytes
constexpr int kSlotBytes = kThreads * 16;   // of one sweep of one tensor
constexpr int kSlots = 26;                  // so that a multiprocessor has room for two blocks
constexpr int kGroups = 4;                  // of sweeps in shared memory: the first are summed while others arrive
constexpr int kBatch = 4;                   // sweeps that are read before the first is used
constexpr int kMaxCluster = 16;             // more than 8 have to be allowed for a kernel
constexpr int kMaxRows = 1 << 30;           // so that numbers of rows and sweeps are int

template <int LANES>
struct Shared {
  static constexpr int kChannels = kWide * LANES;
  float sums[kWarps][2][kChannels];
  float vectors[4][kChannels];  // what all threads need to know of the channels
  float2 found[kChannels];      // what the other blocks of the cluster read
};

// How many sweeps of so many tensors stay in shared memory, and all its bytes.
struct Layout {
  int held, bytes;
};

inline Layout layout_of(int64_t rows, int lanes, int cluster, int tensors) {
  const int64_t most = (rows + cluster - 1) / cluster, sweep = kThreads / lanes, sweeps = (most + sweep - 1) / sweep;
  const int held = static_cast<int>(sweeps < kSlots / tensors ? sweeps : kSlots / tensors);
  return {held, static_cast<int>(sizeof(Shared<1>)) * lanes + held * tensors * kSlotBytes};
}

template <typename T>
__device__ __forceinline__ void unpack_word(const uint4& word, float (&values)[kWide]) {
  const uint32_t pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = fm::unpack<T>(pairs[i]);
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack_word(const float (&values)[kWide]) {
  return make_uint4(fm::pack<T>(values[0], values[1]), fm::pack<T>(values[2], values[3]),
                    fm::pack<T>(values[4], values[5]), fm::pack<T>(values[6], values[7]));
}

__device__ __forceinline__ uint4 no_word() { return make_uint4(0, 0, 0, 0); }

// Rows of a block of the cluster. The first block has one at least.
__device__ __forceinline__ int rows_of(int rows, int rank, int size) {
  return rows / size + (rank < rows % size ? 1 : 0);
}

// What a thread knows of its place.
template <typename T, int LANES>
struct Tile {
  static constexpr int kChannels = kWide * LANES, kSweep = kThreads / LANES;
  static_assert(sizeof(Shared<LANES>) == sizeof(Shared<1>) * LANES && sizeof(Shared<LANES>) % 16 == 0);

  int rank, size;         // of the block in its cluster
  int count, sweeps;      // of this block
  int held, stride;       // sweeps in shared memory: of this block, and those there is room for
  int row;                // of a sweep, for this thread
  int64_t offset, step;   // of the thread's numbers of the first sweep, and to those of the next one
  int channel;            // whose sums this thread puts together
  bool known, owns;       // whether there are such channels: of the thread's 16 bytes, and `channel`

  __device__ __forceinline__ Tile(int rows, int channels, int room)
      : rank(static_cast<int>(fm::cluster_rank())), size(static_cast<int>(fm::cluster_size())), stride(room) {
    const int thread = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) / size * kChannels;
    const int column = first + thread % LANES * kWide, before = rows / size * rank + min(rank, rows % size);
    count = rows_of(rows, rank, size), sweeps = (count + kSweep - 1) / kSweep;
    held = min(room, sweeps), row = thread / LANES;
    known = column < channels;
    offset = static_cast<int64_t>(before + row) * channels + column;
    step = static_cast<int64_t>(kSweep) * channels;
    channel = first + thread;
    owns = thread < kChannels && channel < channels;
  }

  __device__ __forceinline__ bool inside(int sweep) const { return known && sweep * kSweep + row < count; }
  __device__ __forceinline__ int64_t at(int sweep) const { return offset + sweep * step; }
  __device__ __forceinline__ Shared<LANES>& shared() const {
    return *reinterpret_cast<Shared<LANES>*>(fm::dynamic_shared());
  }
  // Of shared memory, this thread's 16 bytes of a sweep of one of the tensors.
  __device__ __forceinline__ uint4& slot(int tensor, int sweep) const {
    unsigned char* const slots = fm::dynamic_shared() + sizeof(Shared<LANES>);
    return reinterpret_cast<uint4*>(slots + (tensor * stride + sweep) * kSlotBytes)[threadIdx.x];
  }
  // By value: of a choice between references the compiler knows no more that they are to shared memory.
  __device__ __forceinline__ uint4 kept(int tensor, int sweep) const { return slot(tensor, sweep); }
  __device__ __forceinline__ void copy(int tensor, const T* from, int sweep) const {
    const bool valid = inside(sweep);
    fm::copy_async_16(fm::shared_address(&slot(tensor, sweep)), valid ? from + at(sweep) : from, valid);
  }
  // The same from global memory; zeros where there is nothing. Not by way of the read-only cache: this block may have
  // written it.
  __device__ __forceinline__ uint4 load(const T* from, int sweep) const {
    return inside(sweep) ? *reinterpret_cast<const uint4*>(from + at(sweep)) : no_word();
  }
  __device__ __forceinline__ void store(T* to, int sweep, const uint4& word) const {
    *reinterpret_cast<uint4*>(to + at(sweep)) = word;
  }
  __device__ __forceinline__ int group_end(int group) const { return (held * (group + 1) + kGroups - 1) / kGroups; }

  // A vector of the shared ones, of this thread's channels.
  __device__ __forceinline__ void vector(int which, float (&values)[kWide]) const {
    const float4* from = reinterpret_cast<const float4*>(shared().vectors[which] + threadIdx.x % LANES * kWide);
    const float4 low = from[0], high = from[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }
};

// Calls use(sweep, words) for all sweeps from `begin` on, where words[k] is read(k, sweep): of several sweeps before
// the first is used.
template <int TENSORS, typename Read, typename Use>
__device__ __forceinline__ void in_batches(int begin, int end, Read read, Use use) {
  for (int sweep = begin; sweep < end; sweep += kBatch) {
    uint4 words[kBatch][TENSORS];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int k = 0; k < TENSORS; ++k) words[i][k] = read(k, min(sweep + i, end - 1));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (sweep + i < end) use(sweep + i, words[i]);
    }
  }
}

// Calls use(begin, end) for each group of sweeps in shared memory, when it has arrived. One more group of copies has
// been asked for behind them.
template <int GROUP = 0, typename Here, typename Use>
__device__ __forceinline__ void as_they_arrive(const Here& tile, Use use) {
  fm::copy_async_wait<kGroups - GROUP>();
  use(GROUP == 0 ? 0 : tile.group_end(GROUP - 1), tile.group_end(GROUP));
  if constexpr (GROUP + 1 < kGroups) as_they_arrive<GROUP + 1>(tile, use);
}

// Adds up the first COUNT numbers over lanes that are STEP, 2 STEP, ... apart: each of two keeps one half of them.
template <int COUNT, int STEP>
__device__ __forceinline__ void add_over_lanes(float (&sums)[2 * kWide]) {
  if constexpr (STEP < 32) {
    constexpr int kHalf = COUNT / 2;
    const bool upper = threadIdx.x & STEP;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float away = upper ? sums[i] : sums[i + kHalf], kept = upper ? sums[i + kHalf] : sums[i];
      sums[i] = kept + __shfl_xor_sync(0xffffffffu, away, STEP);
    }
    add_over_lanes<kHalf, 2 * STEP>(sums);
  }
}

// Two sums for each of the thread's channels, over the rows of its warp, go to shared memory. All threads of the block
// call it, and wait for each other afterwards.
template <typename T, int LANES>
__device__ __forceinline__ void store_sums(const Tile<T, LANES>& tile, float (&sums)[2 * kWide]) {
  constexpr int kKept = 2 * kWide * LANES / 32;
  add_over_lanes<2 * kWide, LANES>(sums);
  int first = 0;
#pragma unroll
  for (int step = LANES, half = kWide; step < 32; step *= 2, half /= 2) first += threadIdx.x & step ? half : 0;
  float(&to)[2][Tile<T, LANES>::kChannels] = tile.shared().sums[threadIdx.x / 32];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int place = first + i;
    to[place / kWide][threadIdx.x % LANES * kWide + place % kWide] = sums[i];
  }
}

// One of the two sums, of all warps: for the thread's `channel`.
template <typename T, int LANES>
__device__ __forceinline__ float sum_of_block(const Tile<T, LANES>& tile, int which) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += tile.shared().sums[warp][which][threadIdx.x];
  return sum;
}

// All threads of the cluster wait for each other; what those that have a `channel` stored, all see then. The others'
// stores to global memory may still be under way.
template <typename T, int LANES>
__device__ __forceinline__ void meet_cluster(const Tile<T, LANES>&) {
  if (threadIdx.x / 32 * 32 < Tile<T, LANES>::kChannels) fm::cluster_arrive<true>();
  else fm::cluster_arrive<false>();
  fm::cluster_wait();
}

// What all blocks of the cluster have found for the thread's `channel`, behind a barrier of the cluster.
template <typename T, int LANES>
__device__ __forceinline__ void read_cluster(const Tile<T, LANES>& tile, float2 (&found)[kMaxCluster]) {
  const fm::SharedAddress own = fm::shared_address(&tile.shared().found[threadIdx.x]);
#pragma unroll
  for (int rank = 0; rank < kMaxCluster; ++rank) {
    found[rank] = rank < tile.size ? fm::load_cluster_float2(own, rank) : make_float2(0.0f, 0.0f);
  }
}

}  // namespace fm_batch_norm
