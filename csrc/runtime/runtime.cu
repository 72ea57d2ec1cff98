// Which CUDA this library was built with and which the driver supports: an older driver loads the library and then
// fails at the first launch, so Python asks before it calls the backend usable.

#include <cuda_runtime.h>

// Versions as 1000 * major + 10 * minor; 0 where there is no driver. Returns a CUDA error code.
extern "C" __attribute__((visibility("default"))) int fastmetro_cuda_versions(int* built, int* driver) {
  if (const cudaError_t error = cudaRuntimeGetVersion(built)) return error;
  return cudaDriverGetVersion(driver);
}
