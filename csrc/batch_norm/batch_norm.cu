// batch_norm_native and batch_norm_backward_native: batch norm in training with the residual and ReLU behind it, in
// half precision, on compute capability 9.0. The kernels are in batch_norm.cuh.
#include "batch_norm.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda.h"

namespace {

using namespace fm_batch_norm;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Config {
  int lanes, cluster;
};

Config make_config(const std::vector<int64_t>& config) {
  STD_TORCH_CHECK(config.size() == 2, "batch_norm_native: config must hold lanes and cluster");
  const int64_t lanes = config[0], cluster = config[1];
  STD_TORCH_CHECK(lanes == 2 || lanes == 4 || lanes == 8, "batch_norm_native: lanes must be 2, 4 or 8, got ", lanes);
  STD_TORCH_CHECK(cluster >= 1 && cluster <= kMaxCluster && (cluster & (cluster - 1)) == 0,
                  "batch_norm_native: cluster must be 1, 2, 4, 8 or 16, got ", cluster);
  return {static_cast<int>(lanes), static_cast<int>(cluster)};
}

void check_x(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4, "batch_norm_native: x must be [B, C, H, W] on a CUDA device");
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "batch_norm_native: x must be float16 or bfloat16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(fm::has_warpgroups(x.get_device_index()),
                  "batch_norm_native: needs a device of compute capability 9.0");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(channels > 0 && channels % kWide == 0,
                  "batch_norm_native: channels must be a positive multiple of ", kWide, ", got ", channels);
  const int64_t rows = x.numel() / channels;
  STD_TORCH_CHECK(rows >= 2 && rows <= kMaxRows && channels <= kMaxRows / kMaxCluster,
                  "batch_norm_native: x must have 2 to ", kMaxRows, " values per channel, got ", rows);
}

// Of x's shape and type, its rows of channels one after the other.
void check_image(const Tensor& image, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(image.is_cuda() && image.get_device_index() == x.get_device_index(), "batch_norm_native: ", name,
                  " must be on the device of x");
  STD_TORCH_CHECK(image.scalar_type() == x.scalar_type(), "batch_norm_native: ", name, " must be ",
                  torch::headeronly::toString(x.scalar_type()), ", got ",
                  torch::headeronly::toString(image.scalar_type()));
  bool fits = image.dim() == 4, whole = fits;
  for (int i = 0; fits && i < 4; i++) fits = image.size(i) == x.size(i);
  STD_TORCH_CHECK(fits, "batch_norm_native: ", name, " must have the shape of x");
  int64_t step = 1;
  for (const int i : {1, 3, 2, 0}) {
    whole = whole && (image.size(i) == 1 || image.stride(i) == step);
    step *= image.size(i);
  }
  STD_TORCH_CHECK(whole && reinterpret_cast<uintptr_t>(image.const_data_ptr()) % 16 == 0, "batch_norm_native: ", name,
                  " must be contiguous in channels_last and aligned to 16 bytes");
}

void check_vector(const Tensor& vector, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(vector.is_cuda() && vector.get_device_index() == x.get_device_index() &&
                      vector.scalar_type() == ScalarType::Float && vector.dim() == 1 &&
                      vector.size(0) == x.size(1) && vector.is_contiguous(),
                  "batch_norm_native: ", name, " must be float32 [", x.size(1), "], contiguous, on the device of x");
}

template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* written(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename Kernel, typename Problem>
void launch(Kernel kernel, const Config& config, int bytes, const Problem& problem, const Tensor& x) {
  if (config.cluster > 8) {  // what every device with clusters has
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  const int width = kWide * config.lanes;
  const dim3 blocks(static_cast<unsigned>(config.cluster * ((problem.channels + width - 1) / width)));
  // The kernels wait for what is in front of them before they read anything: they may always start early.
  fm::launch_kernel(kernel, blocks, kThreads, bytes, config.cluster, true, fm::current_stream(x), problem);
}

// Calls run(T*, lanes) with the type of x and, as a constant, the lanes.
template <typename Run>
void by_type_and_lanes(const Tensor& x, const Config& config, Run run) {
  const auto by_lanes = [&](auto* type) {
    if (config.lanes == 8) run(type, std::integral_constant<int, 8>());
    else if (config.lanes == 4) run(type, std::integral_constant<int, 4>());
    else run(type, std::integral_constant<int, 2>());
  };
  if (x.scalar_type() == ScalarType::Half) by_lanes(static_cast<__half*>(nullptr));
  else by_lanes(static_cast<__nv_bfloat16*>(nullptr));
}

// `x`, `residual` [B, C, H, W] in channels_last; vectors float32 [C]. `config`: lanes of 16 bytes and blocks of a
// cluster. Returns the result, the mean and the variance.
std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, std::optional<Tensor> residual, Tensor weight, Tensor bias,
                                           std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                           std::optional<Tensor> batches, double momentum, double epsilon, bool relu,
                                           std::vector<int64_t> config) {
  const Config chosen = make_config(config);
  check_x(x);
  check_image(x, "x", x);
  if (residual.has_value()) check_image(*residual, "residual", x);
  check_vector(weight, "weight", x), check_vector(bias, "bias", x);
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(),
                  "batch_norm_native: both running averages, or none");
  if (running_mean.has_value()) {
    check_vector(*running_mean, "running_mean", x), check_vector(*running_var, "running_var", x);
  }
  STD_TORCH_CHECK(!batches.has_value() || (batches->is_cuda() && batches->get_device_index() == x.get_device_index() &&
                                           batches->scalar_type() == ScalarType::Long && batches->numel() == 1),
                  "batch_norm_native: batches must be one int64 on the device of x");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  Tensor mean = torch::stable::empty_like(weight), variance = torch::stable::empty_like(weight);
  by_type_and_lanes(x, chosen, [&]<typename T, int LANES>(T*, std::integral_constant<int, LANES>) {
    Forward<T> p{};
    p.x = data_of<T>(x), p.residual = data_of<T>(residual), p.out = written<T>(out);
    p.weight = data_of<float>(weight), p.bias = data_of<float>(bias);
    p.mean = written<float>(mean), p.variance = written<float>(variance);
    if (running_mean.has_value()) {
      p.running_mean = written<float>(*running_mean), p.running_var = written<float>(*running_var);
    }
    if (batches.has_value()) p.batches = written<int64_t>(*batches);
    p.rows = static_cast<int>(x.numel() / x.size(1)), p.channels = static_cast<int>(x.size(1));
    p.momentum = static_cast<float>(momentum), p.epsilon = static_cast<float>(epsilon), p.relu = relu;
    const Layout layout = layout_of(p.rows, LANES, chosen.cluster, p.residual ? 2 : 1);
    p.held = layout.held;
    launch(forward_kernel<T, LANES>, chosen, layout.bytes, p, x);
  });
  return {out, mean, variance};
}

// The gradient of the result is `grad` + `more`. `out`: the result, where a ReLU's input also had a residual; `behind`:
// whether the gradient in front of the ReLU is the last result, which is empty otherwise. The others as above.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, std::optional<Tensor> more, Tensor x,
                                                    std::optional<Tensor> out, Tensor weight, Tensor bias, Tensor mean,
                                                    Tensor variance, double epsilon, bool relu, bool behind,
                                                    std::vector<int64_t> config) {
  const Config chosen = make_config(config);
  check_x(x);
  check_image(x, "x", x), check_image(grad, "grad", x);
  if (more.has_value()) check_image(*more, "more", x);
  if (out.has_value()) check_image(*out, "out", x);
  check_vector(weight, "weight", x), check_vector(bias, "bias", x);
  check_vector(mean, "mean", x), check_vector(variance, "variance", x);
  STD_TORCH_CHECK(behind || !out.has_value(), "batch_norm_native: behind must be asked for where out is given");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor before = behind ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::empty_like(weight), grad_bias = torch::stable::empty_like(weight);
  by_type_and_lanes(x, chosen, [&]<typename T, int LANES>(T*, std::integral_constant<int, LANES>) {
    Backward<T> p{};
    p.grad = data_of<T>(grad), p.more = data_of<T>(more), p.x = data_of<T>(x), p.out = data_of<T>(out);
    p.grad_x = written<T>(grad_x), p.behind = behind ? written<T>(before) : nullptr;
    p.weight = data_of<float>(weight), p.bias = data_of<float>(bias);
    p.mean = data_of<float>(mean), p.variance = data_of<float>(variance);
    p.grad_weight = written<float>(grad_weight), p.grad_bias = written<float>(grad_bias);
    p.rows = static_cast<int>(x.numel() / x.size(1)), p.channels = static_cast<int>(x.size(1));
    p.epsilon = static_cast<float>(epsilon), p.relu = relu;
    const Layout layout = layout_of(p.rows, LANES, chosen.cluster, p.tensors());
    p.held = layout.held;
    launch(backward_kernel<T, LANES>, chosen, layout.bytes, p, x);
  });
  return {grad_x, grad_weight, grad_bias, before};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) {
  m.impl("batch_norm_native", TORCH_BOX(&forward));
  m.impl("batch_norm_backward_native", TORCH_BOX(&backward));
}
