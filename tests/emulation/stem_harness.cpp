// Runs the kernel of a ResNet's stem in the emulator, for test_convolution_stem.py.
#include <algorithm>

#include "convolution/stem.cuh"

namespace {

template <typename T>
void run(const void* x, const void* weight, const float* bias, void* out, int64_t images, int64_t height, int64_t width,
         int64_t tile_height, int64_t tile_width, int64_t most_blocks) {
  const bool known = fm_stem::choose_tile(tile_height, tile_width, [&]<typename Cut>(Cut) {
    const auto problem = fm_stem::make_problem<Cut>(static_cast<const T*>(x), static_cast<const T*>(weight), bias,
                                                    static_cast<T*>(out), static_cast<int>(images),
                                                    static_cast<int>(height), static_cast<int>(width));
    const int blocks = std::min(problem.tiles, static_cast<int>(most_blocks));
    fm_emulation::launch([&] { fm_stem::stem_kernel<T, Cut>(problem); }, dim3(blocks), dim3(Cut::kThreads),
                         Cut::kSharedBytes);
  });
  if (!known) throw fm_emulation::Error("there is no such tile");
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_stem(const void* x, const void* weight, const float* bias, void* out, int64_t images,
                                     int64_t height, int64_t width, int64_t tile_height, int64_t tile_width,
                                     int64_t most_blocks, int64_t bfloat) {
  return fm_emulation::reported([&] {
    const auto call = bfloat ? run<__nv_bfloat16> : run<__half>;
    call(x, weight, bias, out, images, height, width, tile_height, tile_width, most_blocks);
  });
}
