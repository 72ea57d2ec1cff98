// The online softmax of the forward pass: 16 rows against a chunk of 64 keys, in registers.

#pragma once

#include "attention/dropout.cuh"
#include "attention/tiles.cuh"

namespace fm::attention {

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

// A chunk of 64 keys, in shared or global memory, as this lane reads it.
struct Chunk {
  const unsigned char* bytes;

  __device__ explicit Chunk(const unsigned char* bytes) : bytes(bytes) {}

  // The slots of key n (0 to 15) of each of the groups 0 to 3 of 16 keys, 16 bits each.
  __device__ __forceinline__ uint2 slots(int n) const { return *reinterpret_cast<const uint2*>(bytes + 8 * n); }

  // Which keys a row sees, shifted so that bits 8 j and 8 j + 1 are those that this lane holds scores of.
  __device__ __forceinline__ unsigned long long mask(int row) const {
    return *reinterpret_cast<const unsigned long long*>(bytes + kChunkMasks + 8 * row) >> (2 * (threadIdx.x % 4));
  }

  __device__ __forceinline__ int slot_of_key(int key) const {
    return reinterpret_cast<const uint16_t*>(bytes)[key % 16 * 4 + key / 16];
  }
};

__device__ __forceinline__ int slot_of_group(const uint2& slots, int group) {
  const uint32_t word = group < 2 ? slots.x : slots.y;
  return static_cast<int>(group % 2 ? word >> 16 : word & 0xffff);
}

// Fragments of 16 rows that lie one after the other, for all heads of the group; `sign` flips them.
template <typename T, int DIM, int BYTES = kGroupBytes<DIM>>
__device__ __forceinline__ void read_all_heads(uint32_t (*a)[4], SharedAddress rows, uint32_t sign) {
  using L = Layout<DIM, BYTES>;
  const SharedAddress row = rows + row_of_lane() * slot_bytes<DIM, BYTES>(1);
#pragma unroll
  for (int head = 0; head < L::kHeads; ++head) {
    read_rows<T, DIM>(a + head * (DIM / 16), row + row_piece<DIM>(head));
  }
#pragma unroll
  for (int i = 0; i < L::kPieces / 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[i][j] ^= sign;
  }
}

// What dropout needs to know about a tile of scores.
struct DropoutTile {
  const int* slot_tokens;  // in shared memory
  uint32_t key, threshold;
  int token_low, token_high;  // queries
};

// The keys of the tile are those of the chunk from `first_key` on.
template <int GROUPS, typename Keys>
__device__ __forceinline__ void drop_weights(float (*scores)[4], const Keys& chunk, int first_key,
                                             const DropoutTile& tile) {
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = tile.slot_tokens[chunk.slot_of_key(first_key + 8 * j + 2 * (threadIdx.x % 4) + e)];
      if (dropout_bits(tile.key, tile.token_low, token) < tile.threshold) scores[j][e] = 0.f;
      if (dropout_bits(tile.key, tile.token_high, token) < tile.threshold) scores[j][2 + e] = 0.f;
    }
  }
}

// 16 rows see 16 GROUPS keys of a chunk, from `first_key` on, of one head. FIRST: the rows have not seen any key yet.
template <typename T, int DIM, int GROUPS, bool DROPOUT, bool FIRST, int BYTES = kGroupBytes<DIM>, typename Keys>
__device__ __forceinline__ void attend_keys(SoftmaxState<DIM>& state, const uint32_t (*q)[4], SharedAddress slots,
                                            int head, const Keys& chunk, int first_key, float scale,
                                            const DropoutTile& dropout) {
  constexpr int kSlotBytes = slot_bytes<DIM, BYTES>(2);
  const LaneRows lane = lane_rows();
  uint2 key_slots = chunk.slots(column_of_lane()), value_slots = chunk.slots(row_of_lane());
  if (first_key != 0) {  // only halves begin elsewhere
    key_slots.x = key_slots.y;
    value_slots.x = value_slots.y;
  }
  const SharedAddress keys = slots + column_piece<DIM>(head);
  const SharedAddress values = slots + BYTES + row_piece<DIM>(head);
  const unsigned long long mask_low = chunk.mask(lane.low) >> first_key;
  const unsigned long long mask_high = chunk.mask(lane.high) >> first_key;
  float scores[2 * GROUPS][4];
  float peak_low = -INFINITY, peak_high = -INFINITY;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    float(*pair)[4] = scores + 2 * group;
    multiply_keys<T, DIM>(pair, q, keys + slot_of_group(key_slots, group) * kSlotBytes);
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
  if constexpr (DROPOUT) drop_weights<GROUPS>(scores, chunk, first_key, dropout);
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    uint32_t weights[4];
    as_weights<T>(weights, scores + 2 * group);
    multiply_values<T, DIM>(state.out, weights, values + slot_of_group(value_slots, group) * kSlotBytes);
  }
}

// The first `count` keys of a chunk for rows that have seen keys before. In halves: their sums leave fewer registers for
// scores.
template <typename T, int DIM, bool DROPOUT, int BYTES = kGroupBytes<DIM>>
__device__ __forceinline__ void attend_halves(SoftmaxState<DIM>& state, const uint32_t (*q)[4], SharedAddress slots,
                                              int head, const Chunk& chunk, int count, float scale,
                                              const DropoutTile& dropout) {
#pragma unroll 1
  for (int first_key = 0; first_key < min(count, kKeys); first_key += kKeys / 2) {
    attend_keys<T, DIM, kGroups / 2, DROPOUT, false, BYTES>(state, q, slots, head, chunk, first_key, scale, dropout);
  }
}

// log-sum-exp of a row, or -inf where it has seen no key.
__device__ __forceinline__ float log_sum_exp(float peak, float sum) {
  return sum > 0.f ? (peak + log2_fast(sum)) * kLn2 : -INFINITY;
}

// Factor that turns an accumulated row into the output; NaN stays NaN.
__device__ __forceinline__ float normaliser(float sum, float keep_scale) {
  return sum == 0.f ? 0.f : keep_scale * reciprocal_fast(sum);
}

}  // namespace fm::attention
