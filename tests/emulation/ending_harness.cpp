// Runs the kernel of a residual block's end in the emulator, for test_convolution_ending_emulated.py.
#include <algorithm>

#include "convolution/ending.cuh"
#include "convolution/tensor_maps.h"

namespace {

using namespace fm_convolution;

struct Given {
  void *x, *weight, *last_weight, *residual, *second, *second_weight, *next_weight, *wide, *narrow;
  const float *bias, *last_bias, *next_bias;
  int64_t images, height, width;
};

// As in ending.cu.
EndingProblem make_problem(const Given& given, Ending ending, CUtensorMapDataType type) {
  const auto of = [&](int64_t channels) { return Geometry{given.images, given.height, given.width, channels, 1, 1, 1, 0}; };
  const int64_t wide = kParts * kDepth, outputs = ending == kResidualTwice ? 2 * kDepth : kDepth;
  const Geometry g{given.images, given.height, given.width, kDepth, 3, 3, 1, 1};
  EndingProblem p{};
  encode_box(p.pixels, type, given.x, g, kHalo, kHalo);
  encode_weights(p.weights, type, given.weight, g, kDepth, kDepth);
  encode_weights(p.last_weights, type, given.last_weight, of(kDepth), wide, kDepth);
  encode_box(p.wide, type, given.wide, of(wide), kSide, kSide);
  if (ending == kSecondNext) {
    encode_box(p.shortcut, type, given.second, of(kDepth), kSide, kSide);
    encode_weights(p.second_weights, type, given.second_weight, of(kDepth), wide, kDepth);
  } else {
    encode_box(p.shortcut, type, given.residual, of(wide), kSide, kSide);
  }
  if (ending != kResidual) {
    encode_weights(p.next_weights, type, given.next_weight, of(wide), outputs, kDepth);
    encode_box(p.narrow, type, given.narrow, of(outputs), kSide, kSide);
  }
  p.bias = given.bias, p.last_bias = given.last_bias, p.next_bias = given.next_bias, p.residual = given.residual;
  p.height = static_cast<int>(given.height), p.width = static_cast<int>(given.width);
  p.down = (p.height + kSide - 1) / kSide, p.across = (p.width + kSide - 1) / kSide;
  p.tiles = static_cast<int>(given.images) * p.down * p.across;
  return p;
}

template <typename T, Ending ENDING>
void run(const Given& given, int64_t most_blocks) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  const EndingProblem problem =
      make_problem(given, ENDING, kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
  const int blocks = std::min(problem.tiles, static_cast<int>(most_blocks));
  fm_emulation::launch([&] { ending_kernel<T, ENDING>(problem); }, dim3(blocks), dim3(kEndingGroups * kWarpgroup),
                       ending_shared_bytes(ENDING));
}

template <typename T>
void run(Ending ending, const Given& given, int64_t most_blocks) {
  switch (ending) {
    case kResidual: return run<T, kResidual>(given, most_blocks);
    case kResidualNext: return run<T, kResidualNext>(given, most_blocks);
    case kResidualTwice: return run<T, kResidualTwice>(given, most_blocks);
    case kSecondNext: return run<T, kSecondNext>(given, most_blocks);
  }
  throw fm_emulation::Error("there is no such end");
}

}  // namespace

// Tensors as of convolution_ending_native, and its results; `ending`: an Ending.
FM_EMULATION_EXPORT int32_t run_ending(void* x, void* weight, const float* bias, void* last_weight,
                                       const float* last_bias, void* residual, void* second, void* second_weight,
                                       void* next_weight, const float* next_bias, void* wide, void* narrow,
                                       int64_t images, int64_t height, int64_t width, int64_t ending,
                                       int64_t most_blocks, int64_t bfloat) {
  return fm_emulation::reported([&] {
    const Given given{x,    weight, last_weight, residual,  second,    second_weight, next_weight, wide,
                      narrow, bias,   last_bias,   next_bias, images, height,        width};
    (bfloat ? run<__nv_bfloat16> : run<__half>)(static_cast<Ending>(ending), given, most_blocks);
  });
}
