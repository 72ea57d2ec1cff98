// Runs the kernels of a ResNet's stem in the emulator, for test_convolution_stem.py.
#include <algorithm>

#include "convolution/stem_hopper.cuh"
#include "stem_sources.cuh"

namespace {

template <typename T>
void run(const Given& given, const void* weight, const float* bias, void* out, int64_t images, int64_t tile_height,
         int64_t tile_width, int64_t most_blocks, bool warpgroups, bool pooled) {
  const auto with = [&]<typename Cut, typename Source>(Cut, const Source& source, auto* kernel) {
    const auto problem = fm_stem::make_problem<Cut>(source, static_cast<const T*>(weight), bias, static_cast<T*>(out),
                                                    static_cast<int>(images), pooled);
    const int blocks = std::min(problem.tiles, static_cast<int>(most_blocks));
    fm_emulation::launch([&] { kernel(problem); }, dim3(blocks), dim3(Cut::kBlockThreads), Cut::kSharedBytes);
  };
  as_source<T>(given, [&]<typename Source>(const Source& source) {
    using Groups = fm_stem::GroupTile<7, 8>;
    if (warpgroups) return with(Groups{}, source, fm_stem::stem_groups_kernel<T, Groups, Source>);
    const bool known = fm_stem::choose_tile(tile_height, tile_width, [&]<typename Cut>(Cut cut) {
      with(cut, source, fm_stem::stem_kernel<T, Cut, Source>);
    });
    if (!known) throw fm_emulation::Error("there is no such tile");
  });
}

}  // namespace

// `warpgroups`: the kernel of stem_hopper.cuh, of tiles of 7 x 8. `source`: 0 for images of the weights' type, 1 for float32 planes, 2 for bytes.
FM_EMULATION_EXPORT int32_t run_stem(const void* x, const float* mean, const float* scale, const void* weight,
                                     const float* bias, void* out, int64_t images, int64_t height, int64_t width,
                                     int64_t tile_height, int64_t tile_width, int64_t most_blocks, int64_t warpgroups,
                                     int64_t source, int64_t bfloat, int64_t pooled) {
  return fm_emulation::reported([&] {
    const auto call = bfloat ? run<__nv_bfloat16> : run<__half>;
    const Given given{x, mean, scale, source, static_cast<int>(height), static_cast<int>(width)};
    call(given, weight, bias, out, images, tile_height, tile_width, most_blocks, warpgroups != 0, pooled != 0);
  });
}
