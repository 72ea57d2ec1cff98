// attention_forward_few_cuda: the forward pass in one launch, for small batches of small meshes.
#include "attention/few.cuh"

#include "attention/cuda_arguments.h"

namespace fm::attention {
namespace {

template <typename T, int DIM, bool DROPOUT>
void run(const FewForwardArguments& p, const Tensor& q) {
  if constexpr (DIM <= 64) {
    const int64_t blocks = chains<DIM>(p.sizes) * few_blocks<DIM>(p.sizes, p.num_pairs);
    fm::launch_kernel(few_forward_kernel<T, DIM, DROPOUT>, dim3(grid_size(blocks)), kFewThreads,
                      kFewBytes<DIM>, 1, fm::has_clusters(q.get_device_index()),
                      fm::current_stream(q), p);
  }
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor pairs, int64_t num_hubs, double scale,
                                   double dropout_p, std::optional<Tensor> seed) {
  check_input(q, "q", q);
  check_input(k, "k", q);
  check_input(v, "v", q);
  STD_TORCH_CHECK(q.size(3) <= 64, "topology_attention: this kernel takes head dims up to 64, got ", q.size(3));
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  const Tensor readable_q = readable(q), readable_k = readable(k), readable_v = readable(v);
  FewForwardArguments p{};
  p.sizes = sizes_of(q, num_hubs);
  set_pairs(p, pairs, num_hubs, q);
  set_forward(p, readable_q, readable_k, readable_v, out, lse, scale);
  p.dropout = dropout_of(dropout_p, seed, q);
  select_kernel(q, dropout_p > 0, [&]<typename T, int DIM, bool DROPOUT>() { run<T, DIM, DROPOUT>(p, q); });
  return {out, lse};
}

}  // namespace
}  // namespace fm::attention

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) {
  m.impl("attention_forward_few_cuda", TORCH_BOX(&fm::attention::forward));
}
