// Forward pass where there are few rows: at batch 1 a mesh of 431 vertices is a few microseconds of waiting, so what
// counts is how many things happen one after the other. Nothing is shared between windows and nothing is planned. Eight
// warps gather the up to 64 keys of a window, one of them (one per head of the group) attends. The hubs have blocks of
// their own, in which every warp reads its rows in the order of memory and attends to them; then, after the only
// barrier, the block combines the warps' sums.

#pragma once

#include "attention/forward.cuh"

namespace fm::attention {

constexpr int kFewWarps = 16;
constexpr int kFewThreads = kFewWarps * kWarp;
constexpr int kFewWindows = 2;                       // of a block
constexpr int kFewTeam = kFewThreads / kFewWindows;  // threads of a window
constexpr int kFewKeys = 2 * kGroup;                  // that a warp of a hub tile has in shared memory at a time

// A window as fastmetro_kernels/few.py lays it out: a chunk whose slots are 0 to 63, then as in a record, and the tokens
// of the keys (the first one again where there are fewer than 64).
struct FewWindow {
  unsigned char chunk[kChunkBytes];
  int rows[kRows];
  Extras extras;
  int keys[kKeys];
};
static_assert(sizeof(FewWindow) == kForwardRecordBytes + 4 * kKeys);

struct FewForwardArguments : ForwardArguments {
  const FewWindow* windows;
  int num_windows;
};

// Shared memory of a window: k and v of its keys, its queries, its record.
template <int DIM>
struct FewWindowShared {
  static constexpr int kQueries = kKeys * slot_bytes<DIM>(2);
  static constexpr int kRecord = kQueries + kRows * slot_bytes<DIM>(1);
  static constexpr int kBytes = kRecord + static_cast<int>(sizeof(FewWindow));
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
  // Shared memory: of each warp its keys, in their place what it passes on, [heads, 16, kPitch] floats; the queries; of
  // each warp with dropout the tokens of its keys.
  static constexpr int kWarpBytes = kFewKeys * kSlotBytes;
  static constexpr int kQueries = kFewWarps * kWarpBytes;
  static constexpr int kTokens = kQueries + kRows * (kBytes + 16);
  static constexpr int kAllBytes = kTokens + kFewWarps * kFewKeys * 4;
  static_assert(kHeads * kRows * kPitch * 4 <= kWarpBytes);
};

// Blocks of one batch element and group of heads: those of the hubs, which take longest, come first.
template <int DIM>
__host__ __device__ constexpr int few_blocks(const Sizes& sizes, int windows) {
  return FewHubs<DIM>::kBlocks * hub_tiles(sizes) + (windows + kFewWindows - 1) / kFewWindows;
}

template <int DIM>
constexpr int kFewBytes = FewHubs<DIM>::kAllBytes > kFewWindows * FewWindowShared<DIM>::kBytes
                              ? FewHubs<DIM>::kAllBytes
                              : kFewWindows * FewWindowShared<DIM>::kBytes;

// The first `count` keys lie in slots 0, 1, ..., and every row sees them: the same questions as of a Chunk.
struct FewKeys {
  int count;

  __device__ __forceinline__ uint2 slots(int n) const { return make_uint2(n + ((n + 16) << 16), 0u); }
  __device__ __forceinline__ unsigned long long mask(int) const {
    return (count < kFewKeys ? (1u << count) - 1 : 0xffffffffu) >> (2 * (threadIdx.x % 4));
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

// All threads of a window bring its rows to shared memory.
template <typename T, int DIM>
__device__ __forceinline__ void gather_window(const ForwardArguments& p, const BlockPlace& place,
                                              const FewWindow& window, SharedAddress memory) {
  using L = Layout<DIM>;
  using Shared = FewWindowShared<DIM>;
  constexpr int kAtOnce = kFewTeam / L::kPieces;
  const int thread = threadIdx.x % kFewTeam, row = thread / L::kPieces;
  int keys[kKeys / kAtOnce];
#pragma unroll
  for (int i = 0; i < kKeys / kAtOnce; ++i) keys[i] = __ldg(window.keys + row + i * kAtOnce);
  const int query = row < kRows ? __ldg(window.rows + row) : -1;
  if (thread < static_cast<int>(sizeof(FewWindow)) / 16) {
    copy_async_16(memory + Shared::kRecord + 16 * thread, reinterpret_cast<const uint4*>(&window) + thread, true);
  }
  wait_for_previous_grid();
  const RowCopier<T, DIM, 2, 2> copier(p.kv, p.sizes, place, memory);
#pragma unroll
  for (int i = 0; i < kKeys / kAtOnce; ++i) copier.copy(keys[i], row + i * kAtOnce);
  if (row < kRows) {
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
__device__ __forceinline__ void attend_gathered(const ForwardArguments& p, const BlockPlace& place, int head,
                                                const unsigned char* memory) {
  using Shared = FewWindowShared<DIM>;
  const LaneRows lane = lane_rows();
  const FewWindow& window = *reinterpret_cast<const FewWindow*>(memory + Shared::kRecord);
  const SharedAddress slots = shared_address(memory);
  const int token_low = window.rows[lane.low], token_high = window.rows[lane.high];
  const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
  const DropoutTile dropout{window.keys, DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u, p.dropout.threshold,
                            token_low, token_high};
  uint32_t q[DIM / 16][4];
  read_queries<T, DIM>(q, slots + Shared::kQueries, head, p.sign);
  SoftmaxState<DIM> state;
  attend_keys<T, DIM, kGroups, DROPOUT, true>(state, q, slots, head, Chunk(window.chunk), 0, p.scale, dropout);
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

// Copies the rows of 32 tokens from `first` on, of which this lane has a piece; rows beyond the last one are copies of
// it, which nobody sees.
template <int PIECES, int SLOT_BYTES>
__device__ __forceinline__ void copy_tokens(const FewPiece& piece, int first, int tokens, SharedAddress to) {
  const int row = threadIdx.x % kWarp / PIECES;
#pragma unroll
  for (int i = 0; i < kFewKeys; i += kWarp / PIECES) {
    piece.copy(min(first + i + row, tokens - 1), to + (i + row) * SLOT_BYTES);
  }
}

// A warp of a tile of hubs: 32 keys in the order of memory, then those that all warps together have left, to the end.
// `place` names the heads of this block.
template <typename T, int DIM, bool DROPOUT>
__device__ __forceinline__ void few_hubs(const ForwardArguments& p, const BlockPlace& place, int tile,
                                         unsigned char* memory) {
  using F = FewHubs<DIM>;
  using L = Layout<DIM, F::kBytes>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tokens = p.sizes.tokens;
  unsigned char* own = memory + warp * F::kWarpBytes;
  const SharedAddress slots = shared_address(own), queries = shared_address(memory) + F::kQueries;
  int* key_tokens = reinterpret_cast<int*>(memory + F::kTokens) + warp * kFewKeys;
  const auto piece_of = [&](const Strided& tensor, int piece) {
    return FewPiece::of<T>(tensor, p.sizes, place.batch, place.first_head + piece / L::kHeadPieces,
                           piece % L::kHeadPieces * 8);
  };
  const FewPiece key = piece_of(p.kv[0], lane % F::kPieces), value = piece_of(p.kv[1], lane % F::kPieces);
  const auto copy = [&](int first) {
    const SharedAddress to = slots + lane % F::kPieces * 16;
    copy_tokens<F::kPieces, F::kSlotBytes>(key, first, tokens, to);
    copy_tokens<F::kPieces, F::kSlotBytes>(value, first, tokens, to + F::kBytes);
    if (DROPOUT) key_tokens[lane] = first + lane;
  };
  wait_for_previous_grid();
  const int query = threadIdx.x / F::kPieces, hub = tile * kRows + query;
  if (query < kRows) {
    const int piece = threadIdx.x % F::kPieces;
    piece_of(p.q, piece).copy(hub < p.sizes.hubs ? hub : -1, queries + query * (F::kBytes + 16) + 16 * piece);
  }
  const int begin = warp * kFewKeys;
  if (begin < tokens) copy(begin);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  SoftmaxState<DIM> state[F::kHeads];
#pragma unroll
  for (int head = 0; head < F::kHeads; ++head) state[head].clear();
  for (int first = begin; first < tokens; first += kFewWarps * kFewKeys) {
#pragma unroll
    for (int head = 0; head < F::kHeads; ++head) {
      const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
      const DropoutTile dropout{key_tokens, DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u,
                                p.dropout.threshold, tile * kRows + lane / 4, tile * kRows + lane / 4 + 8};
      uint32_t q[DIM / 16][4];
      read_queries<T, DIM, F::kBytes>(q, queries, head, p.sign);
      attend_keys<T, DIM, kFewKeys / kGroup, DROPOUT, false, F::kBytes>(
          state[head], q, slots, head, FewKeys{tokens - first}, 0, p.scale, dropout);
    }
    __syncwarp();
    if (first + kFewWarps * kFewKeys < tokens) copy(first + kFewWarps * kFewKeys);
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
  }
#pragma unroll
  for (int head = 0; head < F::kHeads; ++head) {
    pass_on<DIM>(state[head], reinterpret_cast<float*>(own) + head * kRows * F::kPitch);
  }
}

// The hub rows of a block, from the sums that the warps have passed on.
template <typename T, int DIM>
__device__ __forceinline__ void combine_hubs(const ForwardArguments& p, const BlockPlace& place, int tile,
                                             const unsigned char* memory) {
  using F = FewHubs<DIM>;
  constexpr int kPerRow = DIM / 4, kPart = F::kWarpBytes / 4;
  const int parts = min(kFewWarps, (p.sizes.tokens + kFewKeys - 1) / kFewKeys);
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
  constexpr int kHeads = Layout<DIM>::kHeads, kShares = FewHubs<DIM>::kBlocks;
  unsigned char* memory = dynamic_shared();
  const int per_chain = few_blocks<DIM>(p.sizes, p.num_windows), tiles = hub_tiles(p.sizes);
  const int chain = static_cast<int>(blockIdx.x) / per_chain, number = static_cast<int>(blockIdx.x) % per_chain;
  const int groups = (p.sizes.heads + kHeads - 1) / kHeads;
  BlockPlace place{chain / groups, 0, chain % groups * kHeads, 0, 0};
  launch_dependents();
  if (number < kShares * tiles) {
    place.first_head += number % kShares * FewHubs<DIM>::kHeads;
    few_hubs<T, DIM, DROPOUT>(p, place, number / kShares, memory);
    __syncthreads();
    combine_hubs<T, DIM>(p, place, number / kShares, memory);
    return;
  }
  const int team = threadIdx.x / kFewTeam, window = (number - kShares * tiles) * kFewWindows + team;
  unsigned char* own = memory + team * FewWindowShared<DIM>::kBytes;
  if (window < p.num_windows) gather_window<T, DIM>(p, place, p.windows[window], shared_address(own));
  __syncthreads();
  const int head = threadIdx.x % kFewTeam / kWarp;
  if (window < p.num_windows && head < kHeads && place.first_head + head < p.sizes.heads) {
    attend_gathered<T, DIM, DROPOUT>(p, place, head, own);
  }
}

}  // namespace fm::attention
