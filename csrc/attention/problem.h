// What the dispatching file (attention.cpp) hands to the kernels of one instruction set (attention_simd.cpp).
// Plain data only: code in a header that both include would be linked from either.
//
// The kernels see accumulation-type rows (float, or double for double tensors) whose length is a multiple of the
// vector length; tensors that are not like that are packed first. Tokens are hubs 0..hubs-1, then vertices.
// Work is cut into (batch, head, chunk): chunk 0 is the hub tokens, chunk c >= 1 the vertices
// [(c - 1) * kChunk, c * kChunk). Every chunk writes its own partial sums of what belongs to the hubs, and they are
// merged in the order of the chunks, so results depend neither on the number of threads nor on timing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fm::attention {

constexpr int kChunk = 128;   // vertices of one work item
constexpr int kBlock = 16;    // rows worked on at a time
constexpr int kMaxHubs = 64;
constexpr int kMaxDim = 256;

enum class Storage : int { f32, f64, f16, bf16 };

// Rows of a [batch, token, head, dim] tensor, strides in elements, unit stride along dim.
template <class A>
struct Rows {
  const A* data;
  int64_t batch, token, head;
};

// A tensor as it came: any storage type, any strides.
struct Source {
  const void* data;
  Storage storage;
  int64_t batch, token, head, dim;
};

template <class A>
struct Problem {
  int64_t first_batch;  // index of batch 0 of this problem in the whole call (for the dropout bits)
  int64_t batches, tokens, heads, chunks;
  int dim, padded_dim;    // padded to the vector length
  int hubs, padded_hubs;  // padded to 16
  int64_t max_degree;
  const int32_t *row_offsets, *columns, *t_row_offsets, *t_columns;  // the last two only in the backward
  A scale;
  bool dropout;
  uint32_t drop_threshold, seed_low, seed_high;
  A inverse_keep;
  Rows<A> q, k, v;
  A* hub_tables;  // packed rows of the hubs, of every (batch, head)
  A* partials;    // of every (batch, head, chunk)
};

template <class A>
struct Forward {
  Problem<A> problem;
  Storage storage;
  void* out;  // [batches, tokens, heads, dim], contiguous
  A* lse;     // [batches, heads, tokens], contiguous
};

template <class A>
struct Backward {
  Problem<A> problem;
  Rows<A> grad_out;
  Source out;
  const A* lse;                                           // [batches, heads, tokens], contiguous
  const A* grad_lse;                                      // may be null
  int64_t grad_lse_batch, grad_lse_head, grad_lse_token;  // strides
  A* delta;                                               // [batches, heads, tokens]
  Storage storage;
  void *dq, *dk, *dv;  // [batches, tokens, heads, dim], contiguous
};

// Sizes are in elements of A. Every function handles the work item it is given and nothing else.
template <class A>
struct Kernels {
  int lanes;
  size_t (*forward_table_size)(const Problem<A>&);    // of hub_tables, for one (batch, head)
  size_t (*forward_partial_size)(const Problem<A>&);  // of partials, for one (batch, head, chunk)
  size_t (*forward_scratch_size)(const Problem<A>&);  // for one thread
  void (*forward_prepare)(const Forward<A>&, int64_t batch, int64_t head, A* scratch);
  void (*forward_chunk)(const Forward<A>&, int64_t batch, int64_t head, int64_t chunk, A* scratch);
  void (*forward_merge)(const Forward<A>&, int64_t batch, int64_t head, A* scratch);
  size_t (*backward_table_size)(const Problem<A>&);
  size_t (*backward_partial_size)(const Problem<A>&);
  size_t (*backward_scratch_size)(const Problem<A>&);
  void (*backward_delta)(const Backward<A>&, int64_t batch, int64_t head, int64_t chunk, A* scratch);
  void (*backward_prepare)(const Backward<A>&, int64_t batch, int64_t head);
  void (*backward_chunk)(const Backward<A>&, int64_t batch, int64_t head, int64_t chunk, A* scratch);
  void (*backward_merge)(const Backward<A>&, int64_t batch, int64_t head, A* scratch);
  // Rows of `tokens` tokens from `first` on of one (batch, head), to contiguous rows of padded_dim elements.
  void (*pack)(const Source&, int64_t batch, int64_t head, int64_t first, int64_t tokens, int dim, int padded_dim,
               A* target);
};

}  // namespace fm::attention

#define FM_DECLARE_ATTENTION_KERNELS(isa)                        \
  namespace isa::attention {                                     \
  extern const fm::attention::Kernels<float> kernels_of_float;   \
  extern const fm::attention::Kernels<double> kernels_of_double; \
  }
