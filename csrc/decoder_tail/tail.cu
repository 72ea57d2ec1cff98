// decoder_tail_native: everything of a narrow decoder layer behind its self-attention, in half precision, on compute
// capability 9.0. The kernel is in tail.cuh.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "problem.h"

namespace {

using namespace fm_tail;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const Tensor& tensor, const char* name, const Tensor& tokens, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == tokens.get_device_index(), "decoder_tail_native: ",
                  name, " must be on the device of tokens");
  STD_TORCH_CHECK(tensor.scalar_type() == tokens.scalar_type(), "decoder_tail_native: ", name, " must be ",
                  torch::headeronly::toString(tokens.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  bool fits = tensor.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); i++) fits = tensor.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, "decoder_tail_native: ", name, " has a shape that does not fit");
}

const void* weight(const Tensor& tensor, const char* name, const Tensor& tokens, std::initializer_list<int64_t> shape) {
  check(tensor, name, tokens, shape);
  STD_TORCH_CHECK(tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
                  "decoder_tail_native: ", name, " must be contiguous and aligned to 16 bytes");
  return tensor.const_data_ptr();
}

// [samples, rows, 128], or [samples, rows, 8, 16]. `words`: of 16 bits that rows begin at a multiple of.
Rows rows_of(const Tensor& tensor, const char* name, const Tensor& tokens, std::initializer_list<int64_t> shape,
             int64_t words) {
  check(tensor, name, tokens, shape);
  bool beside = tensor.stride(tensor.dim() - 1) == 1 && (tensor.dim() == 3 || tensor.stride(2) == kWidth / kHeads);
  beside &= reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (2 * words) == 0;
  for (int i = 0; i < 2; i++) beside &= tensor.size(i) <= 1 || tensor.stride(i) % words == 0;
  STD_TORCH_CHECK(beside, "decoder_tail_native: the numbers of a row of ", name,
                  " must lie beside each other, and rows begin at a multiple of ", 2 * words, " bytes");
  const auto step = [&](int i) { return tensor.size(i) > 1 ? tensor.stride(i) : 0; };  // else it is never gone along
  return {tensor.const_data_ptr(), step(0), step(1)};
}

template <typename T>
void launch(const Given& given, const Tensor& tokens, bool early) {
  const Problem<T> problem = make_problem<T>(given);
  const unsigned blocks = std::min(problem.tiles, fm::multiprocessors(tokens.get_device_index()));
  with_tiles(given.count, [&](auto tiles, auto whole) {
    fm::launch_kernel(tail_kernel<T, tiles(), whole()>, dim3(blocks), kThreads, kSharedBytes, 1, early,
                      fm::current_stream(tokens), problem);
  });
}

// `tokens`, `attended` [B, L, 128]; `k`, `v` [B, S, 8, 16], S from 1 to 64; weights as of TailWeights in Python, with
// hidden features in multiples of 64. `early`: whether to start before the kernel in front has ended;
// `constant_weights`: which does not write weights.
Tensor tail(Tensor tokens, Tensor attended, Tensor k, Tensor v, Tensor out_weight, Tensor out_bias, Tensor query_weight,
            Tensor query_bias, Tensor cross_weight, Tensor cross_bias, Tensor expand_weight, Tensor expand_bias,
            Tensor contract_weight, Tensor contract_bias, double scale, double cross_epsilon,
            double feed_forward_epsilon, bool constant_weights, bool early) {
  const ScalarType type = tokens.scalar_type();
  STD_TORCH_CHECK(tokens.is_cuda() && tokens.dim() == 3 && k.dim() == 4 && expand_weight.dim() == 2,
                  "decoder_tail_native: tokens must be [B, L, 128] on a CUDA device, k [B, S, 8, 16]");
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "decoder_tail_native: tokens must be float16 or bfloat16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(fm::has_warpgroups(tokens.get_device_index()),
                  "decoder_tail_native: needs a device of compute capability 9.0");
  const int64_t samples = tokens.size(0), queries = tokens.size(1), count = k.size(1), hidden = expand_weight.size(0);
  STD_TORCH_CHECK(count >= 1 && count <= kKeys, "decoder_tail_native: k must have 1 to ", kKeys, " keys, got ", count);
  STD_TORCH_CHECK(hidden >= kDepth && hidden % kDepth == 0,
                  "decoder_tail_native: hidden features must be a multiple of ", kDepth, ", got ", hidden);
  STD_TORCH_CHECK(samples * ((queries + kRows - 1) / kRows) <= INT32_MAX, "decoder_tail_native: too many tokens");
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  Tensor out = torch::stable::new_empty(tokens, {samples, queries, kWidth});
  const int64_t dim = kWidth / kHeads;
  const Given given{
      rows_of(tokens, "tokens", tokens, {samples, queries, kWidth}, 2),
      rows_of(attended, "attended", tokens, {samples, queries, kWidth}, 2),
      rows_of(k, "k", tokens, {samples, count, kHeads, dim}, 8),
      rows_of(v, "v", tokens, {samples, count, kHeads, dim}, 8),
      weight(out_weight, "out_weight", tokens, {kWidth, kWidth}),
      weight(out_bias, "out_bias", tokens, {kWidth}),
      weight(query_weight, "query_weight", tokens, {kWidth, kWidth}),
      weight(query_bias, "query_bias", tokens, {kWidth}),
      weight(cross_weight, "cross_weight", tokens, {kWidth, kWidth}),
      weight(cross_bias, "cross_bias", tokens, {kWidth}),
      weight(expand_weight, "expand_weight", tokens, {hidden, kWidth}),
      weight(expand_bias, "expand_bias", tokens, {hidden}),
      weight(contract_weight, "contract_weight", tokens, {kWidth, hidden}),
      weight(contract_bias, "contract_bias", tokens, {kWidth}),
      out.mutable_data_ptr(),
      samples, queries, count, hidden, scale, cross_epsilon, feed_forward_epsilon, constant_weights,
  };
  if (out.numel() == 0) return out;
  if (type == ScalarType::Half) launch<__half>(given, tokens, early);
  else launch<__nv_bfloat16>(given, tokens, early);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("decoder_tail_native", TORCH_BOX(&tail)); }
