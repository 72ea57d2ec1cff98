// The rows of the hubs in the forward pass: they see every key, so their warps add up over all steps of a block, and
// where several blocks walk over a mesh, sums are combined.

#pragma once

#include <algorithm>

#include "attention/dropout.cuh"
#include "attention/softmax.cuh"

namespace fm::attention {

struct ForwardArguments {
  Plan plan;
  Sizes sizes;
  Strided q, kv[2];
  void* out;        // [B, L, H, D] contiguous
  float* lse;       // [B, H, L]
  float* partials;  // [B, H, segments, hubs, DIM + 4]; null where the blocks of a cluster combine their hub rows
  float scale;      // see forward_scale
  uint32_t sign;    // flips q where the scale is negative
  Dropout dropout;
};

// A tile of hubs is the work of one warp, or where a group has several heads of two, each with half of the heads; in
// narrow groups of a warp per head. There the keys are shared out as well, as far as warps are left: `hub_parts` warps
// take turns with the chunks, so that nobody waits for the hubs.
template <int DIM, int BYTES = kGroupBytes<DIM>>
constexpr int kHubSplit = std::min(Layout<DIM, BYTES>::kHeads, 2);

constexpr int kNarrowForwardWarps = 20;  // of 96 registers
constexpr int kMostHubParts = 4;

// Warps that the hubs need at least.
template <int DIM, int BYTES = kGroupBytes<DIM>>
__host__ __device__ constexpr int whole_hub_warps(const Sizes& sizes) {
  return hub_tiles(sizes) * kHubSplit<DIM, BYTES>;
}

// Warps that share each tile and head, in a block with so many warps for windows.
template <int DIM, int BYTES = kGroupBytes<DIM>>
constexpr int hub_parts(const Sizes& sizes, int windows) {
  const int whole = whole_hub_warps<DIM, BYTES>(sizes), left = kNarrowForwardWarps - 1 - windows;
  if (!Layout<DIM, BYTES>::kNarrow || whole == 0) return 1;
  return std::max(std::min(left, kMostHubParts) / whole, 1);
}

template <int DIM, int BYTES = kGroupBytes<DIM>>
constexpr int hub_warps(const Sizes& sizes, int windows) {
  return whole_hub_warps<DIM, BYTES>(sizes) * hub_parts<DIM, BYTES>(sizes, windows);
}

// One warp: a tile of rows, not yet divided by their sums, to [16, DIM + 4] floats; behind its columns a row's peak and sum.
template <int DIM>
__device__ __forceinline__ void pass_on(const SoftmaxState<DIM>& state, float* rows) {
  constexpr int kPitch = DIM + 4;
  const LaneRows lane = lane_rows();
  store_partial_rows<DIM>(state.out, 1.f, rows, kPitch, true, true);
  const float sum_low = quad_sum(state.sum_low), sum_high = quad_sum(state.sum_high);
  if (threadIdx.x % 4 != 0) return;
  *reinterpret_cast<float2*>(rows + lane.low * kPitch + DIM) = make_float2(state.peak_low, sum_low);
  *reinterpret_cast<float2*>(rows + lane.high * kPitch + DIM) = make_float2(state.peak_high, sum_high);
}

// A tile of 16 hubs: what its warp keeps over all steps, for its share of the heads of the group and of the chunks.
template <typename T, int DIM, int BYTES = kGroupBytes<DIM>>
struct HubQueries {
  using L = Layout<DIM, BYTES>;
  static constexpr int kHeads = L::kHeads / kHubSplit<DIM, BYTES>;
  static constexpr bool kWholeChunks = L::kNarrow && DIM == 16;  // there is room for the scores of 64 keys at once
  uint32_t q[kHeads * L::kDepth][4];  // fragment head * (DIM / 16) + depth
  SoftmaxState<DIM> state[kHeads];
  int tile, first_head;  // the latter within the group
  int part, parts;       // chunks `part`, `part` + `parts` ... of every step

  // `number` of the `warps` that the hubs have.
  __device__ __forceinline__ void begin(const ForwardArguments& p, const BlockPlace& place, int number, int warps) {
    parts = L::kNarrow ? warps / whole_hub_warps<DIM, BYTES>(p.sizes) : 1;
    part = number % parts;
    tile = number / parts / kHubSplit<DIM, BYTES>;
    first_head = number / parts % kHubSplit<DIM, BYTES> * kHeads;
    const LaneRows lane = lane_rows();
    const int last = p.sizes.hubs - 1;
    const int64_t low = token_offset(p.q, min(tile * kRows + lane.low, last));
    const int64_t high = token_offset(p.q, min(tile * kRows + lane.high, last));
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      state[i].clear();
      const int head = place.first_head + first_head + i;
      const bool there = head < p.sizes.heads;
      const unsigned char* base = head_base<T>(p.q, place.batch, there ? head : place.first_head);
#pragma unroll
      for (int half = 0; half < 2 * L::kDepth; ++half) {  // of 8 columns
        const int column = 8 * half + 2 * (threadIdx.x % 4);
        const bool valid = there && column < p.sizes.dim;
        uint32_t* fragment = q[i * L::kDepth + half / 2] + 2 * (half % 2);
        fragment[0] = valid ? __ldg(reinterpret_cast<const uint32_t*>(base + low + 2 * column)) ^ p.sign : 0u;
        fragment[1] = valid ? __ldg(reinterpret_cast<const uint32_t*>(base + high + 2 * column)) ^ p.sign : 0u;
      }
    }
  }

  template <bool DROPOUT>
  __device__ __forceinline__ void attend(const ForwardArguments& p, const BlockPlace& place, int keys,
                                         const unsigned char* chunks, SharedAddress slots, const int* slot_tokens) {
    const LaneRows lane = lane_rows();
    const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + first_head;
    for (int chunk = part; chunk * kKeys < keys; chunk += parts) {
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        const DropoutTile dropout{slot_tokens, DROPOUT ? dropout_key(*p.dropout.seed, batch_head + i) : 0u,
                                  p.dropout.threshold, tile * kRows + lane.low, tile * kRows + lane.high};
        const Chunk keys_of_chunk(chunks + chunk * kChunkBytes);
        const int count = keys - chunk * kKeys;
        if constexpr (kWholeChunks) {
          if (count > kKeys / 2) {
            attend_keys<T, DIM, kGroups, DROPOUT, false, BYTES>(state[i], q + i * L::kDepth, slots, first_head + i,
                                                                keys_of_chunk, 0, p.scale, dropout);
            continue;
          }
        }
        attend_halves<T, DIM, DROPOUT, BYTES>(state[i], q + i * L::kDepth, slots, first_head + i, keys_of_chunk, count,
                                              p.scale, dropout);
      }
    }
  }

  // To float rows [hubs, DIM + 4] of every head of the group, which are `head_pitch` floats apart.
  __device__ __forceinline__ void store(const ForwardArguments& p, const BlockPlace& place, float* partials,
                                        int64_t head_pitch) {
    constexpr int kPitch = DIM + 4;
    const LaneRows lane = lane_rows();
    const bool low = tile * kRows + lane.low < p.sizes.hubs, high = tile * kRows + lane.high < p.sizes.hubs;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const float sum_low = quad_sum(state[i].sum_low), sum_high = quad_sum(state[i].sum_high);
      if (place.first_head + first_head + i >= p.sizes.heads) continue;
      float* rows = partials + (first_head + i) * head_pitch + tile * kRows * kPitch;
      store_partial_rows<DIM>(state[i].out, 1.f, rows, kPitch, low, high);
      if (threadIdx.x % 4 != 0) continue;
      float2* sums_low = reinterpret_cast<float2*>(rows + lane.low * kPitch + DIM);
      float2* sums_high = reinterpret_cast<float2*>(rows + lane.high * kPitch + DIM);
      if (low) *sums_low = make_float2(state[i].peak_low, sum_low);
      if (high) *sums_high = make_float2(state[i].peak_high, sum_high);
    }
  }

  // All sums where one block has met every key: to the output, or where others have parts of them to `shared`, floats
  // [tiles and heads, parts, 16, DIM + 4].
  __device__ __forceinline__ void finish(const ForwardArguments& p, const BlockPlace& place, float* shared) {
    static_assert(kHeads == 1 || !L::kNarrow);
    if (parts > 1) {
      const int tile_head = tile * kHubSplit<DIM, BYTES> + first_head;
      return pass_on<DIM>(state[0], shared + (tile_head * parts + part) * kRows * (DIM + 4));
    }
    const int head = place.first_head + first_head;
    if (head >= p.sizes.heads) return;
    const LaneRows lane = lane_rows();
    const int low = tile * kRows + lane.low, high = tile * kRows + lane.high;
    const bool has_low = low < p.sizes.hubs, has_high = high < p.sizes.hubs;
    const float sum_low = quad_sum(state[0].sum_low), sum_high = quad_sum(state[0].sum_high);
    store_rows<T, DIM>(state[0].out, normaliser(sum_low, p.dropout.keep_scale),
                       normaliser(sum_high, p.dropout.keep_scale),
                       output_row<T>(p.out, p.sizes, place.batch, head, low),
                       output_row<T>(p.out, p.sizes, place.batch, head, high), has_low, has_high, p.sizes.dim);
    if (threadIdx.x % 4 != 0) return;
    float* lse = p.lse + (place.batch * p.sizes.heads + head) * p.sizes.tokens;
    if (has_low) lse[low] = log_sum_exp(state[0].peak_low, sum_low);
    if (has_high) lse[high] = log_sum_exp(state[0].peak_high, sum_high);
  }
};

// Four columns of a hub row, from `count` partial rows in fixed order; values(i) and sums(i) read of the i-th. Several
// are read at once: each read takes its time.
template <typename T, int DIM, typename Values, typename Sums>
__device__ __forceinline__ void combine_row(const ForwardArguments& p, int64_t batch, int head, int row, int column,
                                            int count, Values values, Sums sums) {
  constexpr int kAtOnce = 8;
  float peak = kLowest, sum = 0.f, total[4] = {};
  for (int first = 0; first < count; first += kAtOnce) {
    float2 part[kAtOnce];
    float4 columns[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int number = min(first + i, count - 1);
      part[i] = sums(number);
      columns[i] = values(number);
    }
    float higher = peak;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) higher = fmaxf(higher, part[i].x);
    const float decay = exp2_fast(peak - higher);
    peak = higher;
    sum *= decay;
#pragma unroll
    for (int j = 0; j < 4; ++j) total[j] *= decay;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = first + i < count ? exp2_fast(part[i].x - peak) : 0.f;
      sum = fmaf(weight, part[i].y, sum);
      total[0] = fmaf(weight, columns[i].x, total[0]);
      total[1] = fmaf(weight, columns[i].y, total[1]);
      total[2] = fmaf(weight, columns[i].z, total[2]);
      total[3] = fmaf(weight, columns[i].w, total[3]);
    }
  }
  if (column == 0) p.lse[(batch * p.sizes.heads + head) * p.sizes.tokens + row] = log_sum_exp(peak, sum);
  if (column >= p.sizes.dim) return;
  const float factor = normaliser(sum, p.dropout.keep_scale);
  *reinterpret_cast<uint2*>(output_row<T>(p.out, p.sizes, batch, head, row) + column) = make_uint2(
      pack<T>(total[0] * factor, total[1] * factor), pack<T>(total[2] * factor, total[3] * factor));
}

// All threads of a cluster: combines the partial rows that lie at `partials` in the shared memory of its blocks.
template <typename T, int DIM>
__device__ __forceinline__ void combine_in_cluster(const ForwardArguments& p, const BlockPlace& place,
                                                   SharedAddress partials) {
  constexpr int kHeads = Layout<DIM>::kHeads, kPerRow = DIM / 4, kPitchBytes = (DIM + 4) * 4;
  const int blocks = static_cast<int>(cluster_size()), elements = kHeads * p.sizes.hubs * kPerRow;
  for (int e = threadIdx.x * blocks + cluster_rank(); e < elements; e += blockDim.x * blocks) {
    const int row = e / kPerRow, column = e % kPerRow * 4, head = place.first_head + row / p.sizes.hubs;
    if (head >= p.sizes.heads) continue;
    const SharedAddress first = partials + row * kPitchBytes;
    combine_row<T, DIM>(
        p, place.batch, head, row % p.sizes.hubs, column, blocks,
        [&](int i) { return load_cluster_float4(first + 4 * column, i); },
        [&](int i) { return load_cluster_float2(first + 4 * DIM, i); });
  }
}

// All threads of a block: the hub rows of which several of its warps have passed on parts.
template <typename T, int DIM, int BYTES>
__device__ __forceinline__ void combine_in_block(const ForwardArguments& p, const BlockPlace& place,
                                                 const float* shared, int parts) {
  constexpr int kPerRow = DIM / 4, kPitch = DIM + 4, kSplit = kHubSplit<DIM, BYTES>;
  for (int e = threadIdx.x; e < hub_tiles(p.sizes) * kSplit * kRows * kPerRow; e += blockDim.x) {
    const int column = e % kPerRow * 4, i = e / kPerRow % kRows, tile_head = e / (kPerRow * kRows);
    const int head = place.first_head + tile_head % kSplit, row = tile_head / kSplit * kRows + i;
    if (row >= p.sizes.hubs || head >= p.sizes.heads) continue;
    const float* first = shared + (tile_head * parts * kRows + i) * kPitch;
    combine_row<T, DIM>(
        p, place.batch, head, row, column, parts,
        [&](int n) { return *reinterpret_cast<const float4*>(first + n * kRows * kPitch + column); },
        [&](int n) { return *reinterpret_cast<const float2*>(first + n * kRows * kPitch + DIM); });
  }
}

}  // namespace fm::attention
