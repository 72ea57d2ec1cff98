// Small kernels for the tests of the emulator: what each instruction returns, and plain use of shared memory.
#pragma once

#include "common/device.cuh"

namespace fm_checks {

constexpr int kSlots = 48;  // results per lane

// One warp. `words` holds a number per lane, `matrix` 32 rows of eight 16-bit numbers; out is [kSlots, 32].
__global__ void instructions_kernel(const uint32_t* __restrict__ words, const uint4* __restrict__ matrix,
                                    uint32_t* __restrict__ out) {
  const int lane = threadIdx.x;
  const uint32_t word = __ldg(words + lane);
  const int number = static_cast<int>(word);
  int slot = 0;
  const auto put = [&](uint32_t value) { out[slot++ * 32 + lane] = value; };
  const auto put_float = [&](float value) { put(__float_as_uint(value)); };

  put(__shfl_xor_sync(0xffffffffu, word, 5));
  put(__shfl_xor_sync(0xffffffffu, word, 16, 16));
  put(__shfl_sync(0xffffffffu, word, lane * 7 % 32));
  put(__shfl_sync(0xffffffffu, word, 3, 8));
  put(__shfl_up_sync(0xffffffffu, word, 3, 8));
  put(__shfl_down_sync(0xffffffffu, word, 5, 16));
  const unsigned long long wide = static_cast<unsigned long long>(word) << 32 | lane;
  const unsigned long long moved = __shfl_xor_sync(0xffffffffu, wide, 1);
  put(static_cast<uint32_t>(moved) ^ static_cast<uint32_t>(moved >> 32));
  put(__half_as_ushort(__shfl_xor_sync(0xffffffffu, __ushort_as_half(static_cast<unsigned short>(word)), 2)));
  put(__ballot_sync(0xffffffffu, word & 1));
  put(__any_sync(0xffffffffu, lane == 40));
  put(__all_sync(0xffffffffu, lane < 40));
  put(__reduce_add_sync(0xffffffffu, word));
  put(static_cast<uint32_t>(__reduce_min_sync(0xffffffffu, number)));
  put(__reduce_max_sync(0xffffffffu, word));
  put(__reduce_or_sync(0xffffffffu, word));
  put(__popc(word));
  put(__clz(number));
  put(__ffs(number));
  put(__brev(word));
  put(__umulhi(word, 0x9E3779B9u));
  put(__byte_perm(word, 0x01234567u, 0x5140u));
  put(__funnelshift_l(word, 0x89ABCDEFu, 7));
  put(max(number, -5));
  put_float(max(__uint_as_float(word), 1.0f));
  put(fm::pack<__half>(static_cast<float>(number) * 1e-5f, 1.0f / (1 + lane)));
  put(fm::pack<__nv_bfloat16>(static_cast<float>(number), 1.0f / (1 + lane)));

  unsigned char* shared = fm::dynamic_shared();
  reinterpret_cast<uint4*>(shared)[lane] = matrix[lane];
  __syncwarp();
  uint32_t rows[4], columns[4];
  fm::load_matrices(rows, fm::shared_address(shared + lane * 16));
  for (int i = 0; i < 4; ++i) put(rows[i]);
  fm::load_matrices_transposed(columns, fm::shared_address(shared + lane * 16));
  for (int i = 0; i < 4; ++i) put(columns[i]);
  // As fragments, the registers are any numbers; their products are exact where they are small integers.
  float c[4] = {1.0f * lane, 2.0f, 3.0f, -1.0f * lane};
  fm::multiply_add_16x8x16<__half>(c, rows, columns[0], columns[3]);
  for (int i = 0; i < 4; ++i) put_float(c[i]);
  const uint32_t small = fm::pack<__nv_bfloat16>(static_cast<float>(lane - 16), static_cast<float>(lane % 5));
  const uint32_t a[4] = {small, small + 0x80u, small ^ 0x80008000u, small};
  float d[4] = {};
  fm::multiply_add_16x8x16<__nv_bfloat16>(d, a, small, a[2]);
  for (int i = 0; i < 4; ++i) put_float(d[i]);

  // Approximate: compared with a tolerance.
  const float positive = static_cast<float>(word >> 8) * 0x1p-20f + 0x1p-10f;
  put_float(fm::exp2_fast(positive - 8.0f));
  put_float(fm::exp2_fast(-INFINITY));
  put_float(fm::log2_fast(positive));
  put_float(fm::reciprocal_fast(positive));
  while (slot < kSlots) put(0);
}

enum class Mistake {
  none,
  no_barrier,          // between the threads' stores and the loads of others
  no_warp_barrier,     // the same within a warp
  shuffle_as_barrier,  // a shuffle does not order memory
  past_the_end,        // stores behind the block's shared memory
  misaligned,
  never_written,       // reads what nobody wrote
  array_index,         // of a thread's own array
  overflow,            // of int
  global_write,        // to an input
  shuffle_of_nobody,   // reads a lane that the mask leaves out
};

// out[t] = sum of in[t ^ i] for i in 0, 1, 2, 4 .. threads/2, by way of shared memory; a block of any number of warps.
template <Mistake MISTAKE>
__global__ void neighbours_kernel(const float* __restrict__ in, float* __restrict__ out, int zero) {
  float* shared = reinterpret_cast<float*>(fm::dynamic_shared());
  const int thread = threadIdx.x, threads = blockDim.x;
  if (MISTAKE == Mistake::misaligned) shared = reinterpret_cast<float*>(fm::dynamic_shared() + 2 + zero);
  if (MISTAKE == Mistake::past_the_end) shared += 1;
  if (MISTAKE == Mistake::no_barrier) __syncthreads();  // one that does not help
  if (MISTAKE == Mistake::global_write) const_cast<float*>(in)[thread] = 1.0f;
  if (MISTAKE != Mistake::never_written || thread != 3) shared[thread] = in[thread];
  if (MISTAKE == Mistake::shuffle_as_barrier) zero += __shfl_xor_sync(0xffffffffu, zero, 1);
  if (MISTAKE == Mistake::shuffle_of_nobody && thread < 16) zero += __shfl_sync(0x0000ffffu, zero, 20);
  if (MISTAKE == Mistake::none || MISTAKE > Mistake::shuffle_as_barrier) __syncthreads();
  float sum = shared[thread];
  for (int i = 1; i < threads; i *= 2) {
    // Within a warp a __syncwarp is enough: the tests run this with one warp, too.
    if (MISTAKE != Mistake::no_warp_barrier && MISTAKE != Mistake::shuffle_as_barrier) __syncwarp();
    sum += shared[thread ^ i];
  }
  int own[4] = {zero, 1, 2, 3};
  if (MISTAKE == Mistake::array_index) own[thread % 4 + 1 + zero] = thread;
  if (MISTAKE == Mistake::overflow) own[0] = 0x7fffffff + own[zero + 1];
  out[blockIdx.x * threads + thread] = sum + static_cast<float>(own[zero]) * (MISTAKE > Mistake::never_written);
}

}  // namespace fm_checks
