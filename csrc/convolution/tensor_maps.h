// Descriptions of tensors for the copy engine. The driver's functions that encode them are asked for at run time, so
// that nothing has to be linked.
#pragma once

#include <cuda.h>

#ifdef FM_EMULATED
#include "tensor_maps_emulation.h"
#else
#include "common/cuda.h"
#endif
#include "tile.cuh"

namespace fm_convolution {

static_assert(sizeof(fm::TensorMap) == sizeof(CUtensorMap) && alignof(fm::TensorMap) >= alignof(CUtensorMap));

// A kernel's geometry over an input of channels_last images.
struct Geometry {
  int64_t images, height, width, channels;
  int64_t taps_down, taps_across, stride, padding;

  int64_t out_height() const { return (height + 2 * padding - taps_down) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - taps_across) / stride + 1; }
};

#ifndef FM_EMULATED
template <typename Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
  STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess, "convolution: the driver has no ", name);
  return reinterpret_cast<Function>(found);
}
#endif

inline CUtensorMap& opaque(fm::TensorMap& map) { return reinterpret_cast<CUtensorMap&>(map); }

// Boxes of 64 channels of kRows consecutive output positions.
inline void encode_pixels(fm::TensorMap& map, CUtensorMapDataType type, const void* data, const Geometry& g) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const cuuint64_t sizes[4] = {cuuint64_t(g.channels), cuuint64_t(g.width), cuuint64_t(g.height), cuuint64_t(g.images)};
  const cuuint64_t row = 2 * g.channels;
  const cuuint64_t strides[3] = {row, row * g.width, row * g.width * g.height};
  const int low[2] = {-int(g.padding), -int(g.padding)};
  const int high[2] = {int(g.padding - (g.taps_across - 1)), int(g.padding - (g.taps_down - 1))};
  const cuuint32_t steps[4] = {1, cuuint32_t(g.stride), cuuint32_t(g.stride), 1};
  const CUresult result = encode(&opaque(map), type, 4, const_cast<void*>(data), sizes, strides, low, high, kDepth, kRows,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "convolution: the input cannot be described to the copy engine, error ", result);
}

// Boxes of 64 input channels of one tap of `columns` output channels of weights [outputs, taps, channels].
inline void encode_weights(fm::TensorMap& map, CUtensorMapDataType type, const void* data, const Geometry& g,
                           int64_t outputs, int columns) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const int64_t taps = g.taps_down * g.taps_across;
  const cuuint64_t sizes[3] = {cuuint64_t(g.channels), cuuint64_t(taps), cuuint64_t(outputs)};
  const cuuint64_t strides[2] = {cuuint64_t(2 * g.channels), cuuint64_t(2 * g.channels * taps)};
  const cuuint32_t box[3] = {kDepth, 1, cuuint32_t(columns)}, steps[3] = {1, 1, 1};
  const CUresult result = encode(&opaque(map), type, 3, const_cast<void*>(data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "convolution: the weights cannot be described to the copy engine, error ",
                  result);
}

// Boxes of 64 channels, some columns and rows of an image.
inline void encode_box(fm::TensorMap& map, CUtensorMapDataType type, const void* data, const Geometry& g, int columns,
                       int rows) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const cuuint64_t sizes[4] = {cuuint64_t(g.channels), cuuint64_t(g.width), cuuint64_t(g.height), cuuint64_t(g.images)};
  const cuuint64_t row = 2 * g.channels;
  const cuuint64_t strides[3] = {row, row * g.width, row * g.width * g.height};
  const cuuint32_t box[4] = {kDepth, cuuint32_t(columns), cuuint32_t(rows), 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(&opaque(map), type, 4, const_cast<void*>(data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "convolution: images cannot be described to the copy engine, error ", result);
}

inline Input make_input(CUtensorMapDataType type, const void* pixels, const void* weights, const Geometry& g,
                        int64_t outputs, int columns) {
  Input input{};
  encode_pixels(input.pixels, type, pixels, g);
  encode_weights(input.weights, type, weights, g, outputs, columns);
  input.across = Divisor::of(uint32_t(g.taps_across));
  input.chunks = Divisor::of(uint32_t((g.channels + kDepth - 1) / kDepth));
  input.depth = int(g.taps_down * g.taps_across * input.chunks.number);
  input.stride = int(g.stride);
  input.left = int(g.padding);
  return input;
}

}  // namespace fm_convolution
