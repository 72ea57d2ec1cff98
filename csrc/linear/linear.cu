// fused_linear_native: a linear layer of few rows with layer norm, bias, ReLU, residual and the moments of its result,
// in half precision, on compute capability 9.0. The kernel is in linear.cuh.
#include "convolution/operands.h"
#include "linear.cuh"

namespace {

using namespace fm_linear;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Config {
  int columns, split, stages;
  bool early;
};

Config make_config(const std::vector<int64_t>& config) {
  STD_TORCH_CHECK(config.size() == 4, "fused_linear_native: config must hold columns, split, stages, early");
  const Config c{int(config[0]), int(config[1]), int(config[2]), config[3] != 0};
  STD_TORCH_CHECK(c.columns == 32 || c.columns == 64, "fused_linear_native: columns must be 32 or 64, got ", c.columns);
  STD_TORCH_CHECK(c.split == 1 || c.split == 2 || c.split == 4 || c.split == 8,
                  "fused_linear_native: split must be 1, 2, 4 or 8, got ", c.split);
  STD_TORCH_CHECK(c.stages >= 2 && c.stages <= kMaxStages && shared_bytes(c.columns, c.split, c.stages) <= 227 * 1024,
                  "fused_linear_native: stages must be 2 to ", kMaxStages, " and fit shared memory, got ", c.stages);
  // Rows of float32 sums are put together in the ring.
  STD_TORCH_CHECK(c.split > 1 || c.stages * (kRows + c.columns) * 128 >= kRows * (c.columns + 8) * 4,
                  "fused_linear_native: too few stages, ", c.stages);
  return c;
}

void check(const Tensor& tensor, const char* name, const Tensor& x, ScalarType type, std::vector<int64_t> shape) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "fused_linear_native: ", name,
                  " must be on the device of x");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "fused_linear_native: ", name, " must be ",
                  torch::headeronly::toString(type), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  bool fits = tensor.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); i++) fits = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(fits, "fused_linear_native: ", name, " has a shape that does not fit");
  STD_TORCH_CHECK(tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
                  "fused_linear_native: ", name, " must be contiguous and aligned to 16 bytes");
}

// Arguments of the op; see `linear` below.
struct Arguments {
  Tensor x, weight, bias;
  std::optional<Tensor> residual, leading, moments, sums;
  double epsilon;
  bool relu;

  int64_t leads() const { return leading.has_value() ? leading->size(0) : 0; }
  int64_t rows() const { return leads() + x.size(0); }
  int64_t width() const { return x.size(1); }
  int64_t features() const { return weight.size(0); }
  int64_t parts() const { return moments.has_value() ? moments->size(1) : 0; }
};

void check_arguments(const Arguments& a, const Config& config) {
  STD_TORCH_CHECK(a.x.is_cuda() && a.x.dim() == 2 && a.weight.dim() == 2 && a.bias.dim() >= 1 && a.bias.dim() <= 2,
                  "fused_linear_native: x must be [rows, K] on a CUDA device, weight [N, K], bias [N] or [tokens, N]");
  const ScalarType type = a.x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "fused_linear_native: x must be float16 or bfloat16, got ", torch::headeronly::toString(type));
  fm_convolution::check_device(a.x.get_device_index());
  STD_TORCH_CHECK(a.width() > 0 && a.width() % 16 == 0 && a.features() > 0 && a.features() % 16 == 0,
                  "fused_linear_native: K and N must be positive multiples of 16, got ", a.width(), " and ",
                  a.features());
  STD_TORCH_CHECK(a.rows() <= int64_t(65535) * kRows, "fused_linear_native: too many rows, ", a.rows());
  check(a.x, "x", a.x, type, {a.x.size(0), a.width()});
  check(a.weight, "weight", a.x, type, {a.features(), a.width()});
  const bool shared = a.bias.dim() == 1;
  if (shared) check(a.bias, "bias", a.x, type, {a.features()});
  else check(a.bias, "bias", a.x, type, {a.bias.size(0), a.features()});
  STD_TORCH_CHECK(shared || (a.bias.size(0) > 0 && a.x.size(0) % a.bias.size(0) == 0),
                  "fused_linear_native: rows of x must be a multiple of the bias's tokens, got ", a.x.size(0));
  if (a.residual.has_value()) check(*a.residual, "residual", a.x, type, {a.rows(), a.features()});
  if (a.leading.has_value()) {
    STD_TORCH_CHECK(a.leading->dim() == 2 && a.x.size(0) > 0 && !a.residual.has_value() && !a.moments.has_value(),
                    "fused_linear_native: leading must be [leads, N], with rows of x, without residual and moments");
    check(*a.leading, "leading", a.x, type, {a.leads(), a.features()});
  }
  STD_TORCH_CHECK(a.moments.has_value() == a.sums.has_value(),
                  "fused_linear_native: moments and weight_sums go together");
  if (!a.moments.has_value()) return;
  STD_TORCH_CHECK(a.moments->dim() == 3 && a.parts() >= 1 && a.parts() <= kPartsOfLane * config.columns / 8,
                  "fused_linear_native: moments must be of 1 to ", kPartsOfLane * config.columns / 8, " parts");
  STD_TORCH_CHECK(a.moments->scalar_type() == ScalarType::Float && a.moments->size(0) == a.rows() &&
                      a.moments->size(2) == 3 && a.moments->is_contiguous(),
                  "fused_linear_native: moments must be float32 [rows, parts, 3], contiguous");
  check(*a.sums, "weight_sums", a.x, ScalarType::Float, {a.features()});
}

template <typename T>
Problem<T> make_problem(const Arguments& a, Tensor& out, std::optional<Tensor>& moments_out, const Config& config) {
  Problem<T> problem{};
  const CUtensorMapDataType type = fm_convolution::map_type(a.x);
  const fm_convolution::Geometry plain{1, 1, 1, a.width(), 1, 1, 1, 0};  // rows of one tap each
  fm_convolution::Input& input = problem.inputs.first;
  fm_convolution::encode_weights(input.pixels, type, a.x.const_data_ptr(), plain, a.x.size(0), kRows);
  fm_convolution::encode_weights(input.weights, type, a.weight.const_data_ptr(), plain, a.features(), config.columns);
  input.across = fm_convolution::Divisor::of(1);
  input.chunks = fm_convolution::Divisor::of(uint32_t((a.width() + kDepth - 1) / kDepth));
  input.depth = int(input.chunks.number), input.stride = 1;
  STD_TORCH_CHECK(config.split <= input.depth, "fused_linear_native: split must be at most the ", input.depth,
                  " chunks of the depth, got ", config.split);
  problem.inputs.height = problem.inputs.width = 1, problem.inputs.stages = config.stages;
  problem.split = config.split;
  Around<T>& around = problem.around;
  around.bias = static_cast<const T*>(a.bias.const_data_ptr());
  around.tokens = a.bias.dim() == 1 ? 0 : int(a.bias.size(0));
  if (a.moments.has_value()) {
    around.moments = a.moments->const_data_ptr<float>(), around.sums = a.sums->const_data_ptr<float>();
    around.parts = int(a.parts());
  }
  if (a.residual.has_value()) around.residual = static_cast<const T*>(a.residual->const_data_ptr());
  if (a.leading.has_value()) around.leading = static_cast<const T*>(a.leading->const_data_ptr());
  around.leads = int(a.leads());
  around.out = static_cast<T*>(out.mutable_data_ptr());
  if (moments_out.has_value()) around.moments_out = static_cast<float*>(moments_out->mutable_data_ptr());
  around.rows = int(a.rows()), around.features = int(a.features());
  around.width = float(a.width()), around.epsilon = float(a.epsilon), around.relu = a.relu;
  return problem;
}

template <typename T, int COLUMNS>
void launch(const Problem<T>& problem, const Config& config, cudaStream_t stream) {
  const auto kernel = config.split == 1 ? linear_kernel<T, COLUMNS, false> : linear_kernel<T, COLUMNS, true>;
  const unsigned rows = problem.around.rows, features = problem.around.features;
  const dim3 blocks(config.split, (rows + kRows - 1) / kRows, (features + COLUMNS - 1) / COLUMNS);
  fm::launch_kernel(kernel, blocks, kWarpgroup + 32, shared_bytes(COLUMNS, config.split, config.stages), config.split,
                    config.early, stream, problem);
}

// `x` [rows, K], `weight` [N, K], `bias` [N], or [tokens, N] for rows that repeat so many tokens, all of x's type;
// `residual` [rows, N]. `leading` [leads, N]: rows that come first in the result, as they are, not with a residual or
// moments. `moments` float32 [rows, parts, 3] and `sums` float32 [N] of the rows of the weight: a layer
// norm in front, of `epsilon`. `give_moments`: also those of the result, float32 [rows, tiles, 3]. `config`: columns
// and split of a tile, stages of the ring, whether to start before the kernel in front has ended.
std::tuple<Tensor, Tensor> linear(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> residual,
                                  std::optional<Tensor> leading, double epsilon, std::optional<Tensor> moments,
                                  std::optional<Tensor> sums, bool relu, bool give_moments,
                                  std::vector<int64_t> config) {
  const Arguments arguments{x, weight, bias, residual, leading, moments, sums, epsilon, relu};
  const Config chosen = make_config(config);
  check_arguments(arguments, chosen);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t rows = arguments.rows(), tiles = (arguments.features() + chosen.columns - 1) / chosen.columns;
  Tensor out = torch::stable::new_empty(x, {rows, arguments.features()});
  Tensor made = torch::stable::new_empty(x, {rows, give_moments ? tiles : 0, 3}, ScalarType::Float);
  if (rows == 0) return {out, made};
  std::optional<Tensor> moments_out;
  if (give_moments) moments_out = made;
  const auto call = [&]<typename T>(T*) {
    const auto problem = make_problem<T>(arguments, out, moments_out, chosen);
    if (chosen.columns == 32) launch<T, 32>(problem, chosen, fm::current_stream(x));
    else launch<T, 64>(problem, chosen, fm::current_stream(x));
  };
  if (x.scalar_type() == ScalarType::Half) call(static_cast<__half*>(nullptr));
  else call(static_cast<__nv_bfloat16*>(nullptr));
  return {out, made};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("fused_linear_native", TORCH_BOX(&linear)); }
