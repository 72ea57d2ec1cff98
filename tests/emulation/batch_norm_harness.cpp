// Runs the kernels of batch_norm_native and batch_norm_backward_native in the emulator, for
// test_batch_norm_emulated.py.
#include "batch_norm/batch_norm.cuh"

namespace {

using namespace fm_batch_norm;

// See Given of batch_norm.py.
struct Given {
  void *x, *residual, *out, *grad, *more, *behind, *grad_x;
  float *weight, *bias, *mean, *variance, *running_mean, *running_var, *grad_weight, *grad_bias;
  int64_t* batches;
  int64_t rows, channels, held, lanes, cluster, relu, bfloat;
  double momentum, epsilon;
};

template <typename Kernel, typename Problem>
void launch(Kernel kernel, const Given& given, Problem problem, int tensors) {
  const Layout layout = layout_of(given.rows, static_cast<int>(given.lanes), static_cast<int>(given.cluster), tensors);
  // Fewer sweeps in shared memory than there is room for, so that small tensors have rows that are read again.
  const int unused = layout.held - static_cast<int>(given.held < layout.held ? given.held : layout.held);
  problem.rows = static_cast<int>(given.rows), problem.channels = static_cast<int>(given.channels);
  problem.held = layout.held - unused;
  problem.epsilon = static_cast<float>(given.epsilon), problem.relu = given.relu != 0;
  const int64_t width = kWide * given.lanes, blocks = (given.channels + width - 1) / width * given.cluster;
  fm_emulation::launch([&] { kernel(problem); }, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                       static_cast<size_t>(layout.bytes - unused * tensors * kSlotBytes),
                       fm_emulation::with_clusters(static_cast<int32_t>(given.cluster)));
}

template <typename T, int LANES>
void forward(const Given& given) {
  Forward<T> p{};
  p.x = static_cast<const T*>(given.x), p.residual = static_cast<const T*>(given.residual);
  p.out = static_cast<T*>(given.out), p.weight = given.weight, p.bias = given.bias;
  p.mean = given.mean, p.variance = given.variance;
  p.running_mean = given.running_mean, p.running_var = given.running_var, p.batches = given.batches;
  p.momentum = static_cast<float>(given.momentum);
  launch(forward_kernel<T, LANES>, given, p, p.residual ? 2 : 1);
}

template <typename T, int LANES>
void backward(const Given& given) {
  Backward<T> p{};
  p.grad = static_cast<const T*>(given.grad), p.more = static_cast<const T*>(given.more);
  p.x = static_cast<const T*>(given.x), p.out = static_cast<const T*>(given.out);
  p.behind = static_cast<T*>(given.behind), p.grad_x = static_cast<T*>(given.grad_x);
  p.weight = given.weight, p.bias = given.bias, p.mean = given.mean, p.variance = given.variance;
  p.grad_weight = given.grad_weight, p.grad_bias = given.grad_bias;
  launch(backward_kernel<T, LANES>, given, p, p.tensors());
}

template <typename Run>
int32_t reported(const Given& given, Run run) {
  return fm_emulation::reported([&] {
    const auto by_lanes = [&]<typename T>(T*) {
      if (given.lanes == 8) run.template operator()<T, 8>();
      else if (given.lanes == 4) run.template operator()<T, 4>();
      else run.template operator()<T, 2>();
    };
    if (given.bfloat) by_lanes(static_cast<__nv_bfloat16*>(nullptr));
    else by_lanes(static_cast<__half*>(nullptr));
  });
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_forward(const Given* given) {
  return reported(*given, [=]<typename T, int LANES> { forward<T, LANES>(*given); });
}

FM_EMULATION_EXPORT int32_t run_backward(const Given* given) {
  return reported(*given, [=]<typename T, int LANES> { backward<T, LANES>(*given); });
}
