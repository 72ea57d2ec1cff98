// convolution_double_stem: HRNet's two 3 x 3 convolutions of stride 2, with bias and ReLU, in half precision,
// on compute capability 8.0 and up. The kernel is in double_stem.cuh.
#include "double_stem.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/cuda.h"
#include "stem_images.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& tensor, const char* name, const Tensor& x, ScalarType type, int64_t numbers) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "convolution_double_stem: ",
                  name, " must be on the device of x");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "convolution_double_stem: ", name, " must be ",
                  torch::headeronly::toString(type), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
                  "convolution_double_stem: ", name, " must be contiguous and aligned to 16 bytes");
  STD_TORCH_CHECK(tensor.numel() == numbers, "convolution_double_stem: ", name, " must hold ", numbers,
                  " numbers, got ", tensor.numel());
}

// `x` [N, H, W, 3] of the type of the weights; or float32 [N, 3, H, W]; or uint8 [N, H, W, 3] with `mean` and `scale`,
// float32 [3]. Weights as lay_out_double_stem packs them, biases float32 [64]; `config`: height of a tile, whether to start
// before the kernel in front has ended (where the device can). Returns [N, P, Q, 64].
Tensor double_stem(Tensor x, Tensor first, Tensor first_bias, Tensor second, Tensor second_bias,
                   std::vector<int64_t> config, std::optional<Tensor> mean, std::optional<Tensor> scale) {
  using namespace fm_double_stem;
  const ScalarType type = first.scalar_type();
  const fm_stem::Sizes sizes = fm_stem::check_images("convolution_double_stem", x, type, mean, scale);
  check(first, "first", x, type, kChannels * kFirstSteps * 16);
  check(first_bias, "first_bias", x, ScalarType::Float, kChannels);
  check(second, "second", x, type, kChannels * kSecondSteps * 16);
  check(second_bias, "second_bias", x, ScalarType::Float, kChannels);
  STD_TORCH_CHECK(config.size() == 2, "convolution_double_stem: config must hold height, early");
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(first, {sizes.images, sizes.out_height(), sizes.out_width(), kChannels});
  if (sizes.images == 0) return out;
  const auto run = [&]<typename T, typename Source>(T*, const Source& source) {
    Problem<T, Source> problem{source,
                               static_cast<const T*>(first.const_data_ptr()),
                               static_cast<const T*>(second.const_data_ptr()),
                               first_bias.const_data_ptr<float>(),
                               second_bias.const_data_ptr<float>(),
                               static_cast<T*>(out.mutable_data_ptr())};
    const bool known = choose_tile(config[0], [&]<typename Cut>(Cut) {
      measure<Cut>(problem, int(sizes.images));
      const unsigned blocks = std::min(problem.tiles, fm::multiprocessors(device));
      fm::launch_kernel(double_stem_kernel<T, Cut, Source>, dim3(blocks), Cut::kThreads, Cut::kSharedBytes, 1,
                        config[1] != 0 && fm::has_clusters(device), fm::current_stream(x), problem);
    });
    STD_TORCH_CHECK(known, "convolution_double_stem: there is no tile of ", config[0], " rows");
  };
  const auto of_type = [&]<typename T>(T* none) {
    fm_stem::as_source<T>(x, sizes, mean, scale, [&](const auto& source) { run(none, source); });
  };
  if (type == ScalarType::Half) of_type(static_cast<__half*>(nullptr));
  else of_type(static_cast<__nv_bfloat16*>(nullptr));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("convolution_double_stem", TORCH_BOX(&double_stem)); }
