// convolution_stem: ResNet's 7 x 7 convolution of stride 2, bias, ReLU and max pooling of channels_last images in half
// precision. The kernel is in stem.cuh.
#include "stem.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/cuda.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& tensor, const char* name, const Tensor& x, ScalarType type, int64_t numbers) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "convolution_stem: ", name,
                  " must be on the device of x");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "convolution_stem: ", name, " must be ",
                  torch::headeronly::toString(type), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
                  "convolution_stem: ", name, " must be contiguous and aligned to 16 bytes");
  STD_TORCH_CHECK(numbers < 0 || tensor.numel() == numbers, "convolution_stem: ", name, " must hold ", numbers,
                  " numbers, got ", tensor.numel());
}

// `x` [N, H, W, 3]; `weight` as lay_out_stem packs it; `bias` float32 [64] -> [N, P, Q, 64].
Tensor stem(Tensor x, Tensor weight, Tensor bias, bool early) {
  STD_TORCH_CHECK(x.is_cuda(), "convolution_stem: x must be on a CUDA device");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "convolution_stem: x must be float16 or bfloat16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) == 3, "convolution_stem: x must be [N, H, W, 3]");
  check(x, "x", x, type, -1);
  check(weight, "weight", x, type, fm_convolution::kStemSteps * 16 * fm_convolution::kStemChannels);
  check(bias, "bias", x, ScalarType::Float, fm_convolution::kStemChannels);
  const int64_t images = x.size(0);
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(1) <= 65536 && x.size(2) <= 65536 && images <= 65535,
                  "convolution_stem: up to 65535 images of 1 to 65536 rows and columns");
  fm_convolution::StemSize size{int(x.size(1)), int(x.size(2)), 0, 0, 0, 0};
  size.rows = (size.height - 1) / 2 + 1, size.columns = (size.width - 1) / 2 + 1;
  size.pooled_rows = (size.rows - 1) / 2 + 1, size.pooled_columns = (size.columns - 1) / 2 + 1;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(
      x, {images, size.pooled_rows, size.pooled_columns, fm_convolution::kStemChannels});
  if (images == 0) return out;
  const dim3 grid((size.pooled_columns + fm_convolution::kPooledColumns - 1) / fm_convolution::kPooledColumns,
                  (size.pooled_rows + fm_convolution::kPooledRows - 1) / fm_convolution::kPooledRows, unsigned(images));
  const auto run = [&]<typename T>(T*) {
    fm::launch_kernel(fm_convolution::stem_kernel<T>, grid, fm_convolution::kStemThreads, fm_convolution::kStemBytes, 1,
                      early && fm::has_clusters(x.get_device_index()), fm::current_stream(x),
                      static_cast<const T*>(x.const_data_ptr()), static_cast<const uint4*>(weight.const_data_ptr()),
                      bias.const_data_ptr<float>(), static_cast<T*>(out.mutable_data_ptr()), size);
  };
  if (type == ScalarType::Half) run(static_cast<__half*>(nullptr));
  else run(static_cast<__nv_bfloat16*>(nullptr));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("convolution_stem", TORCH_BOX(&stem)); }
