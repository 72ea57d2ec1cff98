// Runs the example kernel in the emulator, for test_emulation.py.
#include "example.cuh"

namespace {

using fm_example::Mistake;

template <typename T, Mistake MISTAKE>
void run(const void* a, const int32_t* rows, const void* b, float* c, float* sums, int64_t m, int64_t n, int64_t k) {
  const fm_example::Params<T> p{static_cast<const T*>(a), rows, static_cast<const T*>(b), c, sums,
                                static_cast<int>(m),      static_cast<int>(n), static_cast<int>(k)};
  const unsigned column_tiles = (p.n + fm_example::kColumns - 1) / fm_example::kColumns;
  const unsigned row_tiles = (p.m + fm_example::kRows - 1) / fm_example::kRows;
  fm_emulation::launch([&] { fm_example::gathered_product_kernel<T, MISTAKE>(p); }, dim3(column_tiles, row_tiles),
                       fm_example::kThreads, fm_example::kSharedBytes);
}

template <int MISTAKE = 0>
void run_mistake(int64_t mistake, const auto&... arguments) {
  if constexpr (MISTAKE > static_cast<int>(Mistake::no_swizzle)) {
    throw fm_emulation::Error("there is no such mistake");
  } else if (mistake == MISTAKE) {
    run<__half, static_cast<Mistake>(MISTAKE)>(arguments...);
  } else {
    run_mistake<MISTAKE + 1>(mistake, arguments...);
  }
}

}  // namespace

// `mistake` counts as in the enum; bfloat16 only without one.
FM_EMULATION_EXPORT int32_t run_example(const void* a, const int32_t* rows, const void* b, float* c, float* sums,
                                        int64_t m, int64_t n, int64_t k, int64_t bfloat, int64_t mistake) {
  return fm_emulation::reported([&] {
    if (bfloat) return run<__nv_bfloat16, Mistake::none>(a, rows, b, c, sums, m, n, k);
    run_mistake(mistake, a, rows, b, c, sums, m, n, k);
  });
}
