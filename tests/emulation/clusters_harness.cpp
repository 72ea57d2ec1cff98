// Runs the example of clusters.cuh in the emulator, for test_emulation_clusters.py.
#include "clusters.cuh"

namespace {

using fm_clusters::Mistake;

struct Arguments {
  const float4* in;
  float4* sums;
  float2* next;
  float4* echo;
  int64_t blocks, rows, threads, shared_bytes;
};

template <Mistake MISTAKE>
void run(const Arguments a, const fm_emulation::Options& options) {
  fm_emulation::launch([&] { fm_clusters::exchange_kernel<MISTAKE>(a.in, a.sums, a.next, a.echo); },
                       dim3(static_cast<unsigned>(a.blocks), static_cast<unsigned>(a.rows)),
                       static_cast<unsigned>(a.threads), static_cast<size_t>(a.shared_bytes), options);
}

template <int MISTAKE = 0>
void run_mistake(int64_t mistake, const Arguments& a) {
  if constexpr (MISTAKE > static_cast<int>(Mistake::global_unordered)) {
    throw fm_emulation::Error("there is no such mistake");
  } else if (mistake == MISTAKE) {
    run<static_cast<Mistake>(MISTAKE)>(a, fm_emulation::default_options());
  } else {
    run_mistake<MISTAKE + 1>(mistake, a);
  }
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_exchange(const float4* in, float4* sums, float2* next, float4* echo, int64_t blocks,
                                         int64_t rows, int64_t threads, int64_t shared_bytes, int64_t mistake) {
  return fm_emulation::reported(
      [&] { run_mistake(mistake, {in, sums, next, echo, blocks, rows, threads, shared_bytes}); });
}

// The harness itself asks for clusters of two, whatever the options say.
FM_EMULATION_EXPORT int32_t run_pairs(const float4* in, float4* sums, float2* next, float4* echo, int64_t blocks,
                                      int64_t threads) {
  return fm_emulation::reported([&] {
    run<Mistake::none>({in, sums, next, echo, blocks, 1, threads, 16 * threads}, fm_emulation::with_clusters(2));
  });
}
