// 3 x 3 convolutions of convolution_native with one copy of the pixels for all taps. The kernel is in near.cuh.
#include "near.cuh"
#include "operands.h"

namespace {

using namespace fm_convolution;

template <typename T, int COLUMNS>
void launch(const Near<T>& near, int64_t images, bool early, bool alone, cudaStream_t stream) {
  const int bytes = bytes_of_block(near_shared_bytes(COLUMNS, near.box_bytes, near.split, near.stages), alone);
  STD_TORCH_CHECK(bytes <= 227 * 1024, "convolution_native: ", near.stages, " stages take ", bytes,
                  " bytes of shared memory");
  const auto kernel = near.split > 1 ? near_kernel<T, COLUMNS, true> : near_kernel<T, COLUMNS, false>;
  const unsigned columns = (near.output.channels + COLUMNS - 1) / COLUMNS;
  fm::launch_kernel(kernel, dim3(near.split, unsigned(images * near.tiles), columns), kWarpgroup + 32, bytes, near.split,
                    early, stream, near);
}

}  // namespace

namespace fm_convolution {

void run_near(const Arguments& arguments, Tensor& out, const std::vector<int64_t>& config, cudaStream_t stream) {
  const auto& [x, weight, bias, residual, second, second_weight, stride, padding, second_stride, relu, late, scale] =
      arguments;
  const Geometry g = geometry(x, weight, stride, padding, "weight");
  STD_TORCH_CHECK(g.taps_down == 3 && g.taps_across == 3 && stride == 1 && padding == 1 && scale == 1 && !second.has_value(),
                  "convolution_native: once needs a 3 x 3 convolution of stride 1 and padding 1 alone");
  const int pitch = int(g.width) + 1, rows = near_box_rows(int(g.height), pitch);
  STD_TORCH_CHECK(pitch <= 256 && rows <= 256, "convolution_native: images of up to 255 columns");
  const auto call = [&]<typename T>(T*) {
    Near<T> problem{};
    encode_box(problem.pixels, map_type(x), x.const_data_ptr(), g, pitch, rows);
    encode_weights(problem.weights, map_type(x), weight.const_data_ptr(), g, weight.size(0), int(config[0]));
    problem.output = make_output<T>(bias, residual, out, relu, late);
    problem.height = int(g.height), problem.width = int(g.width);
    problem.tiles = (problem.height * pitch + kRows - 1) / kRows;
    problem.box_bytes = rows * pitch * kDepth * 2;
    problem.chunks = int((g.channels + kDepth - 1) / kDepth);
    problem.split = int(config[1]), problem.stages = int(config[2]);
    STD_TORCH_CHECK((problem.split == 1 || problem.split == 2 || problem.split == 4 || problem.split == 8) &&
                        problem.split <= problem.chunks && problem.stages >= 1 && problem.stages <= kMaxStages,
                    "convolution_native: split must be 1, 2, 4 or 8 and at most the ", problem.chunks,
                    " chunks of channels, stages 1 to 16, got ", problem.split, " and ", problem.stages);
    // The chunk behind it sets a stage free, so a block waits for ever that has one stage and several chunks.
    STD_TORCH_CHECK(problem.stages > 1 || problem.chunks <= problem.split,
                    "convolution_native: one stage needs a block for each of the ", problem.chunks, " chunks of channels");
    switch (config[0]) {
      case 32: return launch<T, 32>(problem, g.images, config[3] != 0, config[6] != 0, stream);
      case 64: return launch<T, 64>(problem, g.images, config[3] != 0, config[6] != 0, stream);
      default: STD_TORCH_CHECK(false, "convolution_native: columns must be 32 or 64, got ", config[0]);
    }
  };
  if (x.scalar_type() == ScalarType::Half) call(static_cast<__half*>(nullptr));
  else call(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace fm_convolution
