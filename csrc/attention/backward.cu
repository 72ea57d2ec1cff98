// attention_backward_cuda: one launch, and a small one that adds up the hubs' gradients where the mesh is cut into
// segments.
#include "attention/backward.cuh"

#include "attention/cuda_arguments.h"

namespace fm::attention {
namespace {

// A block per multiprocessor, which needs no other.
template <typename T, int DIM, bool DROPOUT>
void run_narrow(const BackwardArguments& p, const Tensor& q) {
  const int windows = p.plan.windows_per_step, threads = backward_threads<DIM, kNarrowBytes>(p.sizes, windows);
  check_threads(threads, kBackwardWarps * kWarp);
  const BackwardShared<DIM, kNarrowBytes> shared(p.plan.slots, windows, p.plan.record_bytes, DROPOUT);
  launch_narrow<DIM>(backward_kernel<T, DIM, DROPOUT, kNarrowBytes>, p, threads, shared.bytes, q);
}

template <typename T, int DIM, bool DROPOUT>
void run(BackwardArguments& p, int64_t steps_per_segment, const Tensor& q) {
  if constexpr (DIM <= kNarrowBytes / 2) {
    if (is_narrow<DIM>(p.plan, p.sizes, steps_per_segment, q)) return run_narrow<T, DIM, DROPOUT>(p, q);
  }
  constexpr int kBlocksPerMultiprocessor = DIM == 128 ? 1 : 2;
  STD_TORCH_CHECK(hub_tiles(p.sizes) <= kBackwardHubTiles<DIM>, "topology_attention: the CUDA backward takes up to ",
                  kRows * kBackwardHubTiles<DIM>, " hubs for head dims above 64, got ", p.sizes.hubs);
  set_segments(p.plan, steps_per_segment, chains<DIM>(p.sizes), kBlocksPerMultiprocessor, q);
  const int64_t heads = p.sizes.batch * p.sizes.heads;
  const int cluster_size = cluster_size_of(p.plan, p.sizes, chains<DIM>(p.sizes), q);
  const bool combined = combined_by_kernel(p.plan, p.sizes, cluster_size);
  const int64_t rows = combined ? 3 * heads * p.plan.num_segments * p.sizes.hubs : 0;
  Tensor scratch = torch::stable::new_empty(q, {rows * (DIM + 4)}, ScalarType::Float);
  p.partials = combined ? static_cast<float*>(scratch.mutable_data_ptr()) : nullptr;
  const int windows = p.plan.windows_per_step;
  launch<BackwardArguments>(backward_kernel<T, DIM, DROPOUT>, combined ? combine_backward_kernel<T, DIM> : nullptr, p,
                            chains<DIM>(p.sizes) * p.plan.num_segments, backward_threads<DIM>(p.sizes, windows),
                            BackwardShared<DIM>(p.plan.slots, windows, p.plan.record_bytes, DROPOUT).bytes,
                            cluster_size, 3 * heads * p.sizes.hubs * (DIM / 4), q);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k,
                                            Tensor v, Tensor out, Tensor lse, Tensor steps, Tensor loads,
                                            Tensor restarts, Tensor records, Tensor hub_chunks, Tensor extra_chunks,
                                            int64_t slots, int64_t windows, int64_t num_hubs, double scale,
                                            double dropout_p, std::optional<Tensor> seed, int64_t steps_per_segment) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  BackwardArguments p{};
  BackwardTensors tensors(grad_out, grad_lse, q, k, v, out, lse);
  if (q.numel() == 0) return tensors.results();
  p.sizes = sizes_of(q, num_hubs);
  p.plan = plan_of({steps, loads, restarts, records, hub_chunks, extra_chunks, slots, windows}, q, num_hubs);
  const bool symmetric = p.plan.record_bytes == kBackwardRecordBytes;
  STD_TORCH_CHECK(symmetric || p.plan.record_bytes == kAsymmetricRecordBytes, "topology_attention: records of ",
                  p.plan.record_bytes, " bytes are not those of a backward plan");
  p.transposed = symmetric ? 0 : kRecordTransposed;
  p.transposed_extras = symmetric ? kRecordExtras : kRecordTransposedExtras;
  tensors.set(p, scale);
  p.dropout = dropout_of(dropout_p, seed, q);
  select_kernel(q, dropout_p > 0,
                [&]<typename T, int DIM, bool DROPOUT>() { run<T, DIM, DROPOUT>(p, steps_per_segment, q); });
  return tensors.results();
}

}  // namespace
}  // namespace fm::attention

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) {
  m.impl("attention_backward_cuda", TORCH_BOX(&fm::attention::backward));
}
