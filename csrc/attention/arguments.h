// What the CPU ops require of their arguments, and the arguments as plain data. The Python layer has explained shapes
// and values to users; this guards memory against direct calls of the ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "attention/problem.h"

namespace fm::attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Shape {
  int64_t batch, tokens, heads, dim;
};

struct Lists {
  int64_t hubs;
  const int32_t *row_offsets, *columns, *t_row_offsets, *t_columns;
  int64_t max_degree;
};

struct Options {
  double scale, dropout_p;
  int64_t seed;
};

inline Shape shape_of(const Tensor& q) { return {q.size(0), q.size(1), q.size(2), q.size(3)}; }

inline Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::Double: return Storage::f64;
    case ScalarType::Half: return Storage::f16;
    case ScalarType::BFloat16: return Storage::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, "topology_attention: tensors must be float32, float64, float16 or bfloat16, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline Source source_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), storage_of(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.size(3) == 1 ? 1 : tensor.stride(3)};
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(tensor.is_cpu(), "topology_attention: ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 4, "topology_attention: ", name, " must be [B, L, H, D], got ", tensor.dim(),
                  " axes");
  STD_TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), "topology_attention: ", name, " must have the dtype of q");
  for (int axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(tensor.size(axis) == q.size(axis), "topology_attention: ", name, " must have the shape of q; axis ",
                    axis, " is ", tensor.size(axis), ", not ", q.size(axis));
  }
  STD_TORCH_CHECK(tensor.size(3) <= kMaxDim, "topology_attention: head dims up to ", kMaxDim, " are supported, got ",
                  tensor.size(3));
  storage_of(tensor);
}

inline void check_per_row(const Tensor& tensor, const char* name, const Tensor& q, ScalarType type) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type && tensor.dim() == 3 &&
                      tensor.size(0) == q.size(0) && tensor.size(1) == q.size(2) && tensor.size(2) == q.size(1),
                  "topology_attention: ", name, " must be [B, H, L] on the CPU, float64 for float64 inputs and else ",
                  "float32");
}

inline Options check_options(double scale, double dropout_p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "topology_attention: dropout_p must be in [0, 1), got ", dropout_p);
  if (dropout_p == 0) return {scale, 0, 0};
  STD_TORCH_CHECK(seed.has_value() && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "topology_attention: dropout needs a seed, an int64 tensor of one element on the CPU");
  return {scale, dropout_p, *seed->const_data_ptr<int64_t>()};
}

// Checks one pair of neighbour lists, stores their pointers and notes the longest list.
inline void add_lists(Lists& lists, const Tensor& row_offsets, const Tensor& columns, const Shape& shape,
                      const int32_t*& offsets_out, const int32_t*& columns_out) {
  for (const Tensor* tensor : {&row_offsets, &columns}) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Int && tensor->dim() == 1 &&
                        tensor->is_contiguous(),
                    "topology_attention: row offsets and columns must be contiguous int32 vectors on the CPU");
  }
  STD_TORCH_CHECK(lists.hubs >= 0 && lists.hubs <= kMaxHubs && lists.hubs <= shape.tokens,
                  "topology_attention: num_hubs must be 0 to ", kMaxHubs, ", got ", lists.hubs);
  const int64_t vertices = shape.tokens - lists.hubs;
  STD_TORCH_CHECK(row_offsets.numel() == vertices + 1, "topology_attention: the tensors have ", shape.tokens,
                  " tokens, the topology ", lists.hubs, " + ", row_offsets.numel() - 1);
  const int32_t* offsets = row_offsets.const_data_ptr<int32_t>();
  const int32_t* column = columns.const_data_ptr<int32_t>();
  int32_t longest = 0, shortest = 0;
  for (int64_t i = 0; i < vertices; ++i) {
    longest = std::max(longest, offsets[i + 1] - offsets[i]);
    shortest = std::min(shortest, offsets[i + 1] - offsets[i]);
  }
  uint32_t largest = 0;  // a negative index becomes a large one
  for (int64_t j = 0; j < columns.numel(); ++j) largest = std::max(largest, static_cast<uint32_t>(column[j]));
  STD_TORCH_CHECK(offsets[0] == 0 && shortest >= 0 && offsets[vertices] == columns.numel() &&
                      (columns.numel() == 0 || largest < static_cast<uint64_t>(vertices)),
                  "topology_attention: row offsets or columns are out of range");
  lists.max_degree = std::max<int64_t>(lists.max_degree, longest);
  offsets_out = offsets;
  columns_out = column;
}

}  // namespace fm::attention
