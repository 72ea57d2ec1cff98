// A product of a warpgroup with the copy engine on both sides: a small example for the tests of the emulator.
//
// It is a real kernel, for compute capability 9.0. MISTAKE puts one of the usual mistakes into it, so that the tests can
// show that each is caught.
#pragma once

#include "common/hopper.cuh"

namespace fm_warpgroups {

enum class Mistake {
  none,
  no_copy_wait,     // multiplies what may not have come
  wrong_phase,      // waits for the phase before, which has always ended
  wrong_bytes,      // announces more than comes
  not_visible,      // the copy engine may not see the barrier
  no_begin,         // products may begin before the sums are there
  no_product_wait,  // uses the sums at once
  operand_lost,     // writes over an operand while it is multiplied
  not_ready,        // stores that the copy engine may not see
  no_sync,          // sends what other warps may not have written
  no_store_wait,    // returns while its memory is read
  no_commit,        // waits for a group that was never closed
  wrong_swizzle,
  wrong_group,      // the warps wait for each other at two barriers
};

constexpr int kMatrix = 64 * 128, kShared = 3 * kMatrix + 8;  // bytes; three matrices and a barrier

struct Product {
  fm::TensorMap rows, weights, out;  // images [1, 8, 8, 64], weights [64, 1, 64]
};

#ifdef FM_HOPPER

// Rounded sums to a matrix in the copy engine's swizzle.
template <Mistake MISTAKE>
__device__ __forceinline__ void store_sums(const float (&sums)[32], fm::SharedAddress to) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  const int flip = MISTAKE == Mistake::wrong_swizzle ? row % 4 : row % 8;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = fm::pack<__half>(sums[8 * k + 2 * i], sums[8 * k + 2 * i + 1]);
    fm::store_matrices(to + row * 128 + ((2 * k + lane / 16) ^ flip) * 16, words);
  }
}

#endif

// out [64, 64] = rows [64, 64] times the transposed weights [64, 64], float16. One block of 128 threads.
template <Mistake MISTAKE>
__global__ void product_kernel(const __grid_constant__ Product p) {
#ifdef FM_HOPPER
  const fm::SharedAddress rows = fm::shared_address(fm::dynamic_shared()), weights = rows + kMatrix;
  const fm::SharedAddress results = weights + kMatrix, full = results + kMatrix;
  if (threadIdx.x == 0) {
    fm::barrier_init(full, 1);
    if (MISTAKE != Mistake::not_visible) fm::barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    fm::barrier_expect(full, 2 * kMatrix + (MISTAKE == Mistake::wrong_bytes ? 16 : 0));
    fm::copy_box(rows, p.rows, full, 0, 0, 0, 0);
    fm::copy_weights(weights, p.weights, full, 0, 0, 0);
  }
  __syncwarp();
  if (MISTAKE != Mistake::no_copy_wait) fm::barrier_wait(full, MISTAKE == Mistake::wrong_phase ? 1 : 0);
  __syncwarp();
  float sums[32];
  if (MISTAKE != Mistake::no_begin) fm::products_begin();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    fm::multiply<__half, 64>(sums, fm::operand(rows) + 2 * k, fm::operand(weights) + 2 * k, k > 0);
  }
  fm::products_commit();
  if (MISTAKE == Mistake::operand_lost) fm::store_shared(rows + threadIdx.x * 16, uint4{});
  if (MISTAKE != Mistake::no_product_wait) fm::products_wait<0>();
  fm::keep(sums);
  store_sums<MISTAKE>(sums, results);
  if (MISTAKE == Mistake::no_product_wait) fm::products_wait<0>();
  if (MISTAKE != Mistake::not_ready) fm::shared_stores_ready();
  if (MISTAKE != Mistake::no_sync) fm::group_sync(MISTAKE == Mistake::wrong_group && threadIdx.x >= 64 ? 2 : 1);
  if (threadIdx.x == 0) {
    fm::store_box(p.out, results, 0, 0, 0, 0);
    if (MISTAKE != Mistake::no_commit) fm::stores_commit();
    if (MISTAKE != Mistake::no_store_wait) fm::stores_wait<0>();
  }
#endif
}

}  // namespace fm_warpgroups
