// What the harnesses of convolutions make of tensors as a test gives them: see Given of convolution.py.
#pragma once

#include "convolution/tensor_maps.h"

namespace fm_convolution {

struct Given {
  void *x, *weight, *residual, *second, *second_weight, *out;
  const float* bias;
  void *next_weight, *next_out;  // of a pair
  const float* next_bias;
  int64_t images, height, width, channels, outputs, taps, stride, padding;
  int64_t second_height, second_width, second_channels, second_stride;
  int64_t next_outputs, relu, late, scale;
  int64_t columns, split, stages, groups, bfloat;

  Geometry geometry() const { return {images, height, width, channels, taps, taps, stride, padding}; }
  Geometry second_geometry() const {
    return {images, second_height, second_width, second_channels, 1, 1, second_stride, 0};
  }
  CUtensorMapDataType type() const {
    return bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  }
};

// As in operands.h.
inline Inputs make_inputs(const Given& given, int columns) {
  const Geometry g = given.geometry();
  Inputs inputs{};
  inputs.first = make_input(given.type(), given.x, given.weight, g, given.outputs, columns);
  if (given.second) {
    inputs.second =
        make_input(given.type(), given.second, given.second_weight, given.second_geometry(), given.outputs, columns);
  }
  inputs.height = static_cast<int>(g.out_height()), inputs.width = static_cast<int>(g.out_width());
  inputs.stages = static_cast<int>(given.stages);
  return inputs;
}

template <typename T>
Output<T> make_output(const Given& given) {
  const Geometry g = given.geometry();
  Output<T> output{};
  output.bias = given.bias;
  output.residual = static_cast<const T*>(given.residual), output.out = static_cast<T*>(given.out);
  output.rows = static_cast<int>(g.images * g.out_height() * g.out_width());
  output.channels = static_cast<int>(given.outputs), output.scale = static_cast<int>(given.scale);
  output.relu = given.relu != 0, output.late = given.late != 0;
  return output;
}

inline unsigned blocks_for(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

}  // namespace fm_convolution
