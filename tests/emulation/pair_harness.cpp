// Runs the kernels of convolution_pair_native in the emulator, for test_convolution_emulated.py.
#include "convolution/many_pair.cuh"
#include "convolution/pair.cuh"
#include "convolution_given.h"

namespace {

using namespace fm_convolution;

// As in pair.cu.
template <typename T, int NARROW>
void launch(const Given& given) {
  Pair<T> problem{};
  problem.inputs = make_inputs(given, kWide);
  problem.wide = make_output<T>(given);
  problem.narrow = {given.next_bias, nullptr, static_cast<T*>(given.next_out), problem.wide.rows, NARROW, true, false, 1};
  const Geometry wide{given.images, problem.inputs.height, problem.inputs.width, given.outputs, 1, 1, 1, 0};
  encode_weights(problem.next, given.type(), given.next_weight, wide, NARROW, NARROW);
  problem.split = static_cast<int>(given.outputs) / kWide;
  fm_emulation::launch([&] { pair_kernel<T, NARROW>(problem); },
                       dim3(problem.split, blocks_for(problem.wide.rows, kRows)), dim3(kWarpgroup + 32),
                       pair_shared_bytes(NARROW, problem.inputs.stages), fm_emulation::with_clusters(problem.split));
}

// As in pair.cu, with two blocks, so that they go through several tiles.
template <typename T, int CHUNKS, int NARROW>
void launch_many(const Given& given) {
  ManyPair<T> pair{};
  pair.inputs = make_inputs(given, kDepth);
  const Geometry g = given.geometry();
  const int64_t rows = g.images * g.out_height() * g.out_width();
  encode_rows(pair.wide, given.type(), given.out, rows, given.outputs);
  encode_rows(pair.narrow, given.type(), given.next_out, rows, given.next_outputs);
  pair.adds = given.residual != nullptr;
  if (pair.adds) encode_rows(pair.residual, given.type(), given.residual, rows, given.outputs);
  encode_weights(pair.next, given.type(), given.next_weight, {1, 1, 1, given.outputs, 1, 1, 1, 0}, NARROW, NARROW);
  pair.bias = given.bias, pair.next_bias = given.next_bias;
  pair.tiles = static_cast<int>(blocks_for(rows, kManyRows)), pair.parts = static_cast<int>(given.outputs) / kDepth;
  pair.buffers = static_cast<int>(given.stages);
  const auto kernel = pair.adds ? many_pair_kernel<T, CHUNKS, NARROW, true> : many_pair_kernel<T, CHUNKS, NARROW, false>;
  fm_emulation::launch([&] { kernel(pair); }, dim3(std::min(2, pair.tiles)), dim3(kManyThreads),
                       many_pair_shared_bytes(CHUNKS, NARROW, pair.buffers));
}

// Two groups are those of the kernel for many positions.
template <typename T>
void run(const Given& given) {
  if (given.groups == kManyGroups) {
    const int64_t chunks = (given.channels + given.second_channels) / kDepth;
    if (chunks == 2 && given.next_outputs == 128) return launch_many<T, 2, 128>(given);
    if (chunks == 4 && given.next_outputs == 256) return launch_many<T, 4, 256>(given);
    throw fm_emulation::Error("there is no such kernel here");
  }
  switch (given.next_outputs) {
    case 64: return launch<T, 64>(given);
    case 128: return launch<T, 128>(given);
    case 256: return launch<T, 256>(given);
  }
  throw fm_emulation::Error("there is no such kernel here");
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_pair(const fm_convolution::Given* given) {
  return fm_emulation::reported([&] { (given->bfloat ? run<__nv_bfloat16> : run<__half>)(*given); });
}
