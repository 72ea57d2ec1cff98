// Runs the example of bulk_example.cuh in the emulator, for test_emulation_bulk.py.
#include "bulk_example.cuh"

namespace {

using fm_bulk::Mistake;

template <int MISTAKE = 0>
void run_mistake(int64_t mistake, const float* in, float* out, int rounds, int64_t threads) {
  if constexpr (MISTAKE > static_cast<int>(Mistake::refills_too_early)) {
    throw fm_emulation::Error("there is no such mistake");
  } else if (mistake == MISTAKE) {
    fm_emulation::launch([&] { fm_bulk::double_kernel<static_cast<Mistake>(MISTAKE)>(in, out, rounds); }, 1,
                         static_cast<unsigned>(threads), static_cast<size_t>(16 + 48 * threads));
  } else {
    run_mistake<MISTAKE + 1>(mistake, in, out, rounds, threads);
  }
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_double(const float* in, float* out, int64_t rounds, int64_t threads, int64_t mistake) {
  return fm_emulation::reported([&] { run_mistake(mistake, in, out, static_cast<int>(rounds), threads); });
}
