// The kernels of the emulator's tests on a GPU, for test_emulation.py: what is emulated must agree with what is.
#include <cuda_runtime.h>

#include "checks.cuh"
#include "clusters.cuh"
#include "example.cuh"
#include "warpgroups.cuh"

// Compiled only: its tensors would have to be described by the driver.
template __global__ void fm_warpgroups::product_kernel<fm_warpgroups::Mistake::none>(const __grid_constant__
                                                                                     fm_warpgroups::Product);

namespace {

template <typename T>
void launch_example(const void* a, const int* rows, const void* b, float* c, float* sums, int m, int n, int k) {
  const fm_example::Params<T> p{static_cast<const T*>(a), rows, static_cast<const T*>(b), c, sums, m, n, k};
  const dim3 grid((n + fm_example::kColumns - 1) / fm_example::kColumns, (m + fm_example::kRows - 1) / fm_example::kRows);
  fm_example::gathered_product_kernel<T, fm_example::Mistake::none>
      <<<grid, fm_example::kThreads, fm_example::kSharedBytes>>>(p);
}

int finish() {
  const cudaError_t error = cudaGetLastError();
  return static_cast<int>(error != cudaSuccess ? error : cudaDeviceSynchronize());
}

}  // namespace

extern "C" int example_on_gpu(const void* a, const int* rows, const void* b, float* c, float* sums, int m, int n, int k,
                              int bfloat) {
  if (bfloat) {
    launch_example<__nv_bfloat16>(a, rows, b, c, sums, m, n, k);
  } else {
    launch_example<__half>(a, rows, b, c, sums, m, n, k);
  }
  return finish();
}

extern "C" int instructions_on_gpu(const uint32_t* words, const uint4* matrix, uint32_t* out) {
  fm_checks::instructions_kernel<<<1, 32, 512>>>(words, matrix, out);
  return finish();
}

// `cluster_size` above 1 needs compute capability 9.0.
extern "C" int exchange_on_gpu(const float4* in, float4* sums, float2* next, float4* echo, int blocks, int rows,
                               int threads, int cluster_size) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, rows);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = 16 * threads;
  config.attrs = attributes;
  config.numAttrs = cluster_size > 1 ? 2 : 0;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, fm_clusters::exchange_kernel<fm_clusters::Mistake::none>, in, sums, next, echo);
  return error != cudaSuccess ? static_cast<int>(error) : finish();
}

extern "C" const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
