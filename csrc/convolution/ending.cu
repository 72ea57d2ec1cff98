// convolution_ending_native: the end of a residual block of channels_last images in half precision, on compute
// capability 9.0. The kernel is in ending.cuh.
#include <algorithm>

#include "ending.cuh"
#include "operands.h"

namespace {

using namespace fm_convolution;

constexpr int kWideChannels = kParts * kDepth;

template <typename T, Ending ENDING>
void launch(const EndingProblem& problem, bool early, const Tensor& x) {
  const int blocks = std::min(fm::multiprocessors(x.get_device_index()), problem.tiles);
  fm::launch_kernel(ending_kernel<T, ENDING>, dim3(blocks), kEndingGroups * kWarpgroup, ending_shared_bytes(ENDING), 1,
                    early, fm::current_stream(x), problem);
}

template <typename T>
void launch(Ending ending, const EndingProblem& problem, bool early, const Tensor& x) {
  switch (ending) {
    case kResidual: return launch<T, kResidual>(problem, early, x);
    case kResidualNext: return launch<T, kResidualNext>(problem, early, x);
    case kResidualTwice: return launch<T, kResidualTwice>(problem, early, x);
    case kSecondNext: return launch<T, kSecondNext>(problem, early, x);
  }
}

void check_weights(const Tensor& weight, const Tensor& bias, const Tensor& x, const char* name, int64_t outputs,
                   int64_t taps, int64_t inputs) {
  check(weight, name, 4, x, x.scalar_type());
  check(bias, "bias", 1, x, ScalarType::Float);
  STD_TORCH_CHECK(weight.size(0) == outputs && weight.size(1) == taps && weight.size(2) == taps &&
                      weight.size(3) == inputs && bias.size(0) == outputs,
                  "convolution_ending_native: ", name, " must be [", outputs, ", ", taps, ", ", taps, ", ", inputs,
                  "] with a bias of [", outputs, "]");
}

Geometry pointwise(const Geometry& g, int64_t channels) { return {g.images, g.height, g.width, channels, 1, 1, 1, 0}; }

void check_images(const Tensor& images, const char* name, const Tensor& x, int64_t channels) {
  check(images, name, 4, x, x.scalar_type());
  STD_TORCH_CHECK(images.size(0) == x.size(0) && images.size(1) == x.size(1) && images.size(2) == x.size(2) &&
                      images.size(3) == channels,
                  "convolution_ending_native: ", name, " must be [", x.size(0), ", ", x.size(1), ", ", x.size(2), ", ",
                  channels, "]");
}

// `x` [N, H, W, 64], `weight` [64, 3, 3, 64], `last_weight` [256, 1, 1, 64], with float32 biases; the shortcut is
// `residual` [N, H, W, 256] or `second` [N, H, W, 64] under `second_weight` [256, 1, 1, 64]; `next_weight` [M, 1, 1, 256]
// of M = 64 or, with a residual, 128 outputs may be left out with a residual. `config`: whether to start before the kernel
// in front has ended. Returns [N, H, W, 256] and [N, H, W, M], of no channels where there is no next convolution.
std::tuple<Tensor, Tensor> ending(Tensor x, Tensor weight, Tensor bias, Tensor last_weight, Tensor last_bias,
                                  std::optional<Tensor> residual, std::optional<Tensor> second,
                                  std::optional<Tensor> second_weight, std::optional<Tensor> next_weight,
                                  std::optional<Tensor> next_bias, std::vector<int64_t> config) {
  STD_TORCH_CHECK(x.is_cuda(), "convolution_ending_native: x must be on a CUDA device");
  STD_TORCH_CHECK(config.size() == 1, "convolution_ending_native: config must hold early");
  STD_TORCH_CHECK(residual.has_value() != second.has_value() && second.has_value() == second_weight.has_value(),
                  "convolution_ending_native: needs a residual, or second with second_weight");
  STD_TORCH_CHECK(next_weight.has_value() == next_bias.has_value() && (next_weight.has_value() || residual.has_value()),
                  "convolution_ending_native: next_weight and next_bias go together, and second needs them");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ScalarType scalar = x.scalar_type();
  STD_TORCH_CHECK(scalar == ScalarType::Half || scalar == ScalarType::BFloat16,
                  "convolution_ending_native: x must be float16 or bfloat16, got ", torch::headeronly::toString(scalar));
  check_device(x.get_device_index());
  check(x, "x", 4, x, scalar);
  check_weights(weight, bias, x, "weight", kDepth, 3, kDepth);
  check_weights(last_weight, last_bias, x, "last_weight", kWideChannels, 1, kDepth);
  const int64_t images = x.size(0), height = x.size(1), width = x.size(2);
  Tensor wide = torch::stable::new_empty(x, {images, height, width, kWideChannels});
  const int64_t outputs = next_weight.has_value() ? next_weight->size(0) : 0;
  STD_TORCH_CHECK(outputs == 0 || outputs == kDepth || (outputs == 2 * kDepth && residual.has_value()),
                  "convolution_ending_native: next_weight must have 64 outputs, or 128 with a residual, got ", outputs);
  Tensor narrow = torch::stable::new_empty(x, {images, height, width, outputs});
  const Geometry g{images, height, width, kDepth, 3, 3, 1, 1}, out = pointwise(g, kWideChannels), in = pointwise(g, kDepth);
  STD_TORCH_CHECK(images * height * width <= INT32_MAX, "convolution_ending_native: too many positions");
  const auto type = map_type(x);
  EndingProblem problem{};
  Ending kind = kResidual;
  if (residual.has_value()) check_images(*residual, "residual", x, kWideChannels);
  else check_images(*second, "second", x, kDepth);
  if (next_weight.has_value()) check_weights(*next_weight, *next_bias, x, "next_weight", outputs, 1, kWideChannels);
  if (second.has_value()) check_weights(*second_weight, last_bias, x, "second_weight", kWideChannels, 1, kDepth);
  if (wide.numel() == 0) return {wide, narrow};
  encode_box(problem.pixels, type, x.const_data_ptr(), g, kHalo, kHalo);
  encode_weights(problem.weights, type, weight.const_data_ptr(), g, kDepth, kDepth);
  encode_weights(problem.last_weights, type, last_weight.const_data_ptr(), in, kWideChannels, kDepth);
  encode_box(problem.wide, type, wide.mutable_data_ptr(), out, kSide, kSide);
  if (residual.has_value()) {
    encode_box(problem.shortcut, type, residual->const_data_ptr(), out, kSide, kSide);
    problem.residual = residual->const_data_ptr();
  } else {
    kind = kSecondNext;
    encode_box(problem.shortcut, type, second->const_data_ptr(), in, kSide, kSide);
    encode_weights(problem.second_weights, type, second_weight->const_data_ptr(), in, kWideChannels, kDepth);
  }
  if (next_weight.has_value()) {
    if (residual.has_value()) kind = outputs == kDepth ? kResidualNext : kResidualTwice;
    encode_weights(problem.next_weights, type, next_weight->const_data_ptr(), out, outputs, kDepth);
    encode_box(problem.narrow, type, narrow.mutable_data_ptr(), pointwise(g, outputs), kSide, kSide);
    problem.next_bias = next_bias->const_data_ptr<float>();
  }
  problem.bias = bias.const_data_ptr<float>(), problem.last_bias = last_bias.const_data_ptr<float>();
  problem.height = int(height), problem.width = int(width);
  problem.down = int((height + kSide - 1) / kSide), problem.across = int((width + kSide - 1) / kSide);
  problem.tiles = int(images * problem.down * problem.across);
  if (x.scalar_type() == ScalarType::Half) launch<__half>(kind, problem, config[0] != 0, x);
  else launch<__nv_bfloat16>(kind, problem, config[0] != 0, x);
  return {wide, narrow};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("convolution_ending_native", TORCH_BOX(&ending)); }
