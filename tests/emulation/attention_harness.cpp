// Runs the attention kernels in the emulator, for tests/kernels/test_attention_emulated.py. The arguments are laid out
// as in ForwardArguments and BackwardArguments.
#include "attention/backward.cuh"
#include "attention/few_backward.cuh"
#include "attention/forward.cuh"

namespace {

using namespace fm::attention;

template <int DIM, int BYTES>
dim3 blocks(const Plan& plan, const Sizes& sizes) {
  constexpr int kHeads = Layout<DIM, BYTES>::kHeads;
  const unsigned groups = (sizes.heads + kHeads - 1) / kHeads, batch = static_cast<unsigned>(sizes.batch);
  return BYTES == kNarrowBytes ? dim3(groups, batch) : dim3(batch * plan.num_segments * groups);
}

// Where no kernel is to combine the hub rows of several segments, the segments are a cluster.
template <typename Arguments>
fm_emulation::Options options(const Arguments& p) {
  return fm_emulation::with_clusters(p.partials == nullptr && p.sizes.hubs > 0 ? p.plan.num_segments : 1);
}

unsigned combine_blocks(int64_t threads) { return static_cast<unsigned>((threads + 127) / 128); }

template <typename T, int DIM, bool DROPOUT, int BYTES>
void forward(const ForwardArguments p) {  // by value: the emulator knows the stack of its caller
  const int windows = p.plan.windows_per_step;
  fm_emulation::launch([&] { forward_kernel<T, DIM, DROPOUT, BYTES>(p); },
                       blocks<DIM, BYTES>(p.plan, p.sizes),
                       forward_threads<DIM, BYTES>(p.sizes, windows),
                       ForwardShared<DIM, BYTES>(p.plan.slots, windows, DROPOUT).bytes, options(p));
  if (p.partials != nullptr) {
    fm_emulation::launch([&] { combine_forward_kernel<T, DIM>(p); },
                         dim3(combine_blocks(p.sizes.batch * p.sizes.heads * p.sizes.hubs * (DIM / 4))), 128, 0);
  }
}

template <typename T, int DIM, bool DROPOUT, int BYTES>
void backward(const BackwardArguments p) {
  const int windows = p.plan.windows_per_step;
  fm_emulation::launch([&] { backward_kernel<T, DIM, DROPOUT, BYTES>(p); },
                       blocks<DIM, BYTES>(p.plan, p.sizes),
                       backward_threads<DIM, BYTES>(p.sizes, windows),
                       BackwardShared<DIM, BYTES>(p.plan.slots, windows, p.plan.record_bytes, DROPOUT).bytes,
                       options(p));
  if (p.partials != nullptr) {
    fm_emulation::launch([&] { combine_backward_kernel<T, DIM>(p); },
                         dim3(combine_blocks(3 * p.sizes.batch * p.sizes.heads * p.sizes.hubs * (DIM / 4))), 128, 0);
  }
}

// `blocks`: of one batch element and group of heads.
template <int DIM>
dim3 few_grid(const Sizes& sizes, int blocks) {
  const int groups = (sizes.heads + Layout<DIM>::kHeads - 1) / Layout<DIM>::kHeads;
  return dim3(static_cast<unsigned>(sizes.batch * groups * blocks));
}

// The combinations that the tests look at. Bits of `variant`: bfloat16, narrow groups of heads.
template <typename Arguments, typename Run>
void select(const Arguments& p, int64_t variant, Run run) {
  const int dim = p.sizes.dim;
  const bool dropout = p.dropout.seed != nullptr, narrow = variant & 2;
  const auto grouped = [&]<int DIM, int BYTES>() {
    if (variant & 1) return run.template operator()<__nv_bfloat16, DIM, false, BYTES>(p);
    if (dropout) return run.template operator()<__half, DIM, true, BYTES>(p);
    run.template operator()<__half, DIM, false, BYTES>(p);
  };
  const auto sized = [&]<int DIM>() {
    if constexpr (DIM <= kNarrowBytes / 2) {
      if (narrow) return grouped.template operator()<DIM, kNarrowBytes>();
    }
    grouped.template operator()<DIM, kGroupBytes<DIM>>();
  };
  if (dim <= 16) return sized.template operator()<16>();
  if (dim <= 32) return sized.template operator()<32>();
  if (dim <= 64) return sized.template operator()<64>();
  sized.template operator()<128>();
}

}  // namespace

FM_EMULATION_EXPORT int32_t attention_forward(const ForwardArguments* p, int64_t variant) {
  return fm_emulation::reported([&] {
    select(*p, variant, []<typename T, int DIM, bool DROPOUT, int BYTES>(const ForwardArguments& arguments) {
      forward<T, DIM, DROPOUT, BYTES>(arguments);
    });
  });
}

FM_EMULATION_EXPORT int32_t attention_forward_few(const FewForwardArguments* p, int64_t variant) {
  return fm_emulation::reported([&] {
    select(*p, variant, []<typename T, int DIM, bool DROPOUT, int>(const FewForwardArguments arguments) {
      if constexpr (DIM <= 64) {
        fm_emulation::launch([&] { few_forward_kernel<T, DIM, DROPOUT>(arguments); },
                             few_grid<DIM>(arguments.sizes, few_blocks<DIM>(arguments.sizes, arguments.num_pairs)),
                             kFewThreads, kFewBytes<DIM>);
      }
    });
  });
}

FM_EMULATION_EXPORT int32_t attention_backward_few(const FewBackwardArguments* p, int64_t variant) {
  return fm_emulation::reported([&] {
    select(*p, variant, []<typename T, int DIM, bool DROPOUT, int>(const FewBackwardArguments arguments) {
      if constexpr (DIM <= 64) {
        const int blocks = few_blocks<DIM>(arguments.sizes, arguments.num_pairs, 2);
        fm_emulation::launch([&] { few_backward_kernel<T, DIM, DROPOUT>(arguments); },
                             few_grid<DIM>(arguments.sizes, blocks), kFewThreads, kFewBackwardBytes<DIM>);
      }
    });
  });
}

FM_EMULATION_EXPORT int32_t attention_backward(const BackwardArguments* p, int64_t variant) {
  return fm_emulation::reported([&] {
    select(*p, variant, []<typename T, int DIM, bool DROPOUT, int BYTES>(const BackwardArguments& arguments) {
      backward<T, DIM, DROPOUT, BYTES>(arguments);
    });
  });
}

FM_EMULATION_EXPORT int32_t attention_few_bytes(int32_t dim, int32_t backward) {
  const auto bytes = [&]<int DIM>() { return backward ? kFewBackwardBytes<DIM> : kFewBytes<DIM>; };
  return dim <= 16 ? bytes.operator()<16>() : dim <= 32 ? bytes.operator()<32>() : bytes.operator()<64>();
}

FM_EMULATION_EXPORT float attention_forward_scale(double scale) { return forward_scale(scale); }
