// Blocks of a cluster that read each other's shared memory: a small example for the tests of the emulator.
//
// It is a real kernel, which nvcc compiles as well. MISTAKE puts one of the usual mistakes into it, so that the tests
// can show that each is caught.
#pragma once

#include "common/device.cuh"

namespace fm_clusters {

enum class Mistake {
  none,
  no_sync_before,      // reads what the others may not have written yet
  block_barrier,       // waits for the own block only
  no_wait,             // reads where a copy of another block may be under way
  no_sync_between,     // overwrites what the others may still read
  no_sync_at_end,      // returns while others may still read its memory
  first_returns,       // one block returns early, the others read its memory
  past_shared_memory,  // reads behind what the launch asked for
  misaligned,
  wrong_rank,          // reads from a block that the cluster does not have
  barriers_mixed,      // one warp waits for its block, the others for the cluster
  two_barriers,        // warps wait for the cluster at different places
  global_unordered,    // reads what another block of the cluster writes to global memory
};

// For every thread, sums: of `in` over the blocks of its cluster; next: half of what the same thread of the next block
// has of them, by way of shared memory; echo: all of it, by way of global memory. Grid and blocks of any size.
template <Mistake MISTAKE>
__global__ void exchange_kernel(const float4* __restrict__ in, float4* sums, float2* next, float4* echo) {
  float4* own = reinterpret_cast<float4*>(fm::dynamic_shared());
  const uint32_t rank = fm::cluster_rank(), size = fm::cluster_size(), neighbour = (rank + 1) % size;
  const uint32_t thread = threadIdx.x, block = blockIdx.y * gridDim.x + blockIdx.x;
  const uint32_t slot = block * blockDim.x + thread, next_slot = (block - rank + neighbour) * blockDim.x + thread;
  const fm::SharedAddress address = fm::shared_address(own + thread);

  fm::wait_for_previous_grid();
  fm::copy_async_16(address, in + slot, true);
  fm::copy_async_commit();
  if (MISTAKE != Mistake::no_wait) fm::copy_async_wait<0>();
  if (MISTAKE == Mistake::block_barrier || (MISTAKE == Mistake::barriers_mixed && thread >= 32)) {
    __syncthreads();
  } else if (MISTAKE == Mistake::two_barriers && thread >= 32) {
    fm::cluster_sync();
  } else if (MISTAKE != Mistake::no_sync_before) {
    fm::cluster_sync();
  }
  if (MISTAKE == Mistake::first_returns && rank == 0) return;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (uint32_t other = 0; other < size; ++other) {
    const uint32_t from = MISTAKE == Mistake::wrong_rank ? other + 1 : other;
    const uint32_t wrong = MISTAKE == Mistake::past_shared_memory ? 16 : MISTAKE == Mistake::misaligned ? 8 : 0;
    const float4 part = fm::load_cluster_float4(address + wrong, from);
    sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
  }
  sums[slot] = sum;
  if (MISTAKE == Mistake::global_unordered) echo[slot] = sums[next_slot];

  if (MISTAKE != Mistake::no_sync_between) fm::cluster_sync();
  own[thread] = sum;
  fm::cluster_sync();
  next[slot] = fm::load_cluster_float2(address + 8, neighbour);
  if (MISTAKE != Mistake::global_unordered) echo[slot] = sums[next_slot];
  fm::launch_dependents();
  if (MISTAKE != Mistake::no_sync_at_end) fm::cluster_sync();
}

}  // namespace fm_clusters
