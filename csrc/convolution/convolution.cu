// convolution_native: convolution + bias (+ residual) (+ ReLU) of channels_last images in half precision, on compute
// capability 9.0. The kernel is in forward.cuh.
#include "forward.cuh"
#include "operands.h"

namespace {

using namespace fm_convolution;

// A tile and how the depth is shared.
struct Config {
  int columns, split, stages;
  bool early;
  int groups;  // of 64 rows
  bool alone;  // on a multiprocessor, among the blocks of its kernel
};

void check_config(const Config& config) {
  STD_TORCH_CHECK(config.split == 1 || config.split == 2 || config.split == 4 || config.split == 8,
                  "convolution_native: split must be 1, 2, 4 or 8, got ", config.split);
  STD_TORCH_CHECK(config.groups == 1 || (config.groups == 2 && config.split == 1),
                  "convolution_native: groups must be 1, or 2 without a split, got ", config.groups, " and a split of ",
                  config.split);
  // Rows of float32 sums are put together in the ring.
  STD_TORCH_CHECK(config.split > 1 || config.stages * (config.groups * 64 + config.columns) * 128 >=
                                          config.groups * 64 * (config.columns + 8) * 4,
                  "convolution_native: two groups of 128 columns need 3 stages, got ", config.stages);
}

struct Grid {
  dim3 blocks;
  int threads, bytes;
};

template <typename T>
Grid grid_of(const Problem<T>& problem, const Config& config) {
  const unsigned rows = config.groups * kRows;
  check_rows(problem.output.rows, rows);
  return {dim3(config.split, (problem.output.rows + rows - 1) / rows,
               (problem.output.channels + config.columns - 1) / config.columns),
          config.groups * kWarpgroup + 32,
          bytes_of_block(shared_bytes(config.columns, config.groups, config.split, config.stages), config.alone)};
}

template <typename T, int COLUMNS, Kind KIND>
auto kernel_of(const Config& config) {
  if constexpr (KIND != kRepeats) {
    if (config.groups == 2) return convolution_kernel<T, COLUMNS, 2, false, KIND>;
  }
  return config.split == 1 ? convolution_kernel<T, COLUMNS, 1, false, KIND>
                           : convolution_kernel<T, COLUMNS, 1, true, KIND>;
}

template <typename T, int COLUMNS, Kind KIND>
void launch(const Problem<T>& problem, const Config& config, cudaStream_t stream) {
  const auto kernel = kernel_of<T, COLUMNS, KIND>(config);
  const Grid grid = grid_of(problem, config);
  fm::launch_kernel(kernel, grid.blocks, grid.threads, grid.bytes, config.split, config.early, stream, problem);
}

template <typename T, Kind KIND>
void run(const Problem<T>& problem, const Config& config, cudaStream_t stream) {
  switch (config.columns) {
    case 32: return launch<T, 32, KIND>(problem, config, stream);
    case 64: return launch<T, 64, KIND>(problem, config, stream);
    case 128:
      if constexpr (KIND != kRepeats) return launch<T, 128, KIND>(problem, config, stream);
      [[fallthrough]];
    default: STD_TORCH_CHECK(false, "convolution_native: columns must be 32, 64 or, with scale 1, 128, got ",
                             config.columns);
  }
}

Config make_config(const std::vector<int64_t>& config) {
  STD_TORCH_CHECK(config.size() == 7 && config[5] == 0,
                  "convolution_native: config must hold columns, split, stages, early, groups, once, alone");
  const Config chosen{int(config[0]), int(config[1]), int(config[2]), config[3] != 0, int(config[4]), config[6] != 0};
  check_config(chosen);
  return chosen;
}

template <typename T>
Problem<T> make_problem(const Arguments& arguments, Tensor& out, const Config& config) {
  Problem<T> problem{};
  problem.inputs = make_inputs(arguments, config.columns, config.stages);
  problem.output = make_output<T>(arguments.bias, arguments.residual, out, arguments.relu, arguments.late,
                                  int(arguments.scale));
  problem.split = config.split;
  const int depth = problem.inputs.first.depth + problem.inputs.second.depth;
  STD_TORCH_CHECK(config.split <= depth, "convolution_native: split must be at most the ", depth,
                  " chunks of the depth, got ", config.split);
  return problem;
}

// `x` [N, H, W, C] and `weight` [K, R, S, C]; `bias` float32 [K]; `residual` as the output [N, P, Q, K]; `second`
// [N, H2, W2, C2] under `second_weight` [K, 1, 1, C2] with its own stride is added to the sums. `late`: the residual is
// added behind the ReLU. `scale`: results are repeated so often down and across, [N, P scale, Q scale, K], before the
// residual is added. `config`: columns and split of a tile, stages of the ring, whether to start before the kernel in
// front has ended, groups of 64 rows, whether one copy of the pixels serves all taps, whether a multiprocessor gets one
// block at most.
Tensor convolution(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> residual, std::optional<Tensor> second,
                   std::optional<Tensor> second_weight, int64_t stride, int64_t padding, int64_t second_stride, bool relu,
                   bool late, int64_t scale, std::vector<int64_t> config) {
  const Arguments arguments{x,      weight,  bias,          residual, second, second_weight,
                            stride, padding, second_stride, relu,     late,   scale};
  STD_TORCH_CHECK(x.is_cuda(), "convolution_native: x must be on a CUDA device");
  if (config.size() == 7 && config[5] != 0) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Tensor out = make_out(arguments);
    if (out.numel() > 0) run_near(arguments, out, config, fm::current_stream(x));
    return out;
  }
  const Config chosen = make_config(config);
  STD_TORCH_CHECK(scale >= 1 && scale <= 32 && (scale == 1 || chosen.groups == 1),
                  "convolution_native: scale must be 1 to 32, and 1 with two groups, got ", scale);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = make_out(arguments);
  if (out.numel() == 0) return out;
  const auto call = [&]<typename T>(T*) {
    const auto problem = make_problem<T>(arguments, out, chosen);
    if (scale > 1) run<T, kRepeats>(problem, chosen, fm::current_stream(x));
    else run<T, kOrdinary>(problem, chosen, fm::current_stream(x));
  };
  if (x.scalar_type() == ScalarType::Half) call(static_cast<__half*>(nullptr));
  else call(static_cast<__nv_bfloat16*>(nullptr));
  return out;
}

// The same in float16, and what its blocks note of themselves: int64 [blocks, kStamps], in clocks of the multiprocessor.
std::tuple<Tensor, Tensor> timeline(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> residual,
                                    std::optional<Tensor> second, std::optional<Tensor> second_weight, int64_t stride,
                                    int64_t padding, int64_t second_stride, bool relu, bool late,
                                    std::vector<int64_t> config) {
  const Arguments arguments{x,      weight,  bias,          residual, second, second_weight,
                            stride, padding, second_stride, relu,     late,   1};
  const Config chosen = make_config(config);
  STD_TORCH_CHECK(x.is_cuda() && x.scalar_type() == ScalarType::Half,
                  "convolution_timeline_native: x must be float16 on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = make_out(arguments);
  STD_TORCH_CHECK(out.numel() > 0, "convolution_timeline_native: x must not be empty");
  Problem<__half> problem = make_problem<__half>(arguments, out, chosen);
  const dim3 blocks = grid_of(problem, chosen).blocks;
  Tensor times = torch::stable::new_empty(x, {int64_t(blocks.x) * blocks.y * blocks.z, kStamps}, ScalarType::Long);
  problem.times = static_cast<long long*>(times.mutable_data_ptr());
  run<__half, kTimed>(problem, chosen, fm::current_stream(x));
  return {out, times};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) {
  m.impl("convolution_native", TORCH_BOX(&convolution));
  m.impl("convolution_timeline_native", TORCH_BOX(&timeline));
}
