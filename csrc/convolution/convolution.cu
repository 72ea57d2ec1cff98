// convolution_native: convolution + bias (+ residual) (+ ReLU) of channels_last images in half precision, on compute
// capability 9.0. The kernel is in forward.cuh.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "tensor_maps.h"

namespace {

using fm_convolution::Geometry;
using fm_convolution::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tile and how the depth is shared.
struct Config {
  int columns, split, stages;
  bool early;
  int groups;  // of 64 rows
};

#ifdef FM_TIMELINE
long long* timeline = nullptr;
int64_t timeline_numbers = 0;  // of a launch
#endif

void check_device(int device) {
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  STD_TORCH_CHECK(major == 9 && minor == 0, "convolution_native: needs compute capability 9.0, this device has ", major,
                  ".", minor);
}

void check(const Tensor& tensor, const char* name, int64_t dimensions, const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, "convolution_native: ", name, " must have ", dimensions, " dimensions, got ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "convolution_native: ", name,
                  " must be on the device of x");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "convolution_native: ", name, " must be ",
                  torch::headeronly::toString(type), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
                  "convolution_native: ", name, " must be contiguous and aligned to 16 bytes");
}

// Of images [N, H, W, C] and weights [outputs, taps down, taps across, C].
Geometry geometry(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, const char* name) {
  const Geometry g{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(1), weight.size(2), stride, padding};
  STD_TORCH_CHECK(weight.size(3) == g.channels, "convolution_native: ", name, " must have the ", g.channels,
                  " channels of its images, got ", weight.size(3));
  STD_TORCH_CHECK(g.channels > 0 && g.channels % 16 == 0 && weight.size(0) > 0 && weight.size(0) % 16 == 0,
                  "convolution_native: channels must be positive multiples of 16, got ", g.channels, " and ",
                  weight.size(0));
  STD_TORCH_CHECK(stride >= 1 && stride <= 8 && padding >= 0 && padding < g.taps_down && padding < g.taps_across &&
                      g.taps_down <= 15 && g.taps_across <= 15,
                  "convolution_native: unusual kernel ", g.taps_down, " x ", g.taps_across, ", stride ", stride,
                  ", padding ", padding);
  STD_TORCH_CHECK(g.height + 2 * padding >= g.taps_down && g.width + 2 * padding >= g.taps_across,
                  "convolution_native: images are smaller than the kernel");
  return g;
}

void check_config(const Config& config) {
  STD_TORCH_CHECK(config.split == 1 || config.split == 2 || config.split == 4 || config.split == 8,
                  "convolution_native: split must be 1, 2, 4 or 8, got ", config.split);
  STD_TORCH_CHECK(config.stages >= 2 && config.stages <= fm_convolution::kMaxStages,
                  "convolution_native: stages must be 2 to ", fm_convolution::kMaxStages, ", got ", config.stages);
  STD_TORCH_CHECK(config.groups == 1 || (config.groups == 2 && config.split == 1),
                  "convolution_native: groups must be 1, or 2 without a split, got ", config.groups, " and a split of ",
                  config.split);
  // Rows of float32 sums are put together in the ring.
  STD_TORCH_CHECK(config.split > 1 || config.stages * (config.groups * 64 + config.columns) * 128 >=
                                          config.groups * 64 * (config.columns + 8) * 4,
                  "convolution_native: two groups of 128 columns need 3 stages, got ", config.stages);
}

template <typename T, int COLUMNS>
void launch(const Problem<T>& problem, const Config& config, cudaStream_t stream) {
  using fm_convolution::convolution_kernel;
  const int per_block = config.groups * fm_convolution::kRows;
  const unsigned rows = (problem.rows + per_block - 1) / per_block;
  const unsigned columns = (problem.channels + COLUMNS - 1) / COLUMNS;
  const auto kernel = config.groups == 2  ? convolution_kernel<T, COLUMNS, 2, false>
                      : config.split == 1 ? convolution_kernel<T, COLUMNS, 1, false>
                                          : convolution_kernel<T, COLUMNS, 1, true>;
  const int bytes = fm_convolution::shared_bytes(COLUMNS, config.groups, config.split, config.stages);
  fm::launch_kernel(kernel, dim3(config.split, rows, columns), config.groups * fm_convolution::kWarpgroup + 32, bytes,
                    config.split, config.early, stream, problem);
}

template <typename T>
void run(const Problem<T>& problem, const Config& config, cudaStream_t stream) {
  switch (config.columns) {
    case 32: return launch<T, 32>(problem, config, stream);
    case 64: return launch<T, 64>(problem, config, stream);
    case 128: return launch<T, 128>(problem, config, stream);
    default: STD_TORCH_CHECK(false, "convolution_native: columns must be 32, 64 or 128, got ", config.columns);
  }
}

// `x` [N, H, W, C] and `weight` [K, R, S, C]; `bias` float32 [K]; `residual` as the output [N, P, Q, K]; `second`
// [N, H2, W2, C2] under `second_weight` [K, 1, 1, C2] with its own stride is added to the sums. `config`: columns and
// split of a tile, stages of the ring, whether to start before the kernel in front has ended.
Tensor convolution(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> residual, std::optional<Tensor> second,
                   std::optional<Tensor> second_weight, int64_t stride, int64_t padding, int64_t second_stride, bool relu,
                   std::vector<int64_t> config) {
  STD_TORCH_CHECK(x.is_cuda(), "convolution_native: x must be on a CUDA device");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "convolution_native: x must be float16 or bfloat16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(config.size() == 5, "convolution_native: config must hold columns, split, stages, early, groups");
  check_device(x.get_device_index());
  check(x, "x", 4, x, type);
  check(weight, "weight", 4, x, type);
  check(bias, "bias", 1, x, ScalarType::Float);
  const Geometry g = geometry(x, weight, stride, padding, "weight");
  const int64_t outputs = weight.size(0), height = g.out_height(), width = g.out_width();
  const int64_t rows = g.images * height * width;
  STD_TORCH_CHECK(bias.size(0) == outputs, "convolution_native: bias must be [", outputs, "], got [", bias.size(0), "]");
  STD_TORCH_CHECK(rows <= INT32_MAX && g.height <= 32767 && g.width <= 32767, "convolution_native: too many positions");
  STD_TORCH_CHECK(second.has_value() == second_weight.has_value(),
                  "convolution_native: second and second_weight go together");
  const Config chosen{int(config[0]), int(config[1]), int(config[2]), config[3] != 0, int(config[4])};
  check_config(chosen);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {g.images, height, width, outputs});
  if (rows == 0) return out;
  if (residual.has_value()) {
    check(*residual, "residual", 4, x, type);
    for (int i = 0; i < 4; i++) {
      STD_TORCH_CHECK(residual->size(i) == out.size(i), "convolution_native: residual must have the shape of the output");
    }
  }
  const auto map_type = type == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto call = [&]<typename T>(T*) {
    Problem<T> problem{};
    problem.first = fm_convolution::make_input(map_type, x.const_data_ptr(), weight.const_data_ptr(), g, outputs,
                                               chosen.columns);
    if (second.has_value()) {
      check(*second, "second", 4, x, type);
      check(*second_weight, "second_weight", 4, x, type);
      const Geometry more = geometry(*second, *second_weight, second_stride, 0, "second_weight");
      STD_TORCH_CHECK(second_weight->size(0) == outputs && more.images == g.images && more.out_height() == height &&
                          more.out_width() == width,
                      "convolution_native: second must give the same output");
      problem.second = fm_convolution::make_input(map_type, second->const_data_ptr(), second_weight->const_data_ptr(),
                                                  more, outputs, chosen.columns);
    }
    const int depth = problem.first.depth + problem.second.depth;
    STD_TORCH_CHECK(depth < 65536, "convolution_native: more than 65535 chunks of 64 of the depth, ", depth);
    STD_TORCH_CHECK(chosen.split <= depth, "convolution_native: split must be at most the ", depth,
                    " chunks of the depth, got ", chosen.split);
    problem.bias = bias.const_data_ptr<float>();
    problem.residual = residual.has_value() ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    problem.out = static_cast<T*>(out.mutable_data_ptr());
    problem.rows = int(rows), problem.channels = int(outputs);
    problem.height = int(height), problem.width = int(width);
    problem.split = chosen.split, problem.stages = chosen.stages, problem.relu = relu;
#ifdef FM_TIMELINE
    problem.times = timeline;
    if (timeline != nullptr) timeline += timeline_numbers;
#endif
    run(problem, chosen, fm::current_stream(x));
  };
  if (type == ScalarType::Half) call(static_cast<__half*>(nullptr));
  else call(static_cast<__nv_bfloat16*>(nullptr));
  return out;
}

}  // namespace

#ifdef FM_TIMELINE
// From now on every launch stamps the next so many numbers of device memory; null ends it.
extern "C" __attribute__((visibility("default"))) void fm_convolution_timeline(long long* memory, int64_t numbers) {
  timeline = memory, timeline_numbers = numbers;
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("convolution_native", TORCH_BOX(&convolution)); }
