// Runs the kernel of decoder_tail_native in the emulator, for test_decoder_tail_emulated.py.
#include "decoder_tail/problem.h"

namespace {

using namespace fm_tail;

template <typename T>
void run(const Given& given, int64_t blocks) {
  const Problem<T> problem = make_problem<T>(given);
  with_tiles(given.count, [&](auto tiles, auto whole) {
    fm_emulation::launch([&] { tail_kernel<T, tiles(), whole()>(problem); }, dim3(static_cast<unsigned>(blocks)),
                         dim3(kThreads), kSharedBytes);
  });
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_tail(const fm_tail::Given* given, int64_t blocks, int64_t bfloat) {
  return fm_emulation::reported([&] { (bfloat ? run<__nv_bfloat16> : run<__half>)(*given, blocks); });
}
