// attention_forward_native and attention_backward_native on CPU: checks, packing, the split over threads, and the
// choice of instruction set. The arithmetic is in attention_simd.cpp.
#include <algorithm>
#include <atomic>
#include <tuple>

#include "attention/arguments.h"
#include "attention/problem.h"
#include "common/simd.h"

FM_DECLARE_ATTENTION_KERNELS(isa_baseline)
#ifdef FM_HAVE_X86
FM_DECLARE_ATTENTION_KERNELS(isa_avx2)
FM_DECLARE_ATTENTION_KERNELS(isa_avx512)
#endif

namespace fm::attention {
namespace {

using torch::stable::parallel_for;

template <class A>
const Kernels<A>& kernels_for_this_machine() {
  constexpr bool single = std::is_same_v<A, float>;
#ifdef FM_HAVE_X86
  switch (simd_level()) {
    case SimdLevel::avx512:
      if constexpr (single) return isa_avx512::attention::kernels_of_float;
      else return isa_avx512::attention::kernels_of_double;
    case SimdLevel::avx2:
      if constexpr (single) return isa_avx2::attention::kernels_of_float;
      else return isa_avx2::attention::kernels_of_double;
    default: break;
  }
#endif
  if constexpr (single) return isa_baseline::attention::kernels_of_float;
  else return isa_baseline::attention::kernels_of_double;
}

// Uninitialised memory for one call.
template <class A>
class Buffer {
 public:
  explicit Buffer(size_t size) : data_(new (std::align_val_t{64}) A[std::max<size_t>(size, 1)]) {}
  ~Buffer() { ::operator delete[](data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* get() const { return data_; }

 private:
  A* data_;
};

// Calls work(item, scratch) for all items, of about `cost` multiply-adds each. Threads take the next `stride` items
// when they are free, so that a busy core holds nothing up; every item writes its own results, so the order does not
// matter.
// What takes a few microseconds stays on this thread: waking another one and waiting for it would cost more.
template <class A, class F>
void for_each(int64_t items, int64_t stride, int64_t cost, size_t scratch_size, const F& work) {
  constexpr int64_t worth_a_thread = int64_t{1} << 18;
  const int64_t most = std::min((items + stride - 1) / stride, 1 + items * cost / worth_a_thread);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), most);
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Buffer<A> scratch(scratch_size);
    for (int64_t first; (first = next.fetch_add(stride)) < items;) {
      for (int64_t item = first; item < std::min(first + stride, items); ++item) work(item, scratch.get());
    }
  });
}

// The work items (batch, head, chunk), heads fastest: neighbouring items share pages, whatever the layout.
template <class A, class F>
void for_each_item(const Problem<A>& p, int64_t first_chunk, int64_t cost, size_t scratch_size, const F& work) {
  const int64_t chunks = p.chunks - first_chunk;
  for_each<A>(p.batches * chunks * p.heads, 2, cost, scratch_size, [&](int64_t item, A* scratch) {
    const int64_t head = item % p.heads, rest = item / p.heads;
    work(rest / chunks, head, first_chunk + rest % chunks, scratch);
  });
}

template <class A, class F>
void for_each_head(const Problem<A>& p, int64_t cost, size_t scratch_size, const F& work) {
  for_each<A>(p.batches * p.heads, 1, cost, scratch_size,
              [&](int64_t item, A* scratch) { work(item / p.heads, item % p.heads, scratch); });
}

// Multiply-adds, roughly: of the rows of one chunk, of the hub tokens among themselves, of merging the chunks.
template <class A>
int64_t chunk_cost(const Problem<A>& p) {
  return int64_t{kChunk} * p.padded_dim * (4 * p.hubs + 16);
}

template <class A>
int64_t hub_cost(const Problem<A>& p) {
  return int64_t{2} * p.hubs * p.padded_dim * (p.hubs + 4);
}

template <class A>
int64_t merge_cost(const Problem<A>& p) {
  return p.chunks * p.hubs * p.padded_dim;
}

// One input tensor as the kernels want it: used in place where its rows fit, else packed, one group of batches after
// the other, into memory that is reused.
template <class A>
class Input {
 public:
  Input(const Tensor& tensor, const Shape& shape, int64_t group, const Kernels<A>& kernels)
      : source_(source_of(tensor)), shape_(shape), kernels_(kernels),
        padded_dim_((shape.dim + kernels.lanes - 1) / kernels.lanes * kernels.lanes),
        direct_(source_.storage == (std::is_same_v<A, float> ? Storage::f32 : Storage::f64) && source_.dim == 1 &&
                padded_dim_ == shape.dim),
        shared_(source_.batch == 0),
        buffer_(direct_ ? 0 : static_cast<size_t>((shared_ ? 1 : group) * shape.heads * shape.tokens * padded_dim_)) {}

  Rows<A> rows(int64_t first, int64_t batches) {
    if (direct_) {
      const A* data = static_cast<const A*>(source_.data) + first * source_.batch;
      return {data, source_.batch, source_.token, source_.head};
    }
    const int64_t head_stride = shape_.tokens * padded_dim_;
    const int64_t batch_stride = shape_.heads * head_stride;
    if (!shared_ || first == 0) pack(first, shared_ ? 1 : batches);
    return {buffer_.get(), shared_ ? 0 : batch_stride, padded_dim_, head_stride};
  }

 private:
  void pack(int64_t first, int64_t batches) {
    const int64_t pieces = (shape_.tokens + kChunk - 1) / kChunk;
    for_each<A>(batches * pieces * shape_.heads, shape_.heads, kChunk * padded_dim_, 0, [&](int64_t item, A*) {
      const int64_t head = item % shape_.heads, rest = item / shape_.heads;
      const int64_t batch = rest / pieces, token = rest % pieces * kChunk;
      A* target = buffer_.get() + ((batch * shape_.heads + head) * shape_.tokens + token) * padded_dim_;
      kernels_.pack(source_, first + batch, head, token, std::min<int64_t>(kChunk, shape_.tokens - token),
                    static_cast<int>(shape_.dim), static_cast<int>(padded_dim_), target);
    });
  }

  Source source_;
  Shape shape_;
  const Kernels<A>& kernels_;
  int64_t padded_dim_;
  bool direct_, shared_;
  Buffer<A> buffer_;
};

// Batches worked on together: packed copies and partial sums stay in the megabytes, whatever the batch size.
int64_t batches_per_group(const Shape& shape) {
  constexpr int64_t elements = int64_t{1} << 21;
  return std::clamp<int64_t>(elements / std::max<int64_t>(1, shape.tokens * shape.heads * shape.dim), 1, shape.batch);
}

template <class A>
Problem<A> make_problem(const Shape& shape, const Lists& lists, const Options& options, const Kernels<A>& kernels) {
  Problem<A> p{};
  p.tokens = shape.tokens;
  p.heads = shape.heads;
  p.chunks = 1 + (shape.tokens - lists.hubs + kChunk - 1) / kChunk;
  p.dim = static_cast<int>(shape.dim);
  p.padded_dim = (p.dim + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  p.hubs = static_cast<int>(lists.hubs);
  p.padded_hubs = (p.hubs + 15) / 16 * 16;
  p.row_offsets = lists.row_offsets;
  p.columns = lists.columns;
  p.t_row_offsets = lists.t_row_offsets;
  p.t_columns = lists.t_columns;
  p.max_degree = lists.max_degree;
  p.scale = static_cast<A>(options.scale);
  p.dropout = options.dropout_p > 0;
  p.drop_threshold = static_cast<uint32_t>(options.dropout_p * 4294967296.0);
  p.inverse_keep = static_cast<A>(1 / (1 - options.dropout_p));
  p.seed_low = static_cast<uint32_t>(options.seed);
  p.seed_high = static_cast<uint32_t>(static_cast<uint64_t>(options.seed) >> 32);
  return p;
}

void* advance(const Tensor& tensor, int64_t batch) {
  return static_cast<char*>(tensor.mutable_data_ptr()) +
         batch * tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
}

template <class A>
void run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Lists& lists, const Options& options,
                 const Tensor& out, const Tensor& lse) {
  const Kernels<A>& kernels = kernels_for_this_machine<A>();
  const Shape shape = shape_of(q);
  const int64_t group = batches_per_group(shape);
  Forward<A> f{make_problem<A>(shape, lists, options, kernels), storage_of(q), nullptr, nullptr};
  Problem<A>& p = f.problem;
  Input<A> q_rows(q, shape, group, kernels), k_rows(k, shape, group, kernels), v_rows(v, shape, group, kernels);
  const int64_t heads = group * shape.heads;
  Buffer<A> tables(heads * kernels.forward_table_size(p));
  Buffer<A> partials(heads * p.chunks * kernels.forward_partial_size(p));
  p.hub_tables = tables.get();
  p.partials = partials.get();
  const size_t scratch = kernels.forward_scratch_size(p);
  for (int64_t first = 0; first < shape.batch; first += group) {
    p.first_batch = first;
    p.batches = std::min(group, shape.batch - first);
    p.q = q_rows.rows(first, p.batches);
    p.k = k_rows.rows(first, p.batches);
    p.v = v_rows.rows(first, p.batches);
    f.out = advance(out, first);
    f.lse = static_cast<A*>(advance(lse, first));
    if (p.hubs > 0) {
      for_each_head(p, hub_cost(p), scratch, [&](int64_t b, int64_t h, A* s) { kernels.forward_prepare(f, b, h, s); });
    }
    for_each_item(p, 1, chunk_cost(p), scratch,
                  [&](int64_t b, int64_t h, int64_t c, A* s) { kernels.forward_chunk(f, b, h, c, s); });
    if (p.hubs > 0) {
      for_each_head(p, merge_cost(p), scratch, [&](int64_t b, int64_t h, A* s) { kernels.forward_merge(f, b, h, s); });
    }
  }
}

struct Saved {
  Tensor q, k, v, out, lse;
};

struct Gradients {
  Tensor dq, dk, dv;
};

template <class A>
void run_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Saved& saved,
                  const Lists& lists, const Options& options, const Gradients& gradients) {
  const Kernels<A>& kernels = kernels_for_this_machine<A>();
  const Shape shape = shape_of(saved.q);
  const int64_t group = batches_per_group(shape);
  Backward<A> b{};
  b.problem = make_problem<A>(shape, lists, options, kernels);
  b.storage = storage_of(saved.q);
  Problem<A>& p = b.problem;
  Input<A> q_rows(saved.q, shape, group, kernels), k_rows(saved.k, shape, group, kernels),
      v_rows(saved.v, shape, group, kernels), grad_rows(grad_out, shape, group, kernels);
  const int64_t heads = group * shape.heads;
  Buffer<A> tables(heads * kernels.backward_table_size(p));
  Buffer<A> partials(heads * p.chunks * kernels.backward_partial_size(p));
  Buffer<A> delta(heads * shape.tokens);
  p.hub_tables = tables.get();
  p.partials = partials.get();
  b.delta = delta.get();
  const Source out = source_of(saved.out);
  const Tensor lse = torch::stable::contiguous(saved.lse);
  const size_t scratch = kernels.backward_scratch_size(p);
  for (int64_t first = 0; first < shape.batch; first += group) {
    p.first_batch = first;
    p.batches = std::min(group, shape.batch - first);
    p.q = q_rows.rows(first, p.batches);
    p.k = k_rows.rows(first, p.batches);
    p.v = v_rows.rows(first, p.batches);
    b.grad_out = grad_rows.rows(first, p.batches);
    b.out = out;
    b.out.data = advance(saved.out, first);
    b.lse = static_cast<const A*>(advance(lse, first));
    if (grad_lse.has_value()) {
      b.grad_lse = static_cast<const A*>(advance(*grad_lse, first));
      b.grad_lse_batch = grad_lse->stride(0);
      b.grad_lse_head = grad_lse->stride(1);
      b.grad_lse_token = grad_lse->stride(2);
    }
    b.dq = advance(gradients.dq, first);
    b.dk = advance(gradients.dk, first);
    b.dv = advance(gradients.dv, first);
    for_each_item(p, 0, int64_t{kChunk} * p.padded_dim, scratch,
                  [&](int64_t n, int64_t h, int64_t c, A* s) { kernels.backward_delta(b, n, h, c, s); });
    if (p.hubs > 0) {
      for_each_head(p, hub_cost(p), 0, [&](int64_t n, int64_t h, A*) { kernels.backward_prepare(b, n, h); });
    }
    const int64_t first_chunk = p.hubs > 0 ? 0 : 1;
    for_each_item(p, first_chunk, 2 * chunk_cost(p), scratch,
                  [&](int64_t n, int64_t h, int64_t c, A* s) { kernels.backward_chunk(b, n, h, c, s); });
    if (p.hubs > 0) {
      for_each_head(p, 3 * merge_cost(p), scratch,
                    [&](int64_t n, int64_t h, A* s) { kernels.backward_merge(b, n, h, s); });
    }
  }
}

ScalarType lse_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_offsets,
                                   const Tensor& columns, int64_t num_hubs, double scale, double dropout_p,
                                   std::optional<Tensor> seed) {
  check_like(q, "q", q);
  check_like(k, "k", q);
  check_like(v, "v", q);
  const Options options = check_options(scale, dropout_p, seed);
  Lists lists{};
  lists.hubs = num_hubs;
  add_lists(lists, row_offsets, columns, shape_of(q), lists.row_offsets, lists.columns);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, lse_type(q));
  if (q.numel() > 0) {
    if (q.scalar_type() == ScalarType::Double) run_forward<double>(q, k, v, lists, options, out, lse);
    else run_forward<float>(q, k, v, lists, options, out, lse);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, std::optional<Tensor> grad_lse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const Tensor& row_offsets, const Tensor& columns,
                                            const Tensor& t_row_offsets, const Tensor& t_columns, int64_t num_hubs,
                                            double scale, double dropout_p, std::optional<Tensor> seed) {
  check_like(q, "q", q);
  check_like(k, "k", q);
  check_like(v, "v", q);
  check_like(out, "out", q);
  check_like(grad_out, "grad_out", q);
  check_per_row(lse, "lse", q, lse_type(q));
  if (grad_lse.has_value()) check_per_row(*grad_lse, "grad_lse", q, lse_type(q));
  const Options options = check_options(scale, dropout_p, seed);
  Lists lists{};
  lists.hubs = num_hubs;
  add_lists(lists, row_offsets, columns, shape_of(q), lists.row_offsets, lists.columns);
  add_lists(lists, t_row_offsets, t_columns, shape_of(q), lists.t_row_offsets, lists.t_columns);
  const Gradients gradients{torch::stable::new_empty(q, q.sizes()), torch::stable::new_empty(q, q.sizes()),
                            torch::stable::new_empty(q, q.sizes())};
  const Saved saved{q, k, v, out, lse};
  if (q.numel() > 0) {
    if (q.scalar_type() == ScalarType::Double) {
      run_backward<double>(grad_out, grad_lse, saved, lists, options, gradients);
    } else {
      run_backward<float>(grad_out, grad_lse, saved, lists, options, gradients);
    }
  }
  return {gradients.dq, gradients.dk, gradients.dv};
}

}  // namespace
}  // namespace fm::attention

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CPU, m) {
  m.impl("attention_forward_native", TORCH_BOX(&fm::attention::forward));
  m.impl("attention_backward_native", TORCH_BOX(&fm::attention::backward));
}
