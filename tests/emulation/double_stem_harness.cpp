// Runs the kernel of an HRNet's stem in the emulator, for test_convolution_double_stem.py.
#include <algorithm>

#include "convolution/double_stem.cuh"

namespace {

template <typename T>
void run(const void* x, const void* first, const float* first_bias, const void* second, const float* second_bias, void* out,
         int64_t images, int64_t height, int64_t width, int64_t tile_height, int64_t most_blocks) {
  const bool known = fm_double_stem::choose_tile(tile_height, [&]<typename Cut>(Cut) {
    fm_double_stem::Problem<T> problem{
        fm_stem::make_images(static_cast<const T*>(x), static_cast<int>(height), static_cast<int>(width)),
        static_cast<const T*>(first), static_cast<const T*>(second), first_bias, second_bias, static_cast<T*>(out)};
    fm_double_stem::measure<Cut>(problem, static_cast<int>(images));
    const int blocks = std::min(problem.tiles, static_cast<int>(most_blocks));
    fm_emulation::launch([&] { fm_double_stem::double_stem_kernel<T, Cut>(problem); }, dim3(blocks), dim3(Cut::kThreads),
                         Cut::kSharedBytes);
  });
  if (!known) throw fm_emulation::Error("there is no such tile");
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_double_stem(const void* x, const void* first, const float* first_bias, const void* second,
                                            const float* second_bias, void* out, int64_t images, int64_t height,
                                            int64_t width, int64_t tile_height, int64_t most_blocks, int64_t bfloat) {
  return fm_emulation::reported([&] {
    const auto call = bfloat ? run<__nv_bfloat16> : run<__half>;
    call(x, first, first_bias, second, second_bias, out, images, height, width, tile_height, most_blocks);
  });
}
