// upsample_native on CUDA: one launch per call, no atomics, sums in float32 in a fixed order. The kernels are in
// kernels.cuh, the choice among them in launch.h.
#include "common/cuda.h"

#include <cstring>
#include <vector>

#include "checks.h"
#include "launch.h"

namespace {

using fm_upsampling::Cut;
using fm_upsampling::Cuts;
using fm_upsampling::Device;
using fm_upsampling::Plan;
using fm_upsampling::Problem;
using fm_upsampling::ScalarType;
using fm_upsampling::Tensor;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

struct CudaLaunch {
  cudaStream_t stream;

  template <auto KERNEL, typename T, typename Layout>
  void operator()(const Problem<T>& problem, const Layout& layout, uint32_t blocks, uint32_t batch_tiles, int threads,
                  uint32_t shared_bytes, bool early) const {
    fm::launch_kernel(KERNEL, dim3(blocks, batch_tiles), threads, static_cast<int>(shared_bytes), 1, early, stream,
                      problem, layout);
  }
};

// The cuts of points.py: `point_tables` holds their tables, `sizes` the fields of Cut, one cut after the other.
std::vector<Cut> cuts_of(const std::optional<Tensor>& point_tables, const std::vector<int64_t>& sizes, const Tensor& x,
                         int64_t rows) {
  constexpr size_t fields = sizeof(Cut) / sizeof(int64_t);
  STD_TORCH_CHECK(sizes.size() % fields == 0 && (sizes.empty() || point_tables.has_value()),
                  "upsample_native: point_cuts must hold ", fields, " numbers per cut of point_tables");
  std::vector<Cut> cuts(sizes.size() / fields);
  std::memcpy(cuts.data(), sizes.data(), sizes.size() * sizeof(int64_t));
  if (!cuts.empty()) fm_upsampling::check_list(*point_tables, 1, ScalarType::Int, x, "point_tables");
  for (const Cut& cut : cuts) {
    // Where rows have three entries blocks are ranges of rows, else lists of up to block_rows.
    const bool no_empty_range = cut.slots != 3 || (cut.blocks - 1) * cut.block_rows < rows;
    const int most = fm_upsampling::point_threads(static_cast<int>(cut.slots), 1, false);
    STD_TORCH_CHECK(cut.offset >= 0 && cut.block_words >= 0 && cut.blocks > 0 &&
                        cut.offset + cut.blocks * cut.block_words <= point_tables->size(0) && no_empty_range &&
                        rows <= cut.blocks * cut.block_rows && cut.threads > 0 && cut.threads % 32 == 0 &&
                        cut.threads <= most,
                    "upsample_native: point_tables and point_cuts do not belong to this matrix");
  }
  return cuts;
}

Tensor product(const Tensor& x, const Tensor& row_offsets, const Tensor& columns, const Tensor& values,
               const std::optional<Tensor>& ell_columns, const std::optional<Tensor>& ell_values, int64_t rows,
               const std::optional<Tensor>& point_tables, const std::vector<int64_t>& point_cuts, const Plan* wanted) {
  fm_upsampling::check_arguments(x, row_offsets, columns, values, ell_columns, ell_values, rows);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {x.size(0), rows, x.size(2)});
  if (x.size(0) == 0 || rows == 0 || x.size(2) == 0) return out;

  const int index = x.get_device_index();
  const Device device{attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                      attribute(cudaDevAttrComputeCapabilityMajor, index) >= 9};
  // A full table has the same entries in the same order as the compressed rows, and makes their offsets superfluous.
  const bool three_each = ell_columns.has_value() && ell_columns->size(1) == 3 && columns.size(0) == 3 * rows;
  const std::vector<Cut> list = cuts_of(point_tables, point_cuts, x, rows);
  const int32_t* const tables = list.empty() ? nullptr : point_tables->const_data_ptr<int32_t>();
  const Cuts cuts{reinterpret_cast<const uint32_t*>(tables), list};
  const auto run = [&]<typename T>(T*) {
    const Problem<T> problem{static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
                             row_offsets.const_data_ptr<int32_t>(), columns.const_data_ptr<int32_t>(),
                             values.const_data_ptr<float>(), x.size(0), x.size(1), rows, x.size(2), x.stride(0),
                             x.stride(1), x.stride(2)};
    const Plan plan = wanted != nullptr ? *wanted : fm_upsampling::choose_plan(problem, three_each, cuts, device);
    const CudaLaunch launch{fm::current_stream(x)};
    fm_upsampling::Launcher(problem, columns.size(0), three_each, cuts, plan, device, launch).run();
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: run(static_cast<float*>(nullptr)); break;
    case ScalarType::Half: run(static_cast<__half*>(nullptr)); break;
    case ScalarType::BFloat16: run(static_cast<__nv_bfloat16*>(nullptr)); break;
    default:
      STD_TORCH_CHECK(false, "upsample_native: on CUDA x must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
  return out;
}

Tensor upsample(Tensor x, Tensor row_offsets, Tensor columns, Tensor values, std::optional<Tensor> ell_columns,
                std::optional<Tensor> ell_values, int64_t rows, std::optional<Tensor> point_tables,
                std::vector<int64_t> point_cuts) {
  return product(x, row_offsets, columns, values, ell_columns, ell_values, rows, point_tables, point_cuts, nullptr);
}

// The same in a given configuration, with the first of the cuts, for benchmarks and tests.
Tensor upsample_as(Tensor x, Tensor row_offsets, Tensor columns, Tensor values, std::optional<Tensor> ell_columns,
                   std::optional<Tensor> ell_values, int64_t rows, std::optional<Tensor> point_tables,
                   std::vector<int64_t> point_cuts, int64_t kernel, int64_t batch_tile, int64_t threads, bool early) {
  STD_TORCH_CHECK(kernel >= 0 && kernel <= static_cast<int64_t>(fm_upsampling::Kernel::points),
                  "upsample_native: kernel must be 0 (gather), 1 (staged) or 2 (points), got ", kernel);
  STD_TORCH_CHECK(threads >= 0 && threads <= fm_upsampling::kMaxThreads && threads % 32 == 0,
                  "upsample_native: threads must be a multiple of 32 up to ", fm_upsampling::kMaxThreads, ", got ",
                  threads);
  const Plan plan{static_cast<fm_upsampling::Kernel>(kernel), static_cast<int>(batch_tile), static_cast<int>(threads),
                  early};
  return product(x, row_offsets, columns, values, ell_columns, ell_values, rows, point_tables, point_cuts, &plan);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) {
  m.impl("upsample_native", TORCH_BOX(&upsample));
  m.impl("upsample_native_as", TORCH_BOX(&upsample_as));
}
