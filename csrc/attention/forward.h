// Forward kernels. Hub rows: every chunk of keys gives a maximum, a sum and a weighted sum of values for all hubs at
// once, merged at the end. Vertex rows: one softmax over the hubs and the listed neighbours.
#pragma once

#include "attention/hubs.h"

namespace FM_SIMD_NS::attention {

// Packed hub rows of one (batch, head).
template <class A>
struct ForwardTable {
  A *q_transposed, *k_transposed, *v;
};

template <class A>
size_t forward_table_size(const Problem<A>& p) {
  return static_cast<size_t>(p.padded_dim) * (2 * p.padded_hubs + p.hubs);
}

template <class A>
inline ForwardTable<A> forward_table(const Problem<A>& p, int64_t batch, int64_t head) {
  A* base = p.hub_tables + (batch * p.heads + head) * static_cast<int64_t>(forward_table_size(p));
  const int64_t block = static_cast<int64_t>(p.padded_dim) * p.padded_hubs;
  return {base, base + block, base + 2 * block};
}

// What one chunk of keys contributes to the hub rows.
template <class A>
struct ForwardPartial {
  A *maximum, *sum, *values;
};

template <class A>
size_t forward_partial_size(const Problem<A>& p) {
  return 2 * static_cast<size_t>(p.padded_hubs) + static_cast<size_t>(p.hubs) * p.padded_dim;
}

template <class A>
inline ForwardPartial<A> forward_partial(const Problem<A>& p, int64_t batch, int64_t head, int64_t chunk) {
  const int64_t index = (batch * p.heads + head) * p.chunks + chunk;
  A* base = p.partials + index * static_cast<int64_t>(forward_partial_size(p));
  return {base, base + p.padded_hubs, base + 2 * p.padded_hubs};
}

template <class A>
struct ForwardScratch {
  A *scores, *block_scores, *rows, *list, *factor;
  uint32_t* tokens;
};

template <class A>
size_t forward_scratch_size(const Problem<A>& p) {
  const size_t list = static_cast<size_t>(list_size(p));
  const size_t chunk = static_cast<size_t>(kChunk + kBlock) * p.padded_hubs +
                       static_cast<size_t>(kBlock) * p.padded_dim + 3 * list + kMaxHubs;
  const size_t merge = 3 * static_cast<size_t>(p.padded_hubs) + static_cast<size_t>(p.hubs) * p.padded_dim;
  return chunk > merge ? chunk : merge;
}

template <class A>
inline ForwardScratch<A> forward_scratch(const Problem<A>& p, A* base) {
  ForwardScratch<A> s;
  s.scores = base;
  s.block_scores = s.scores + kChunk * p.padded_hubs;
  s.rows = s.block_scores + kBlock * p.padded_hubs;
  s.list = s.rows + kBlock * p.padded_dim;
  s.factor = s.list + list_size(p);
  s.tokens = reinterpret_cast<uint32_t*>(s.factor + list_size(p) + kMaxHubs);
  return s;
}

// The hub rows over the keys of one chunk. Lanes are hubs, so the softmax needs no sums across lanes.
template <class A>
inline void hub_rows(const Problem<A>& p, int64_t batch, int64_t head, int64_t chunk, A* scores, A* factor) {
  constexpr int lanes = kLanes<A>;
  const Span span = chunk_tokens(p, chunk);
  const ForwardTable<A> table = forward_table(p, batch, head);
  const ForwardPartial<A> partial = forward_partial(p, batch, head, chunk);
  const int width = p.padded_hubs;
  for (int64_t i = 0; i < span.count; i += kBlock) {
    const int count = static_cast<int>(span.count - i < kBlock ? span.count - i : kBlock);
    hub_scores(p, row_of(p.k, batch, span.first + i, head), p.k.token, count, table.q_transposed, scores + i * width);
  }
  for (int hub = 0; hub < p.padded_hubs; hub += lanes) {
    Vec<A> top = splat(-kInfinity<A>), sum{};
    for (int64_t i = 0; i < span.count; ++i) {
      const Vec<A> score = load(scores + i * width + hub) * p.scale;
      store(scores + i * width + hub, score);
      top = max<A>(score, top);
    }
    store(partial.maximum + hub, top);
    for (int64_t i = 0; i < span.count; ++i) {
      const Vec<A> weight = exp(load(scores + i * width + hub) - top);
      store(scores + i * width + hub, weight);
      sum += weight;
    }
    store(partial.sum + hub, sum);
  }
  if (p.dropout) {
    const HubTokens hubs = hub_tokens();
    const DropoutHead drop = dropout_head(p, batch, head);
    for (int64_t i = 0; i < span.count; ++i) {
      dropout_factors(factor, p.hubs, hubs.token, static_cast<uint32_t>(span.first + i), false, drop, p.inverse_keep);
      for (int hub = 0; hub < p.hubs; ++hub) scores[i * width + hub] *= factor[hub];
    }
  }
  for (int64_t i = 0; i < static_cast<int64_t>(p.hubs) * p.padded_dim; ++i) partial.values[i] = A(0);
  for (int64_t i = 0; i < span.count; i += kBlock) {
    const int count = static_cast<int>(span.count - i < kBlock ? span.count - i : kBlock);
    weighted_tokens(p, scores + i * width, count, row_of(p.v, batch, span.first + i, head), p.v.token,
                    partial.values);
  }
}

// Softmax of one vertex row in place: `hub` holds padded_hubs raw scores, `list` `degree` of them. Weights are
// normalised; the log-sum-exp is returned (-inf, and zero weights, for a row without keys).
template <class A>
inline A row_softmax(const Problem<A>& p, A* hub, A* list, int64_t degree) {
  constexpr int lanes = kLanes<A>;
  if (p.hubs == 0 && degree == 0) return -kInfinity<A>;
  const int64_t padded = (degree + lanes - 1) / lanes * lanes;
  Vec<A> top = splat(-kInfinity<A>);
  for (int h = 0; h < p.padded_hubs; h += lanes) {
    const Vec<A> score = keep_first<A>(load(hub + h) * p.scale, p.hubs - h);
    store(hub + h, score);
    top = max<A>(score, top);
  }
  for (int64_t j = 0; j < padded; j += lanes) {
    const Vec<A> score = keep_first<A>(load(list + j) * p.scale, degree - j);
    store(list + j, score);
    top = max<A>(score, top);
  }
  const A maximum = max_lanes(top);
  Vec<A> sum{};
  for (int h = 0; h < p.padded_hubs; h += lanes) {
    const Vec<A> weight = exp(load(hub + h) - maximum);
    store(hub + h, weight);
    sum += weight;
  }
  for (int64_t j = 0; j < padded; j += lanes) {
    const Vec<A> weight = exp(load(list + j) - maximum);
    store(list + j, weight);
    sum += weight;
  }
  const A total = sum_lanes(sum);
  const A inverse = A(1) / total;
  for (int h = 0; h < p.padded_hubs; h += lanes) store(hub + h, load(hub + h) * inverse);
  for (int64_t j = 0; j < padded; j += lanes) store(list + j, load(list + j) * inverse);
  return maximum + static_cast<A>(sizeof(A) == 4 ? __builtin_logf(total) : __builtin_log(total));
}

// Up to kBlock vertex rows from token `first` on.
template <class A>
inline void vertex_rows(const Forward<A>& f, int64_t batch, int64_t head, int64_t first, int count,
                        const ForwardScratch<A>& s) {
  const Problem<A>& p = f.problem;
  const ForwardTable<A> table = forward_table(p, batch, head);
  const HubTokens hubs = hub_tokens();
  const DropoutHead drop = dropout_head(p, batch, head);
  if (p.hubs > 0) {
    hub_scores(p, row_of(p.q, batch, first, head), p.q.token, count, table.k_transposed, s.block_scores);
  }
  for (int i = 0; i < count; ++i) {
    const int64_t token = first + i, vertex = token - p.hubs;
    const int32_t* neighbors = p.columns + p.row_offsets[vertex];
    const int64_t degree = p.row_offsets[vertex + 1] - p.row_offsets[vertex];
    A* hub = s.block_scores + i * p.padded_hubs;
    const Neighbors<A> keys{row_of(p.k, batch, p.hubs, head), p.k.token};
    const Neighbors<A> values{row_of(p.v, batch, p.hubs, head), p.v.token};
    if (token + 1 < p.tokens) {
      const int64_t next_degree = p.row_offsets[vertex + 2] - p.row_offsets[vertex + 1];
      prefetch_neighbors(keys, neighbors + degree, next_degree, p.padded_dim);
      prefetch_neighbors(values, neighbors + degree, next_degree, p.padded_dim);
    }
    neighbor_dots(s.list, row_of(p.q, batch, token, head), keys, neighbors, degree, p.padded_dim);
    f.lse[(batch * p.heads + head) * p.tokens + token] = row_softmax(p, hub, s.list, degree);
    if (p.dropout) {
      dropout_factors(s.factor, p.hubs, hubs.token, static_cast<uint32_t>(token), true, drop, p.inverse_keep);
      for (int h = 0; h < p.hubs; ++h) hub[h] *= s.factor[h];
      for (int64_t j = 0; j < degree; ++j) s.tokens[j] = static_cast<uint32_t>(p.hubs + neighbors[j]);
      dropout_factors(s.factor, static_cast<int>(degree), s.tokens, static_cast<uint32_t>(token), true, drop,
                      p.inverse_keep);
      for (int64_t j = 0; j < degree; ++j) s.list[j] *= s.factor[j];
    }
    A* row = s.rows + i * p.padded_dim;
    for (int d = 0; d < p.padded_dim; ++d) row[d] = A(0);
    add_neighbors(row, s.list, values, neighbors, degree, p.padded_dim);
  }
  if (p.hubs > 0) weighted_hubs(p, s.block_scores, count, table.v, s.rows, true);
  for (int i = 0; i < count; ++i) {
    const int64_t offset = ((batch * p.tokens + first + i) * p.heads + head) * p.dim;
    write_row(f.out, f.storage, offset, s.rows + i * p.padded_dim, p.dim);
  }
}

template <class A>
void forward_prepare(const Forward<A>& f, int64_t batch, int64_t head, A* scratch) {
  const Problem<A>& p = f.problem;
  if (p.hubs == 0) return;
  const ForwardTable<A> table = forward_table(p, batch, head);
  const ForwardScratch<A> s = forward_scratch(p, scratch);
  pack_transposed(p, p.q, batch, head, table.q_transposed);
  pack_transposed(p, p.k, batch, head, table.k_transposed);
  pack_straight(p, p.v, batch, head, table.v);
  hub_rows(p, batch, head, 0, s.scores, s.factor);
}

template <class A>
void forward_chunk(const Forward<A>& f, int64_t batch, int64_t head, int64_t chunk, A* scratch) {
  const Problem<A>& p = f.problem;
  const ForwardScratch<A> s = forward_scratch(p, scratch);
  const Span span = chunk_tokens(p, chunk);
  if (p.hubs > 0) hub_rows(p, batch, head, chunk, s.scores, s.factor);
  for (int64_t i = 0; i < span.count; i += kBlock) {
    const int count = static_cast<int>(span.count - i < kBlock ? span.count - i : kBlock);
    vertex_rows(f, batch, head, span.first + i, count, s);
  }
}

template <class A>
void forward_merge(const Forward<A>& f, int64_t batch, int64_t head, A* scratch) {
  constexpr int lanes = kLanes<A>;
  const Problem<A>& p = f.problem;
  A* maximum = scratch;
  A* sum = maximum + p.padded_hubs;
  A* weight = sum + p.padded_hubs;
  A* row = weight + p.padded_hubs;  // [hubs][padded_dim]
  for (int hub = 0; hub < p.padded_hubs; hub += lanes) {
    Vec<A> top = splat(-kInfinity<A>);
    for (int64_t c = 0; c < p.chunks; ++c) {
      top = max<A>(load(forward_partial(p, batch, head, c).maximum + hub), top);
    }
    store(maximum + hub, top);
    store(sum + hub, Vec<A>{});
  }
  for (int64_t i = 0; i < static_cast<int64_t>(p.hubs) * p.padded_dim; ++i) row[i] = A(0);
  for (int64_t c = 0; c < p.chunks; ++c) {
    const ForwardPartial<A> partial = forward_partial(p, batch, head, c);
    for (int hub = 0; hub < p.padded_hubs; hub += lanes) {
      const Vec<A> w = exp(load(partial.maximum + hub) - load(maximum + hub));
      store(weight + hub, w);
      store(sum + hub, load(sum + hub) + w * load(partial.sum + hub));
    }
    for (int hub = 0; hub < p.hubs; ++hub) {
      A* target = row + hub * p.padded_dim;
      const A* values = partial.values + hub * p.padded_dim;
      for (int d = 0; d < p.padded_dim; d += lanes) {
        store(target + d, load(target + d) + weight[hub] * load(values + d));
      }
    }
  }
  for (int hub = 0; hub < p.hubs; ++hub) {
    A* target = row + hub * p.padded_dim;
    const A inverse = A(1) / sum[hub];
    for (int d = 0; d < p.padded_dim; d += lanes) store(target + d, load(target + d) * inverse);
    write_row(f.out, f.storage, ((batch * p.tokens + hub) * p.heads + head) * p.dim, target, p.dim);
    f.lse[(batch * p.heads + head) * p.tokens + hub] =
        maximum[hub] + static_cast<A>(sizeof(A) == 4 ? __builtin_logf(sum[hub]) : __builtin_log(sum[hub]));
  }
}

}  // namespace FM_SIMD_NS::attention
