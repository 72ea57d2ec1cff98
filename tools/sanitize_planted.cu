// A mistake on purpose for each tool of compute-sanitizer, so that `make sanitize` can show that the tools see.
//
// `sanitize_planted memcheck|racecheck|initcheck`; the kernel is the one that the emulator's tests use.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "checks.cuh"

int main(int count, char** names) {
  using fm_checks::Mistake;
  if (count != 2) return 2;
  constexpr int kThreads = 64;
  const bool past_the_end = std::strcmp(names[1], "memcheck") == 0;
  float *in = nullptr, *out = nullptr;
  cudaMalloc(&in, kThreads * sizeof(float));
  cudaMalloc(&out, (kThreads - (past_the_end ? 1 : 0)) * sizeof(float));
  if (std::strcmp(names[1], "initcheck") != 0) cudaMemset(in, 0, kThreads * sizeof(float));
  if (std::strcmp(names[1], "racecheck") == 0) {
    fm_checks::neighbours_kernel<Mistake::no_barrier><<<1, kThreads, kThreads * sizeof(float)>>>(in, out, 0);
  } else {
    fm_checks::neighbours_kernel<Mistake::none><<<1, kThreads, kThreads * sizeof(float)>>>(in, out, 0);
  }
  const cudaError_t error = cudaDeviceSynchronize();
  // Without compute-sanitizer nothing of this is noticed, and with memcheck the launch may fail: both are as wanted.
  std::printf("cases: 1 (%s)\n", cudaGetErrorName(error));
  return 0;
}
