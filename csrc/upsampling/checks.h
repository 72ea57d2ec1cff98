// What both devices require of the arguments of upsample_native. The Python layer has checked shapes and values for
// users; this guards direct calls of the op against lists of wrong shapes. The indices themselves are SparseMatrix's
// to check, once, at construction: here that would wait for the device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace fm_upsampling {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_list(const Tensor& tensor, int64_t dims, ScalarType type, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dims, "upsample_native: ", name, " must have ", dims, " axes, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == type, "upsample_native: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), "upsample_native: ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.device() == x.device(), "upsample_native: ", name, " must be on the device of x");
}

inline void check_arguments(const Tensor& x, const Tensor& row_offsets, const Tensor& columns, const Tensor& values,
                            const std::optional<Tensor>& ell_columns, const std::optional<Tensor>& ell_values,
                            int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 3, "upsample_native: x must be [B, N, C], got ", x.dim(), " axes");
  const bool is_double = x.scalar_type() == ScalarType::Double;
  check_list(row_offsets, 1, ScalarType::Int, x, "row_offsets");
  check_list(columns, 1, ScalarType::Int, x, "columns");
  check_list(values, 1, is_double ? ScalarType::Double : ScalarType::Float, x, "values");
  STD_TORCH_CHECK(rows >= 0 && row_offsets.size(0) == rows + 1, "upsample_native: row_offsets must have ", rows + 1,
                  " elements, got ", row_offsets.size(0));
  STD_TORCH_CHECK(columns.size(0) == values.size(0), "upsample_native: columns and values differ in length");
  STD_TORCH_CHECK(ell_columns.has_value() == ell_values.has_value(),
                  "upsample_native: ell_columns and ell_values must come together");
  if (ell_columns.has_value()) {
    STD_TORCH_CHECK(!is_double, "upsample_native: the padded table is for float32 sums; float64 takes row_offsets");
    check_list(*ell_columns, 2, ScalarType::Int, x, "ell_columns");
    check_list(*ell_values, 2, ScalarType::Float, x, "ell_values");
    STD_TORCH_CHECK(ell_columns->size(0) == rows && ell_values->size(0) == rows &&
                        ell_columns->size(1) == ell_values->size(1),
                    "upsample_native: ell_columns and ell_values must both be [rows, width]");
  }
}

}  // namespace fm_upsampling
