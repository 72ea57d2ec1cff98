// Bulk copies to shared memory and back: a small example for the tests of the emulator. It is a real kernel, which nvcc
// compiles as well. MISTAKE puts one of the usual mistakes into it, so that the tests can show that each is caught.
#pragma once

#include "common/device.cuh"

namespace fm_bulk {

enum class Mistake {
  none,
  no_wait,            // reads what a copy brings before it has arrived
  others_do_not_wait, // only one warp waits
  no_fence,           // lets the engine read what a thread has just written
  no_sync_before_store,
  overwrites_store,   // writes what a store may still read
  no_wait_at_end,     // returns while a store may still read
  expects_too_much,   // so that the copy is waited for for ever
  wrong_turn,         // takes the barrier for open before it has been
  not_started,        // a barrier that nobody has started
  unordered_start,    // of which the others cannot know yet that it is started
  misaligned,
  past_input,
  refills_too_early,  // asks for new numbers where others may still read the old ones
};

// out[r][i] = 2 in[r][i] for `rounds` rows of one block, 4 numbers per thread.
template <Mistake MISTAKE>
__global__ void double_kernel(const float* __restrict__ in, float* out, int rounds) {
  const uint32_t count = 4 * blockDim.x, bytes = 4 * count;
  float* const here = reinterpret_cast<float*>(fm::dynamic_shared() + 16);
  float* const there = here + count;
  const fm::SharedAddress barrier = fm::shared_address(fm::dynamic_shared());
  const auto ask = [&](int round) {
    const uint32_t size = bytes + (MISTAKE == Mistake::past_input && round + 1 == rounds ? 16 : 0);
    fm::barrier_arrive_expecting(barrier, size + (MISTAKE == Mistake::expects_too_much ? 16 : 0));
    const float* const from = in + round * count + (MISTAKE == Mistake::misaligned ? 1 : 0);
    fm::bulk_load(fm::shared_address(here), from, size, barrier);
  };
  if (threadIdx.x == 0 && MISTAKE != Mistake::not_started) fm::barrier_start(barrier, 1);
  if (MISTAKE != Mistake::unordered_start) __syncthreads();
  if (threadIdx.x == 0) ask(0);
  for (int round = 0; round < rounds; ++round) {
    const uint32_t turn = (round + (MISTAKE == Mistake::wrong_turn ? 1 : 0)) % 2;
    if (MISTAKE != Mistake::no_wait && (MISTAKE != Mistake::others_do_not_wait || threadIdx.x < 32)) {
      fm::barrier_wait(barrier, turn);
    }
    float mine[4];
    for (int i = 0; i < 4; ++i) mine[i] = here[4 * (blockDim.x - 1 - threadIdx.x) + i];
    if (MISTAKE == Mistake::refills_too_early && threadIdx.x == 0 && round + 1 < rounds) ask(round + 1);
    if (threadIdx.x == 0 && MISTAKE != Mistake::overwrites_store) fm::bulk_wait_read();
    __syncthreads();
    for (int i = 0; i < 4; ++i) there[4 * (blockDim.x - 1 - threadIdx.x) + i] = 2.0f * mine[i];
    if (MISTAKE != Mistake::no_fence) fm::bulk_fence();
    if (MISTAKE != Mistake::no_sync_before_store) __syncthreads();
    if (threadIdx.x == 0) {
      fm::bulk_store(out + round * count, fm::shared_address(there), bytes);
      fm::bulk_commit();
      if (MISTAKE != Mistake::refills_too_early && round + 1 < rounds) ask(round + 1);
    }
  }
  if (threadIdx.x == 0 && MISTAKE != Mistake::no_wait_at_end) fm::bulk_wait_read();
}

}  // namespace fm_bulk
