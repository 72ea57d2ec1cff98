// Forward pass where there are few rows: at batch 1 a mesh of 431 vertices is a few microseconds of waiting, so what
// counts is how many things happen one after the other, and how much all blocks ask of L2 at the same time. A block
// gathers the rows that a pair of windows needs, then a warp attends for each window and head of the group. The hubs
// have blocks of their own, which read all rows in the order of memory; eight warps attend to 64 keys each, and the
// block combines their sums.

#pragma once

#include "attention/forward.cuh"

namespace fm::attention {

constexpr int kFewWarps = 16;
constexpr int kFewThreads = kFewWarps * kWarp;
constexpr int kFewWindows = 2;  // of a block
constexpr int kFewSlots = kFewWindows * kKeys;
constexpr int kFewHubWarps = 8;  // that attend, of a tile of hubs, to 64 keys each
constexpr int kFewHubSlots = kFewHubWarps * kKeys;

// A pair of windows as fastmetro_kernels/few.py lays it out: of each a chunk, the tokens of the rows (below 0: none) and
// the slots that these lie in; the tokens of all `count` slots.
struct FewPair {
  unsigned char chunks[kFewWindows][kChunkBytes];
  int rows[kFewWindows][kRows];
  unsigned char row_slots[kFewWindows][kRows];
  int tokens[kFewSlots];
  int count, unused[3];
};
static_assert(sizeof(FewPair) % 16 == 0);

struct FewForwardArguments : ForwardArguments {
  const FewPair* pairs;
  int num_pairs;
};

// Shared memory of a pair of windows: k and v of its slots, its queries, its record.
template <int DIM>
struct FewPairShared {
  static constexpr int kQueries = kFewSlots * slot_bytes<DIM>(2);
  static constexpr int kRecord = kQueries + kFewWindows * kRows * slot_bytes<DIM>(1);
  static constexpr int kBytes = kRecord + static_cast<int>(sizeof(FewPair));
};

// A tile of hubs and what a block does of it: all, or where a group has several heads, half of them.
template <int DIM>
struct FewHubs {
  static constexpr int kBytes = DIM == 64 ? 128 : 64;     // of a row of k
  static constexpr int kHeads = kBytes / (2 * DIM);
  static constexpr int kBlocks = Layout<DIM>::kHeads / kHeads;  // of a tile
  static constexpr int kPieces = kBytes / 16;
  static constexpr int kSlotBytes = slot_bytes<DIM, kBytes>(2);
  static constexpr int kPitch = DIM + 4;
  // Shared memory: of each warp its keys, in their place what it passes on, [heads, 16, kPitch] floats; the queries; with
  // dropout the tokens of the keys.
  static constexpr int kWarpBytes = kKeys * kSlotBytes;
  static constexpr int kQueries = kFewHubWarps * kWarpBytes;
  static constexpr int kTokens = kQueries + kRows * (kBytes + 16);
  static constexpr int kAllBytes = kTokens + kFewHubSlots * 4;
  static_assert(kHeads * kRows * kPitch * 4 <= kWarpBytes);
};

// Blocks of one batch element and group of heads: those of the hubs, which take longest, come first. `roles`: that the
// hubs' blocks share, 2 in the backward.
template <int DIM>
__host__ __device__ constexpr int few_blocks(const Sizes& sizes, int pairs, int roles = 1) {
  return roles * FewHubs<DIM>::kBlocks * hub_tiles(sizes) + pairs;
}

template <int DIM>
constexpr int kFewBytes =
    FewHubs<DIM>::kAllBytes > FewPairShared<DIM>::kBytes ? FewHubs<DIM>::kAllBytes : FewPairShared<DIM>::kBytes;

// What a block does.
struct FewPlace {
  BlockPlace block;
  int tile, role;  // of hubs; tile -1: it has a pair of windows
  int pair;

  template <int DIM>
  __device__ __forceinline__ static FewPlace here(const Sizes& sizes, int pairs, int roles) {
    constexpr int kHeads = Layout<DIM>::kHeads, kShares = FewHubs<DIM>::kBlocks;
    const int per_chain = few_blocks<DIM>(sizes, pairs, roles), of_hubs = per_chain - pairs;
    const int chain = static_cast<int>(blockIdx.x) / per_chain, number = static_cast<int>(blockIdx.x) % per_chain;
    const int groups = (sizes.heads + kHeads - 1) / kHeads;
    FewPlace place{{chain / groups, 0, chain % groups * kHeads, 0, 0}, -1, 0, number - of_hubs};
    if (number >= of_hubs) return place;
    place.role = number % roles;
    place.tile = number / (roles * kShares);
    place.block.first_head += number / roles % kShares * FewHubs<DIM>::kHeads;
    return place;
  }
};

// The first `count` keys lie in slots 0, 1, ..., and every row sees them: the same questions as of a Chunk.
struct FewKeys {
  int count;

  __device__ __forceinline__ uint2 slots(int n) const {
    const uint32_t first = n + ((n + 16) << 16);
    return make_uint2(first, first + 0x00200020u);
  }
  __device__ __forceinline__ unsigned long long mask(int) const {
    return (count < kKeys ? (1ull << count) - 1 : ~0ull) >> (2 * (threadIdx.x % 4));
  }
  __device__ __forceinline__ int slot_of_key(int key) const { return key; }
};

// A thread's piece of 16 bytes of rows of a tensor.
struct FewPiece {
  const unsigned char* source;
  int token_bytes;
  bool valid;  // pieces beyond the head dim or the last head are zero

  template <typename T>
  __device__ __forceinline__ static FewPiece of(const Strided& tensor, const Sizes& sizes, int64_t batch, int head,
                                                int column) {
    const bool valid = head < sizes.heads && column < sizes.dim;
    return {head_base<T>(tensor, batch, valid ? head : 0) + (valid ? 2 * column : 0), tensor.token_bytes, valid};
  }

  // A token below 0 is a row of zeros.
  __device__ __forceinline__ void copy(int token, SharedAddress to) const {
    copy_async_16(to, source + static_cast<int64_t>(max(token, 0)) * token_bytes, valid && token >= 0);
  }
};

// The queries of one head as fragments.
template <typename T, int DIM, int BYTES = kGroupBytes<DIM>>
__device__ __forceinline__ void read_queries(uint32_t (*q)[4], SharedAddress rows, int head, uint32_t sign) {
  read_rows<T, DIM>(q, rows + row_of_lane() * slot_bytes<DIM, BYTES>(1) + row_piece<DIM>(head));
#pragma unroll
  for (int i = 0; i < DIM / 16; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) q[i][j] ^= sign;
  }
}

// The block brings the rows of a pair of windows to shared memory.
template <typename T, int DIM>
__device__ __forceinline__ void gather_pair(const ForwardArguments& p, const BlockPlace& place, const FewPair& pair,
                                            SharedAddress memory) {
  using L = Layout<DIM>;
  using Shared = FewPairShared<DIM>;
  constexpr int kAtOnce = kFewThreads / L::kPieces, kRounds = kFewSlots / kAtOnce, kQueries = kFewWindows * kRows;
  const int thread = threadIdx.x, row = thread / L::kPieces;
  int tokens[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) tokens[i] = __ldg(pair.tokens + row + i * kAtOnce);
  const int count = __ldg(&pair.count), query = row < kQueries ? __ldg(pair.rows[0] + row) : -1;
  if (thread < static_cast<int>(sizeof(FewPair)) / 16) {
    copy_async_16(memory + Shared::kRecord + 16 * thread, reinterpret_cast<const uint4*>(&pair) + thread, true);
  }
  wait_for_previous_grid();
  const RowCopier<T, DIM, 2, 2> copier(p.kv, p.sizes, place, memory);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    if (row + i * kAtOnce < count) copier.copy(tokens[i], row + i * kAtOnce);
  }
  if (row < kQueries) {
    const int piece = thread % L::kPieces;
    const FewPiece own = FewPiece::of<T>(p.q, p.sizes, place.batch, place.first_head + piece / L::kHeadPieces,
                                         piece % L::kHeadPieces * 8);
    own.copy(query, memory + Shared::kQueries + row * slot_bytes<DIM>(1) + 16 * piece);
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// One warp: one head of a window that has been gathered.
template <typename T, int DIM, bool DROPOUT>
__device__ __forceinline__ void attend_gathered(const ForwardArguments& p, const BlockPlace& place, int window,
                                                int head, const unsigned char* memory) {
  using Shared = FewPairShared<DIM>;
  const LaneRows lane = lane_rows();
  const FewPair& pair = *reinterpret_cast<const FewPair*>(memory + Shared::kRecord);
  const SharedAddress slots = shared_address(memory);
  const int token_low = pair.rows[window][lane.low], token_high = pair.rows[window][lane.high];
  const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
  const DropoutTile dropout{pair.tokens, DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u, p.dropout.threshold,
                            token_low, token_high};
  uint32_t q[DIM / 16][4];
  read_queries<T, DIM>(q, slots + Shared::kQueries + window * kRows * slot_bytes<DIM>(1), head, p.sign);
  SoftmaxState<DIM> state;
  attend_keys<T, DIM, kGroups, DROPOUT, true>(state, q, slots, head, Chunk(pair.chunks[window]), 0, p.scale, dropout);
  const float sum_low = quad_sum(state.sum_low), sum_high = quad_sum(state.sum_high);
  const auto row = [&](int token) {
    return output_row<T>(p.out, p.sizes, place.batch, place.first_head + head, max(token, 0));
  };
  store_rows<T, DIM>(state.out, normaliser(sum_low, p.dropout.keep_scale), normaliser(sum_high, p.dropout.keep_scale),
                     row(token_low), row(token_high), token_low >= 0, token_high >= 0, p.sizes.dim);
  if (threadIdx.x % 4 != 0) return;
  float* lse = p.lse + batch_head * p.sizes.tokens;
  if (token_low >= 0) lse[token_low] = log_sum_exp(state.peak_low, sum_low);
  if (token_high >= 0) lse[token_high] = log_sum_exp(state.peak_high, sum_high);
}

// The block copies `count` rows of TENSORS tensors to slots; token_of(slot) tells which. A loop, because code that runs
// once is slow to come.
template <typename T, int DIM, int TENSORS, int BYTES, typename TokenOf>
__device__ __forceinline__ void few_copy(const Strided* tensors, const Sizes& sizes, const BlockPlace& place,
                                         SharedAddress slots, int count, TokenOf token_of) {
  constexpr int kPieces = BYTES / 16;
  const RowCopier<T, DIM, TENSORS, TENSORS, BYTES> copier(tensors, sizes, place, slots);
#pragma unroll 1
  for (int slot = threadIdx.x / kPieces; slot < count; slot += kFewThreads / kPieces) copier.copy(token_of(slot), slot);
}

// How many slots a turn of a tile of hubs fills that begins with token `first`: whole chunks, so that keys that are not
// there are copies of the last one, which nobody sees.
__device__ __forceinline__ int few_hub_slots(int first, int tokens) {
  return min(kFewHubSlots, (tokens - first + kKeys - 1) / kKeys * kKeys);
}

// A tile of hubs: keys in the order of memory, 64 for each of the warps that attend, then as many more, to the end.
// `place` names the heads of this block.
template <typename T, int DIM, bool DROPOUT>
__device__ __forceinline__ void few_hubs(const ForwardArguments& p, const BlockPlace& place, int tile,
                                         unsigned char* memory) {
  using F = FewHubs<DIM>;
  using L = Layout<DIM, F::kBytes>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tokens = p.sizes.tokens;
  const int piece = threadIdx.x % F::kPieces, row = threadIdx.x / F::kPieces;
  const SharedAddress slots = shared_address(memory), queries = slots + F::kQueries;
  int* key_tokens = reinterpret_cast<int*>(memory + F::kTokens);
  const auto copy = [&](int first) {
    few_copy<T, DIM, 2, F::kBytes>(p.kv, p.sizes, place, slots, few_hub_slots(first, tokens),
                                   [&](int slot) { return min(first + slot, tokens - 1); });
    if (DROPOUT) key_tokens[threadIdx.x] = first + threadIdx.x;
    copy_async_commit();
    copy_async_wait<0>();
  };
  static_assert(kFewThreads == kFewHubSlots);
  wait_for_previous_grid();
  if (row < kRows) {
    const int hub = tile * kRows + row;
    const FewPiece query = FewPiece::of<T>(p.q, p.sizes, place.batch, place.first_head + piece / L::kHeadPieces,
                                           piece % L::kHeadPieces * 8);
    query.copy(hub < p.sizes.hubs ? hub : -1, queries + row * (F::kBytes + 16) + 16 * piece);
  }
  SoftmaxState<DIM> state[F::kHeads];
#pragma unroll
  for (int head = 0; head < F::kHeads; ++head) state[head].clear();
  for (int first = 0; first < tokens; first += kFewHubSlots) {
    if (first > 0) __syncthreads();
    copy(first);
    __syncthreads();
    const int own = first + warp * kKeys;
    if (warp >= kFewHubWarps || own >= tokens) continue;
#pragma unroll
    for (int head = 0; head < F::kHeads; ++head) {
      const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
      const DropoutTile dropout{key_tokens + warp * kKeys, DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u,
                                p.dropout.threshold, tile * kRows + lane / 4, tile * kRows + lane / 4 + 8};
      uint32_t q[DIM / 16][4];
      read_queries<T, DIM, F::kBytes>(q, queries, head, p.sign);
      attend_keys<T, DIM, kGroups, DROPOUT, false, F::kBytes>(state[head], q, slots + warp * F::kWarpBytes, head,
                                                              FewKeys{tokens - own}, 0, p.scale, dropout);
    }
  }
  __syncwarp();
  if (warp >= kFewHubWarps) return;
#pragma unroll
  for (int head = 0; head < F::kHeads; ++head) {
    pass_on<DIM>(state[head], reinterpret_cast<float*>(memory + warp * F::kWarpBytes) + head * kRows * F::kPitch);
  }
}

// The hub rows of a block, from the sums that the warps have passed on.
template <typename T, int DIM>
__device__ __forceinline__ void combine_hubs(const ForwardArguments& p, const BlockPlace& place, int tile,
                                             const unsigned char* memory) {
  using F = FewHubs<DIM>;
  constexpr int kPerRow = DIM / 4, kPart = F::kWarpBytes / 4;
  const int parts = min(kFewHubWarps, (p.sizes.tokens + kKeys - 1) / kKeys);
  for (int e = threadIdx.x; e < F::kHeads * kRows * kPerRow; e += kFewThreads) {
    const int column = e % kPerRow * 4, i = e / kPerRow % kRows, head = e / (kPerRow * kRows);
    if (tile * kRows + i >= p.sizes.hubs || place.first_head + head >= p.sizes.heads) continue;
    const float* first = reinterpret_cast<const float*>(memory) + (head * kRows + i) * F::kPitch;
    combine_row<T, DIM>(
        p, place.batch, place.first_head + head, tile * kRows + i, column, parts,
        [&](int n) { return *reinterpret_cast<const float4*>(first + n * kPart + column); },
        [&](int n) { return *reinterpret_cast<const float2*>(first + n * kPart + DIM); });
  }
}

template <typename T, int DIM, bool DROPOUT>
__global__ void __launch_bounds__(kFewThreads, 1) few_forward_kernel(const __grid_constant__ FewForwardArguments p) {
  unsigned char* memory = dynamic_shared();
  const FewPlace place = FewPlace::here<DIM>(p.sizes, p.num_pairs, 1);
  launch_dependents();
  if (place.tile >= 0) {
    few_hubs<T, DIM, DROPOUT>(p, place.block, place.tile, memory);
    __syncthreads();
    combine_hubs<T, DIM>(p, place.block, place.tile, memory);
    return;
  }
  gather_pair<T, DIM>(p, place.block, p.pairs[place.pair], shared_address(memory));
  __syncthreads();
  const int window = threadIdx.x / kWarp % kFewWindows, head = threadIdx.x / kWarp / kFewWindows;
  if (head < Layout<DIM>::kHeads && place.block.first_head + head < p.sizes.heads) {
    attend_gathered<T, DIM, DROPOUT>(p, place.block, window, head, memory);
  }
}

}  // namespace fm::attention
