// Runs the kernel of convolution_native in the emulator, for test_convolution_emulated.py.
#include "convolution/forward.cuh"
#include "convolution_given.h"

namespace {

using namespace fm_convolution;

template <typename T, int COLUMNS, int GROUPS, bool SHARED, Kind KIND>
void launch(const Given& given) {
  Problem<T> problem{};
  problem.inputs = make_inputs(given, COLUMNS);
  problem.output = make_output<T>(given);
  problem.split = static_cast<int>(given.split);
  const dim3 blocks(given.split, blocks_for(problem.output.rows, GROUPS * kRows), blocks_for(given.outputs, COLUMNS));
  fm_emulation::launch([&] { convolution_kernel<T, COLUMNS, GROUPS, SHARED, KIND>(problem); }, blocks,
                       dim3(GROUPS * kWarpgroup + 32), shared_bytes(COLUMNS, GROUPS, problem.split, problem.inputs.stages),
                       fm_emulation::with_clusters(problem.split));
}

// Some of the kernels that the op has.
template <typename T>
void run(const Given& given) {
  const auto is = [&](int64_t columns, int64_t groups, bool shared, bool repeats) {
    return given.columns == columns && given.groups == groups && (given.split > 1) == shared &&
           (given.scale > 1) == repeats;
  };
  if (is(32, 1, true, false)) return launch<T, 32, 1, true, kOrdinary>(given);
  if (is(64, 1, false, false)) return launch<T, 64, 1, false, kOrdinary>(given);
  if (is(64, 1, true, false)) return launch<T, 64, 1, true, kOrdinary>(given);
  if (is(128, 2, false, false)) return launch<T, 128, 2, false, kOrdinary>(given);
  if (is(32, 1, true, true)) return launch<T, 32, 1, true, kRepeats>(given);
  if (is(64, 1, false, true)) return launch<T, 64, 1, false, kRepeats>(given);
  if (is(64, 1, true, true)) return launch<T, 64, 1, true, kRepeats>(given);
  throw fm_emulation::Error("there is no such kernel here");
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_convolution(const fm_convolution::Given* given) {
  return fm_emulation::reported([&] { (given->bfloat ? run<__nv_bfloat16> : run<__half>)(*given); });
}
