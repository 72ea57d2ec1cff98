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

// Shared memory of a pair of windows: its slots, their statistics, its record.
template <int DIM>
struct FewBackwardPair {
  static constexpr int kStatistics = kFewSlots * slot_bytes<DIM>(4);
  static constexpr int kRecord =
      kStatistics + kFewSlots * Layout<DIM>::kHeads * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kBytes = kRecord + static_cast<int>(sizeof(FewPair));
};

// Shared memory of a block of hubs: of each warp 64 partners, in their place what it passes on, [tensors, heads, 16,
// kPitch] floats; the hubs' own rows; statistics of own rows and of partners; of each warp a chunk that lists its
// partners; with dropout their tokens.
template <int DIM>
struct FewHubGradients {
  using F = FewHubs<DIM>;
  static constexpr int kStatisticsBytes = F::kHeads * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kOwn = kFewHubWarps * F::kWarpBytes;
  static constexpr int kOwnStatistics = kOwn + kRows * F::kSlotBytes;
  static constexpr int kStatistics = kOwnStatistics + kRows * kStatisticsBytes;
  static constexpr int kChunks = kStatistics + kFewHubSlots * kStatisticsBytes;
  static constexpr int kTokens = kChunks + kFewHubWarps * kChunkBytes;
  static constexpr int kAllBytes = kTokens + kFewHubSlots * 4;
  static_assert(2 * F::kHeads * kRows * F::kPitch * 4 <= F::kWarpBytes);
};

template <int DIM>
constexpr int kFewBackwardBytes = FewHubGradients<DIM>::kAllBytes > FewBackwardPair<DIM>::kBytes
                                      ? FewHubGradients<DIM>::kAllBytes
                                      : FewBackwardPair<DIM>::kBytes;

// The block brings the rows of a pair of windows to shared memory.
template <typename T, int DIM>
__device__ __forceinline__ void gather_partners(const BackwardArguments& p, const BlockPlace& place,
                                                const FewPair& pair, unsigned char* memory) {
  using Shared = FewBackwardPair<DIM>;
  constexpr int kRounds = kFewSlots * Layout<DIM>::kPieces / kFewThreads;
  if (threadIdx.x < sizeof(FewPair) / 16) {
    copy_async_16(shared_address(memory) + Shared::kRecord + 16 * threadIdx.x,
                  reinterpret_cast<const uint4*>(&pair) + threadIdx.x, true);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const FewPair& here = *reinterpret_cast<const FewPair*>(memory + Shared::kRecord);
  wait_for_previous_grid();
  const BackwardCopier<T, DIM> copier(p, place, memory, reinterpret_cast<RowStatistics*>(memory + Shared::kStatistics),
                                      nullptr);
  copier.template copy<kRounds>(0, here.count, threadIdx.x / kWarp, kFewWarps,
                                [&](int slot) { return make_int2(here.tokens[slot], slot); });
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
      rows.slots + row_slots[row_of_lane()] * slot_bytes<DIM>(4) + (OWNS_KEYS ? 0 : 2 * L::kBytes) +
          row_piece<DIM>(head),
      statistics[row_slots[lane.low] * L::kHeads + head], statistics[row_slots[lane.high] * L::kHeads + head],
      pair.rows[window][lane.low], pair.rows[window][lane.high]};
  const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
  float first[DIM / 8][4], second[OWNS_KEYS ? DIM / 8 : 1][4];
  clear<DIM>(first);
  if constexpr (OWNS_KEYS) clear<DIM>(second);
  accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT>(first, second, p, rows, owned, pair.chunks[window], kGroups, head,
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
  constexpr int kBytes = F::kBytes, kRowsAtOnce = kWarp / F::kPieces, kOwnWarps = kRows / kRowsAtOnce;
  constexpr int kRounds = kFewHubSlots / (kFewWarps * kRowsAtOnce);
  const LaneRows lane = lane_rows();
  const int warp = threadIdx.x / kWarp, tokens = p.sizes.tokens, row = threadIdx.x / F::kPieces;
  unsigned char *own = memory + M::kOwn, *chunk = memory + M::kChunks + warp * kChunkBytes;
  auto* own_statistics = reinterpret_cast<RowStatistics*>(memory + M::kOwnStatistics);
  auto* statistics = reinterpret_cast<RowStatistics*>(memory + M::kStatistics);
  int* key_tokens = reinterpret_cast<int*>(memory + M::kTokens);
  const auto hub_of = [&](int row) { return min(tile * kRows + row, p.sizes.hubs - 1); };

  const auto copy_partners = [&](int first) {
    const int end = few_hub_slots(first, tokens);
    const auto token_of = [&](int slot) { return min(first + slot, tokens - 1); };
    if constexpr (OWNS_KEYS) {
      const BackwardCopier<T, DIM, kBytes, 2> copier(p, place, memory, statistics, nullptr);
      copier.template copy<kRounds>(0, end, warp, kFewWarps, [&](int n) { return make_int2(token_of(n), n); });
    } else {
      const RowCopier<T, DIM, 2, 2, kBytes> copier(p.inputs, p.sizes, place, shared_address(memory));
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const int slot = i * kFewWarps * kRowsAtOnce + row;
        if (slot < end) copier.copy(token_of(slot), slot);
      }
    }
    if (DROPOUT) key_tokens[threadIdx.x] = token_of(threadIdx.x);
    if (warp < kFewHubWarps) write_chunk(chunk, max(tokens - first - warp * kKeys, 0));
  };
  static_assert(kFewThreads == kFewHubSlots);
  const auto copy_own = [&] {
    if (warp >= kOwnWarps) return;
    if constexpr (OWNS_KEYS) {
      const RowCopier<T, DIM, 2, 2, kBytes> copier(p.inputs, p.sizes, place, shared_address(own));
      copier.copy(hub_of(row), row);
    } else {
      const BackwardCopier<T, DIM, kBytes, 2> copier(p, place, own, own_statistics, nullptr);
      copier.template copy<1>(0, kRows, warp, kOwnWarps, [&](int n) { return make_int2(hub_of(n), n); });
    }
  };

  HubGradients<T, DIM, OWNS_KEYS, kBytes> gradients;
  gradients.begin(tile, 1);
  const SharedRows rows{shared_address(memory) + warp * F::kWarpBytes, statistics + warp * kKeys * F::kHeads,
                        key_tokens + warp * kKeys, in_register(p.scale_log2e)};
  wait_for_previous_grid();
  for (int first = 0; first < tokens; first += kFewHubSlots) {
    if (first > 0) __syncthreads();
    // The copies that wait for what they have read come last.
    if (OWNS_KEYS && first == 0) copy_own();
    copy_partners(first);
    if (!OWNS_KEYS && first == 0) copy_own();
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (warp >= kFewHubWarps || first + warp * kKeys >= tokens) continue;
#pragma unroll
    for (int head = 0; head < F::kHeads; ++head) {
      const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
      const OwnedRows owned{shared_address(own) + row_of_lane() * F::kSlotBytes + row_piece<DIM>(head),
                            own_statistics[lane.low * F::kHeads + head], own_statistics[lane.high * F::kHeads + head],
                            hub_of(lane.low), hub_of(lane.high)};
      accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT, kBytes, 2>(
          gradients.first[head], gradients.second[OWNS_KEYS ? head : 0], p, rows, owned, chunk, kGroups, head,
          DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u);
    }
  }
  __syncwarp();
  if (warp >= kFewHubWarps) return;
  constexpr int kRowsPitch = kRows * F::kPitch;
  float* passed = reinterpret_cast<float*>(memory + warp * F::kWarpBytes) - tile * kRowsPitch;  // which store() adds
  gradients.store(p, place, passed, kRowsPitch, F::kHeads * kRowsPitch);
}

// The hub rows of a block, from the sums that the warps have passed on.
template <typename T, int DIM, bool OWNS_KEYS>
__device__ __forceinline__ void add_up_hubs(const BackwardArguments& p, const BlockPlace& place, int tile,
                                            const unsigned char* memory) {
  using F = FewHubs<DIM>;
  constexpr int kPerRow = DIM / 4, kPart = F::kWarpBytes / 4, kTensors = OWNS_KEYS ? 2 : 1;
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
