// Backward kernels. Probabilities are recomputed from the log-sum-exp. With p = exp(s - lse), kept = dropout factor,
// dp = dO . v and delta = rowsum(dO * O) - dlse:  ds = p * (kept * dp - delta) * scale,
//   dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i,   dv_j = sum_i kept_ij p_ij dO_i.
// A vertex gathers its row from the neighbours and its column from the transposed lists, so nothing is scattered.
#pragma once

#include "attention/hubs.h"

namespace FM_SIMD_NS::attention {

// Packed hub rows of one (batch, head), and the log-sum-exp and delta of the hub rows.
template <class A>
struct BackwardTable {
  A *q_transposed, *k_transposed, *v_transposed, *grad_transposed, *q, *k, *grad, *lse, *delta;
};

template <class A>
size_t backward_table_size(const Problem<A>& p) {
  return static_cast<size_t>(p.padded_dim) * (4 * p.padded_hubs + 3 * p.hubs) + 2 * p.padded_hubs;
}

template <class A>
inline BackwardTable<A> backward_table(const Problem<A>& p, int64_t batch, int64_t head) {
  A* base = p.hub_tables + (batch * p.heads + head) * static_cast<int64_t>(backward_table_size(p));
  const int64_t wide = static_cast<int64_t>(p.padded_dim) * p.padded_hubs;
  const int64_t tall = static_cast<int64_t>(p.padded_dim) * p.hubs;
  BackwardTable<A> t;
  t.q_transposed = base;
  t.k_transposed = t.q_transposed + wide;
  t.v_transposed = t.k_transposed + wide;
  t.grad_transposed = t.v_transposed + wide;
  t.q = t.grad_transposed + wide;
  t.k = t.q + tall;
  t.grad = t.k + tall;
  t.lse = t.grad + tall;
  t.delta = t.lse + p.padded_hubs;
  return t;
}

// What the tokens of one chunk contribute to the gradients of the hub rows, each [hubs][padded_dim].
template <class A>
struct BackwardPartial {
  A *dq, *dk, *dv;
};

template <class A>
size_t backward_partial_size(const Problem<A>& p) {
  return 3 * static_cast<size_t>(p.hubs) * p.padded_dim;
}

template <class A>
inline BackwardPartial<A> backward_partial(const Problem<A>& p, int64_t batch, int64_t head, int64_t chunk) {
  const int64_t block = static_cast<int64_t>(p.hubs) * p.padded_dim;
  A* base = p.partials + 3 * block * ((batch * p.heads + head) * p.chunks + chunk);
  return {base, base + block, base + 2 * block};
}

template <class A>
struct BackwardScratch {
  A *weights, *gradients, *dq, *dk, *dv, *list, *list_gradients, *list_lse, *list_delta, *factor;
  uint32_t* tokens;
};

template <class A>
size_t backward_scratch_size(const Problem<A>& p) {
  const size_t rows = static_cast<size_t>(kBlock) * (2 * p.padded_hubs + 3 * p.padded_dim);
  const size_t chunk = rows + 6 * static_cast<size_t>(list_size(p)) + kMaxHubs;
  const size_t merge = static_cast<size_t>(p.padded_dim);
  return chunk > merge ? chunk : merge;
}

template <class A>
inline BackwardScratch<A> backward_scratch(const Problem<A>& p, A* base) {
  const int64_t list = list_size(p);
  BackwardScratch<A> s;
  s.weights = base;
  s.gradients = s.weights + kBlock * p.padded_hubs;
  s.dq = s.gradients + kBlock * p.padded_hubs;
  s.dk = s.dq + kBlock * p.padded_dim;
  s.dv = s.dk + kBlock * p.padded_dim;
  s.list = s.dv + kBlock * p.padded_dim;
  s.list_gradients = s.list + list;
  s.list_lse = s.list_gradients + list;
  s.list_delta = s.list_lse + list;
  s.factor = s.list_delta + list;
  s.tokens = reinterpret_cast<uint32_t*>(s.factor + list + kMaxHubs);
  return s;
}

// In place: weight = raw score -> kept probability, gradient = dp -> ds.
template <class A>
inline void finish_vector(const Problem<A>& p, A* weight, A* gradient, Vec<A> lse, Vec<A> delta, const A* factor) {
  const Vec<A> probability = exp(load(weight) * p.scale - lse);
  if (factor == nullptr) {
    store(weight, probability);
    store(gradient, probability * (load(gradient) - delta) * p.scale);
  } else {
    const Vec<A> kept = load(factor);
    store(weight, probability * kept);
    store(gradient, probability * (kept * load(gradient) - delta) * p.scale);
  }
}

// Block rows as queries, hubs as keys: dq of the rows (into `dq`, overwritten), and the hubs' dk and dv.
template <class A>
inline void queries_on_hubs(const Backward<A>& b, int64_t batch, int64_t head, int64_t first, int count,
                            const BackwardPartial<A>& partial, const BackwardScratch<A>& s, A* dq) {
  const Problem<A>& p = b.problem;
  const BackwardTable<A> table = backward_table(p, batch, head);
  const A* q = row_of(p.q, batch, first, head);
  const A* grad = row_of(b.grad_out, batch, first, head);
  const int64_t row_index = (batch * p.heads + head) * p.tokens + first;
  const HubTokens hubs = hub_tokens();
  const DropoutHead drop = dropout_head(p, batch, head);
  hub_scores(p, q, p.q.token, count, table.k_transposed, s.weights);
  hub_scores(p, grad, b.grad_out.token, count, table.v_transposed, s.gradients);
  for (int i = 0; i < count; ++i) {
    if (p.dropout) {
      dropout_factors(s.factor, p.hubs, hubs.token, static_cast<uint32_t>(first + i), true, drop, p.inverse_keep);
    }
    for (int h = 0; h < p.padded_hubs; h += kLanes<A>) {
      finish_vector(p, s.weights + i * p.padded_hubs + h, s.gradients + i * p.padded_hubs + h,
                    splat(b.lse[row_index + i]), splat(b.delta[row_index + i]), p.dropout ? s.factor + h : nullptr);
    }
  }
  weighted_tokens(p, s.gradients, count, q, p.q.token, partial.dk);
  weighted_tokens(p, s.weights, count, grad, b.grad_out.token, partial.dv);
  weighted_hubs(p, s.gradients, count, table.k, dq, false);
}

// Block rows as keys, hubs as queries: dk and dv of the rows (overwritten), and the hubs' dq.
template <class A>
inline void keys_under_hubs(const Backward<A>& b, int64_t batch, int64_t head, int64_t first, int count,
                            const BackwardPartial<A>& partial, const BackwardScratch<A>& s) {
  const Problem<A>& p = b.problem;
  const BackwardTable<A> table = backward_table(p, batch, head);
  const A* k = row_of(p.k, batch, first, head);
  const HubTokens hubs = hub_tokens();
  const DropoutHead drop = dropout_head(p, batch, head);
  hub_scores(p, k, p.k.token, count, table.q_transposed, s.weights);
  hub_scores(p, row_of(p.v, batch, first, head), p.v.token, count, table.grad_transposed, s.gradients);
  for (int i = 0; i < count; ++i) {
    if (p.dropout) {
      dropout_factors(s.factor, p.hubs, hubs.token, static_cast<uint32_t>(first + i), false, drop, p.inverse_keep);
    }
    for (int h = 0; h < p.padded_hubs; h += kLanes<A>) {
      finish_vector(p, s.weights + i * p.padded_hubs + h, s.gradients + i * p.padded_hubs + h, load(table.lse + h),
                    load(table.delta + h), p.dropout ? s.factor + h : nullptr);
    }
  }
  weighted_tokens(p, s.gradients, count, k, p.k.token, partial.dq);
  weighted_hubs(p, s.gradients, count, table.q, s.dk, false);
  weighted_hubs(p, s.weights, count, table.grad, s.dv, false);
}

// One vertex as a query of its neighbours: adds to its dq.
template <class A>
inline void neighbor_row(const Backward<A>& b, int64_t batch, int64_t head, int64_t token,
                         const BackwardScratch<A>& s, A* dq) {
  const Problem<A>& p = b.problem;
  const int64_t vertex = token - p.hubs;
  const int32_t* neighbors = p.columns + p.row_offsets[vertex];
  const int64_t degree = p.row_offsets[vertex + 1] - p.row_offsets[vertex];
  const int64_t row_index = (batch * p.heads + head) * p.tokens + token;
  const Neighbors<A> keys{row_of(p.k, batch, p.hubs, head), p.k.token};
  const Neighbors<A> values{row_of(p.v, batch, p.hubs, head), p.v.token};
  if (token + 1 < p.tokens) {
    const int64_t next_degree = p.row_offsets[vertex + 2] - p.row_offsets[vertex + 1];
    prefetch_neighbors(keys, neighbors + degree, next_degree, p.padded_dim);
    prefetch_neighbors(values, neighbors + degree, next_degree, p.padded_dim);
  }
  neighbor_dots(s.list, row_of(p.q, batch, token, head), keys, neighbors, degree, p.padded_dim);
  neighbor_dots(s.list_gradients, row_of(b.grad_out, batch, token, head), values, neighbors, degree, p.padded_dim);
  if (p.dropout) {
    for (int64_t j = 0; j < degree; ++j) s.tokens[j] = static_cast<uint32_t>(p.hubs + neighbors[j]);
    dropout_factors(s.factor, static_cast<int>(degree), s.tokens, static_cast<uint32_t>(token), true,
                    dropout_head(p, batch, head), p.inverse_keep);
  }
  for (int64_t j = 0; j < degree; j += kLanes<A>) {
    finish_vector(p, s.list + j, s.list_gradients + j, splat(b.lse[row_index]), splat(b.delta[row_index]),
                  p.dropout ? s.factor + j : nullptr);
  }
  add_neighbors(dq, s.list_gradients, keys, neighbors, degree, p.padded_dim);
}

// One vertex as a key of the vertices that list it: adds to its dk and dv.
template <class A>
inline void neighbor_column(const Backward<A>& b, int64_t batch, int64_t head, int64_t token,
                            const BackwardScratch<A>& s, A* dk, A* dv) {
  const Problem<A>& p = b.problem;
  const int64_t vertex = token - p.hubs;
  const int32_t* neighbors = p.t_columns + p.t_row_offsets[vertex];
  const int64_t degree = p.t_row_offsets[vertex + 1] - p.t_row_offsets[vertex];
  const int64_t first_vertex = (batch * p.heads + head) * p.tokens + p.hubs;
  const Neighbors<A> queries{row_of(p.q, batch, p.hubs, head), p.q.token};
  const Neighbors<A> grads{row_of(b.grad_out, batch, p.hubs, head), b.grad_out.token};
  if (token + 1 < p.tokens) {
    const int64_t next_degree = p.t_row_offsets[vertex + 2] - p.t_row_offsets[vertex + 1];
    prefetch_neighbors(queries, neighbors + degree, next_degree, p.padded_dim);
    prefetch_neighbors(grads, neighbors + degree, next_degree, p.padded_dim);
  }
  neighbor_dots(s.list, row_of(p.k, batch, token, head), queries, neighbors, degree, p.padded_dim);
  neighbor_dots(s.list_gradients, row_of(p.v, batch, token, head), grads, neighbors, degree, p.padded_dim);
  for (int64_t j = 0; j < degree; ++j) {
    s.list_lse[j] = b.lse[first_vertex + neighbors[j]];
    s.list_delta[j] = b.delta[first_vertex + neighbors[j]];
  }
  if (p.dropout) {
    for (int64_t j = 0; j < degree; ++j) s.tokens[j] = static_cast<uint32_t>(p.hubs + neighbors[j]);
    dropout_factors(s.factor, static_cast<int>(degree), s.tokens, static_cast<uint32_t>(token), false,
                    dropout_head(p, batch, head), p.inverse_keep);
  }
  for (int64_t j = 0; j < degree; j += kLanes<A>) {
    finish_vector(p, s.list + j, s.list_gradients + j, load(s.list_lse + j), load(s.list_delta + j),
                  p.dropout ? s.factor + j : nullptr);
  }
  add_neighbors(dk, s.list_gradients, queries, neighbors, degree, p.padded_dim);
  add_neighbors(dv, s.list, grads, neighbors, degree, p.padded_dim);
}

template <class A>
void backward_delta(const Backward<A>& b, int64_t batch, int64_t head, int64_t chunk, A* scratch) {
  const Problem<A>& p = b.problem;
  const Span span = chunk_tokens(p, chunk);
  for (int64_t token = span.first; token < span.first + span.count; ++token) {
    const int64_t offset = batch * b.out.batch + token * b.out.token + head * b.out.head;
    const A* out = static_cast<const A*>(b.out.data) + offset;
    const bool direct = b.out.storage == b.storage && b.out.dim == 1 && p.dim == p.padded_dim &&
                        b.storage == (sizeof(A) == 8 ? Storage::f64 : Storage::f32);
    if (!direct) {
      read_row(b.out.data, b.out.storage, offset, b.out.dim, p.dim, p.padded_dim, scratch);
      out = scratch;
    }
    const A* grad = row_of(b.grad_out, batch, token, head);
    Vec<A> sum{};
    for (int d = 0; d < p.padded_dim; d += kLanes<A>) sum += load(out + d) * load(grad + d);
    A delta = sum_lanes(sum);
    if (b.grad_lse != nullptr) {
      delta -= b.grad_lse[batch * b.grad_lse_batch + head * b.grad_lse_head + token * b.grad_lse_token];
    }
    b.delta[(batch * p.heads + head) * p.tokens + token] = delta;
  }
}

template <class A>
void backward_prepare(const Backward<A>& b, int64_t batch, int64_t head) {
  const Problem<A>& p = b.problem;
  if (p.hubs == 0) return;
  const BackwardTable<A> table = backward_table(p, batch, head);
  pack_transposed(p, p.q, batch, head, table.q_transposed);
  pack_transposed(p, p.k, batch, head, table.k_transposed);
  pack_transposed(p, p.v, batch, head, table.v_transposed);
  pack_transposed(p, b.grad_out, batch, head, table.grad_transposed);
  pack_straight(p, p.q, batch, head, table.q);
  pack_straight(p, p.k, batch, head, table.k);
  pack_straight(p, b.grad_out, batch, head, table.grad);
  const int64_t row_index = (batch * p.heads + head) * p.tokens;
  for (int hub = 0; hub < p.padded_hubs; ++hub) {
    table.lse[hub] = hub < p.hubs ? b.lse[row_index + hub] : A(0);
    table.delta[hub] = hub < p.hubs ? b.delta[row_index + hub] : A(0);
  }
}

template <class A>
void backward_chunk(const Backward<A>& b, int64_t batch, int64_t head, int64_t chunk, A* scratch) {
  const Problem<A>& p = b.problem;
  const Span span = chunk_tokens(p, chunk);
  const BackwardScratch<A> s = backward_scratch(p, scratch);
  const BackwardPartial<A> partial = backward_partial(p, batch, head, chunk);
  for (int64_t i = 0; i < 3 * static_cast<int64_t>(p.hubs) * p.padded_dim; ++i) partial.dq[i] = A(0);
  for (int64_t start = 0; start < span.count; start += kBlock) {
    const int count = static_cast<int>(span.count - start < kBlock ? span.count - start : kBlock);
    const int64_t first = span.first + start;
    if (chunk == 0) {
      queries_on_hubs(b, batch, head, first, count, partial, s, partial.dq + first * p.padded_dim);
      continue;
    }
    if (p.hubs > 0) {
      queries_on_hubs(b, batch, head, first, count, partial, s, s.dq);
      keys_under_hubs(b, batch, head, first, count, partial, s);
    } else {
      for (int i = 0; i < 3 * kBlock * p.padded_dim; ++i) s.dq[i] = A(0);
    }
    for (int i = 0; i < count; ++i) {
      A* const row[] = {s.dq + i * p.padded_dim, s.dk + i * p.padded_dim, s.dv + i * p.padded_dim};
      neighbor_row(b, batch, head, first + i, s, row[0]);
      neighbor_column(b, batch, head, first + i, s, row[1], row[2]);
      const int64_t offset = ((batch * p.tokens + first + i) * p.heads + head) * p.dim;
      write_row(b.dq, b.storage, offset, row[0], p.dim);
      write_row(b.dk, b.storage, offset, row[1], p.dim);
      write_row(b.dv, b.storage, offset, row[2], p.dim);
    }
  }
}

template <class A>
void backward_merge(const Backward<A>& b, int64_t batch, int64_t head, A* scratch) {
  const Problem<A>& p = b.problem;
  void* const targets[] = {b.dq, b.dk, b.dv};
  const int64_t block = static_cast<int64_t>(p.hubs) * p.padded_dim;
  for (int which = 0; which < 3; ++which) {
    for (int hub = 0; hub < p.hubs; ++hub) {
      for (int d = 0; d < p.padded_dim; d += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
          sum += load(backward_partial(p, batch, head, chunk).dq + which * block + hub * p.padded_dim + d);
        }
        store(scratch + d, sum);
      }
      write_row(targets[which], b.storage, ((batch * p.tokens + hub) * p.heads + head) * p.dim, scratch, p.dim);
    }
  }
}

}  // namespace FM_SIMD_NS::attention
