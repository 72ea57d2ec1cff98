// Backward pass: the same stream as the forward, with q and the gradient of the output beside k and v. A warp computes
// dq of the 16 queries of a window from its list of keys, then dk and dv of the same 16 vertices as keys from the list
// of the queries that see them: every gradient is gathered by the warp that owns it. For every tile of hubs one warp
// adds up dq and one dk and dv, over all steps.

#pragma once

#include "attention/dropout.cuh"
#include "attention/stream.cuh"

namespace fm::attention {

struct BackwardArguments {
  Plan plan;        // lists of the keys that a window of queries sees
  Plan transposed;  // the same with lists of the queries that see a window of keys
  Sizes sizes;
  Strided inputs[4];      // k, v, q, gradient of the output: the order in shared memory
  Strided out;            // contiguous
  const float* lse;       // [B, H, L]
  const float* grad_lse;  // the same shape, or null
  void* grads[3];         // of q, k, v: [B, L, H, D], contiguous
  float* partials;        // [3, B, H, segments, hubs, DIM] where there are several segments
  float scale, scale_log2e;
  Dropout dropout;
};

// What the softmax of one query left behind: log-sum-exp (base 2), and sum(grad_out out) - grad_lse.
using RowStatistics = float2;

struct SharedRows {
  SharedAddress k, v, q, grad;
  const RowStatistics* statistics;  // [slots, heads of the group]
  const int* slot_tokens;           // with dropout
};

// 16 rows of this warp (as fragments, with their statistics and tokens) and where their partners lie. For dq the rows
// are queries: a = q, b = gradient, partners k, v. For dk and dv they are keys: a = k, b = v, partners q, gradient.
struct OwnedRows {
  SharedAddress a, b;
  uint32_t offset;  // of row l % 16 and this lane's piece
  RowStatistics low, high;
  int token_low, token_high;
};

// Slots of the columns that this lane holds scores of, 8 j + 2 (l % 4) + e of each group of 16 keys.
struct ColumnSlots {
  KeySlots at[2][2];
  __device__ __forceinline__ void read(const Plan& plan, int chunk) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint2 words = __ldg(plan.lists + chunk * 16 + 8 * j + 2 * (threadIdx.x % 4) + e);
        at[j][e] = {words.x, words.y};
      }
    }
  }
};

// From scores s and products p of the gradient with v (of one pair): the weight that multiplies the gradient (for dv)
// and the gradient of the score. Both are 0 for pairs that do not see each other.
template <bool DROPOUT>
__device__ __forceinline__ void differentiate(float& s, float& p, bool seen, const RowStatistics& query, float scale,
                                              const Dropout& dropout, uint32_t key, int query_token, int key_token) {
  const float weight = seen ? exp2_fast(fmaf(s, scale, -query.x)) : 0.f;
  float kept = weight;
  if constexpr (DROPOUT) {
    const bool keep = dropout_bits(key, query_token, key_token) >= dropout.threshold;
    p = keep ? p * dropout.keep_scale : 0.f;
    kept = keep ? weight * dropout.keep_scale : 0.f;
  }
  p = seen ? weight * (p - query.y) : 0.f;
  s = kept;
}

// One chunk of 64 partners of the owned rows. Adds the gradients of the scores times the first partner tensor to
// `first`, and for owned keys the weights times the gradient to `second`.
template <typename T, int DIM, bool OWNS_KEYS, bool DROPOUT>
__device__ __forceinline__ void accumulate_chunk(float (*first)[4], float (*second)[4], const BackwardArguments& p,
                                                 const Plan& plan, const SharedRows& rows, const OwnedRows& owned,
                                                 int chunk, int head, unsigned long long mask_low,
                                                 unsigned long long mask_high, uint32_t dropout_key) {
  constexpr int kHeads = Layout<DIM>::kHeads;
  const SharedAddress partner_a = OWNS_KEYS ? rows.q : rows.k, partner_b = OWNS_KEYS ? rows.grad : rows.v;
  // With two sums to keep, the owned rows are read again for every group instead of kept.
  constexpr bool kKeep = !OWNS_KEYS;
  uint32_t a[DIM / 16][4], b[DIM / 16][4];
  if constexpr (kKeep) {
    read_rows<T, DIM>(a, owned.a, owned.offset);
    read_rows<T, DIM>(b, owned.b, owned.offset);
  }
  KeySlots slots = read_slots(plan, chunk);
  ColumnSlots columns;
  if constexpr (OWNS_KEYS || DROPOUT) columns.read(plan, chunk);
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
    const uint32_t offset = lane_offset<DIM>(slots[0], head);
    float scores[2][4] = {}, products[2][4] = {};
    if constexpr (!kKeep) read_rows<T, DIM>(a, owned.a, owned.offset);
    multiply_keys<T, DIM>(scores, a, partner_a, offset);
    if constexpr (!kKeep) read_rows<T, DIM>(b, owned.b, owned.offset);
    multiply_keys<T, DIM>(products, b, partner_b, offset);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int bit = 8 * j + e;
        RowStatistics low = owned.low, high = owned.high;
        int token = 0;
        if constexpr (OWNS_KEYS || DROPOUT) {
          const int slot = columns.at[j][e][0];
          if constexpr (OWNS_KEYS) low = high = rows.statistics[slot * kHeads + head];
          if constexpr (DROPOUT) token = rows.slot_tokens[slot];
        }
        differentiate<DROPOUT>(scores[j][e], products[j][e], mask_low >> bit & 1, low, p.scale_log2e, p.dropout,
                               dropout_key, OWNS_KEYS ? token : owned.token_low, OWNS_KEYS ? owned.token_low : token);
        differentiate<DROPOUT>(scores[j][2 + e], products[j][2 + e], mask_high >> bit & 1, high, p.scale_log2e,
                               p.dropout, dropout_key, OWNS_KEYS ? token : owned.token_high,
                               OWNS_KEYS ? owned.token_high : token);
      }
    }
    uint32_t weights[4];
    as_weights<T>(weights, products);
    multiply_values<T, DIM>(first, weights, partner_a, offset);
    if constexpr (OWNS_KEYS) {
      as_weights<T>(weights, scores);
      multiply_values<T, DIM>(second, weights, partner_b, offset);
    }
    mask_low >>= 16;
    mask_high >>= 16;
    next_group(slots);
    if constexpr (OWNS_KEYS || DROPOUT) {
#pragma unroll
      for (int i = 0; i < 4; ++i) next_group(columns.at[i / 2][i % 2]);
    }
  }
}

template <int DIM>
__device__ __forceinline__ void clear(float (*acc)[4]) {
#pragma unroll
  for (int i = 0; i < DIM / 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;
}

// All partners of a window's 16 vertices, in one of the two roles.
template <typename T, int DIM, bool OWNS_KEYS, bool DROPOUT>
__device__ __forceinline__ void backward_window(const BackwardArguments& p, const BlockPlace& place,
                                                const SharedRows& rows, int window) {
  constexpr int kHeads = Layout<DIM>::kHeads;
  const Plan& plan = OWNS_KEYS ? p.transposed : p.plan;
  const LaneRows lane = lane_rows();
  const int* tokens = p.plan.rows + window * kRows;
  const int* row_slots = p.plan.row_slots + window * kRows;
  const int token_low = __ldg(tokens + lane.low), token_high = __ldg(tokens + lane.high);
  const int slot_low = __ldg(row_slots + lane.low), slot_high = __ldg(row_slots + lane.high);
  const int lane_slot = __ldg(row_slots + threadIdx.x % kRows);
  const int extra_begin = __ldg(plan.extras + window), extra_end = __ldg(plan.extras + window + 1);
#pragma unroll 1
  for (int head = 0; head < kHeads && place.first_head + head < p.sizes.heads; ++head) {
    float first[DIM / 8][4], second[OWNS_KEYS ? DIM / 8 : 1][4];
    clear<DIM>(first);
    if constexpr (OWNS_KEYS) clear<DIM>(second);
    const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
    const uint32_t key = DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u;
    const OwnedRows owned{OWNS_KEYS ? rows.k : rows.q,
                          OWNS_KEYS ? rows.v : rows.grad,
                          lane_offset<DIM>(lane_slot, head),
                          rows.statistics[slot_low * kHeads + head],
                          rows.statistics[slot_high * kHeads + head],
                          token_low,
                          token_high};
    for (int chunk = window, extra = extra_begin;; chunk = p.plan.num_windows + extra++) {
      const unsigned long long low = __ldg(plan.masks + chunk * kRows + lane.low) >> (2 * (threadIdx.x % 4));
      const unsigned long long high = __ldg(plan.masks + chunk * kRows + lane.high) >> (2 * (threadIdx.x % 4));
      accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT>(first, second, p, plan, rows, owned, chunk, head, low, high, key);
      if (extra >= extra_end) break;
    }
    const auto store = [&](const float(*acc)[4], void* tensor, float factor) {
      const int number = place.first_head + head;
      store_rows<T, DIM>(acc, factor, factor, output_row<T>(tensor, p.sizes, place.batch, number, token_low),
                         output_row<T>(tensor, p.sizes, place.batch, number, token_high), token_low >= 0,
                         token_high >= 0, p.sizes.dim);
    };
    store(first, p.grads[OWNS_KEYS ? 1 : 0], p.scale);
    if constexpr (OWNS_KEYS) store(second, p.grads[2], 1.f);
  }
}

// A tile of 16 hubs in one of the two roles: what its warp adds up over all steps, for every head of the group.
template <typename T, int DIM, bool OWNS_KEYS>
struct HubGradients {
  static constexpr int kHeads = Layout<DIM>::kHeads;
  float first[kHeads][DIM / 8][4], second[OWNS_KEYS ? kHeads : 1][DIM / 8][4];
  int tile;

  __device__ __forceinline__ void begin(int number) {
    tile = number;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      clear<DIM>(first[head]);
      if constexpr (OWNS_KEYS) clear<DIM>(second[head]);
    }
  }

  template <bool DROPOUT>
  __device__ __forceinline__ void accumulate(const BackwardArguments& p, const BlockPlace& place,
                                             const SharedRows& rows, const Step& step) {
    const LaneRows lane = lane_rows();
    const int last = p.sizes.hubs - 1;  // slot and token of the last hub
    const int low = min(tile * kRows + lane.low, last), high = min(tile * kRows + lane.high, last);
    const int lane_slot = min(tile * kRows + static_cast<int>(threadIdx.x % kRows), last);
    const int64_t batch_head = place.batch * p.sizes.heads + place.first_head;
    for (int begin = 0, chunk = step.hub_chunk; begin < step.hub_keys; begin += kKeys, ++chunk) {
      const int count = step.hub_keys - begin;
      const unsigned long long all = ~0ull >> (count < kKeys ? kKeys - count : 0);
      const unsigned long long mask = all >> (2 * (threadIdx.x % 4));
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        const uint32_t key = DROPOUT ? dropout_key(*p.dropout.seed, batch_head + head) : 0u;
        const OwnedRows owned{OWNS_KEYS ? rows.k : rows.q,
                              OWNS_KEYS ? rows.v : rows.grad,
                              lane_offset<DIM>(lane_slot, head),
                              rows.statistics[low * kHeads + head],
                              rows.statistics[high * kHeads + head],
                              low,
                              high};
        accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT>(first[head], second[OWNS_KEYS ? head : 0], p, p.plan, rows, owned,
                                                     chunk, head, mask, mask, key);
      }
    }
  }

  __device__ __forceinline__ void finish(const BackwardArguments& p, const BlockPlace& place) {
    const LaneRows lane = lane_rows();
    const int low = tile * kRows + lane.low, high = tile * kRows + lane.high;
    const bool has_low = low < p.sizes.hubs, has_high = high < p.sizes.hubs;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = place.first_head + i;
      if (head >= p.sizes.heads) continue;
      const auto write = [&](const float(*acc)[4], int tensor, float factor) {
        if (p.plan.num_segments == 1) {
          store_rows<T, DIM>(acc, factor, factor, output_row<T>(p.grads[tensor], p.sizes, place.batch, head, low),
                             output_row<T>(p.grads[tensor], p.sizes, place.batch, head, high), has_low, has_high,
                             p.sizes.dim);
          return;
        }
        const int64_t heads = p.sizes.batch * p.sizes.heads, number = place.batch * p.sizes.heads + head;
        const int64_t first_row = ((tensor * heads + number) * p.plan.num_segments + place.segment) * p.sizes.hubs;
        float* partial = p.partials + first_row * DIM;
#pragma unroll
        for (int j = 0; j < DIM / 8; ++j) {
          const int column = 8 * j + 2 * (threadIdx.x % 4);
          const float2 a = make_float2(acc[j][0] * factor, acc[j][1] * factor);
          const float2 b = make_float2(acc[j][2] * factor, acc[j][3] * factor);
          if (has_low) *reinterpret_cast<float2*>(partial + low * DIM + column) = a;
          if (has_high) *reinterpret_cast<float2*>(partial + high * DIM + column) = b;
        }
      };
      write(first[i], OWNS_KEYS ? 1 : 0, p.scale);
      if constexpr (OWNS_KEYS) write(second[i], 2, 1.f);
    }
  }
};

// Statistics of the rows that have just arrived: the gradient is in shared memory, the output is read here.
template <typename T, int DIM>
__device__ __forceinline__ void write_statistics(const BackwardArguments& p, const BlockPlace& place,
                                                 const unsigned char* grads, RowStatistics* statistics,
                                                 const RowRange& range, int end_step) {
  using L = Layout<DIM>;
  const int piece = threadIdx.x % L::kPieces, head_in_group = piece / L::kHeadPieces;
  const int head = place.first_head + head_in_group, column = piece % L::kHeadPieces * 8;
  const bool there = head < p.sizes.heads, valid = there && column < p.sizes.dim;
  const int rows = blockDim.x / L::kPieces;
  // Lanes leave the loop together: the sums over pieces need all lanes of a row, and warps hold whole rows.
  for (int first = range.begin; first < range.end; first += rows) {
    const int i = first + threadIdx.x / L::kPieces;
    const RowEntry entry = read_entry(p.plan, range, min(i, range.end - 1));
    const bool copied = i < range.end && entry.step < end_step;
    float sum = 0.f;
    if (valid && copied) {
      const uint4 mine = *reinterpret_cast<const uint4*>(grads + L::offset(entry.slot, piece));
      const T* row = head_base<T>(p.out, place.batch, head) + entry.token * p.out.token + column;
      sum = dot_pieces<T>(mine, __ldg(reinterpret_cast<const uint4*>(row)));
    }
#pragma unroll
    for (int distance = 1; distance < L::kHeadPieces; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (copied && column == 0 && there) {
      const int64_t number = (place.batch * p.sizes.heads + head) * p.sizes.tokens + entry.token;
      const float grad_lse = p.grad_lse ? __ldg(p.grad_lse + number) : 0.f;
      statistics[entry.slot * L::kHeads + head_in_group] = make_float2(__ldg(p.lse + number) * kLog2e, sum - grad_lse);
    }
  }
}

// Bytes of shared memory: four rows and the statistics per slot, with dropout the tokens.
template <int DIM>
constexpr int backward_memory(int slots, bool dropout) {
  return slots * (4 * Layout<DIM>::kBytes + 8 * Layout<DIM>::kHeads + (dropout ? 4 : 0));
}

constexpr int backward_threads(int hub_tiles) { return (kWindowsPerStep + 2 * hub_tiles) * kWarp; }

// Tiles of hubs that fit: wide heads need all registers of a multiprocessor for six warps.
template <int DIM>
constexpr int kBackwardHubTiles = DIM == 128 ? 1 : 4;

// The bounds leave 168 registers, enough for two blocks of one tile of hubs.
template <typename T, int DIM, bool DROPOUT>
__global__ void __launch_bounds__(backward_threads(kBackwardHubTiles<DIM>), 1)
    backward_kernel(const __grid_constant__ BackwardArguments p) {
  using L = Layout<DIM>;
  unsigned char* memory = dynamic_shared();
  const int tensor_bytes = p.plan.slots * L::kBytes;
  RowStatistics* statistics = reinterpret_cast<RowStatistics*>(memory + 4 * tensor_bytes);
  int* slot_tokens = reinterpret_cast<int*>(statistics + p.plan.slots * L::kHeads);
  const SharedAddress base = shared_address(memory);
  const SharedRows rows{base,       base + tensor_bytes, base + 2 * tensor_bytes, base + 3 * tensor_bytes,
                        statistics, slot_tokens};
  const BlockPlace place = block_place<DIM>(p.plan, p.sizes);
  const int piece = threadIdx.x % L::kPieces, copied_head = place.first_head + piece / L::kHeadPieces;
  const auto on_copy = [&](int token, int slot) {
    if (DROPOUT && piece == 0) slot_tokens[slot] = token;
    // The output is read when the row arrives; one prefetch per 128 bytes.
    if (piece % 8 == 0) prefetch_l2(head_base<T>(p.out, place.batch, copied_head) + token * p.out.token);
  };
  const int warp = threadIdx.x / kWarp, first_step = place.segment * p.plan.steps_per_segment;
  const int end_step = min(first_step + p.plan.steps_per_segment, p.plan.num_steps);
  const RowCopier<T, DIM, 4> copier(p.inputs, p.sizes, place.batch, place.first_head, p.plan.slots, base);
  // Everybody's part of a step before its rows can be used.
  const auto arrive = [&](const Step& step, int number) {
    const RowRange range = rows_to_copy(step, number == first_step);
    write_statistics<T, DIM>(p, place, memory + 3 * tensor_bytes, statistics, range, end_step);
    __syncthreads();
  };
  const auto stream = [&](auto compute) {
    stream_segment(p.plan, place.segment, copier, on_copy, [](const Step&) {}, arrive, compute);
  };
  const auto stream_hubs = [&](auto&& gradients, int tile) {
    const bool active = tile * kRows < p.sizes.hubs;
    gradients.begin(tile);
    stream([&](const Step& step, const Step&, bool) {
      if (active) gradients.template accumulate<DROPOUT>(p, place, rows, step);
    });
    if (active) gradients.finish(p, place);
  };
  // Every kind of warp has a loop of its own, so that none keeps registers for the others' work.
  const int hub_role = warp - kWindowsPerStep;
  if (hub_role < 0) {
    stream([&](const Step& step, const Step&, bool) {
      const int window = step.window_begin + warp;
      if (window >= step.window_end) return;
      backward_window<T, DIM, false, DROPOUT>(p, place, rows, window);
      backward_window<T, DIM, true, DROPOUT>(p, place, rows, window);
    });
  } else if (hub_role % 2 == 0) {
    stream_hubs(HubGradients<T, DIM, false>(), hub_role / 2);
  } else {
    stream_hubs(HubGradients<T, DIM, true>(), hub_role / 2);
  }
}

// The hubs' gradients of several segments: one thread adds up four columns of a row, in the order of the segments.
template <typename T, int DIM>
__global__ void __launch_bounds__(128) combine_backward_kernel(const __grid_constant__ BackwardArguments p) {
  constexpr int kPerRow = DIM / 4;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  const int64_t heads = p.sizes.batch * p.sizes.heads, per_head = p.sizes.hubs * kPerRow;
  const int64_t tensor = number / (heads * per_head), batch_head = number / per_head % heads;
  const int row = static_cast<int>(number % per_head) / kPerRow, column = static_cast<int>(number % kPerRow) * 4;
  if (tensor >= 3 || column >= p.sizes.dim) return;
  const int64_t segments = p.plan.num_segments;
  const float* parts = p.partials + (((tensor * heads + batch_head) * segments) * p.sizes.hubs + row) * DIM + column;
  float total[4] = {};
  for (int64_t i = 0; i < segments; ++i) {
    const float4 part = *reinterpret_cast<const float4*>(parts + i * p.sizes.hubs * DIM);
    total[0] += part.x;
    total[1] += part.y;
    total[2] += part.z;
    total[3] += part.w;
  }
  T* grad = output_row<T>(p.grads[tensor], p.sizes, batch_head / p.sizes.heads,
                          static_cast<int>(batch_head % p.sizes.heads), row) + column;
  *reinterpret_cast<uint2*>(grad) = make_uint2(pack<T>(total[0], total[1]), pack<T>(total[2], total[3]));
}

}  // namespace fm::attention
