// Backward pass where there are few rows, like few.cuh: a block gathers the rows that a pair of windows needs. They are
// the keys that its vertices see and, the pattern being symmetric, the queries that see them. Then for each window and
// head a warp computes dq and another dk and dv. The hubs have a block for either role, which reads all rows in the order
// of memory; eight warps take 64 partners each, and the block adds up what they have gathered.

#pragma once

#include "attention/backward.cuh"
#include "attention/few.cuh"

namespace fm::attention {

struct FewBackwardArguments : BackwardArguments {
  const FewPair* pairs;
  int num_pairs;
};

// Shared memory of a pair of windows: of its slots k, v, q, the gradient and the output; their statistics; its record.
template <int DIM>
struct FewBackwardPair {
  static constexpr int kTensors = 5;
  static constexpr int kSlotBytes = slot_bytes<DIM>(kTensors);
  static constexpr int kStatistics = kFewSlots * kSlotBytes;
  static constexpr int kRecord =
      kStatistics + kFewSlots * Layout<DIM>::kHeads * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kBytes = kRecord + static_cast<int>(sizeof(FewPair));
};

// Shared memory of a block of hubs: of each warp 64 partners (k and v; or q, the gradient, the output), in their place
// what it passes on, [tensors, heads, 16, kPitch] floats; the hubs' own rows; statistics of queries; of each warp a
// chunk that lists its partners; with dropout their tokens.
template <int DIM>
struct FewHubGradients {
  using F = FewHubs<DIM>;
  static constexpr int kTensors = 3;
  static constexpr int kSlotBytes = slot_bytes<DIM, F::kBytes>(kTensors);
  static constexpr int kWarpBytes = kKeys * kSlotBytes;
  static constexpr int kOwn = kFewHubWarps * kWarpBytes;
  static constexpr int kStatistics = kOwn + kRows * kSlotBytes;
  static constexpr int kChunks = kStatistics + kFewHubSlots * F::kHeads * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kTokens = kChunks + kFewHubWarps * kChunkBytes;
  static constexpr int kAllBytes = kTokens + kFewHubSlots * 4;
  static_assert(2 * F::kHeads * kRows * F::kPitch * 4 <= kWarpBytes);
};

template <int DIM>
constexpr int kFewBackwardBytes = FewHubGradients<DIM>::kAllBytes > FewBackwardPair<DIM>::kBytes
                                      ? FewHubGradients<DIM>::kAllBytes
                                      : FewBackwardPair<DIM>::kBytes;

// Statistics of the rows in `count` slots, of which a slot has the gradient and behind it the output at `gradients`. In
// two parts: what has to come from global memory, while rows are still on their way, and then, by PARTS threads for each
// row and head, the products of what has come.
template <typename T, int DIM, int BYTES, int SLOT_BYTES, int PARTS>
struct FewStatistics {
  static constexpr int kHeads = BYTES / (2 * DIM), kPieces = DIM / 8 / PARTS;
  static_assert(kPieces * PARTS * 8 == DIM);
  RowStatistics* statistics;  // [slots, kHeads]
  int count;

  template <typename TokenOf>
  __device__ __forceinline__ void begin(const BackwardArguments& p, const BlockPlace& place, TokenOf token_of) const {
    for (int e = threadIdx.x; e < count * kHeads; e += kFewThreads) {
      const int head = place.first_head + e % kHeads;
      const int64_t number = (place.batch * p.sizes.heads + head) * p.sizes.tokens + token_of(e / kHeads);
      const bool there = head < p.sizes.heads;
      statistics[e] = make_float2(there ? __ldg(p.lse + number) * kLog2e : 0.f,
                                  there && p.grad_lse != nullptr ? __ldg(p.grad_lse + number) : 0.f);
    }
  }

  // After a barrier that tells that all has come.
  __device__ __forceinline__ void finish(const unsigned char* gradients) const {
    const int part = threadIdx.x % PARTS;
    for (int first = 0; first < count * kHeads; first += kFewThreads / PARTS) {
      const int e = first + threadIdx.x / PARTS, slot = min(e / kHeads, count - 1);
      const unsigned char* row = gradients + slot * SLOT_BYTES + e % kHeads * (2 * DIM) + part * (16 * kPieces);
      float sum = 0.f;
#pragma unroll 4
      for (int i = 0; i < kPieces; ++i) {
        sum += dot_pieces<T>(*reinterpret_cast<const uint4*>(row + 16 * i),
                             *reinterpret_cast<const uint4*>(row + BYTES + 16 * i));
      }
#pragma unroll
      for (int distance = 1; distance < PARTS; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (part == 0 && e < count * kHeads) statistics[e].y = sum - statistics[e].y;
    }
  }
};

// The block brings the rows of a pair of windows to shared memory.
template <typename T, int DIM>
__device__ __forceinline__ void gather_partners(const BackwardArguments& p, const BlockPlace& place,
                                                const FewPair& pair, unsigned char* memory) {
  using L = Layout<DIM>;
  using Shared = FewBackwardPair<DIM>;
  if (threadIdx.x < sizeof(FewPair) / 16) {
    copy_async_16(shared_address(memory) + Shared::kRecord + 16 * threadIdx.x,
                  reinterpret_cast<const uint4*>(&pair) + threadIdx.x, true);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const FewPair& here = *reinterpret_cast<const FewPair*>(memory + Shared::kRecord);
  const auto token_of = [&](int slot) { return here.tokens[slot]; };
  const int count = here.count;
  wait_for_previous_grid();
  few_copy<T, DIM, Shared::kTensors, L::kBytes>(p.inputs, p.sizes, place, shared_address(memory), count, token_of);
  constexpr int kParts = kFewThreads / kFewSlots / L::kHeads;
  const FewStatistics<T, DIM, L::kBytes, Shared::kSlotBytes, kParts> statistics{
      reinterpret_cast<RowStatistics*>(memory + Shared::kStatistics), count};
  statistics.begin(p, place, token_of);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  statistics.finish(memory + 3 * L::kBytes);
}

// One warp: one head of a window that has been gathered, in one of the two roles.
template <typename T, int DIM, bool OWNS_KEYS, bool DROPOUT>
__device__ __forceinline__ void differentiate_gathered(const BackwardArguments& p, const BlockPlace& place, int window,
                                                       int head, unsigned char* memory) {
  using L = Layout<DIM>;
  using Shared = FewBackwardPair<DIM>;
  const LaneRows lane = lane_rows();
  const FewPair& pair = *reinterpret_cast<const FewPair*>(memory + Shared::kRecord);
  const unsigned char* row_slots = pair.row_slots[window];
  const RowStatistics* statistics = reinterpret_cast<const RowStatistics*>(memory + Shared::kStatistics);
  const SharedRows rows{shared_address(memory), statistics, pair.tokens, in_register(p.scale_log2e)};
  const OwnedRows owned{
      rows.slots + row_slots[row_of_lane()] * Shared::kSlotBytes + (OWNS_KEYS ? 0 : 2 * L::kBytes) +
          row_piece<DIM>(head),
      statistics[row_slots[lane.low] * L::kHeads + head], statistics[row_slots[lane.high] * L::kHeads + head],
      pair.rows[window][lane.low], pair.rows[window][lane.high]};
  const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
  float first[DIM / 8][4], second[OWNS_KEYS ? DIM / 8 : 1][4];
  clear<DIM>(first);
  if constexpr (OWNS_KEYS) clear<DIM>(second);
  accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT, L::kBytes, Shared::kTensors>(
      first, second, p, rows, owned, pair.chunks[window], kGroups, head,
      DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u);
  store_gradients<T, DIM, OWNS_KEYS>(p, place.batch, place.first_head + head, owned.token_low, owned.token_high,
                                     owned.token_low >= 0, owned.token_high >= 0, first, second);
}

// One warp: a chunk whose first `count` partners lie in slots 0, 1, ... and see every row.
__device__ __forceinline__ void write_chunk(unsigned char* chunk, int count) {
  const int lane = threadIdx.x % kWarp, n = lane % 16;
  const unsigned long long slots = n * 0x0001000100010001ull + 0x0030002000100000ull;
  const unsigned long long mask = count < kKeys ? (1ull << count) - 1 : ~0ull;
  static_assert(kChunkMasks == 16 * 8);
  *reinterpret_cast<unsigned long long*>(chunk + 8 * lane) = lane < 16 ? slots : mask;
}

// A tile of hubs in one of the two roles: partners in the order of memory, 64 for each of the warps that gather, then as
// many more, to the end. `place` names the heads of this block.
template <typename T, int DIM, bool OWNS_KEYS, bool DROPOUT>
__device__ __forceinline__ void few_hub_gradients(const BackwardArguments& p, const BlockPlace& place, int tile,
                                                  unsigned char* memory) {
  using F = FewHubs<DIM>;
  using M = FewHubGradients<DIM>;
  constexpr int kBytes = F::kBytes, kQueries = 3, kKeysAndValues = 2;  // tensors in a slot
  constexpr int kPartners = OWNS_KEYS ? kQueries : kKeysAndValues, kOwned = OWNS_KEYS ? kKeysAndValues : kQueries;
  const LaneRows lane = lane_rows();
  const int warp = threadIdx.x / kWarp, tokens = p.sizes.tokens;
  const SharedAddress slots = shared_address(memory), own = slots + M::kOwn;
  unsigned char* chunk = memory + M::kChunks + warp * kChunkBytes;
  auto* statistics = reinterpret_cast<RowStatistics*>(memory + M::kStatistics);
  int* key_tokens = reinterpret_cast<int*>(memory + M::kTokens);
  const auto hub_of = [&](int row) { return min(tile * kRows + row, p.sizes.hubs - 1); };

  HubGradients<T, DIM, OWNS_KEYS, kBytes> gradients;
  gradients.begin(tile, 1);
  const SharedRows rows{slots + warp * kKeys * slot_bytes<DIM, kBytes>(kPartners),
                        statistics + warp * kKeys * F::kHeads, key_tokens + warp * kKeys, in_register(p.scale_log2e)};
  wait_for_previous_grid();
  few_copy<T, DIM, kOwned, kBytes>(p.inputs + (OWNS_KEYS ? 0 : 2), p.sizes, place, own, kRows, hub_of);
  for (int first = 0; first < tokens; first += kFewHubSlots) {
    if (first > 0) __syncthreads();
    const int count = few_hub_slots(first, tokens);
    const auto token_of = [&](int slot) { return min(first + slot, tokens - 1); };
    few_copy<T, DIM, kPartners, kBytes>(p.inputs + (OWNS_KEYS ? 2 : 0), p.sizes, place, slots, count, token_of);
    if (DROPOUT) key_tokens[threadIdx.x] = token_of(threadIdx.x);
    static_assert(kFewThreads == kFewHubSlots);
    if (warp < kFewHubWarps) write_chunk(chunk, max(tokens - first - warp * kKeys, 0));
    const FewStatistics<T, DIM, kBytes, slot_bytes<DIM, kBytes>(kQueries), OWNS_KEYS ? 1 : 2> queries{
        statistics, OWNS_KEYS ? count : kRows};
    if (OWNS_KEYS) queries.begin(p, place, token_of);
    else if (first == 0) queries.begin(p, place, hub_of);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (OWNS_KEYS || first == 0) {
      queries.finish(memory + (OWNS_KEYS ? 0 : M::kOwn) + kBytes);
      __syncthreads();
    }
    if (warp >= kFewHubWarps || first + warp * kKeys >= tokens) continue;
#pragma unroll
    for (int head = 0; head < F::kHeads; ++head) {
      const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
      const OwnedRows owned{own + row_of_lane() * slot_bytes<DIM, kBytes>(kOwned) + row_piece<DIM>(head),
                            statistics[lane.low * F::kHeads + head], statistics[lane.high * F::kHeads + head],
                            hub_of(lane.low), hub_of(lane.high)};
      accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT, kBytes, kPartners>(
          gradients.first[head], gradients.second[OWNS_KEYS ? head : 0], p, rows, owned, chunk, kGroups, head,
          DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u);
    }
  }
  __syncthreads();  // partners of a turn of two tensors do not end where a warp's sums do
  if (warp >= kFewHubWarps) return;
  constexpr int kRowsPitch = kRows * F::kPitch;
  float* passed = reinterpret_cast<float*>(memory + warp * M::kWarpBytes) - tile * kRowsPitch;  // which store() adds
  gradients.store(p, place, passed, kRowsPitch, F::kHeads * kRowsPitch);
}

// The hub rows of a block, from the sums that the warps have passed on.
template <typename T, int DIM, bool OWNS_KEYS>
__device__ __forceinline__ void add_up_hubs(const BackwardArguments& p, const BlockPlace& place, int tile,
                                            const unsigned char* memory) {
  using F = FewHubs<DIM>;
  constexpr int kPerRow = DIM / 4, kPart = FewHubGradients<DIM>::kWarpBytes / 4, kTensors = OWNS_KEYS ? 2 : 1;
  const int parts = min(kFewHubWarps, (p.sizes.tokens + kKeys - 1) / kKeys);
  for (int e = threadIdx.x; e < kTensors * F::kHeads * kRows * kPerRow; e += kFewThreads) {
    const int column = e % kPerRow * 4, row = e / kPerRow, i = row % kRows, head = row / kRows % F::kHeads;
    if (tile * kRows + i >= p.sizes.hubs || place.first_head + head >= p.sizes.heads) continue;
    const float* first = reinterpret_cast<const float*>(memory) + row * F::kPitch + column;
    add_up_row<T>(p, (OWNS_KEYS ? 1 : 0) + row / (kRows * F::kHeads), place.batch, place.first_head + head,
                  tile * kRows + i, column, parts,
                  [&](int n) { return *reinterpret_cast<const float4*>(first + n * kPart); });
  }
}

template <typename T, int DIM, bool DROPOUT>
__global__ void __launch_bounds__(kFewThreads, 1) few_backward_kernel(const __grid_constant__ FewBackwardArguments p) {
  unsigned char* memory = dynamic_shared();
  const FewPlace place = FewPlace::here<DIM>(p.sizes, p.num_pairs, 2);
  launch_dependents();
  if (place.tile >= 0) {
    const auto gather = [&]<bool OWNS_KEYS>() {
      few_hub_gradients<T, DIM, OWNS_KEYS, DROPOUT>(p, place.block, place.tile, memory);
      __syncthreads();
      add_up_hubs<T, DIM, OWNS_KEYS>(p, place.block, place.tile, memory);
    };
    if (place.role == 0) gather.template operator()<true>();
    else gather.template operator()<false>();
    return;
  }
  gather_partners<T, DIM>(p, place.block, p.pairs[place.pair], memory);
  __syncthreads();
  const int warp = threadIdx.x / kWarp, window = warp / 2 % kFewWindows, head = warp / 2 / kFewWindows;
  if (head >= Layout<DIM>::kHeads || place.block.first_head + head >= p.sizes.heads) return;
  if (warp % 2 == 0) {
    differentiate_gathered<T, DIM, true, DROPOUT>(p, place.block, window, head, memory);
  } else {
    differentiate_gathered<T, DIM, false, DROPOUT>(p, place.block, window, head, memory);
  }
}

}  // namespace fm::attention
