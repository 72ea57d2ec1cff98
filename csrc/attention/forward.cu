// attention_forward_cuda: one launch, and a small one that adds up the hub rows where the mesh is cut into segments.
#include "attention/forward.cuh"

#include "attention/cuda_arguments.h"

namespace fm::attention {
namespace {

template <typename T, int DIM, bool DROPOUT>
void run(ForwardArguments& p, int64_t steps_per_segment, const Tensor& q) {
  constexpr int kBlocksPerMultiprocessor = DIM == 128 ? 1 : 3;
  set_segments(p.plan, steps_per_segment, chains<DIM>(p.sizes), kBlocksPerMultiprocessor, q);
  const int64_t heads = p.sizes.batch * p.sizes.heads;
  const bool partial = p.plan.num_segments > 1 && p.sizes.hubs > 0;
  const int64_t partial_rows = partial ? heads * p.plan.num_segments * p.sizes.hubs : 0;
  // One buffer: the sums (two numbers per row), then the rows.
  Tensor scratch = torch::stable::new_empty(q, {partial_rows * (DIM + 4)}, ScalarType::Float);
  p.partial_sums = static_cast<float2*>(scratch.mutable_data_ptr());
  p.partial_out = static_cast<float*>(scratch.mutable_data_ptr()) + 4 * partial_rows;
  const cudaStream_t stream = fm::current_stream(q);
  launch<ForwardArguments>(forward_kernel<T, DIM, DROPOUT>, p, chains<DIM>(p.sizes) * p.plan.num_segments,
                           forward_threads(hub_tiles(p.sizes)), forward_memory<DIM>(p.plan.slots, DROPOUT), stream);
  if (!partial) return;
  const int64_t threads = heads * p.sizes.hubs * (DIM / 4);
  launch<ForwardArguments>(combine_forward_kernel<T, DIM>, p, (threads + 127) / 128, 128, 0, stream);
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor steps, Tensor loads, Tensor restarts,
                                   Tensor rows, Tensor row_slots, Tensor extras, Tensor lists, Tensor masks,
                                   int64_t slots, int64_t num_hubs, double scale, double dropout_p,
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
  p.plan = plan_of({steps, loads, restarts, rows, row_slots}, {extras, lists, masks}, slots, q);
  p.sizes = sizes_of(q, num_hubs);
  p.q = strided(readable_q);
  p.kv[0] = strided(readable_k);
  p.kv[1] = strided(readable_v);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.scale = static_cast<float>(std::abs(scale)) * kLog2e;
  p.sign = scale < 0 ? 0x80008000u : 0u;
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
