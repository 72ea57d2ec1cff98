// Runs the small kernels of checks.cuh in the emulator, for test_emulation.py.
#include "checks.cuh"

namespace {

using fm_checks::Mistake;

template <Mistake MISTAKE>
void run(const float* in, float* out, int64_t threads, int64_t blocks, int64_t shared_bytes) {
  fm_emulation::launch([&] { fm_checks::neighbours_kernel<MISTAKE>(in, out, 0); }, static_cast<unsigned>(blocks),
                       static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes));
}

template <int MISTAKE = 0>
void run_mistake(int64_t mistake, const auto&... arguments) {
  if constexpr (MISTAKE > static_cast<int>(Mistake::shuffle_of_nobody)) {
    throw fm_emulation::Error("there is no such mistake");
  } else if (mistake == MISTAKE) {
    run<static_cast<Mistake>(MISTAKE)>(arguments...);
  } else {
    run_mistake<MISTAKE + 1>(mistake, arguments...);
  }
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_instructions(const uint32_t* words, const uint4* matrix, uint32_t* out) {
  return fm_emulation::reported([&] {
    fm_emulation::launch([&] { fm_checks::instructions_kernel(words, matrix, out); }, 1, 32, 512);
  });
}

FM_EMULATION_EXPORT int32_t run_neighbours(const float* in, float* out, int64_t threads, int64_t blocks,
                                           int64_t shared_bytes, int64_t mistake) {
  return fm_emulation::reported([&] { run_mistake(mistake, in, out, threads, blocks, shared_bytes); });
}
