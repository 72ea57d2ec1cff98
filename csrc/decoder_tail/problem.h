// What the host gives to the kernel of a decoder layer's tail: tensors of one layer, described to the copy engine.
#pragma once

#include <cmath>
#include <numbers>

#include "convolution/tensor_maps.h"
#include "tail.cuh"

namespace fm_tail {

// Rows of 128 numbers in half precision; strides in numbers, and a row's numbers one after the other.
struct Rows {
  const void* data;
  int64_t sample, row;
};

struct Given {
  Rows tokens, attended, keys, values;
  const void *out_weight, *out_bias, *query_weight, *query_bias, *cross_weight, *cross_bias;
  const void *expand_weight, *expand_bias, *contract_weight, *contract_bias;
  void* out;
  int64_t samples, queries, count, hidden;
  double scale, cross_epsilon, feed_forward_epsilon;
  int64_t constant_weights;
};

// Boxes of 64 columns of kKeys keys of a sample; keys that it does not have are 0.
inline void encode_memory(fm::TensorMap& map, CUtensorMapDataType type, const Rows& rows, int64_t samples,
                          int64_t count) {
  using fm_convolution::driver_function;
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const cuuint64_t sizes[3] = {kWidth, cuuint64_t(count), cuuint64_t(samples)};
  const cuuint64_t strides[2] = {cuuint64_t(2 * rows.row), cuuint64_t(2 * rows.sample)};
  const cuuint32_t box[3] = {kDepth, kKeys, 1}, steps[3] = {1, 1, 1};
  const CUresult result = encode(&fm_convolution::opaque(map), type, 3, const_cast<void*>(rows.data), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "decoder_tail: keys cannot be described to the copy engine, error ", result);
}

template <typename T>
Problem<T> make_problem(const Given& given) {
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto weights = [&](fm::TensorMap& map, const void* data, int64_t outputs, int64_t inputs) {
    const fm_convolution::Geometry plain{1, 1, 1, inputs, 1, 1, 1, 0};
    fm_convolution::encode_weights(map, type, data, plain, outputs, kRows);
  };
  Problem<T> p{};
  weights(p.squares[0], given.out_weight, kWidth, kWidth);
  weights(p.squares[1], given.query_weight, kWidth, kWidth);
  weights(p.squares[2], given.cross_weight, kWidth, kWidth);
  weights(p.expand, given.expand_weight, given.hidden, kWidth);
  weights(p.contract, given.contract_weight, kWidth, given.hidden);
  encode_memory(p.keys, type, given.keys, given.samples, given.count);
  encode_memory(p.values, type, given.values, given.samples, given.count);
  p.tokens = static_cast<const T*>(given.tokens.data), p.attended = static_cast<const T*>(given.attended.data);
  p.out = static_cast<T*>(given.out);
  p.out_bias = static_cast<const T*>(given.out_bias), p.query_bias = static_cast<const T*>(given.query_bias);
  p.cross_bias = static_cast<const T*>(given.cross_bias), p.expand_bias = static_cast<const T*>(given.expand_bias);
  p.contract_bias = static_cast<const T*>(given.contract_bias);
  p.tokens_sample = given.tokens.sample, p.tokens_row = given.tokens.row;
  p.attended_sample = given.attended.sample, p.attended_row = given.attended.row;
  p.queries = static_cast<int>(given.queries), p.count = static_cast<int>(given.count);
  p.chunks = static_cast<int>(given.hidden / kDepth);
  p.tiles_of_sample = static_cast<int>((given.queries + kRows - 1) / kRows);
  p.tiles = static_cast<int>(given.samples) * p.tiles_of_sample;
  p.scale = static_cast<float>(std::abs(given.scale) * std::numbers::log2e);
  p.opposite = given.scale < 0 ? 0x80008000u : 0;
  p.cross_epsilon = static_cast<float>(given.cross_epsilon);
  p.feed_forward_epsilon = static_cast<float>(given.feed_forward_epsilon);
  p.constant_weights = given.constant_weights != 0;
  return p;
}

// Calls `run` with what tail_kernel is to be made for, for so many keys: an image's 7 x 7 have a kernel that masks no
// more than it must.
template <typename Run>
void with_tiles(int64_t count, Run run) {
  constexpr int kTiles = kKeys / 8;
  if (count > kKeys - 16 && count <= kKeys - 8) {
    run(std::integral_constant<int, kTiles - 1>(), std::integral_constant<int, kTiles - 2>());
  } else {
    run(std::integral_constant<int, kTiles>(), std::integral_constant<int, 0>());
  }
}

}  // namespace fm_tail
