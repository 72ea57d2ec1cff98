// A mistake on purpose for each tool of compute-sanitizer, so that `make sanitize` can show that the tools see.
//
// `sanitize_planted memcheck|racecheck|initcheck`, or racecheck-neighbours for another race. Prints the errors of the
// launch and of the run: where the kernel did not run, a tool that finds nothing has nothing to find.
#include <cuda_runtime.h>

#include <cstdio>
#include <string_view>
#include <vector>

#include "checks.cuh"

namespace {

constexpr int kThreads = 256, kRounds = 8;

// Every thread writes its word and reads the word of a thread of the next warp, round after round, and nothing orders
// the two. The numbers are never those that were there: racecheck counts a write that changes nothing among the hazards
// without consequences, which it does not show.
__global__ void race_kernel(float* out) {
  __shared__ volatile float words[kThreads];  // volatile: every access stays, in this order
  const int thread = threadIdx.x;
  float sum = 0.f;
  for (int round = 0; round < kRounds; ++round) {
    words[thread] = static_cast<float>(1 + round * kThreads + thread);
    sum += words[(thread + 32) % kThreads];
  }
  out[thread] = sum;
}

// 1, 2, 3 ..., at an address on the device.
float* counted(int count) {
  std::vector<float> numbers(count);
  for (int i = 0; i < count; ++i) numbers[i] = static_cast<float>(i + 1);
  float* device = nullptr;
  cudaMalloc(&device, count * sizeof(float));
  cudaMemcpy(device, numbers.data(), count * sizeof(float), cudaMemcpyHostToDevice);
  return device;
}

float* unwritten(int count) {
  float* device = nullptr;
  cudaMalloc(&device, count * sizeof(float));
  return device;
}

template <fm_checks::Mistake MISTAKE>
void run_neighbours(const float* in, float* out) {
  fm_checks::neighbours_kernel<MISTAKE><<<1, kThreads, kThreads * sizeof(float)>>>(in, out, 0);
}

}  // namespace

int main(int count, char** names) {
  using fm_checks::Mistake;
  if (count != 2) return 2;
  const std::string_view name = names[1];
  if (name == "memcheck") {
    run_neighbours<Mistake::none>(counted(kThreads), unwritten(kThreads - 1));  // the last thread writes past the end
  } else if (name == "initcheck") {
    run_neighbours<Mistake::none>(unwritten(kThreads), unwritten(kThreads));
  } else if (name == "racecheck") {
    race_kernel<<<1, kThreads>>>(unwritten(kThreads));
  } else if (name == "racecheck-neighbours") {
    run_neighbours<Mistake::no_barrier>(counted(kThreads), unwritten(kThreads));
  } else {
    return 2;
  }
  const cudaError_t launched = cudaGetLastError(), finished = cudaDeviceSynchronize();
  // Without compute-sanitizer nothing of this is noticed, and with memcheck the launch may fail: both are as wanted.
  std::printf("cases: 1 (%s, %s)\n", cudaGetErrorName(launched), cudaGetErrorName(finished));
  return 0;
}
