// upsample_native on CPU: checks, the split over threads, and the choice of instruction set.
#include "upsampling.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "common/simd.h"

namespace {

using fm_upsampling::Element;
using fm_upsampling::Problem;
using fm_upsampling::ScalarType;
using fm_upsampling::Tensor;

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Element::float32;
    case ScalarType::Double: return Element::float64;
    case ScalarType::Half: return Element::float16;
    case ScalarType::BFloat16: return Element::bfloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "upsample_native: x must be float32, float64, float16 or bfloat16, got ",
                  torch::headeronly::toString(type));
}

auto rows_for_this_machine() {
#ifdef FM_HAVE_X86
  switch (fm::simd_level()) {
    case fm::SimdLevel::avx512: return &isa_avx512::upsample_rows;
    case fm::SimdLevel::avx2: return &isa_avx2::upsample_rows;
    default: break;
  }
#endif
  return &isa_baseline::upsample_rows;
}

constexpr int64_t kGrain = 16384;  // multiply-adds below which another thread costs more than it brings

Tensor upsample(Tensor x, Tensor row_offsets, Tensor columns, Tensor values, std::optional<Tensor> ell_columns,
                std::optional<Tensor> ell_values, int64_t rows, std::optional<Tensor> /*point_tables*/,
                std::vector<int64_t> /*point_cuts*/) {
  fm_upsampling::check_arguments(x, row_offsets, columns, values, ell_columns, ell_values, rows);
  const int64_t batch = x.size(0);
  const int64_t channels = x.size(2);
  Tensor out = torch::stable::new_empty(x, {batch, rows, channels});
  if (batch == 0 || rows == 0 || channels == 0) return out;

  const bool ell = ell_columns.has_value();
  const Problem problem{
      element_of(x.scalar_type()), x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2),
      out.mutable_data_ptr(), batch, rows, channels, row_offsets.const_data_ptr<int32_t>(),
      columns.const_data_ptr<int32_t>(), values.const_data_ptr(),
      ell ? ell_columns->const_data_ptr<int32_t>() : nullptr, ell ? ell_values->const_data_ptr<float>() : nullptr,
      ell ? ell_columns->size(1) : 0};
  const int64_t batch_tiles = (batch + fm_upsampling::kBatchTile - 1) / fm_upsampling::kBatchTile;
  const int64_t elements_per_tile = (batch + batch_tiles - 1) / batch_tiles;
  const int64_t work_per_unit = std::max<int64_t>(1, columns.size(0) / rows) * channels * elements_per_tile;
  const auto run_rows = rows_for_this_machine();
  torch::stable::parallel_for(0, batch_tiles * rows, std::max<int64_t>(1, kGrain / work_per_unit),
                              [&](int64_t begin, int64_t end) { run_rows(problem, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CPU, m) { m.impl("upsample_native", TORCH_BOX(&upsample)); }
