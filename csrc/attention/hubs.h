// The dense part that forward and backward share: packed hub rows, scores against all hubs, per-thread scratch.
#pragma once

#include "attention/rows.h"
#include "attention/small_gemm.h"

namespace FM_SIMD_NS::attention {

// Token numbers 0..63, the hubs, as vector lanes of the dropout bits.
struct HubTokens {
  uint32_t token[kMaxHubs];
};

inline HubTokens hub_tokens() {
  HubTokens tokens;
  for (int i = 0; i < kMaxHubs; ++i) tokens.token[i] = static_cast<uint32_t>(i);
  return tokens;
}

inline uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return x;
}

template <class A>
inline DropoutHead dropout_head(const Problem<A>& p, int64_t batch, int64_t head) {
  const uint32_t index = static_cast<uint32_t>((p.first_batch + batch) * p.heads + head);
  return {mix32(mix32(index ^ p.seed_low) + p.seed_high), p.drop_threshold};
}

// Room for a list of neighbours in vectors of any length, with slack for the fours of neighbor_dots.
template <class A>
inline int64_t list_size(const Problem<A>& p) {
  return (p.max_degree + 31) / 16 * 16;
}

// target[d][hub] = row(hub)[d], zero in the padding lanes.
template <class A>
inline void pack_transposed(const Problem<A>& p, const Rows<A>& rows, int64_t batch, int64_t head, A* target) {
  for (int d = 0; d < p.padded_dim; ++d) {
    for (int hub = p.hubs; hub < p.padded_hubs; ++hub) target[d * p.padded_hubs + hub] = A(0);
  }
  for (int hub = 0; hub < p.hubs; ++hub) {
    const A* row = row_of(rows, batch, hub, head);
    for (int d = 0; d < p.padded_dim; ++d) target[d * p.padded_hubs + hub] = row[d];
  }
}

template <class A>
inline void pack_straight(const Problem<A>& p, const Rows<A>& rows, int64_t batch, int64_t head, A* target) {
  for (int hub = 0; hub < p.hubs; ++hub) {
    const A* row = row_of(rows, batch, hub, head);
    for (int d = 0; d < p.padded_dim; ++d) target[hub * p.padded_dim + d] = row[d];
  }
}

// score[i][hub] = row(first + i) . table[:, hub] for `count` tokens.
template <class A>
inline void hub_scores(const Problem<A>& p, const A* rows, int64_t row_stride, int count, const A* table, A* score) {
  small_gemm<A>({rows, row_stride, 1, table, p.padded_hubs, score, p.padded_hubs, p.dim, false}, count,
                p.padded_hubs);
}

// out[i] (+)= sum over hubs of weight[i][hub] * table[hub].
template <class A>
inline void weighted_hubs(const Problem<A>& p, const A* weight, int count, const A* table, A* out, bool accumulate) {
  small_gemm<A>({weight, p.padded_hubs, 1, table, p.padded_dim, out, p.padded_dim, p.hubs, accumulate}, count,
                p.padded_dim);
}

// out[hub] += sum over the tokens of weight[i][hub] * row(first + i).
template <class A>
inline void weighted_tokens(const Problem<A>& p, const A* weight, int count, const A* rows, int64_t row_stride,
                            A* out) {
  small_gemm<A>({weight, 1, p.padded_hubs, rows, row_stride, out, p.padded_dim, count, true}, p.hubs, p.padded_dim);
}

// The tokens of a chunk: [first, first + count).
struct Span {
  int64_t first;
  int64_t count;
};

template <class A>
inline Span chunk_tokens(const Problem<A>& p, int64_t chunk) {
  if (chunk == 0) return {0, p.hubs};
  const int64_t first = p.hubs + (chunk - 1) * kChunk;
  const int64_t left = p.tokens - first;
  return {first, left < kChunk ? left : kChunk};
}

}  // namespace FM_SIMD_NS::attention
