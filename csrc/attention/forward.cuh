// Forward pass: a block streams the windows of a segment; four warps attend for one window each while one warp per
// tile of 16 hubs (and head) goes over the keys of the step. See docs/kernels.md.

#pragma once

#include "attention/dropout.cuh"
#include "attention/stream.cuh"

namespace fm::attention {

struct ForwardArguments {
  Plan plan;
  Sizes sizes;
  Strided q, kv[2];
  void* out;             // [B, L, H, D] contiguous
  float* lse;            // [B, H, L]
  float* partial_out;    // [B, H, segments, hubs, DIM], where there are several segments
  float2* partial_sums;  // [B, H, segments, hubs]: maximum (base 2) and sum
  float scale;           // |scale| log2(e)
  uint32_t sign;         // flips q where the scale is negative
  Dropout dropout;
};

// The online softmax of 16 rows; every lane keeps its two rows.
template <int DIM>
struct SoftmaxState {
  float peak_low, peak_high;  // base 2
  float sum_low, sum_high;    // over this lane's keys only
  float out[DIM / 8][4];

  __device__ __forceinline__ void clear() {
    peak_low = peak_high = kLowest;
    sum_low = sum_high = 0.f;
#pragma unroll
    for (int i = 0; i < DIM / 8; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
  }

  // New maxima: what was summed up so far shrinks.
  template <bool FIRST>
  __device__ __forceinline__ void raise(float low, float high) {
    if constexpr (FIRST) {
      clear();
    } else {
      const float decay_low = exp2_fast(peak_low - low), decay_high = exp2_fast(peak_high - high);
      sum_low *= decay_low;
      sum_high *= decay_high;
#pragma unroll
      for (int i = 0; i < DIM / 8; ++i) {
        out[i][0] *= decay_low;
        out[i][1] *= decay_low;
        out[i][2] *= decay_high;
        out[i][3] *= decay_high;
      }
    }
    peak_low = low;
    peak_high = high;
  }
};

// What dropout needs to know about a tile of scores.
struct DropoutTile {
  const int* slot_tokens;  // in shared memory
  uint32_t key, threshold;
  int token_low, token_high;  // queries
};

// The keys of the tile are those of the chunk from `first_key` on.
template <int GROUPS>
__device__ __forceinline__ void drop_weights(float (*scores)[4], const Plan& plan, int chunk, int first_key,
                                             const DropoutTile& tile) {
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = first_key + 8 * j + 2 * (threadIdx.x % 4) + e;
      const int token = tile.slot_tokens[slot_of_key(plan, chunk, key)];
      if (dropout_bits(tile.key, tile.token_low, token) < tile.threshold) scores[j][e] = 0.f;
      if (dropout_bits(tile.key, tile.token_high, token) < tile.threshold) scores[j][2 + e] = 0.f;
    }
  }
}

// 16 rows see 16 GROUPS keys of a chunk, from `first_key` on. The masks are shifted so that this lane's keys are bits
// 8 j and 8 j + 1. FIRST: the rows have not seen any key yet.
template <typename T, int DIM, int GROUPS, bool DROPOUT, bool FIRST>
__device__ __forceinline__ void attend_keys(SoftmaxState<DIM>& state, const uint32_t (*q)[4], SharedAddress keys,
                                            SharedAddress values, const Plan& plan, int chunk, int first_key,
                                            const KeySlots& slots, int head, unsigned long long mask_low,
                                            unsigned long long mask_high, float scale, const DropoutTile& dropout) {
  float scores[2 * GROUPS][4];
  float peak_low = -INFINITY, peak_high = -INFINITY;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    float(*pair)[4] = scores + 2 * group;
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[0][i] = pair[1][i] = 0.f;
    multiply_keys<T, DIM>(pair, q, keys, lane_offset<DIM>(slots[group], head));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int bit = 16 * group + 8 * j + e;
        pair[j][e] = mask_low >> bit & 1 ? pair[j][e] : -INFINITY;
        pair[j][2 + e] = mask_high >> bit & 1 ? pair[j][2 + e] : -INFINITY;
        peak_low = fmaxf(peak_low, pair[j][e]);
        peak_high = fmaxf(peak_high, pair[j][2 + e]);
      }
    }
  }
  peak_low = fmaxf(quad_max(peak_low) * scale, FIRST ? kLowest : state.peak_low);
  peak_high = fmaxf(quad_max(peak_high) * scale, FIRST ? kLowest : state.peak_high);
  state.template raise<FIRST>(peak_low, peak_high);
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      scores[j][e] = exp2_fast(fmaf(scores[j][e], scale, -peak_low));
      scores[j][2 + e] = exp2_fast(fmaf(scores[j][2 + e], scale, -peak_high));
      state.sum_low += scores[j][e];
      state.sum_high += scores[j][2 + e];
    }
  }
  if constexpr (DROPOUT) drop_weights<GROUPS>(scores, plan, chunk, first_key, dropout);
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    uint32_t weights[4];
    as_weights<T>(weights, scores + 2 * group);
    multiply_values<T, DIM>(state.out, weights, values, lane_offset<DIM>(slots[group], head));
  }
}

// A whole chunk for rows that have seen keys before. In halves: their sums leave fewer registers for scores.
template <typename T, int DIM, bool DROPOUT>
__device__ __forceinline__ void attend_halves(SoftmaxState<DIM>& state, const uint32_t (*q)[4], SharedAddress keys,
                                              SharedAddress values, const Plan& plan, int chunk, KeySlots slots,
                                              int head, unsigned long long mask_low, unsigned long long mask_high,
                                              float scale, const DropoutTile& dropout) {
#pragma unroll 1
  for (int first_key = 0; first_key < kKeys; first_key += kKeys / 2) {
    attend_keys<T, DIM, kGroups / 2, DROPOUT, false>(state, q, keys, values, plan, chunk, first_key, slots, head,
                                                     mask_low, mask_high, scale, dropout);
    slots.low = slots.high;
    mask_low >>= kKeys / 2;
    mask_high >>= kKeys / 2;
  }
}

// What one warp needs for a window of queries, fetched while it still computes the window before. The queries go to a
// buffer of the warp in shared memory.
template <typename T, int DIM>
struct WindowInputs {
  int window;  // -1 where there is none
  KeySlots slots;
  unsigned long long mask_low, mask_high;

  __device__ __forceinline__ void fetch(const ForwardArguments& p, const BlockPlace& place, int number, bool exists,
                                        SharedAddress buffer) {
    window = exists ? number : -1;
    if (!exists) return;
    copy_window<T, DIM>(p.plan, p.sizes, p.q, place.batch, place.first_head, number, buffer);
    copy_async_commit();
    fetch_chunk(p.plan, number);
  }

  __device__ __forceinline__ void fetch_chunk(const Plan& plan, int chunk) {
    const LaneRows lane = lane_rows();
    slots = read_slots(plan, chunk);
    mask_low = __ldg(plan.masks + chunk * kRows + lane.low) >> (2 * (threadIdx.x % 4));
    mask_high = __ldg(plan.masks + chunk * kRows + lane.high) >> (2 * (threadIdx.x % 4));
  }
};

// log-sum-exp of a row, or -inf where it has seen no key.
__device__ __forceinline__ float log_sum_exp(float peak, float sum) {
  return sum > 0.f ? (peak + log2_fast(sum)) * kLn2 : -INFINITY;
}

// Factor that turns an accumulated row into the output; NaN stays NaN.
__device__ __forceinline__ float normaliser(float sum, float keep_scale) {
  return sum == 0.f ? 0.f : keep_scale * reciprocal_fast(sum);
}

// Writes two finished rows of one head: outputs and log-sum-exp. Tokens below 0 do not exist.
template <typename T, int DIM>
__device__ __forceinline__ void store_results(const ForwardArguments& p, int64_t batch, int head,
                                              const SoftmaxState<DIM>& state, float sum_low, float sum_high,
                                              int token_low, int token_high) {
  const Sizes& sizes = p.sizes;
  store_rows<T, DIM>(state.out, normaliser(sum_low, p.dropout.keep_scale), normaliser(sum_high, p.dropout.keep_scale),
                     output_row<T>(p.out, sizes, batch, head, token_low),
                     output_row<T>(p.out, sizes, batch, head, token_high), token_low >= 0, token_high >= 0, sizes.dim);
  if (threadIdx.x % 4 == 0) {
    float* lse = p.lse + (batch * sizes.heads + head) * sizes.tokens;
    if (token_low >= 0) lse[token_low] = log_sum_exp(state.peak_low, sum_low);
    if (token_high >= 0) lse[token_high] = log_sum_exp(state.peak_high, sum_high);
  }
}

// Computes the window that `in` describes; its queries, fragments head * (DIM / 16) + depth, are in q.
template <typename T, int DIM, bool DROPOUT>
__device__ __forceinline__ void attend_window(const ForwardArguments& p, const BlockPlace& place,
                                              WindowInputs<T, DIM>& in, const uint32_t (*q)[4], SharedAddress keys,
                                              SharedAddress values, const int* slot_tokens) {
  using L = Layout<DIM>;
  const LaneRows lane = lane_rows();
  const int window = in.window;
  const int extra_begin = __ldg(p.plan.extras + window), extra_end = __ldg(p.plan.extras + window + 1);
  const int token_low = __ldg(p.plan.rows + window * kRows + lane.low);
  const int token_high = __ldg(p.plan.rows + window * kRows + lane.high);
#pragma unroll
  for (int head = 0; head < L::kHeads; ++head) {
    SoftmaxState<DIM> state;
    const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
    const DropoutTile dropout{slot_tokens, DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u,
                              p.dropout.threshold, token_low, token_high};
    if (head > 0 && extra_begin < extra_end) in.fetch_chunk(p.plan, window);
    attend_keys<T, DIM, kGroups, DROPOUT, true>(state, q + head * L::kDepth, keys, values, p.plan, window, 0, in.slots,
                                                head, in.mask_low, in.mask_high, p.scale, dropout);
    for (int extra = extra_begin; extra < extra_end; ++extra) {
      const int chunk = p.plan.num_windows + extra;
      in.fetch_chunk(p.plan, chunk);
      attend_halves<T, DIM, DROPOUT>(state, q + head * L::kDepth, keys, values, p.plan, chunk, in.slots, head,
                                     in.mask_low, in.mask_high, p.scale, dropout);
    }
    const float sum_low = quad_sum(state.sum_low), sum_high = quad_sum(state.sum_high);
    if (place.first_head + head < p.sizes.heads) {
      store_results<T, DIM>(p, place.batch, place.first_head + head, state, sum_low, sum_high, token_low, token_high);
    }
  }
}

// A tile of 16 hubs: what its warp keeps over all steps, for every head of the group.
template <typename T, int DIM>
struct HubQueries {
  using L = Layout<DIM>;
  uint32_t q[L::kPieces / 2][4];  // fragment head * (DIM / 16) + depth
  SoftmaxState<DIM> state[L::kHeads];
  int tile;
  bool active;

  __device__ __forceinline__ void begin(const ForwardArguments& p, const BlockPlace& place, int number) {
    tile = number;
    active = tile * kRows < p.sizes.hubs;
    if (!active) return;
    const LaneRows lane = lane_rows();
    const int last = p.sizes.hubs - 1;
    const int64_t low = min(tile * kRows + lane.low, last) * p.q.token;
    const int64_t high = min(tile * kRows + lane.high, last) * p.q.token;
#pragma unroll
    for (int head = 0; head < L::kHeads; ++head) {
      state[head].clear();
      const bool there = place.first_head + head < p.sizes.heads;
      const T* base = head_base<T>(p.q, place.batch, there ? place.first_head + head : place.first_head);
#pragma unroll
      for (int half = 0; half < 2 * L::kDepth; ++half) {  // of 8 columns
        const int column = 8 * half + 2 * (threadIdx.x % 4);
        const bool valid = there && column < p.sizes.dim;
        uint32_t* fragment = q[head * L::kDepth + half / 2] + 2 * (half % 2);
        fragment[0] = valid ? __ldg(reinterpret_cast<const uint32_t*>(base + low + column)) ^ p.sign : 0u;
        fragment[1] = valid ? __ldg(reinterpret_cast<const uint32_t*>(base + high + column)) ^ p.sign : 0u;
      }
    }
  }

  template <bool DROPOUT>
  __device__ __forceinline__ void attend(const ForwardArguments& p, const BlockPlace& place, const Step& step,
                                         SharedAddress keys, SharedAddress values, const int* slot_tokens) {
    const LaneRows lane = lane_rows();
    const int64_t batch_head = place.batch * p.sizes.heads + place.first_head;
    for (int first = 0, chunk = step.hub_chunk; first < step.hub_keys; first += kKeys, ++chunk) {
      const int count = step.hub_keys - first;
      const unsigned long long all = ~0ull >> (count < kKeys ? kKeys - count : 0);
      const unsigned long long mask = all >> (2 * (threadIdx.x % 4));
      const KeySlots slots = read_slots(p.plan, chunk);
#pragma unroll
      for (int head = 0; head < L::kHeads; ++head) {
        const DropoutTile dropout{slot_tokens, DROPOUT ? dropout_key(*p.dropout.seed, batch_head + head) : 0u,
                                  p.dropout.threshold, tile * kRows + lane.low, tile * kRows + lane.high};
        attend_halves<T, DIM, DROPOUT>(state[head], q + head * L::kDepth, keys, values, p.plan, chunk, slots, head,
                                       mask, mask, p.scale, dropout);
      }
    }
  }

  __device__ __forceinline__ void finish(const ForwardArguments& p, const BlockPlace& place) {
    const LaneRows lane = lane_rows();
    const int low = tile * kRows + lane.low, high = tile * kRows + lane.high;
    const int row_low = low < p.sizes.hubs ? low : -1, row_high = high < p.sizes.hubs ? high : -1;
#pragma unroll
    for (int i = 0; i < L::kHeads; ++i) {
      const int head = place.first_head + i;
      const float sum_low = quad_sum(state[i].sum_low), sum_high = quad_sum(state[i].sum_high);
      if (head >= p.sizes.heads) continue;
      if (p.plan.num_segments == 1) {
        store_results<T, DIM>(p, place.batch, head, state[i], sum_low, sum_high, row_low, row_high);
      } else {
        store_partial(p, place, head, state[i], sum_low, sum_high, row_low, row_high);
      }
    }
  }

  __device__ __forceinline__ void store_partial(const ForwardArguments& p, const BlockPlace& place, int head,
                                                const SoftmaxState<DIM>& sums, float sum_low, float sum_high,
                                                int row_low, int row_high) {
    const int64_t batch_head = place.batch * p.sizes.heads + head;
    const int64_t first = (batch_head * p.plan.num_segments + place.segment) * p.sizes.hubs;
    if (threadIdx.x % 4 == 0) {
      if (row_low >= 0) p.partial_sums[first + row_low] = make_float2(sums.peak_low, sum_low);
      if (row_high >= 0) p.partial_sums[first + row_high] = make_float2(sums.peak_high, sum_high);
    }
#pragma unroll
    for (int i = 0; i < DIM / 8; ++i) {
      const int column = 8 * i + 2 * (threadIdx.x % 4);
      float* low = p.partial_out + (first + row_low) * DIM + column;
      float* high = p.partial_out + (first + row_high) * DIM + column;
      if (row_low >= 0) *reinterpret_cast<float2*>(low) = make_float2(sums.out[i][0], sums.out[i][1]);
      if (row_high >= 0) *reinterpret_cast<float2*>(high) = make_float2(sums.out[i][2], sums.out[i][3]);
    }
  }
};

// Bytes of shared memory: k and v of the slots, the queries of the step's windows, with dropout the tokens.
template <int DIM>
constexpr int forward_memory(int slots, bool dropout) {
  return (2 * slots + kWindowsPerStep * kRows) * Layout<DIM>::kBytes + (dropout ? slots * 4 : 0);
}

constexpr int forward_threads(int hub_tiles) { return (kWindowsPerStep + hub_tiles) * kWarp; }

// The bounds allow for four tiles of hubs, the most there are, and 128 registers: enough for three blocks of one tile.
template <typename T, int DIM, bool DROPOUT>
__global__ void __launch_bounds__(forward_threads(4), DIM == 128 ? 1 : 2)
    forward_kernel(const __grid_constant__ ForwardArguments p) {
  using L = Layout<DIM>;
  unsigned char* memory = dynamic_shared();
  const SharedAddress keys = shared_address(memory), values = keys + p.plan.slots * L::kBytes;
  int* slot_tokens = reinterpret_cast<int*>(memory + (2 * p.plan.slots + kWindowsPerStep * kRows) * L::kBytes);
  const auto note_token = [&](int token, int slot) {
    if (DROPOUT && threadIdx.x % L::kPieces == 0) slot_tokens[slot] = token;
  };
  const auto nothing = [](const Step&, auto...) {};
  const BlockPlace place = block_place<DIM>(p.plan, p.sizes);
  const int warp = threadIdx.x / kWarp;
  const RowCopier<T, DIM, 2> copier(p.kv, p.sizes, place.batch, place.first_head, p.plan.slots, keys);
  // The two kinds of warps have loops of their own, so that none keeps registers for the other's work.
  if (warp < kWindowsPerStep) {
    WindowInputs<T, DIM> inputs;
    const SharedAddress buffer = keys + (2 * p.plan.slots + warp * kRows) * L::kBytes;
    const auto fetch = [&](const Step& step, bool exists) {
      const int window = step.window_begin + warp;
      inputs.fetch(p, place, window, exists && window < step.window_end, buffer);
    };
    const auto compute = [&](const Step&, const Step& next, bool goes_on) {
      WindowInputs<T, DIM> current = inputs;
      uint32_t q[L::kPieces / 2][4];
      read_all_heads<T, DIM>(q, buffer, p.sign);
      __syncwarp();
      fetch(next, goes_on);
      if (current.window >= 0) attend_window<T, DIM, DROPOUT>(p, place, current, q, keys, values, slot_tokens);
    };
    stream_segment(p.plan, place.segment, copier, note_token, [&](const Step& step) { fetch(step, true); }, nothing,
                   compute);
  } else {
    HubQueries<T, DIM> hubs;
    hubs.begin(p, place, warp - kWindowsPerStep);
    const auto compute = [&](const Step& step, const Step&, bool) {
      if (hubs.active) hubs.template attend<DROPOUT>(p, place, step, keys, values, slot_tokens);
    };
    stream_segment(p.plan, place.segment, copier, note_token, nothing, nothing, compute);
    if (hubs.active) hubs.finish(p, place);
  }
}

// The hub rows of several segments: one thread adds up four columns of a row, in the order of the segments.
template <typename T, int DIM>
__global__ void __launch_bounds__(128) combine_forward_kernel(const __grid_constant__ ForwardArguments p) {
  constexpr int kPerRow = DIM / 4;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  const int64_t batch_head = number / (p.sizes.hubs * kPerRow);
  const int rest = static_cast<int>(number % (p.sizes.hubs * kPerRow));
  const int row = rest / kPerRow, column = rest % kPerRow * 4;
  if (batch_head >= p.sizes.batch * p.sizes.heads) return;
  const int segments = p.plan.num_segments;
  const float2* sums = p.partial_sums + batch_head * segments * p.sizes.hubs + row;
  const float* parts = p.partial_out + (batch_head * segments * p.sizes.hubs + row) * DIM + column;
  float peak = kLowest;
  for (int i = 0; i < segments; ++i) peak = fmaxf(peak, sums[i * p.sizes.hubs].x);
  float sum = 0.f, total[4] = {};
  for (int i = 0; i < segments; ++i) {
    const float2 part = sums[i * p.sizes.hubs];
    const float weight = exp2_fast(part.x - peak);
    sum = fmaf(weight, part.y, sum);
    const float4 values = *reinterpret_cast<const float4*>(parts + static_cast<int64_t>(i) * p.sizes.hubs * DIM);
    total[0] = fmaf(weight, values.x, total[0]);
    total[1] = fmaf(weight, values.y, total[1]);
    total[2] = fmaf(weight, values.z, total[2]);
    total[3] = fmaf(weight, values.w, total[3]);
  }
  if (column == 0) p.lse[batch_head * p.sizes.tokens + row] = log_sum_exp(peak, sum);
  if (column >= p.sizes.dim) return;
  const float factor = normaliser(sum, p.dropout.keep_scale);
  const int64_t batch = batch_head / p.sizes.heads, head = batch_head % p.sizes.heads;
  T* out = static_cast<T*>(p.out) + ((batch * p.sizes.tokens + row) * p.sizes.heads + head) * p.sizes.dim + column;
  *reinterpret_cast<uint2*>(out) = make_uint2(pack<T>(total[0] * factor, total[1] * factor),
                                              pack<T>(total[2] * factor, total[3] * factor));
}

}  // namespace fm::attention
