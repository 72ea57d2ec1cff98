// convolution_stem: the stem of a ResNet (convolution, bias, ReLU, max pooling; or no more than the convolution and its
// bias) in half precision, on compute capability 8.0 and up. The kernels are in stem.cuh and stem_hopper.cuh.
#include "stem_hopper.cuh"

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
  check(weight, "weight", 5, x, weight.scalar_type());
  check(bias, "bias", 1, x, ScalarType::Float);
  STD_TORCH_CHECK(weight.size(0) == 2 && weight.size(1) == fm_stem::kSteps && weight.size(2) == 2 &&
                      weight.size(3) == 32 && weight.size(4) == 8,
                  "convolution_stem: weight must be [2, 10, 2, 32, 8], as lay_out_stem makes it");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
                  "convolution_stem: weight must be aligned to 16 bytes");
  STD_TORCH_CHECK(bias.size(0) == fm_stem::kChannels, "convolution_stem: bias must be [64], got [", bias.size(0),
                  "]");
}

template <typename T, typename Source>
void run(const Source& source, int images, const Tensor& weight, const Tensor& bias, Tensor& out,
         const std::vector<int64_t>& config, bool pooled) {
  const int device = weight.get_device_index();
  const auto with = [&]<typename Cut>(Cut, auto* kernel) {
    const auto problem =
        fm_stem::make_problem<Cut>(source, static_cast<const T*>(weight.const_data_ptr()), bias.const_data_ptr<float>(),
                                   static_cast<T*>(out.mutable_data_ptr()), images, pooled);
    const int blocks = std::min(problem.tiles, fm::multiprocessors(device) * Cut::kResident);
    fm::launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), Cut::kBlockThreads,
                      Cut::kSharedBytes, 1, config[2] != 0 && fm::has_clusters(device), fm::current_stream(weight),
                      problem);
  };
  if (config[3] != 0) {
    STD_TORCH_CHECK(fm::has_warpgroups(device) && config[0] == 7 && config[1] == 8,
                    "convolution_stem: warpgroups need compute capability 9.0 and a tile of 7 x 8");
    using Cut = fm_stem::GroupTile<7, 8>;
    return with(Cut{}, fm_stem::stem_groups_kernel<T, Cut, Source>);
  }
  const bool known = fm_stem::choose_tile(config[0], config[1], [&]<typename Cut>(Cut cut) {
    with(cut, fm_stem::stem_kernel<T, Cut, Source>);
  });
  STD_TORCH_CHECK(known, "convolution_stem: there is no tile of ", config[0], " x ", config[1]);
}

// `x` [N, H, W, 3] of the type of the weights; or float32 [N, 3, H, W]; or uint8 [N, H, W, 3] with `mean` and `scale`,
// float32 [3]. `weight` [2, 10, 2, 32, 8] and `bias` [64] as lay_out_stem makes them; `config`: height and width of a
// tile, whether to start before the kernel in front has ended (where the device can), whether to multiply by warpgroups.
// `pooled`: whether ReLU and pooling follow. Returns [N, P, Q, 64].
Tensor convolution_stem(Tensor x, Tensor weight, Tensor bias, std::vector<int64_t> config, std::optional<Tensor> mean,
                        std::optional<Tensor> scale, bool pooled) {
  const ScalarType type = weight.scalar_type();
  const fm_stem::Sizes sizes = fm_stem::check_images("convolution_stem", x, type, mean, scale);
  check_weights(weight, bias, x);
  STD_TORCH_CHECK(config.size() == 4, "convolution_stem: config must hold height, width, early, warpgroups");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t height = pooled ? sizes.out_height() : sizes.middle_height();
  const int64_t width = pooled ? sizes.out_width() : sizes.middle_width();
  Tensor out = torch::stable::new_empty(weight, {sizes.images, height, width, fm_stem::kChannels});
  if (sizes.images == 0) return out;
  const auto of_type = [&]<typename T>(T*) {
    fm_stem::as_source<T>(x, sizes, mean, scale, [&](const auto& source) {
      run<T>(source, static_cast<int>(sizes.images), weight, bias, out, config, pooled);
    });
  };
  if (type == ScalarType::Half) of_type(static_cast<__half*>(nullptr));
  else of_type(static_cast<__nv_bfloat16*>(nullptr));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("convolution_stem", TORCH_BOX(&convolution_stem)); }
