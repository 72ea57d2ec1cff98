// convolution_stem: the stem of a ResNet (convolution, bias, ReLU, max pooling) of channels_last images in half
// precision, on compute capability 8.0 and up. The kernel is in stem.cuh.
#include "stem.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/cuda.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& tensor, const char* name, int64_t dimensions, const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, "convolution_stem: ", name, " must have ", dimensions,
                  " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "convolution_stem: ",
                  name, " must be on the device of x");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "convolution_stem: ", name, " must be ",
                  torch::headeronly::toString(type), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous(), "convolution_stem: ", name, " must be contiguous");
}

void check_weights(const Tensor& weight, const Tensor& bias, const Tensor& x) {
  check(weight, "weight", 5, x, x.scalar_type());
  check(bias, "bias", 1, x, ScalarType::Float);
  STD_TORCH_CHECK(weight.size(0) == 2 && weight.size(1) == fm_stem::kSteps && weight.size(2) == 2 &&
                      weight.size(3) == 32 && weight.size(4) == 8,
                  "convolution_stem: weight must be [2, 10, 2, 32, 8], as lay_out_stem makes it");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
                  "convolution_stem: weight must be aligned to 16 bytes");
  STD_TORCH_CHECK(bias.size(0) == fm_stem::kChannels, "convolution_stem: bias must be [64], got [", bias.size(0),
                  "]");
}

int multiprocessors(int device) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <typename T>
void run(const Tensor& x, const Tensor& weight, const Tensor& bias, Tensor& out, const std::vector<int64_t>& config) {
  const int device = x.get_device_index();
  const bool known = fm_stem::choose_tile(config[0], config[1], [&]<typename Cut>(Cut) {
    const auto problem = fm_stem::make_problem<Cut>(
        static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
        bias.const_data_ptr<float>(), static_cast<T*>(out.mutable_data_ptr()), static_cast<int>(x.size(0)),
        static_cast<int>(x.size(1)), static_cast<int>(x.size(2)));
    const int blocks = std::min(problem.tiles, multiprocessors(device) * Cut::kResident);
    fm::launch_kernel(fm_stem::stem_kernel<T, Cut>, dim3(static_cast<unsigned>(blocks)), Cut::kThreads,
                      Cut::kSharedBytes, 1, config[2] != 0 && fm::has_clusters(device), fm::current_stream(x), problem);
  });
  STD_TORCH_CHECK(known, "convolution_stem: there is no tile of ", config[0], " x ", config[1]);
}

// `x` [N, H, W, 3]; `weight` [2, 10, 2, 32, 8] and `bias` [64] as lay_out_stem makes them; `config`: height and width of
// a tile, whether to start before the kernel in front has ended (where the device can). Returns [N, P, Q, 64].
Tensor convolution_stem(Tensor x, Tensor weight, Tensor bias, std::vector<int64_t> config) {
  STD_TORCH_CHECK(x.is_cuda(), "convolution_stem: x must be on a CUDA device");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "convolution_stem: x must be float16 or bfloat16, got ", torch::headeronly::toString(type));
  check(x, "x", 4, x, type);
  check_weights(weight, bias, x);
  STD_TORCH_CHECK(config.size() == 3, "convolution_stem: config must hold height, width, early");
  const int64_t images = x.size(0), height = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(x.size(3) == fm_stem::kInputs && height >= 1 && width >= 1,
                  "convolution_stem: x must be [N, H, W, 3] with H and W at least 1, got [", images, ", ", height,
                  ", ", width, ", ", x.size(3), "]");
  const int64_t out_height = (height + 3) / 4, out_width = (width + 3) / 4;
  STD_TORCH_CHECK(height <= 1 << 24 && width <= 1 << 24 && images * out_height * out_width <= INT32_MAX,
                  "convolution_stem: too many positions");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {images, out_height, out_width, fm_stem::kChannels});
  if (images == 0) return out;
  if (type == ScalarType::Half) run<__half>(x, weight, bias, out, config);
  else run<__nv_bfloat16>(x, weight, bias, out, config);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("convolution_stem", TORCH_BOX(&convolution_stem)); }
