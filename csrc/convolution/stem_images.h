// What the host makes of the images that a stem is given: their sizes, checks, and how the kernel reads them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "raw_pixels.cuh"

namespace fm_stem {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Sizes {
  int64_t images, height, width;
  int64_t out_height() const { return (height + 3) / 4; }
  int64_t out_width() const { return (width + 3) / 4; }
  int64_t middle_height() const { return (height + 1) / 2; }  // between the convolution and the pooling
  int64_t middle_width() const { return (width + 1) / 2; }
};

inline void check_constant(const char* op, const char* name, const std::optional<Tensor>& given, const Tensor& x) {
  if (x.scalar_type() != ScalarType::Byte) {
    STD_TORCH_CHECK(!given.has_value(), op, ": ", name, " belongs to uint8 images, got x of ",
                    torch::headeronly::toString(x.scalar_type()));
    return;
  }
  STD_TORCH_CHECK(given.has_value(), op, ": uint8 images need ", name);
  STD_TORCH_CHECK(given->is_cuda() && given->get_device_index() == x.get_device_index(), op, ": ", name,
                  " must be on the device of x");
  STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float && given->dim() == 1 && given->size(0) == kInputs &&
                      given->is_contiguous(),
                  op, ": ", name, " must be float32 [3], contiguous");
}

// Of images [N, H, W, 3] of the weights' type or uint8, or float32 [N, 3, H, W].
inline Sizes check_images(const char* op, const Tensor& x, ScalarType type, const std::optional<Tensor>& mean,
                          const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(x.is_cuda(), op, ": x must be on a CUDA device");
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, op,
                  ": weights must be float16 or bfloat16, got ", torch::headeronly::toString(type));
  const ScalarType given = x.scalar_type();
  STD_TORCH_CHECK(given == type || given == ScalarType::Float || given == ScalarType::Byte, op,
                  ": x must be of the type of the weights, float32 or uint8, got ", torch::headeronly::toString(given));
  const bool planes = given == ScalarType::Float;
  STD_TORCH_CHECK(x.dim() == 4 && x.size(planes ? 1 : 3) == kInputs && x.is_contiguous(), op, ": x of ",
                  torch::headeronly::toString(given), " must be ", planes ? "[N, 3, H, W]" : "[N, H, W, 3]",
                  ", contiguous");
  const Sizes sizes{x.size(0), x.size(planes ? 2 : 1), x.size(planes ? 3 : 2)};
  STD_TORCH_CHECK(sizes.height >= 1 && sizes.width >= 1, op, ": x must have H and W of at least 1, got ", sizes.height,
                  " and ", sizes.width);
  STD_TORCH_CHECK(sizes.height <= 1 << 24 && sizes.width <= 1 << 24 &&
                      sizes.images * sizes.out_height() * sizes.out_width() <= INT32_MAX,
                  op, ": too many positions");
  check_constant(op, "mean", mean, x);
  check_constant(op, "scale", scale, x);
  return sizes;
}

// Calls `with` with what a kernel of type T reads the checked images as.
template <typename T, typename With>
void as_source(const Tensor& x, const Sizes& sizes, const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
               const With& with) {
  const void* const data = x.const_data_ptr();
  const int height = static_cast<int>(sizes.height), width = static_cast<int>(sizes.width);
  if (x.scalar_type() == ScalarType::Float) {
    with(make_planes(static_cast<const float*>(data), height, width));
  } else if (x.scalar_type() == ScalarType::Byte) {
    with(make_bytes(static_cast<const uint8_t*>(data), mean->const_data_ptr<float>(), scale->const_data_ptr<float>(),
                    height, width));
  } else {
    with(make_images(static_cast<const T*>(data), height, width));
  }
}

}  // namespace fm_stem
