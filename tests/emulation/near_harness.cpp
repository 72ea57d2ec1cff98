// Runs the kernel of near.cuh in the emulator, for test_convolution_emulated.py.
#include "convolution/near.cuh"
#include "convolution_given.h"
#include "tiles.h"

namespace {

using namespace fm_convolution;

// As in near.cu.
template <typename T>
Near<T> make_problem(const Given& given) {
  const Geometry g = given.geometry();
  const int pitch = static_cast<int>(g.width) + 1, rows = near_box_rows(static_cast<int>(g.height), pitch);
  Near<T> problem{};
  encode_box(problem.pixels, given.type(), given.x, g, pitch, rows);
  encode_weights(problem.weights, given.type(), given.weight, g, given.outputs, static_cast<int>(given.columns));
  problem.output = make_output<T>(given);
  problem.height = static_cast<int>(g.height), problem.width = static_cast<int>(g.width);
  problem.tiles = static_cast<int>(blocks_for(g.height * pitch, kRows));
  problem.box_bytes = rows * pitch * kDepth * 2;
  problem.chunks = static_cast<int>(blocks_for(g.channels, kDepth));
  problem.split = static_cast<int>(given.split), problem.stages = static_cast<int>(given.stages);
  return problem;
}

template <typename T, int COLUMNS, bool SHARED>
void launch(const Given& given) {
  const Near<T> problem = make_problem<T>(given);
  const dim3 blocks(problem.split, given.images * problem.tiles, blocks_for(given.outputs, COLUMNS));
  fm_emulation::launch([&] { near_kernel<T, COLUMNS, SHARED>(problem); }, blocks, dim3(kWarpgroup + 32),
                       near_shared_bytes(COLUMNS, problem.box_bytes, problem.split, problem.stages),
                       fm_emulation::with_clusters(problem.split));
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_near(const fm_convolution::Given* given) {
  return fm_emulation::run_by_tile(*given, [=]<typename T, int C, bool SHARED> { launch<T, C, SHARED>(*given); });
}
