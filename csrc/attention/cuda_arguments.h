// What the CUDA ops require of their arguments, and the arguments as the kernels want them. The Python layer has
// explained shapes and values to users; this guards memory against direct calls of the ops. What the plan's tensors
// contain is `build_plan`'s to get right, once per topology: looking here would wait for the device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "attention/tiles.cuh"
#include "common/cuda.h"

namespace fm::attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kSharedLimit = 227 * 1024;  // of one block, on the largest devices

inline int device_attribute(cudaDeviceAttr which, const Tensor& tensor) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, tensor.get_device_index()));
  return value;
}

inline void check_plan_tensor(const Tensor& tensor, const char* name, int64_t size, ScalarType type, const Tensor& q) {
  STD_TORCH_CHECK(tensor.device() == q.device() && tensor.scalar_type() == type && tensor.is_contiguous() &&
                      (size < 0 || tensor.numel() == size),
                  "topology_attention: ", name, " is not a tensor of a plan for these inputs");
}

inline void check_input(const Tensor& tensor, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.device() == q.device() && tensor.scalar_type() == q.scalar_type(),
                  "topology_attention: ", name, " must be [B, L, H, D] with the dtype and device of q");
  for (int axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(tensor.size(axis) == q.size(axis), "topology_attention: ", name, " must have the shape of q; axis ",
                    axis, " is ", tensor.size(axis), ", not ", q.size(axis));
  }
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16,
                  "topology_attention: the CUDA kernels take float16 and bfloat16, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(q.size(3) % 8 == 0 && q.size(3) >= 8 && q.size(3) <= 128,
                  "topology_attention: the CUDA kernels take head dims 8, 16, ... 128, got ", q.size(3));
}

// The tensor itself where the kernels can read it in pieces of 16 bytes, else a contiguous copy.
inline Tensor readable(const Tensor& tensor) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && tensor.stride(3) == 1;
  for (int axis = 0; axis < 3; ++axis) aligned = aligned && (tensor.stride(axis) % 8 == 0 || tensor.size(axis) == 1);
  const bool near = std::abs(tensor.stride(1)) <= std::numeric_limits<int32_t>::max() / 2;  // in bytes an int
  if (aligned && near) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

inline Strided strided(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(2), static_cast<int>(2 * tensor.stride(1))};
}

inline Sizes sizes_of(const Tensor& q, int64_t hubs) {
  STD_TORCH_CHECK(hubs >= 0 && hubs <= 64 && hubs <= q.size(1), "topology_attention: num_hubs must be 0 to 64, got ",
                  hubs);
  STD_TORCH_CHECK(q.size(1) <= std::numeric_limits<int32_t>::max() && q.size(2) <= std::numeric_limits<int32_t>::max(),
                  "topology_attention: too many tokens or heads: ", q.size(1), " and ", q.size(2));
  return {q.size(0), static_cast<int>(q.size(1)), static_cast<int>(q.size(2)), static_cast<int>(q.size(3)),
          static_cast<int>(hubs)};
}

inline Dropout dropout_of(double dropout_p, const std::optional<Tensor>& seed, const Tensor& q) {
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "topology_attention: dropout_p must be in [0, 1), got ", dropout_p);
  if (dropout_p == 0) return {nullptr, 0, 1.f};
  STD_TORCH_CHECK(seed.has_value() && seed->device() == q.device() && seed->scalar_type() == ScalarType::Long &&
                      seed->numel() == 1,
                  "topology_attention: dropout needs a seed, an int64 tensor of one element on the device of q");
  return {seed->const_data_ptr<int64_t>(), static_cast<uint32_t>(dropout_p * 4294967296.0),
          static_cast<float>(1.0 / (1.0 - dropout_p))};
}

// The arguments of a plan, in the order of the op's schema.
struct PlanTensors {
  const Tensor &steps, &loads, &restarts, &records, &hub_chunks, &extra_chunks;
  int64_t slots, windows;
};

inline Plan plan_of(const PlanTensors& plan, const Tensor& q, int64_t hubs) {
  const int64_t steps = plan.steps.numel() / 8, windows = (q.size(1) - hubs + kRows - 1) / kRows;
  STD_TORCH_CHECK(plan.records.dim() == 2 && plan.records.size(0) == windows,
                  "topology_attention: records are not those of a plan for these inputs");
  check_plan_tensor(plan.steps, "steps", 8 * steps, ScalarType::Int, q);
  check_plan_tensor(plan.loads, "loads", -1, ScalarType::Int, q);
  check_plan_tensor(plan.restarts, "restarts", -1, ScalarType::Int, q);
  check_plan_tensor(plan.records, "records", -1, ScalarType::Byte, q);
  check_plan_tensor(plan.hub_chunks, "hub_chunks", -1, ScalarType::Byte, q);
  check_plan_tensor(plan.extra_chunks, "extra_chunks", -1, ScalarType::Byte, q);
  STD_TORCH_CHECK(steps > 0 && plan.slots > 0 && plan.slots < 32768 && plan.windows > 0 && plan.windows <= 16,
                  "topology_attention: a plan has at least one step, up to 32767 slots and 16 windows per step, got ",
                  steps, ", ", plan.slots, " and ", plan.windows);
  return {plan.steps.const_data_ptr<int32_t>(),
          static_cast<const int2*>(plan.loads.const_data_ptr()),
          static_cast<const int4*>(plan.restarts.const_data_ptr()),
          static_cast<const unsigned char*>(plan.records.const_data_ptr()),
          static_cast<const unsigned char*>(plan.hub_chunks.const_data_ptr()),
          static_cast<const unsigned char*>(plan.extra_chunks.const_data_ptr()),
          static_cast<int>(plan.records.size(1)),
          static_cast<int>(plan.slots),
          static_cast<int>(plan.windows),
          static_cast<int>(steps),
          static_cast<int>(steps),
          1};
}

template <int DIM, int BYTES = kGroupBytes<DIM>>
int64_t groups_of_heads(const Sizes& sizes) {
  constexpr int heads = Layout<DIM, BYTES>::kHeads;
  return (sizes.heads + heads - 1) / heads;
}

// Blocks that walk over the mesh side by side: one per batch element and group of heads.
template <int DIM, int BYTES = kGroupBytes<DIM>>
int64_t chains(const Sizes& sizes) { return sizes.batch * groups_of_heads<DIM, BYTES>(sizes); }

// Whether blocks of narrow groups walk over the mesh alone, one per multiprocessor: the plan's cache holds all tokens,
// and there are enough such blocks to give most multiprocessors one, but none two (`native.py` decides by the same rule
// which plan to take). Every row is then copied once, and the hub rows are finished where they were added up.
template <int DIM>
bool is_narrow(const Plan& plan, const Sizes& sizes, int64_t steps_per_segment, const Tensor& q) {
  const int64_t blocks = chains<DIM, kNarrowBytes>(sizes), places = device_attribute(cudaDevAttrMultiProcessorCount, q);
  return steps_per_segment == 0 && plan.slots == sizes.tokens && 2 * blocks > places && blocks <= places;
}

// Cuts the steps into segments, `wanted` steps each; 0: so many that one wave of blocks fills the device.
inline void set_segments(Plan& plan, int64_t wanted, int64_t chains, int blocks_per_multiprocessor, const Tensor& q) {
  STD_TORCH_CHECK(wanted >= 0, "topology_attention: steps_per_segment must not be negative, got ", wanted);
  int64_t per_segment = wanted;
  if (wanted == 0) {
    const int64_t places = int64_t{blocks_per_multiprocessor} *
                           device_attribute(cudaDevAttrMultiProcessorCount, q);
    const int64_t segments = std::clamp<int64_t>(places / std::max<int64_t>(chains, 1), 1, plan.num_steps);
    per_segment = (plan.num_steps + segments - 1) / segments;
  }
  plan.steps_per_segment = static_cast<int>(std::clamp<int64_t>(per_segment, 1, plan.num_steps));
  plan.num_segments = (plan.num_steps + plan.steps_per_segment - 1) / plan.steps_per_segment;
}

// Blocks of one batch element and group of heads that combine their hub rows in a cluster; 1: there is one segment, or
// a kernel combines them. Clusters are for few blocks: where the device is full of them, the scheduler finds no place
// for the last ones (measured: 1.5 times the time), and a launch more does not count.
inline int cluster_size_of(const Plan& plan, const Sizes& sizes, int64_t chains, const Tensor& q) {
  constexpr int kLargest = 8;
  const bool fits = plan.num_segments <= kLargest &&
                    chains * plan.num_segments <= device_attribute(cudaDevAttrMultiProcessorCount, q);
  return sizes.hubs > 0 && fits && fm::has_clusters(q.get_device_index()) ? plan.num_segments : 1;
}

// Whether a kernel of its own must combine the hub rows.
inline bool combined_by_kernel(const Plan& plan, const Sizes& sizes, int cluster_size) {
  return sizes.hubs > 0 && plan.num_segments > cluster_size;
}

inline void check_memory(int memory) {
  STD_TORCH_CHECK(memory <= kSharedLimit, "topology_attention: the topology needs ", memory,
                  " bytes of shared memory for this head dim, at most ", kSharedLimit, " are there");
}

inline void check_threads(int threads, int most) {
  STD_TORCH_CHECK(threads <= most, "topology_attention: the plan asks for blocks of ", threads, " threads, at most ",
                  most, " are there");
}

inline unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "topology_attention: the inputs are too large, they ",
                  "need ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

// Launches the kernel that streams, and where it is not null the one that combines hub rows afterwards.
template <typename Arguments>
void launch(void (*kernel)(Arguments), void (*combine)(Arguments), const Arguments& arguments, int64_t blocks,
            int threads, int memory, int cluster_size, int64_t combine_threads, const Tensor& q) {
  check_memory(memory);
  const cudaStream_t stream = fm::current_stream(q);
  const bool early = fm::has_clusters(q.get_device_index());
  fm::launch_kernel(kernel, dim3(grid_size(blocks)), threads, memory, cluster_size, early, stream, arguments);
  if (combine == nullptr) return;
  const dim3 grid(grid_size((combine_threads + 127) / 128));
  fm::launch_kernel(combine, grid, 128, 0, 1, early, stream, arguments);
}

// Launches blocks of narrow groups; there are few of them.
template <int DIM, typename Arguments>
void launch_narrow(void (*kernel)(Arguments), const Arguments& arguments, int threads, int memory, const Tensor& q) {
  check_memory(memory);
  const dim3 grid(static_cast<unsigned>(groups_of_heads<DIM, kNarrowBytes>(arguments.sizes)),
                  static_cast<unsigned>(arguments.sizes.batch));
  fm::launch_kernel(kernel, grid, threads, memory, 1, fm::has_clusters(q.get_device_index()), fm::current_stream(q),
                    arguments);
}

// Calls run.operator()<T, DIM, DROPOUT>() for the inputs at hand.
template <typename Run>
void select_kernel(const Tensor& q, bool dropout, Run run) {
  const auto typed = [&]<typename T, int DIM>() {
    if (dropout) run.template operator()<T, DIM, true>();
    else run.template operator()<T, DIM, false>();
  };
  const auto sized = [&]<typename T>() {
    const int64_t dim = q.size(3);
    if (dim <= 16) typed.template operator()<T, 16>();
    else if (dim <= 32) typed.template operator()<T, 32>();
    else if (dim <= 64) typed.template operator()<T, 64>();
    else typed.template operator()<T, 128>();
  };
  if (q.scalar_type() == ScalarType::Half) sized.template operator()<__half>();
  else sized.template operator()<__nv_bfloat16>();
}

// The pairs of windows of few.py.
template <typename Arguments>
void set_pairs(Arguments& p, const Tensor& pairs, int64_t hubs, const Tensor& q) {
  using Pair = std::remove_const_t<std::remove_pointer_t<decltype(p.pairs)>>;
  constexpr int64_t rows = sizeof(Pair::rows) / sizeof(int);
  p.num_pairs = static_cast<int>((q.size(1) - hubs + rows - 1) / rows);
  check_plan_tensor(pairs, "pairs", p.num_pairs * static_cast<int64_t>(sizeof(Pair)), ScalarType::Byte, q);
  p.pairs = static_cast<const Pair*>(pairs.const_data_ptr());
}

// What every forward op does with its tensors; `readable` ones are kept alive by the caller.
template <typename Arguments>
void set_forward(Arguments& p, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out, Tensor& lse,
                 double scale) {
  p.q = strided(q);
  p.kv[0] = strided(k);
  p.kv[1] = strided(v);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.scale = forward_scale(scale);
  p.sign = scale < 0 ? 0x80008000u : 0u;
}

inline void check_per_row(const Tensor& tensor, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(tensor.device() == q.device() && tensor.scalar_type() == ScalarType::Float && tensor.dim() == 3 &&
                      tensor.size(0) == q.size(0) && tensor.size(1) == q.size(2) && tensor.size(2) == q.size(1),
                  "topology_attention: ", name, " must be float32 [B, H, L] on the device of q");
}

// What every backward op does with its tensors: checks them, makes the gradients, and keeps alive what the kernels read.
class BackwardTensors {
 public:
  BackwardTensors(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
                  const Tensor& v, const Tensor& out, const Tensor& lse) {
    check_input(q, "q", q);
    check_input(k, "k", q);
    check_input(v, "v", q);
    check_input(out, "out", q);
    check_input(grad_out, "grad_out", q);
    check_per_row(lse, "lse", q);
    if (grad_lse.has_value()) check_per_row(*grad_lse, "grad_lse", q);
    for (int i = 0; i < 3; ++i) grads_.push_back(torch::stable::new_empty(q, q.sizes()));
    if (q.numel() == 0) return;
    for (const Tensor& tensor : {k, v, q, grad_out, out}) read_.push_back(readable(tensor));
    read_.push_back(torch::stable::contiguous(lse));
    if (grad_lse.has_value()) read_.push_back(torch::stable::contiguous(*grad_lse));
  }

  template <typename Arguments>
  void set(Arguments& p, double scale) {
    for (int i = 0; i < 5; ++i) p.inputs[i] = strided(read_[i]);
    p.lse = read_[5].const_data_ptr<float>();
    p.grad_lse = read_.size() > 6 ? read_[6].const_data_ptr<float>() : nullptr;
    for (int i = 0; i < 3; ++i) p.grads[i] = grads_[i].mutable_data_ptr();
    p.scale = static_cast<float>(scale);
    p.scale_log2e = static_cast<float>(scale) * kLog2e;
  }

  std::tuple<Tensor, Tensor, Tensor> results() const { return {grads_[0], grads_[1], grads_[2]}; }

 private:
  std::vector<Tensor> grads_, read_;
};

}  // namespace fm::attention
