// Runs the upsampling kernels in the emulator, through the same choice of kernel and grid as the op takes.
#include "upsampling/launch.h"

// What the op would do; `packs`: of a block of the points kernel. The fields are those of upsampling.py.
struct Choice {
  int64_t kernel, batch_tile, cut, packs;
};

namespace {

// Only notes what would be launched where there is a `choice`.
struct EmulatedLaunch {
  Choice* choice;

  template <auto KERNEL, typename T, typename Layout>
  void operator()(const fm_upsampling::Problem<T>& problem, const Layout& layout, uint32_t blocks, uint32_t batch_tiles,
                  int threads, uint32_t shared_bytes, bool) const {
    if (choice) {
      if constexpr (std::is_same_v<Layout, fm_upsampling::Points>) choice->packs = layout.packs;
      return;
    }
    fm_emulation::launch([&] { KERNEL(problem, layout); }, dim3(blocks, batch_tiles), dim3(threads), shared_bytes);
  }
};

}  // namespace

// Of x: batch, tokens, channels and their strides; of the matrix; of the plan (kernel -1: as the op chooses); of the
// device. The fields are those of upsampling.py.
struct Arguments {
  int64_t batch, tokens, channels, batch_stride, token_stride, channel_stride;
  int64_t rows, entries, three_each, dtype;
  int64_t kernel, batch_tile, threads, multiprocessors, shared_limit, cuts;
};

template <typename T>
void run(const Arguments& a, const void* x, void* out, const int32_t* row_offsets, const int32_t* columns,
         const float* values, const uint32_t* point_tables, const fm_upsampling::Cut* cut_list,
         Choice* choice) {
  const fm_upsampling::Problem<T> problem{static_cast<const T*>(x), static_cast<T*>(out), row_offsets, columns, values,
                                          a.batch, a.tokens, a.rows, a.channels, a.batch_stride, a.token_stride,
                                          a.channel_stride};
  const fm_upsampling::Device device{static_cast<int>(a.multiprocessors), static_cast<int>(a.shared_limit), true};
  const fm_upsampling::Plan given{static_cast<fm_upsampling::Kernel>(a.kernel), static_cast<int>(a.batch_tile),
                                  static_cast<int>(a.threads), true};
  const bool three_each = a.three_each != 0;
  const fm_upsampling::Cuts cuts{point_tables, {cut_list, static_cast<size_t>(a.cuts)}};
  const fm_upsampling::Plan plan = a.kernel < 0 ? fm_upsampling::choose_plan(problem, three_each, cuts, device) : given;
  if (choice) *choice = {static_cast<int64_t>(plan.kernel), plan.batch_tile, plan.cut, 0};
  const EmulatedLaunch launch{choice};
  fm_upsampling::Launcher(problem, a.entries, three_each, cuts, plan, device, launch).run();
}

FM_EMULATION_EXPORT int32_t run_upsampling(const Arguments* a, const void* x, void* out, const int32_t* row_offsets,
                                           const int32_t* columns, const float* values, const uint32_t* point_tables,
                                           const fm_upsampling::Cut* cuts, Choice* choice) {
  return fm_emulation::reported([&] {
    const auto run_as = [&]<typename T>(T*) { run<T>(*a, x, out, row_offsets, columns, values, point_tables, cuts, choice); };
    switch (a->dtype) {
      case 0: return run_as(static_cast<float*>(nullptr));
      case 1: return run_as(static_cast<__half*>(nullptr));
      default: return run_as(static_cast<__nv_bfloat16*>(nullptr));
    }
  });
}
