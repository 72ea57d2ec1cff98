// Runs the kernel of fused_linear_native in the emulator, for test_fused_linear_emulated.py.
#include "convolution/tensor_maps.h"
#include "linear/linear.cuh"
#include "tiles.h"

namespace {

using namespace fm_linear;

// See Given of linear.py.
struct Given {
  void *x, *weight, *bias, *residual, *leading, *out;
  const float *moments, *sums;
  float* moments_out;
  int64_t rows, width, features, tokens, parts, leads, relu, columns, split, stages, bfloat;
  double epsilon;
};

// As in linear.cu.
template <typename T>
Problem<T> make_problem(const Given& given) {
  using fm_convolution::Divisor;
  const auto type = given.bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const fm_convolution::Geometry plain{1, 1, 1, given.width, 1, 1, 1, 0};
  Problem<T> problem{};
  fm_convolution::Input& input = problem.inputs.first;
  fm_convolution::encode_weights(input.pixels, type, given.x, plain, given.rows, kRows);
  fm_convolution::encode_weights(input.weights, type, given.weight, plain, given.features, static_cast<int>(given.columns));
  input.across = Divisor::of(1), input.chunks = Divisor::of(static_cast<uint32_t>((given.width + kDepth - 1) / kDepth));
  input.depth = static_cast<int>(input.chunks.number), input.stride = 1;
  problem.inputs.height = problem.inputs.width = 1, problem.inputs.stages = static_cast<int>(given.stages);
  problem.split = static_cast<int>(given.split);
  Around<T>& around = problem.around;
  around.bias = static_cast<const T*>(given.bias), around.tokens = static_cast<int>(given.tokens);
  around.sums = given.sums, around.moments = given.moments, around.parts = static_cast<int>(given.parts);
  around.residual = static_cast<const T*>(given.residual), around.leading = static_cast<const T*>(given.leading);
  around.out = static_cast<T*>(given.out), around.moments_out = given.moments_out;
  around.leads = static_cast<int>(given.leads), around.rows = static_cast<int>(given.rows) + around.leads;
  around.features = static_cast<int>(given.features), around.width = static_cast<float>(given.width);
  around.epsilon = static_cast<float>(given.epsilon), around.relu = given.relu != 0;
  return problem;
}

template <typename T, int COLUMNS, bool SHARED>
void launch(const Given& given) {
  const Problem<T> problem = make_problem<T>(given);
  const unsigned rows = problem.around.rows, features = problem.around.features;
  const dim3 blocks(problem.split, (rows + kRows - 1) / kRows, (features + COLUMNS - 1) / COLUMNS);
  fm_emulation::launch([&] { linear_kernel<T, COLUMNS, SHARED>(problem); }, blocks, dim3(kWarpgroup + 32),
                       shared_bytes(COLUMNS, problem.split, problem.inputs.stages),
                       fm_emulation::with_clusters(problem.split));
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_linear(const Given* given) {
  return fm_emulation::run_by_tile(*given, [=]<typename T, int C, bool SHARED> { launch<T, C, SHARED>(*given); });
}
