// What the host makes of the arguments of a convolution: checks, descriptions for the copy engine, places in memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "tensor_maps.h"

namespace fm_convolution {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_device(int device) {
  STD_TORCH_CHECK(fm::has_warpgroups(device), "convolution_native: needs a device of compute capability 9.0");
}

inline void check(const Tensor& tensor, const char* name, int64_t dimensions, const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, "convolution_native: ", name, " must have ", dimensions, " dimensions, got ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "convolution_native: ", name,
                  " must be on the device of x");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "convolution_native: ", name, " must be ",
                  torch::headeronly::toString(type), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
                  "convolution_native: ", name, " must be contiguous and aligned to 16 bytes");
}

// Of images [N, H, W, C] and weights [outputs, taps down, taps across, C].
inline Geometry geometry(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, const char* name) {
  const Geometry g{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(1), weight.size(2), stride, padding};
  STD_TORCH_CHECK(weight.size(3) == g.channels, "convolution_native: ", name, " must have the ", g.channels,
                  " channels of its images, got ", weight.size(3));
  STD_TORCH_CHECK(g.channels > 0 && g.channels % 16 == 0 && weight.size(0) > 0 && weight.size(0) % 16 == 0,
                  "convolution_native: channels must be positive multiples of 16, got ", g.channels, " and ",
                  weight.size(0));
  STD_TORCH_CHECK(stride >= 1 && stride <= 8 && padding >= 0 && padding < g.taps_down && padding < g.taps_across &&
                      g.taps_down <= 15 && g.taps_across <= 15,
                  "convolution_native: unusual kernel ", g.taps_down, " x ", g.taps_across, ", stride ", stride,
                  ", padding ", padding);
  STD_TORCH_CHECK(g.height + 2 * padding >= g.taps_down && g.width + 2 * padding >= g.taps_across,
                  "convolution_native: images are smaller than the kernel");
  return g;
}

// Shared memory of which a multiprocessor has room for one block, with the kilobyte that each block takes beside it.
constexpr int kAloneBytes = 115 * 1024;

inline int bytes_of_block(int needed, bool alone) { return alone && needed < kAloneBytes ? kAloneBytes : needed; }

// A grid has at most 65535 blocks down.
inline void check_rows(int rows, int per_block) {
  STD_TORCH_CHECK(rows <= int64_t(65535) * per_block, "convolution_native: at most ", int64_t(65535) * per_block,
                  " positions of all images, got ", rows);
}

// Arguments of a convolution; see convolution.cu.
struct Arguments {
  Tensor x, weight, bias;
  std::optional<Tensor> residual, second, second_weight;
  int64_t stride, padding, second_stride;
  bool relu, late;
  int64_t scale;
};

inline CUtensorMapDataType map_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// An empty output [N, P, Q, K], once what does not depend on the type is checked.
inline Tensor make_out(const Arguments& a) {
  const ScalarType type = a.x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "convolution_native: x must be float16 or bfloat16, got ", torch::headeronly::toString(type));
  check_device(a.x.get_device_index());
  check(a.x, "x", 4, a.x, type);
  check(a.weight, "weight", 4, a.x, type);
  check(a.bias, "bias", 1, a.x, ScalarType::Float);
  const Geometry g = geometry(a.x, a.weight, a.stride, a.padding, "weight");
  const int64_t outputs = a.weight.size(0), rows = g.images * g.out_height() * g.out_width() * a.scale * a.scale;
  STD_TORCH_CHECK(a.bias.size(0) == outputs, "convolution_native: bias must be [", outputs, "], got [", a.bias.size(0),
                  "]");
  STD_TORCH_CHECK(rows <= INT32_MAX && g.height <= 32767 && g.width <= 32767, "convolution_native: too many positions");
  STD_TORCH_CHECK(a.second.has_value() == a.second_weight.has_value(),
                  "convolution_native: second and second_weight go together");
  STD_TORCH_CHECK(!a.late || (a.relu && a.residual.has_value()), "convolution_native: late needs a residual and relu");
  Tensor out = torch::stable::new_empty(a.x, {g.images, g.out_height() * a.scale, g.out_width() * a.scale, outputs});
  if (a.residual.has_value()) {
    check(*a.residual, "residual", 4, a.x, type);
    for (int i = 0; i < 4; i++) {
      STD_TORCH_CHECK(a.residual->size(i) == out.size(i),
                      "convolution_native: residual must have the shape of the output");
    }
  }
  return out;
}

inline Inputs make_inputs(const Arguments& a, int columns, int stages) {
  STD_TORCH_CHECK(stages >= 2 && stages <= kMaxStages, "convolution_native: stages must be 2 to ", kMaxStages, ", got ",
                  stages);
  Inputs inputs{};
  const Geometry g = geometry(a.x, a.weight, a.stride, a.padding, "weight");
  const int64_t outputs = a.weight.size(0);
  inputs.first = make_input(map_type(a.x), a.x.const_data_ptr(), a.weight.const_data_ptr(), g, outputs, columns);
  if (a.second.has_value()) {
    check(*a.second, "second", 4, a.x, a.x.scalar_type());
    check(*a.second_weight, "second_weight", 4, a.x, a.x.scalar_type());
    const Geometry more = geometry(*a.second, *a.second_weight, a.second_stride, 0, "second_weight");
    STD_TORCH_CHECK(a.second_weight->size(0) == outputs && more.images == g.images &&
                        more.out_height() == g.out_height() && more.out_width() == g.out_width(),
                    "convolution_native: second must give the same output");
    inputs.second = make_input(map_type(a.x), a.second->const_data_ptr(), a.second_weight->const_data_ptr(), more, outputs,
                               columns);
  }
  STD_TORCH_CHECK(inputs.first.depth + inputs.second.depth < 65536,
                  "convolution_native: more than 65535 chunks of 64 of the depth, ",
                  inputs.first.depth + inputs.second.depth);
  inputs.height = int(g.out_height()), inputs.width = int(g.out_width()), inputs.stages = stages;
  return inputs;
}

template <typename T>
Output<T> make_output(const Tensor& bias, const std::optional<Tensor>& residual, Tensor& out, bool relu, bool late = false,
                      int scale = 1) {
  Output<T> output{};
  output.bias = bias.const_data_ptr<float>();
  output.residual = residual.has_value() ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
  output.out = static_cast<T*>(out.mutable_data_ptr());
  output.rows = int(out.size(0) * out.size(1) * out.size(2) / (int64_t(scale) * scale));
  output.channels = int(out.size(3)), output.relu = relu, output.late = late, output.scale = scale;
  return output;
}

// near.cu: the same where one copy of the pixels serves all taps of a 3 x 3 kernel.
void run_near(const Arguments& arguments, Tensor& out, const std::vector<int64_t>& config, cudaStream_t stream);

}  // namespace fm_convolution
