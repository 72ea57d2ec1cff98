// attention_forward_cuda: one launch, and a small one that combines the hub rows where the mesh is cut into more segments
// than a cluster has blocks.
#include "attention/forward.cuh"

#include "attention/cuda_arguments.h"

namespace fm::attention {
namespace {

// A block per multiprocessor, which needs no other.
template <typename T, int DIM, bool DROPOUT>
void run_narrow(const ForwardArguments& p, const Tensor& q) {
  const int windows = p.plan.windows_per_step, threads = forward_threads<DIM, kNarrowBytes>(p.sizes, windows);
  check_threads(threads, kMostForwardThreads<DIM, kNarrowBytes>);
  launch_narrow<DIM>(forward_kernel<T, DIM, DROPOUT, kNarrowBytes>, p, threads,
                     ForwardShared<DIM, kNarrowBytes>(p.plan.slots, windows, DROPOUT).bytes, q);
}

template <typename T, int DIM, bool DROPOUT>
void run(ForwardArguments& p, int64_t steps_per_segment, const Tensor& q) {
  if constexpr (DIM <= kNarrowBytes / 2) {
    if (is_narrow<DIM>(p.plan, p.sizes, steps_per_segment, q)) return run_narrow<T, DIM, DROPOUT>(p, q);
  }
  constexpr int kBlocksPerMultiprocessor = DIM == 128 ? 1 : 2;
  set_segments(p.plan, steps_per_segment, chains<DIM>(p.sizes), kBlocksPerMultiprocessor, q);
  const int64_t heads = p.sizes.batch * p.sizes.heads;
  const int cluster_size = cluster_size_of(p.plan, p.sizes, chains<DIM>(p.sizes), q);
  const bool combined = combined_by_kernel(p.plan, p.sizes, cluster_size);
  const int64_t rows = combined ? heads * p.plan.num_segments * p.sizes.hubs : 0;
  Tensor scratch = torch::stable::new_empty(q, {rows * (DIM + 4)}, ScalarType::Float);
  p.partials = combined ? static_cast<float*>(scratch.mutable_data_ptr()) : nullptr;
  const int windows = p.plan.windows_per_step;
  launch<ForwardArguments>(forward_kernel<T, DIM, DROPOUT>, combined ? combine_forward_kernel<T, DIM> : nullptr, p,
                           chains<DIM>(p.sizes) * p.plan.num_segments, forward_threads<DIM>(p.sizes, windows),
                           ForwardShared<DIM>(p.plan.slots, windows, DROPOUT).bytes, cluster_size,
                           heads * p.sizes.hubs * (DIM / 4), q);
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor steps, Tensor loads, Tensor restarts,
                                   Tensor records, Tensor hub_chunks, Tensor extra_chunks, int64_t slots,
                                   int64_t windows, int64_t num_hubs, double scale, double dropout_p,
                                   std::optional<Tensor> seed, int64_t steps_per_segment) {
  check_input(q, "q", q);
  check_input(k, "k", q);
  check_input(v, "v", q);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  const Tensor readable_q = readable(q), readable_k = readable(k), readable_v = readable(v);
  ForwardArguments p{};
  p.sizes = sizes_of(q, num_hubs);
  p.plan = plan_of({steps, loads, restarts, records, hub_chunks, extra_chunks, slots, windows}, q, num_hubs);
  STD_TORCH_CHECK(p.plan.record_bytes == kForwardRecordBytes, "topology_attention: records of ", p.plan.record_bytes,
                  " bytes are not those of a forward plan");
  set_forward(p, readable_q, readable_k, readable_v, out, lse, scale);
  p.dropout = dropout_of(dropout_p, seed, q);
  select_kernel(q, dropout_p > 0,
                [&]<typename T, int DIM, bool DROPOUT>() { run<T, DIM, DROPOUT>(p, steps_per_segment, q); });
  return {out, lse};
}

}  // namespace
}  // namespace fm::attention

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) {
  m.impl("attention_forward_cuda", TORCH_BOX(&fm::attention::forward));
}
