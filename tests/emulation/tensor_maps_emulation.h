// Descriptions of tensors for the emulated copy engine, in place of the driver's: the side of harnesses, which describe
// them with the functions of csrc/convolution/tensor_maps.h.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "emulator.h"

#define STD_TORCH_CHECK(condition, what, ...) \
  if (!(condition)) throw fm_emulation::Error(what)

namespace fm_emulation {

// What a TensorMap holds. 16-bit numbers; the first dimension is that of the channels.
struct Description {
  static constexpr uint64_t kMagic = 0x666d74656e736f72;
  uint64_t magic;
  unsigned char* data;
  int32_t dimensions, im2col;
  uint32_t sizes[4];
  uint64_t strides[3];     // bytes, of all dimensions but the first
  int32_t box[4];          // im2col: channels and positions
  int32_t low[2], high[2]; // corners of the positions across and down
  int32_t steps[2];        // from one position to the next
};
static_assert(sizeof(Description) <= sizeof(CUtensorMap));

// What both kinds have in common, as far as the driver checks it for our tensors.
inline bool describe(Description& d, cuuint32_t dimensions, void* data, const cuuint64_t* sizes,
                     const cuuint64_t* strides, CUtensorMapSwizzle swizzle, CUtensorMapInterleave interleave,
                     CUtensorMapFloatOOBfill fill) {
  d = {Description::kMagic, static_cast<unsigned char*>(data), static_cast<int32_t>(dimensions)};
  bool good = dimensions >= 3 && dimensions <= 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
              swizzle == CU_TENSOR_MAP_SWIZZLE_128B && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  for (cuuint32_t i = 0; good && i < dimensions; ++i) {
    good = sizes[i] >= 1 && sizes[i] <= cuuint64_t{1} << 32 && (i == 0 || strides[i - 1] % 16 == 0);
    d.sizes[i] = static_cast<uint32_t>(sizes[i]);
    if (i > 0) d.strides[i - 1] = strides[i - 1];
  }
  return good;
}

inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t dimensions, void* data,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  Description d;
  if (!describe(d, dimensions, data, sizes, strides, swizzle, interleave, fill) || box[0] * 2 != 128) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (cuuint32_t i = 0; i < dimensions; ++i) {
    if (box[i] < 1 || box[i] > 256 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    d.box[i] = static_cast<int32_t>(box[i]);
  }
  std::memcpy(map, &d, sizeof d);
  return CUDA_SUCCESS;
}

inline CUresult encode_im2col(CUtensorMap* map, CUtensorMapDataType, cuuint32_t dimensions, void* data,
                              const cuuint64_t* sizes, const cuuint64_t* strides, const int* low, const int* high,
                              cuuint32_t channels, cuuint32_t positions, const cuuint32_t* steps,
                              CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                              CUtensorMapFloatOOBfill fill) {
  Description d;
  if (!describe(d, dimensions, data, sizes, strides, swizzle, interleave, fill) || dimensions != 4 ||
      channels * 2 != 128 || positions < 1 || positions > 1024 || steps[0] != 1 || steps[3] != 1) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  d.im2col = 1, d.box[0] = static_cast<int32_t>(channels), d.box[1] = static_cast<int32_t>(positions);
  for (int i = 0; i < 2; ++i) {
    const bool good = low[i] >= -128 && low[i] <= 127 && high[i] >= -128 && high[i] <= 127 && steps[i + 1] >= 1 &&
                      steps[i + 1] <= 8;
    if (!good) return CUDA_ERROR_INVALID_VALUE;
    d.low[i] = low[i], d.high[i] = high[i], d.steps[i] = static_cast<int32_t>(steps[i + 1]);
  }
  std::memcpy(map, &d, sizeof d);
  return CUDA_SUCCESS;
}

}  // namespace fm_emulation

namespace fm_convolution {

// The emulated one of the driver's functions, by its type.
template <typename Function>
Function driver_function(const char*) {
  if constexpr (std::is_same_v<Function, decltype(&cuTensorMapEncodeTiled)>) return &fm_emulation::encode_tiled;
  else return &fm_emulation::encode_im2col;
}

}  // namespace fm_convolution
