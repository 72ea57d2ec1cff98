// Runs the example kernel in the emulator, for test_emulation.py.
#include "example.cuh"

namespace {

using fm_example::Mistake;

template <typename T, Mistake MISTAKE>
void run(const void* a, const int32_t* rows, const void* b, float* c, float* sums, int m, int n, int k) {
  const fm_example::Params<T> p{static_cast<const T*>(a), rows, static_cast<const T*>(b), c, sums, m, n, k};
  const dim3 grid((n + fm_example::kColumns - 1) / fm_example::kColumns, (m + fm_example::kRows - 1) / fm_example::kRows);
  fm_emulation::launch([&] { fm_example::gathered_product_kernel<T, MISTAKE>(p); }, grid, fm_example::kThreads,
                       fm_example::kSharedBytes);
}

}  // namespace

// `mistake` as in the enum; bfloat16 only without one.
FM_EMULATION_EXPORT int32_t run_example(const void* a, const int32_t* rows, const void* b, float* c, float* sums,
                                        int64_t m, int64_t n, int64_t k, int64_t bfloat, int64_t mistake) {
  return fm_emulation::reported([&] {
    const auto call = [&](auto run) { run(a, rows, b, c, sums, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k)); };
    if (bfloat) return call(run<__nv_bfloat16, Mistake::none>);
    switch (static_cast<Mistake>(mistake)) {
      case Mistake::none: return call(run<__half, Mistake::none>);
      case Mistake::no_wait: return call(run<__half, Mistake::no_wait>);
      case Mistake::no_barrier_before: return call(run<__half, Mistake::no_barrier_before>);
      case Mistake::no_barrier_after: return call(run<__half, Mistake::no_barrier_after>);
      case Mistake::past_shared_memory: return call(run<__half, Mistake::past_shared_memory>);
      case Mistake::lane_leaves: return call(run<__half, Mistake::lane_leaves>);
      case Mistake::lane_returns: return call(run<__half, Mistake::lane_returns>);
      case Mistake::barrier_in_branch: return call(run<__half, Mistake::barrier_in_branch>);
      case Mistake::past_the_input: return call(run<__half, Mistake::past_the_input>);
      case Mistake::writes_twice: return call(run<__half, Mistake::writes_twice>);
      case Mistake::no_swizzle: return call(run<__half, Mistake::no_swizzle>);
    }
    throw fm_emulation::Error("there is no such mistake");
  });
}
