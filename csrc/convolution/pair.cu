// convolution_pair_native: a pointwise convolution with shortcut and ReLU, and the pointwise convolution with ReLU that
// follows it, of channels_last images in half precision, on compute capability 9.0. The kernel is in pair.cuh.
#include "operands.h"
#include "pair.cuh"

namespace {

using namespace fm_convolution;

template <typename T, int NARROW>
void launch(const Pair<T>& pair, bool early, cudaStream_t stream) {
  const int bytes = pair_shared_bytes(NARROW, pair.inputs.stages);
  STD_TORCH_CHECK(bytes <= 227 * 1024, "convolution_pair_native: ", pair.inputs.stages, " stages take ", bytes,
                  " bytes of shared memory");
  check_rows(pair.wide.rows, kRows);
  const unsigned rows = (pair.wide.rows + kRows - 1) / kRows;
  fm::launch_kernel(pair_kernel<T, NARROW>, dim3(pair.split, rows), kWarpgroup + 32, bytes, pair.split, early, stream,
                    pair);
}

// `x` [N, P, Q, C], `weight` [K, 1, 1, C], `bias` float32 [K], `residual` [N, P, Q, K], `second` [N, H2, W2, C2] under
// `second_weight` [K, 1, 1, C2] with its stride; `next_weight` [M, 1, 1, K], `next_bias` float32 [M]. K is 256, 512 or
// 1024; M is 64, 128 or 256. `config`: stages of the ring, whether to start before the kernel in front has ended.
// Returns the outputs of both, [N, P, Q, K] and [N, P, Q, M].
std::tuple<Tensor, Tensor> pair(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> residual,
                                std::optional<Tensor> second, std::optional<Tensor> second_weight,
                                int64_t second_stride, Tensor next_weight, Tensor next_bias, std::vector<int64_t> config) {
  STD_TORCH_CHECK(x.is_cuda(), "convolution_pair_native: x must be on a CUDA device");
  STD_TORCH_CHECK(config.size() == 2, "convolution_pair_native: config must hold stages, early");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Arguments arguments{x, weight, bias, residual, second, second_weight, 1, 0, second_stride, true, false, 1};
  Tensor wide = make_out(arguments);
  const int64_t channels = wide.size(3);
  const int split = int(channels / kWide);
  STD_TORCH_CHECK(channels % kWide == 0 && (split == 2 || split == 4 || split == 8),
                  "convolution_pair_native: weight must have 256, 512 or 1024 outputs, got ", channels);
  STD_TORCH_CHECK(weight.size(1) == 1 && weight.size(2) == 1, "convolution_pair_native: weight must be [K, 1, 1, C]");
  check(next_weight, "next_weight", 4, x, x.scalar_type());
  check(next_bias, "next_bias", 1, x, ScalarType::Float);
  const Geometry g = geometry(wide, next_weight, 1, 0, "next_weight");
  STD_TORCH_CHECK(g.taps_down == 1 && g.taps_across == 1, "convolution_pair_native: next_weight must be [M, 1, 1, K]");
  const int64_t narrow = next_weight.size(0);
  STD_TORCH_CHECK(next_bias.size(0) == narrow, "convolution_pair_native: next_bias must be [", narrow, "]");
  Tensor out = torch::stable::new_empty(x, {wide.size(0), wide.size(1), wide.size(2), narrow});
  if (wide.numel() == 0) return {wide, out};
  const auto call = [&]<typename T>(T*) {
    Pair<T> problem{};
    problem.inputs = make_inputs(arguments, kWide, int(config[0]));
    problem.wide = make_output<T>(bias, residual, wide, true);
    problem.narrow = make_output<T>(next_bias, std::nullopt, out, true);
    encode_weights(problem.next, map_type(x), next_weight.const_data_ptr(), g, narrow, int(narrow));
    problem.split = split;
    const auto stream = fm::current_stream(x);
    switch (narrow) {
      case 64: return launch<T, 64>(problem, config[1] != 0, stream);
      case 128: return launch<T, 128>(problem, config[1] != 0, stream);
      case 256: return launch<T, 256>(problem, config[1] != 0, stream);
      default: STD_TORCH_CHECK(false, "convolution_pair_native: next_weight must have 64, 128 or 256 outputs, got ", narrow);
    }
  };
  if (x.scalar_type() == ScalarType::Half) call(static_cast<__half*>(nullptr));
  else call(static_cast<__nv_bfloat16*>(nullptr));
  return {wide, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("convolution_pair_native", TORCH_BOX(&pair)); }
