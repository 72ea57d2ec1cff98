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
};

#ifdef FM_TIMELINE
long long* timeline = nullptr;
int64_t timeline_numbers = 0;  // of a launch
#endif

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

template <typename T, int COLUMNS>
void launch(const Problem<T>& problem, const Config& config, cudaStream_t stream) {
  const int per_block = config.groups * kRows;
  const unsigned rows = (problem.output.rows + per_block - 1) / per_block;
  const unsigned columns = (problem.output.channels + COLUMNS - 1) / COLUMNS;
  const auto kernel = config.groups == 2  ? convolution_kernel<T, COLUMNS, 2, false>
                      : config.split == 1 ? convolution_kernel<T, COLUMNS, 1, false>
                                          : convolution_kernel<T, COLUMNS, 1, true>;
  const int bytes = shared_bytes(COLUMNS, config.groups, config.split, config.stages);
  fm::launch_kernel(kernel, dim3(config.split, rows, columns), config.groups * kWarpgroup + 32, bytes,
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
// split of a tile, stages of the ring, whether to start before the kernel in front has ended, groups of 64 rows.
Tensor convolution(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> residual, std::optional<Tensor> second,
                   std::optional<Tensor> second_weight, int64_t stride, int64_t padding, int64_t second_stride, bool relu,
                   std::vector<int64_t> config) {
  const Arguments arguments{x, weight, bias, residual, second, second_weight, stride, padding, second_stride, relu};
  STD_TORCH_CHECK(config.size() == 5, "convolution_native: config must hold columns, split, stages, early, groups");
  const Config chosen{int(config[0]), int(config[1]), int(config[2]), config[3] != 0, int(config[4])};
  check_config(chosen);
  STD_TORCH_CHECK(x.is_cuda(), "convolution_native: x must be on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = make_out(arguments);
  if (out.numel() == 0) return out;
  const auto call = [&]<typename T>(T*) {
    Problem<T> problem{};
    problem.inputs = make_inputs(arguments, out, chosen.columns, chosen.stages);
    problem.output = make_output<T>(bias, residual, out, relu);
    problem.split = chosen.split;
    const int depth = problem.inputs.first.depth + problem.inputs.second.depth;
    STD_TORCH_CHECK(chosen.split <= depth, "convolution_native: split must be at most the ", depth,
                    " chunks of the depth, got ", chosen.split);
#ifdef FM_TIMELINE
    problem.times = timeline;
    if (timeline != nullptr) timeline += timeline_numbers;
#endif
    run(problem, chosen, fm::current_stream(x));
  };
  if (x.scalar_type() == ScalarType::Half) call(static_cast<__half*>(nullptr));
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
