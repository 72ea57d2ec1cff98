// Backward pass where there are few rows, like few.cuh: eight warps gather the up to 64 partners of a window, which are
// the keys that its vertices see and, the pattern being symmetric, the queries that see them. Then one warp per head
// computes dq and another dk and dv. The hubs have a block for either role: every warp reads partners in the order of
// memory, and after the only barrier the block adds up what the warps have gathered.

#pragma once

#include "attention/backward.cuh"
#include "attention/few.cuh"

namespace fm::attention {

struct FewBackwardArguments : BackwardArguments {
  const FewWindow* windows;
  int num_windows;
};

// Shared memory of a window: its partners and behind them its own rows, statistics of both, its record.
template <int DIM>
struct FewBackwardWindow {
  static constexpr int kSlots = kKeys + kRows;
  static constexpr int kStatistics = kSlots * slot_bytes<DIM>(4);
  static constexpr int kRecord = kStatistics + kSlots * Layout<DIM>::kHeads * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kBytes = kRecord + static_cast<int>(sizeof(FewWindow));
  static_assert(kBytes % 16 == 0);
};

// Shared memory of a block of hubs: of each warp 32 partners, in their place what it passes on, [tensors, heads, 16,
// kPitch] floats; the hubs' own rows; statistics of own rows and partners; of each warp a chunk that lists its partners,
// and their tokens.
template <int DIM>
struct FewHubGradients {
  using F = FewHubs<DIM>;
  static constexpr int kPassedBytes = 2 * F::kHeads * kRows * F::kPitch * 4;
  static constexpr int kWarpBytes = kPassedBytes > F::kWarpBytes ? kPassedBytes : F::kWarpBytes;
  static constexpr int kOwn = kFewWarps * kWarpBytes;
  static constexpr int kOwnStatistics = kOwn + kRows * F::kSlotBytes;
  static constexpr int kStatistics = kOwnStatistics + kRows * F::kHeads * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kChunks =
      kStatistics + kFewWarps * kFewKeys * F::kHeads * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kTokens = kChunks + kFewWarps * kChunkBytes;
  static constexpr int kAllBytes = kTokens + kFewWarps * kFewKeys * 4;
};

// Blocks of one batch element and group of heads.
template <int DIM>
__host__ __device__ constexpr int few_backward_blocks(const Sizes& sizes, int windows) {
  return 2 * FewHubs<DIM>::kBlocks * hub_tiles(sizes) + (windows + kFewWindows - 1) / kFewWindows;
}

template <int DIM>
constexpr int kFewBackwardBytes = FewHubGradients<DIM>::kAllBytes > kFewWindows * FewBackwardWindow<DIM>::kBytes
                                      ? FewHubGradients<DIM>::kAllBytes
                                      : kFewWindows * FewBackwardWindow<DIM>::kBytes;

// All threads of a window bring its rows to shared memory, in which its record already is.
template <typename T, int DIM>
__device__ __forceinline__ void gather_partners(const BackwardArguments& p, const BlockPlace& place,
                                                unsigned char* memory) {
  using Shared = FewBackwardWindow<DIM>;
  constexpr int kWarps = kFewTeam / kWarp, kRowsAtOnce = kWarps * kWarp / Layout<DIM>::kPieces;
  constexpr int kRounds = (Shared::kSlots + kRowsAtOnce - 1) / kRowsAtOnce;
  const FewWindow& window = *reinterpret_cast<const FewWindow*>(memory + Shared::kRecord);
  const BackwardCopier<T, DIM> copier(p, place, memory, reinterpret_cast<RowStatistics*>(memory + Shared::kStatistics),
                                      nullptr);
  copier.template copy<kRounds>(0, Shared::kSlots, threadIdx.x % kFewTeam / kWarp, kWarps, [&](int slot) {
    const int token = slot < kKeys ? window.keys[slot] : window.rows[slot - kKeys];
    return make_int2(token < 0 ? window.keys[0] : token, slot);  // a missing row is a copy that nobody looks at
  });
}

// One warp: one head of a window that has been gathered, in one of the two roles.
template <typename T, int DIM, bool OWNS_KEYS, bool DROPOUT>
__device__ __forceinline__ void differentiate_gathered(const BackwardArguments& p, const BlockPlace& place, int head,
                                                       unsigned char* memory) {
  using L = Layout<DIM>;
  using Shared = FewBackwardWindow<DIM>;
  const LaneRows lane = lane_rows();
  const FewWindow& window = *reinterpret_cast<const FewWindow*>(memory + Shared::kRecord);
  const RowStatistics* statistics = reinterpret_cast<const RowStatistics*>(memory + Shared::kStatistics);
  const SharedRows rows{shared_address(memory), statistics, window.keys, in_register(p.scale_log2e)};
  const RowStatistics* own_statistics = statistics + kKeys * L::kHeads + head;
  const OwnedRows owned{rows.slots + (kKeys + row_of_lane()) * slot_bytes<DIM>(4) + (OWNS_KEYS ? 0 : 2 * L::kBytes) +
                            row_piece<DIM>(head),
                        own_statistics[lane.low * L::kHeads], own_statistics[lane.high * L::kHeads],
                        window.rows[lane.low], window.rows[lane.high]};
  const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
  float first[DIM / 8][4], second[OWNS_KEYS ? DIM / 8 : 1][4];
  clear<DIM>(first);
  if constexpr (OWNS_KEYS) clear<DIM>(second);
  accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT>(first, second, p, rows, owned, window.chunk, kGroups, head,
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

// A tile of hubs in one of the two roles: 32 partners of each warp in the order of memory, then those that all warps
// together have left, to the end. `place` names the heads of this block.
template <typename T, int DIM, bool OWNS_KEYS, bool DROPOUT>
__device__ __forceinline__ void few_hub_gradients(const BackwardArguments& p, const BlockPlace& place, int tile,
                                                  unsigned char* memory) {
  using F = FewHubs<DIM>;
  using M = FewHubGradients<DIM>;
  constexpr int kBytes = F::kBytes, kRowsAtOnce = kWarp / F::kPieces, kRounds = kFewKeys / kRowsAtOnce;
  const LaneRows lane = lane_rows();
  const int warp = threadIdx.x / kWarp, tokens = p.sizes.tokens, number = threadIdx.x % kWarp / F::kPieces;
  unsigned char *slots = memory + warp * M::kWarpBytes, *own = memory + M::kOwn;
  unsigned char* chunk = memory + M::kChunks + warp * kChunkBytes;
  auto* own_statistics = reinterpret_cast<RowStatistics*>(memory + M::kOwnStatistics);
  auto* statistics = reinterpret_cast<RowStatistics*>(memory + M::kStatistics) + warp * kFewKeys * F::kHeads;
  int* key_tokens = reinterpret_cast<int*>(memory + M::kTokens) + warp * kFewKeys;
  const auto hub_of = [&](int row) { return min(tile * kRows + row, p.sizes.hubs - 1); };

  const auto copy_partners = [&](int first) {
    const auto token_of = [&](int n) { return min(first + n, tokens - 1); };
    if constexpr (OWNS_KEYS) {
      const BackwardCopier<T, DIM, kBytes, 2> copier(p, place, slots, statistics, nullptr);
      copier.template copy<kRounds>(0, kFewKeys, 0, 1, [&](int n) { return make_int2(token_of(n), n); });
    } else {
      const RowCopier<T, DIM, 2, 2, kBytes> copier(p.inputs, p.sizes, place, shared_address(slots));
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const int n = i * kRowsAtOnce + number;
        copier.copy(token_of(n), n);
      }
    }
    if (DROPOUT) key_tokens[threadIdx.x % kWarp] = token_of(threadIdx.x % kWarp);
    write_chunk(chunk, min(tokens - first, kFewKeys));
  };
  const auto copy_own = [&] {
    constexpr int kOwnWarps = kRows / kRowsAtOnce;
    if (warp >= kOwnWarps) return;
    if constexpr (OWNS_KEYS) {
      const RowCopier<T, DIM, 2, 2, kBytes> copier(p.inputs, p.sizes, place, shared_address(own));
      const int row = warp * kRowsAtOnce + number;
      copier.copy(hub_of(row), row);
    } else {
      const BackwardCopier<T, DIM, kBytes, 2> copier(p, place, own, own_statistics, nullptr);
      copier.template copy<1>(0, kRows, warp, kOwnWarps, [&](int row) { return make_int2(hub_of(row), row); });
    }
  };

  const int begin = warp * kFewKeys;
  wait_for_previous_grid();
  // The copies that wait for what they have read come last.
  if constexpr (OWNS_KEYS) copy_own();
  if (begin < tokens) copy_partners(begin);
  if constexpr (!OWNS_KEYS) copy_own();
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  HubGradients<T, DIM, OWNS_KEYS, kBytes> gradients;
  gradients.begin(tile, 1);
  const SharedRows rows{shared_address(slots), statistics, key_tokens, in_register(p.scale_log2e)};
  for (int first = begin; first < tokens; first += kFewWarps * kFewKeys) {
#pragma unroll
    for (int head = 0; head < F::kHeads; ++head) {
      const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
      const OwnedRows owned{shared_address(own) + row_of_lane() * F::kSlotBytes + row_piece<DIM>(head),
                            own_statistics[lane.low * F::kHeads + head], own_statistics[lane.high * F::kHeads + head],
                            hub_of(lane.low), hub_of(lane.high)};
      accumulate_chunk<T, DIM, OWNS_KEYS, DROPOUT, kBytes, 2>(
          gradients.first[head], gradients.second[OWNS_KEYS ? head : 0], p, rows, owned, chunk, kFewKeys / kGroup, head,
          DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u);
    }
    __syncwarp();
    if (first + kFewWarps * kFewKeys >= tokens) break;
    copy_partners(first + kFewWarps * kFewKeys);
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
  }
  constexpr int kRowsPitch = kRows * F::kPitch;
  float* passed = reinterpret_cast<float*>(slots) - tile * kRowsPitch;  // which store() adds
  gradients.store(p, place, passed, kRowsPitch, F::kHeads * kRowsPitch);
}

// The hub rows of a block, from the sums that the warps have passed on.
template <typename T, int DIM, bool OWNS_KEYS>
__device__ __forceinline__ void add_up_hubs(const BackwardArguments& p, const BlockPlace& place, int tile,
                                            const unsigned char* memory) {
  using F = FewHubs<DIM>;
  constexpr int kPerRow = DIM / 4, kPart = FewHubGradients<DIM>::kWarpBytes / 4, kTensors = OWNS_KEYS ? 2 : 1;
  const int parts = min(kFewWarps, (p.sizes.tokens + kFewKeys - 1) / kFewKeys);
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
  using Shared = FewBackwardWindow<DIM>;
  constexpr int kHeads = Layout<DIM>::kHeads, kShares = FewHubs<DIM>::kBlocks;
  unsigned char* memory = dynamic_shared();
  const int per_chain = few_backward_blocks<DIM>(p.sizes, p.num_windows), hub_blocks = 2 * kShares * hub_tiles(p.sizes);
  const int chain = static_cast<int>(blockIdx.x) / per_chain, number = static_cast<int>(blockIdx.x) % per_chain;
  const int groups = (p.sizes.heads + kHeads - 1) / kHeads;
  BlockPlace place{chain / groups, 0, chain % groups * kHeads, 0, 0};
  launch_dependents();
  if (number < hub_blocks) {
    const int tile = number / (2 * kShares);
    place.first_head += number / 2 % kShares * FewHubs<DIM>::kHeads;
    const auto gather = [&]<bool OWNS_KEYS>() {
      few_hub_gradients<T, DIM, OWNS_KEYS, DROPOUT>(p, place, tile, memory);
      __syncthreads();
      add_up_hubs<T, DIM, OWNS_KEYS>(p, place, tile, memory);
    };
    if (number % 2 == 0) gather.template operator()<true>();
    else gather.template operator()<false>();
    return;
  }
  const int team = threadIdx.x / kFewTeam, window = (number - hub_blocks) * kFewWindows + team;
  const bool there = window < p.num_windows;
  unsigned char* own = memory + team * Shared::kBytes;
  if (there && threadIdx.x % kFewTeam < static_cast<int>(sizeof(FewWindow)) / 16) {
    const int thread = threadIdx.x % kFewTeam;
    copy_async_16(shared_address(own) + Shared::kRecord + 16 * thread,
                  reinterpret_cast<const uint4*>(p.windows + window) + thread, true);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  wait_for_previous_grid();
  if (there) gather_partners<T, DIM>(p, place, own);
  __syncthreads();
  const int head = threadIdx.x % kFewTeam / kWarp / 2;
  if (!there || head >= kHeads || place.first_head + head >= p.sizes.heads) return;
  if (threadIdx.x / kWarp % 2 == 0) {
    differentiate_gathered<T, DIM, true, DROPOUT>(p, place, head, own);
  } else {
    differentiate_gathered<T, DIM, false, DROPOUT>(p, place, head, own);
  }
}

}  // namespace fm::attention
