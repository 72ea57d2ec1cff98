// Gradients of 16 rows (a window, or a tile of hubs) from chunks of 64 partners, in one of two roles: as queries, whose
// partners are keys (dq), or as keys, whose partners are queries (dk and dv).

#pragma once

#include "attention/dropout.cuh"
#include "attention/tiles.cuh"

namespace fm::attention {

struct BackwardArguments {
  Plan plan;
  Sizes sizes;
  Strided inputs[4];      // k, v, q, gradient of the output: the order in a slot
  Strided out;            // contiguous
  const float* lse;       // [B, H, L]
  const float* grad_lse;  // the same shape, or null
  void* grads[3];         // of q, k, v: [B, L, H, D], contiguous
  float* partials;        // [3, B, H, segments, hubs, DIM + 4]; null where the blocks of a cluster add up their hub rows
  float scale, scale_log2e;
  int transposed, transposed_extras;  // where a record has the chunk of the transposed pattern, and its extra chunks
  Dropout dropout;
};

// What the softmax of one query left behind: log-sum-exp (base 2), and sum(grad_out out) - grad_lse.
using RowStatistics = float2;

struct SharedRows {
  SharedAddress slots;              // a slot holds k, v, q, gradient
  const RowStatistics* statistics;  // [slots, heads of the group]
  const int* slot_tokens;           // with dropout
  float scale_log2e;
};

// 16 rows of this warp: where this lane reads their two factors (of slot l % 16), statistics and tokens of its two.
struct OwnedRows {
  SharedAddress row;
  RowStatistics low, high;
  int token_low, token_high;
};

// From scores s and products p of the gradient with v (of one pair): the weight that multiplies the gradient (for dv)
// and the gradient of the score. Both are 0 for pairs that do not see each other, if p is finite.
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
  p = weight * (p - query.y);
  s = kept;
}

// The first `groups` groups of 16 partners of a chunk. Adds the gradients of the scores times the first partner tensor to
// `first`, and for owned keys the weights times the gradient to `second`. A slot has all four tensors, or the partners'
// two.
template <typename T, int DIM, bool OWNS_KEYS, bool DROPOUT, int BYTES = kGroupBytes<DIM>, int TENSORS = 4>
__device__ __forceinline__ void accumulate_chunk(float (*first)[4], float (*second)[4], const BackwardArguments& p,
                                                 const SharedRows& rows, const OwnedRows& owned,
                                                 const unsigned char* chunk, int groups, int head,
                                                 uint32_t dropout_key) {
  using L = Layout<DIM, BYTES>;
  constexpr int kSlotBytes = slot_bytes<DIM, BYTES>(TENSORS);
  const SharedAddress partners = rows.slots + (OWNS_KEYS && TENSORS == 4 ? 2 * L::kBytes : 0);
  const LaneRows lane = lane_rows();
  const uint16_t* key_slot = reinterpret_cast<const uint16_t*>(chunk) + column_of_lane() * 4;
  const uint16_t* value_slot = reinterpret_cast<const uint16_t*>(chunk) + row_of_lane() * 4;
  const uint16_t* column_slots = reinterpret_cast<const uint16_t*>(chunk) + threadIdx.x % 4 * 8;
  const uint16_t* mask_low = reinterpret_cast<const uint16_t*>(chunk + kChunkMasks) + 4 * lane.low;
  const uint16_t* mask_high = reinterpret_cast<const uint16_t*>(chunk + kChunkMasks) + 4 * lane.high;
  // With two sums to keep, the owned rows are read again for every group instead of kept.
  constexpr bool kKeep = !OWNS_KEYS;
  uint32_t a[DIM / 16][4], b[DIM / 16][4];
  if constexpr (kKeep) {
    read_rows<T, DIM>(a, owned.row);
    read_rows<T, DIM>(b, owned.row + L::kBytes);
  }
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    const SharedAddress key = partners + column_piece<DIM>(head) + key_slot[group] * kSlotBytes;
    const SharedAddress value = partners + row_piece<DIM>(head) + value_slot[group] * kSlotBytes;
    const uint32_t seen_low = static_cast<uint32_t>(mask_low[group]) >> (2 * (threadIdx.x % 4));
    const uint32_t seen_high = static_cast<uint32_t>(mask_high[group]) >> (2 * (threadIdx.x % 4));
    float scores[2][4], products[2][4];
    if constexpr (!kKeep) read_rows<T, DIM>(a, owned.row);
    multiply_keys<T, DIM>(scores, a, key);
    if constexpr (!kKeep) read_rows<T, DIM>(b, owned.row + L::kBytes);
    multiply_keys<T, DIM>(products, b, key + L::kBytes);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int bit = 8 * j + e;
        RowStatistics low = owned.low, high = owned.high;
        int token = 0;
        if constexpr (OWNS_KEYS || DROPOUT) {
          const int slot = column_slots[4 * bit + group];
          if constexpr (OWNS_KEYS) low = high = rows.statistics[slot * L::kHeads + head];
          if constexpr (DROPOUT) token = rows.slot_tokens[slot];
        }
        differentiate<DROPOUT>(scores[j][e], products[j][e], seen_low >> bit & 1, low, rows.scale_log2e, p.dropout,
                               dropout_key, OWNS_KEYS ? token : owned.token_low, OWNS_KEYS ? owned.token_low : token);
        differentiate<DROPOUT>(scores[j][2 + e], products[j][2 + e], seen_high >> bit & 1, high, rows.scale_log2e,
                               p.dropout, dropout_key, OWNS_KEYS ? token : owned.token_high,
                               OWNS_KEYS ? owned.token_high : token);
      }
    }
    uint32_t weights[4];
    as_weights<T>(weights, products);
    multiply_values<T, DIM>(first, weights, value);
    if constexpr (OWNS_KEYS) {
      as_weights<T>(weights, scores);
      multiply_values<T, DIM>(second, weights, value + L::kBytes);
    }
  }
}

template <int DIM>
__device__ __forceinline__ void clear(float (*acc)[4]) {
#pragma unroll
  for (int i = 0; i < DIM / 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;
}

// What two rows of each lane have gathered, in one of the two roles, to the gradients.
template <typename T, int DIM, bool OWNS_KEYS>
__device__ __forceinline__ void store_gradients(const BackwardArguments& p, int64_t batch, int head, int token_low,
                                                int token_high, bool has_low, bool has_high, const float (*first)[4],
                                                const float (*second)[4]) {
  const auto store = [&](const float(*acc)[4], void* tensor, float factor) {
    store_rows<T, DIM>(acc, factor, factor, output_row<T>(tensor, p.sizes, batch, head, token_low),
                       output_row<T>(tensor, p.sizes, batch, head, token_high), has_low, has_high, p.sizes.dim);
  };
  store(first, p.grads[OWNS_KEYS ? 1 : 0], p.scale);
  if constexpr (OWNS_KEYS) store(second, p.grads[2], 1.f);
}

// All partners of a window's 16 vertices, in one of the two roles.
template <typename T, int DIM, bool OWNS_KEYS, bool DROPOUT, int BYTES = kGroupBytes<DIM>>
__device__ __forceinline__ void backward_window(const BackwardArguments& p, const BlockPlace& place,
                                                const SharedRows& rows, const unsigned char* record) {
  using L = Layout<DIM, BYTES>;
  const LaneRows lane = lane_rows();
  const int* tokens = reinterpret_cast<const int*>(record + kRecordTokens);
  const int16_t* row_slots = reinterpret_cast<const int16_t*>(record + kRecordRowSlots);
  const int token_low = tokens[lane.low], token_high = tokens[lane.high];
  const Extras extras =
      *reinterpret_cast<const Extras*>(record + (OWNS_KEYS ? p.transposed_extras : kRecordExtras));
  const SharedAddress own = rows.slots + row_slots[threadIdx.x % kRows] * slot_bytes<DIM, BYTES>(4) +
                            (OWNS_KEYS ? 0 : 2 * L::kBytes);
#pragma unroll 1
  for (int head = 0; head < L::kHeads && place.first_head + head < p.sizes.heads; ++head) {
    float first[DIM / 8][4], second[OWNS_KEYS ? DIM / 8 : 1][4];
    clear<DIM>(first);
    if constexpr (OWNS_KEYS) clear<DIM>(second);
    const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
    const uint32_t key = DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u;
    const OwnedRows owned{own + row_piece<DIM>(head), rows.statistics[row_slots[lane.low] * L::kHeads + head],
                          rows.statistics[row_slots[lane.high] * L::kHeads + head], token_low, token_high};
    accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT, BYTES>(
        first, second, p, rows, owned, record + (OWNS_KEYS ? p.transposed : 0), extras.groups, head, key);
    for (int extra = extras.begin; extra < extras.end; ++extra) {
      const unsigned char* chunk = p.plan.extra_chunks + static_cast<int64_t>(extra) * kChunkBytes;
      accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT, BYTES>(first, second, p, rows, owned, chunk, kGroups, head, key);
    }
    store_gradients<T, DIM, OWNS_KEYS>(p, place.batch, place.first_head + head, token_low, token_high, token_low >= 0,
                                       token_high >= 0, first, second);
  }
}

// A tile of 16 hubs in one of the two roles: what its warp adds up over all steps, for every head of the group, or in
// narrow groups for a share of them.
template <typename T, int DIM, bool OWNS_KEYS, int BYTES = kGroupBytes<DIM>>
struct HubGradients {
  using L = Layout<DIM, BYTES>;
  float first[L::kHeads][DIM / 8][4], second[OWNS_KEYS ? L::kHeads : 1][DIM / 8][4];
  int tile, share, shares;

  __device__ __forceinline__ void begin(int number, int shares_of_tile) {
    shares = shares_of_tile;
    share = number % shares;
    tile = number / shares;
#pragma unroll
    for (int head = 0; head < L::kHeads; ++head) {
      clear<DIM>(first[head]);
      if constexpr (OWNS_KEYS) clear<DIM>(second[head]);
    }
  }

  // Whether a head of the group is this warp's.
  __device__ __forceinline__ bool mine(int head) const { return !L::kNarrow || head % shares == share; }

  template <bool DROPOUT>
  __device__ __forceinline__ void accumulate(const BackwardArguments& p, const BlockPlace& place,
                                             const SharedRows& rows, int keys, const unsigned char* chunks) {
    const LaneRows lane = lane_rows();
    const int last = p.sizes.hubs - 1;  // slot and token of the last hub
    const int low = min(tile * kRows + lane.low, last), high = min(tile * kRows + lane.high, last);
    const int lane_slot = min(tile * kRows + static_cast<int>(threadIdx.x % kRows), last);
    const SharedAddress own = rows.slots + lane_slot * slot_bytes<DIM, BYTES>(4) + (OWNS_KEYS ? 0 : 2 * L::kBytes);
    const int64_t batch_head = place.batch * p.sizes.heads + place.first_head;
    for (int chunk = 0; chunk * kKeys < keys; ++chunk) {
      const int groups = min((keys - chunk * kKeys + kGroup - 1) / kGroup, kGroups);
#pragma unroll
      for (int head = 0; head < L::kHeads; ++head) {
        if (!mine(head)) continue;
        const uint32_t key = DROPOUT ? dropout_key(*p.dropout.seed, batch_head + head) : 0u;
        const OwnedRows owned{own + row_piece<DIM>(head), rows.statistics[low * L::kHeads + head],
                              rows.statistics[high * L::kHeads + head], low, high};
        accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT, BYTES>(first[head], second[OWNS_KEYS ? head : 0], p, rows, owned,
                                                            chunks + chunk * kChunkBytes, groups, head, key);
      }
    }
  }

  // To float rows [heads, hubs, DIM + 4] per tensor: of dq, or of dk and behind it dv.
  __device__ __forceinline__ void store(const BackwardArguments& p, const BlockPlace& place, float* partials,
                                        int64_t head_pitch, int64_t tensor_pitch) {
    constexpr int kPitch = DIM + 4;
    const LaneRows lane = lane_rows();
    const bool low = tile * kRows + lane.low < p.sizes.hubs, high = tile * kRows + lane.high < p.sizes.hubs;
#pragma unroll
    for (int head = 0; head < L::kHeads; ++head) {
      if (place.first_head + head >= p.sizes.heads) continue;
      float* rows = partials + head * head_pitch + tile * kRows * kPitch;
      store_partial_rows<DIM>(first[head], p.scale, rows, kPitch, low, high);
      if constexpr (OWNS_KEYS) store_partial_rows<DIM>(second[head], 1.f, rows + tensor_pitch, kPitch, low, high);
    }
  }

  // To the gradients themselves, where one block has met all partners.
  __device__ __forceinline__ void finish(const BackwardArguments& p, const BlockPlace& place) {
    const LaneRows lane = lane_rows();
    const int low = tile * kRows + lane.low, high = tile * kRows + lane.high;
#pragma unroll
    for (int i = 0; i < L::kHeads; ++i) {
      const int head = place.first_head + i;
      if (!mine(i) || head >= p.sizes.heads) continue;
      store_gradients<T, DIM, OWNS_KEYS>(p, place.batch, head, low, high, low < p.sizes.hubs, high < p.sizes.hubs,
                                         first[i], second[OWNS_KEYS ? i : 0]);
    }
  }
};

// Four columns of a hub row of a gradient, from `count` partial rows in fixed order; values(i) reads of the i-th.
// Several are read at once: each read takes its time.
template <typename T, typename Values>
__device__ __forceinline__ void add_up_row(const BackwardArguments& p, int tensor, int64_t batch, int head, int row,
                                           int column, int count, Values values) {
  constexpr int kAtOnce = 8;
  if (column >= p.sizes.dim) return;
  float total[4] = {};
  for (int first = 0; first < count; first += kAtOnce) {
    float4 parts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) parts[i] = values(min(first + i, count - 1));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= count) break;
      total[0] += parts[i].x;
      total[1] += parts[i].y;
      total[2] += parts[i].z;
      total[3] += parts[i].w;
    }
  }
  T* grad = output_row<T>(p.grads[tensor], p.sizes, batch, head, row) + column;
  *reinterpret_cast<uint2*>(grad) = make_uint2(pack<T>(total[0], total[1]), pack<T>(total[2], total[3]));
}

}  // namespace fm::attention
