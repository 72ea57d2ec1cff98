// attention_backward_few_cuda: the backward pass in one launch, for small batches of small meshes whose pattern is
// symmetric.
#include "attention/few_backward.cuh"

#include "attention/cuda_arguments.h"

namespace fm::attention {
namespace {

template <typename T, int DIM, bool DROPOUT>
void run(const FewBackwardArguments& p, const Tensor& q) {
  if constexpr (DIM <= 64) {
    const int64_t blocks = chains<DIM>(p.sizes) * few_blocks<DIM>(p.sizes, p.num_pairs, 2);
    fm::launch_kernel(few_backward_kernel<T, DIM, DROPOUT>, dim3(grid_size(blocks)), kFewThreads,
                      kFewBackwardBytes<DIM>, 1, fm::has_clusters(q.get_device_index()), fm::current_stream(q), p);
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k,
                                            Tensor v, Tensor out, Tensor lse, Tensor pairs, int64_t num_hubs,
                                            double scale, double dropout_p, std::optional<Tensor> seed) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  BackwardTensors tensors(grad_out, grad_lse, q, k, v, out, lse);
  STD_TORCH_CHECK(q.size(3) <= 64, "topology_attention: this kernel takes head dims up to 64, got ", q.size(3));
  if (q.numel() == 0) return tensors.results();
  FewBackwardArguments p{};
  p.sizes = sizes_of(q, num_hubs);
  set_pairs(p, pairs, num_hubs, q);
  tensors.set(p, scale);
  p.dropout = dropout_of(dropout_p, seed, q);
  select_kernel(q, dropout_p > 0, [&]<typename T, int DIM, bool DROPOUT>() { run<T, DIM, DROPOUT>(p, q); });
  return tensors.results();
}

}  // namespace
}  // namespace fm::attention

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) {
  m.impl("attention_backward_few_cuda", TORCH_BOX(&fm::attention::backward));
}
