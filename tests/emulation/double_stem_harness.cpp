// Runs the kernel of an HRNet's stem in the emulator, for test_convolution_double_stem.py.
#include <algorithm>

#include "convolution/double_stem.cuh"
#include "stem_sources.cuh"

namespace {

template <typename T>
void run(const Given& given, const void* first, const float* first_bias, const void* second, const float* second_bias,
         void* out, int64_t images, int64_t tile_height, int64_t most_blocks) {
  const bool known = fm_double_stem::choose_tile(tile_height, [&]<typename Cut>(Cut) {
    as_source<T>(given, [&]<typename Source>(const Source& source) {
      fm_double_stem::Problem<T, Source> problem{
          source, static_cast<const T*>(first), static_cast<const T*>(second), first_bias, second_bias,
          static_cast<T*>(out)};
      fm_double_stem::measure<Cut>(problem, static_cast<int>(images));
      const int blocks = std::min(problem.tiles, static_cast<int>(most_blocks));
      fm_emulation::launch([&] { fm_double_stem::double_stem_kernel<T, Cut, Source>(problem); }, dim3(blocks),
                           dim3(Cut::kThreads), Cut::kSharedBytes);
    });
  });
  if (!known) throw fm_emulation::Error("there is no such tile");
}

}  // namespace

// `source`: 0 for images of the weights' type, 1 for float32 planes, 2 for bytes.
FM_EMULATION_EXPORT int32_t run_double_stem(const void* x, const float* mean, const float* scale, const void* first,
                                            const float* first_bias, const void* second, const float* second_bias,
                                            void* out, int64_t images, int64_t height, int64_t width,
                                            int64_t tile_height, int64_t most_blocks, int64_t source, int64_t bfloat) {
  return fm_emulation::reported([&] {
    const auto call = bfloat ? run<__nv_bfloat16> : run<__half>;
    const Given given{x, mean, scale, source, static_cast<int>(height), static_cast<int>(width)};
    call(given, first, first_bias, second, second_bias, out, images, tile_height, most_blocks);
  });
}
