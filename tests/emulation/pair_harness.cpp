// Runs the kernel of convolution_pair_native in the emulator, for test_convolution_emulated.py.
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

template <typename T>
void run(const Given& given) {
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
