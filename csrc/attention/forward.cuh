// Forward pass: a block streams the windows of a segment. A warp per window attends for its 16 vertices, warps of the
// hubs go over the keys of the step, and one warp copies the rows of the next step. See docs/kernels.md.

#pragma once

#include "attention/forward_hubs.cuh"

namespace fm::attention {

constexpr int kForwardTables = 3;  // of the step, of the next one, and one on its way

// Where the first head of a block begins, for token 0. Kept in shared memory: every step needs these once, and in
// registers they would drive others out to local memory, which has hardly any cache beside so much shared memory.
struct BlockBases {
  const unsigned char* queries;
  void* out;
  float* lse;
};

// Shared memory: k and v of the slots, the queries of the windows, tables, what parts of hub tiles pass on, bases, with
// dropout the tokens of the slots.
template <int DIM, int BYTES = kGroupBytes<DIM>>
struct ForwardShared {
  static constexpr int kHubSums = Layout<DIM, BYTES>::kNarrow ? kMostHubParts * kRows * (DIM + 4) * 4 : 0;
  Tables tables;
  int queries, first_table, hub_sums, bases, tokens, bytes;

  __host__ __device__ constexpr ForwardShared(int slots, int windows, bool dropout)
      : tables{kForwardRecordBytes, windows},
        queries(slots * slot_bytes<DIM, BYTES>(2)),
        first_table(queries + windows * kRows * slot_bytes<DIM, BYTES>(1)),
        hub_sums(first_table + kForwardTables * tables.bytes()),
        bases(hub_sums + kHubSums),
        tokens(bases + static_cast<int>(sizeof(BlockBases))),
        bytes(tokens + (dropout ? 4 * slots : 0)) {}
};

template <int DIM, int BYTES = kGroupBytes<DIM>>
constexpr int forward_threads(const Sizes& sizes, int windows) {
  return (windows + hub_warps<DIM, BYTES>(sizes, windows) + 1) * kWarp;
}

// Two blocks of up to ten warps of 96 registers share a multiprocessor, or eight of 128 for heads of 64; heads of 128
// and narrow groups have one to themselves.
template <int DIM, int BYTES>
constexpr int kMostForwardThreads =
    Layout<DIM, BYTES>::kNarrow ? kNarrowForwardWarps * kWarp : DIM == 128 ? 384 : DIM == 64 ? 512 : 640;

// One warp copies the queries of its window to a buffer of its own; token_of(row) below 0 are missing rows, which are
// zero.
template <typename T, int DIM, int BYTES, typename TokenOf>
__device__ __forceinline__ void copy_queries(const ForwardArguments& p, int first_head, const BlockBases& bases,
                                             SharedAddress buffer, TokenOf token_of) {
  using L = Layout<DIM, BYTES>;
  constexpr int kRowsAtOnce = kWarp / L::kPieces;
  const int piece = threadIdx.x % L::kPieces, head = piece / L::kHeadPieces, column = piece % L::kHeadPieces * 8;
  const bool valid = first_head + head < p.sizes.heads && column < p.sizes.dim;
  const unsigned char* source = bases.queries + (valid ? 2 * (head * p.q.head + column) : 0);
#pragma unroll
  for (int first = 0; first < kRows; first += kRowsAtOnce) {
    const int row = first + threadIdx.x % kWarp / L::kPieces, token = token_of(row);
    copy_async_16(buffer + row * slot_bytes<DIM, BYTES>(1) + 16 * piece, source + token_offset(p.q, max(token, 0)),
                  valid && token >= 0);
  }
}

// A window of queries, whose fragments (head * (DIM / 16) + depth) are in q, which is used up.
template <typename T, int DIM, bool DROPOUT, int BYTES>
__device__ __forceinline__ void attend_window(const ForwardArguments& p, const BlockPlace& place,
                                              const BlockBases& bases, const unsigned char* record,
                                              uint32_t (*q)[4], SharedAddress slots, const int* slot_tokens,
                                              float scale) {
  using L = Layout<DIM, BYTES>;
  const LaneRows lane = lane_rows();
  const int* tokens = reinterpret_cast<const int*>(record + kRecordTokens);
  const int token_low = tokens[lane.low], token_high = tokens[lane.high];
  const Extras extras = *reinterpret_cast<const Extras*>(record + kRecordExtras);
  // Where there are few blocks, no tensor has so many elements.
  using Offset = std::conditional_t<L::kNarrow, int, int64_t>;
  const int row_elements = p.sizes.heads * p.sizes.dim;
#pragma unroll 1
  for (int head = 0; head < L::kHeads; ++head) {
    SoftmaxState<DIM> state;
    const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
    const DropoutTile dropout{slot_tokens, DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u,
                              p.dropout.threshold, token_low, token_high};
    if (extras.groups == kGroups) {
      attend_keys<T, DIM, kGroups, DROPOUT, true, BYTES>(state, q, slots, head, Chunk(record), 0, scale, dropout);
    } else {
      attend_keys<T, DIM, kGroups - 1, DROPOUT, true, BYTES>(state, q, slots, head, Chunk(record), 0, scale, dropout);
    }
    for (int extra = extras.begin; extra < extras.end; ++extra) {
      const Chunk chunk(p.plan.extra_chunks + static_cast<int64_t>(extra) * kChunkBytes);
      attend_halves<T, DIM, DROPOUT, BYTES>(state, q, slots, head, chunk, kKeys, scale, dropout);
    }
#pragma unroll
    for (int i = 0; i + L::kDepth < L::kPieces / 2; ++i) {  // the next head's come first: registers have no index
#pragma unroll
      for (int j = 0; j < 4; ++j) q[i][j] = q[i + L::kDepth][j];
    }
    const float sum_low = quad_sum(state.sum_low), sum_high = quad_sum(state.sum_high);
    const bool there = place.first_head + head < p.sizes.heads;
    const bool low = there && token_low >= 0, high = there && token_high >= 0;
    T* out = static_cast<T*>(bases.out) + head * p.sizes.dim;
    store_rows<T, DIM>(state.out, normaliser(sum_low, p.dropout.keep_scale), normaliser(sum_high, p.dropout.keep_scale),
                       out + static_cast<Offset>(token_low) * row_elements,
                       out + static_cast<Offset>(token_high) * row_elements, low, high, p.sizes.dim);
    if (threadIdx.x % 4 == 0) {
      float* lse = bases.lse + static_cast<Offset>(head) * p.sizes.tokens;
      if (low) lse[token_low] = log_sum_exp(state.peak_low, sum_low);
      if (high) lse[token_high] = log_sum_exp(state.peak_high, sum_high);
    }
  }
}

template <typename T, int DIM, bool DROPOUT, int BYTES = kGroupBytes<DIM>>
__global__ void __launch_bounds__(kMostForwardThreads<DIM, BYTES>, 1)
    forward_kernel(const __grid_constant__ ForwardArguments p) {
  using L = Layout<DIM, BYTES>;
  unsigned char* memory = dynamic_shared();
  const ForwardShared<DIM, BYTES> shared(p.plan.slots, p.plan.windows_per_step, DROPOUT);
  const SharedAddress slots = shared_address(memory), tables = slots + shared.first_table;
  const int table_bytes = shared.tables.bytes();
  int* slot_tokens = reinterpret_cast<int*>(memory + shared.tokens);
  const BlockPlace place = block_place<DIM, BYTES>(p.plan, p.sizes);
  const int warp = threadIdx.x / kWarp, windows = p.plan.windows_per_step;
  const int hub_end = blockDim.x / kWarp - 1;  // one warp copies
  const RowCopier<T, DIM, 2, 2, BYTES> copier(p.kv, p.sizes, place, slots);
  const auto copy = [&](int token, int slot) {
    copier.copy(token, slot);
    if (DROPOUT && threadIdx.x % L::kPieces == 0) slot_tokens[slot] = token;
  };
  float* hub_sums = reinterpret_cast<float*>(memory + shared.hub_sums);
  const SharedAddress buffer = slots + shared.queries + warp * kRows * slot_bytes<DIM, BYTES>(1);

  launch_dependents();
  const Step first = read_step(p.plan, place.first_step);
  const bool queries_first = warp < windows && first.window_begin + warp < first.window_end;
  int first_token = -1;  // of row l % 16: asked for before the rows, which wait for lists of their own
  if (queries_first) {
    const int64_t record = static_cast<int64_t>(first.window_begin + warp) * kForwardRecordBytes;
    first_token = __ldg(reinterpret_cast<const int*>(p.plan.records + record + kRecordTokens) + threadIdx.x % kRows);
  }
  // The last two warps, which have the fewest rows to copy, bring a table each.
  if (const int ahead = hub_end - warp; ahead < 2 && place.first_step + ahead < place.end_step) {
    const int number = place.first_step + ahead;
    shared.tables.copy(p.plan, number, read_step(p.plan, number), tables + ahead * table_bytes);
  }
  copy_restart<DIM, BYTES>(p.plan, first, place.end_step, copy);
  const BlockBases bases{head_base<T>(p.q, place.batch, place.first_head),
                         output_row<T>(p.out, p.sizes, place.batch, place.first_head, 0),
                         p.lse + (place.batch * p.sizes.heads + place.first_head) * p.sizes.tokens};
  BlockBases* shared_bases = reinterpret_cast<BlockBases*>(memory + shared.bases);
  if (threadIdx.x == 0) *shared_bases = bases;
  if (queries_first) {
    copy_queries<T, DIM, BYTES>(p, place.first_head, bases, buffer,
                                [&](int row) { return __shfl_sync(0xffffffffu, first_token, row); });
  }
  copy_async_commit();
  copy_async_wait<0>();
  const auto table = [&](int number) {
    return memory + shared.first_table + (number - place.first_step) % kForwardTables * table_bytes;
  };

  // Every kind of warp has a loop of its own, so that none keeps registers for the others' work.
  if (warp < windows) {
    const float scale = in_register(p.scale);
    each_step(place, [&](int number) {
      uint32_t q[L::kPieces / 2][4];
      read_all_heads<T, DIM, BYTES>(q, buffer, p.sign);
      __syncwarp();
      if (number + 1 < place.end_step) {
        const unsigned char* record = record_of(table(number + 1), warp, kForwardRecordBytes);
        if (record != nullptr) {
          const int* tokens = reinterpret_cast<const int*>(record + kRecordTokens);
          copy_queries<T, DIM, BYTES>(p, place.first_head, *shared_bases, buffer, [&](int row) { return tokens[row]; });
        }
      }
      copy_async_commit();
      const unsigned char* record = record_of(table(number), warp, kForwardRecordBytes);
      if (record != nullptr) {
        attend_window<T, DIM, DROPOUT, BYTES>(p, place, *shared_bases, record, q, slots, slot_tokens, scale);
      }
      copy_async_wait<0>();
    });
  } else if (warp < hub_end) {
    HubQueries<T, DIM, BYTES> hubs;
    hubs.begin(p, place, warp - windows, hub_end - windows);
    each_step(place, [&](int number) {
      const int keys = reinterpret_cast<const Step*>(table(number))->hub_keys;
      hubs.template attend<DROPOUT>(p, place, keys, table(number) + shared.tables.hub_offset(), slots, slot_tokens);
    });
    const int64_t rows = p.sizes.hubs * (DIM + 4), segments = p.plan.num_segments;
    if constexpr (L::kNarrow) {
      hubs.finish(p, place, hub_sums);
    } else if (p.partials != nullptr) {
      const int64_t part = (place.batch * p.sizes.heads + place.first_head) * segments + place.segment;
      hubs.store(p, place, p.partials + part * rows, segments * rows);
      return;
    } else {
      leave_slots();
      hubs.store(p, place, reinterpret_cast<float*>(memory), rows);
    }
  } else {
    const auto copy_listed = [&](int token, int slot) { copy_batch<DIM, kWarp, BYTES>(token, slot, copy); };
    LoadList list;
    list.begin(p.plan, first.load_end, read_step(p.plan, place.end_step - 1).load_end);
    each_step(place, [&](int number) {
      if (number + 1 < place.end_step) {
        list.copy_rows(reinterpret_cast<const Step*>(table(number + 1))->load_end, copy_listed);
      }
      if (number + 2 < place.end_step) {
        shared.tables.copy(p.plan, number + 2, read_step(p.plan, number + 2),
                           tables + (number + 2 - place.first_step) % kForwardTables * table_bytes);
      }
      copy_async_commit();
      copy_async_wait<0>();
    });
  }
  if constexpr (L::kNarrow) {
    const int parts = hub_end > windows ? (hub_end - windows) / whole_hub_warps<DIM, BYTES>(p.sizes) : 1;
    if (parts == 1) return;
    leave_slots();
    combine_in_block<T, DIM, BYTES>(p, place, hub_sums, parts);
    return;
  }
  if (p.partials != nullptr || p.sizes.hubs == 0) return;
  if (warp >= windows && warp < hub_end) {
    cluster_arrive<true>();
  } else {
    leave_slots();
    cluster_arrive<false>();
  }
  cluster_wait();
  combine_in_cluster<T, DIM>(p, place, slots);
  if (p.plan.num_segments == 1) return;
  cluster_arrive<false>();  // the others may still read this block's rows
  cluster_wait();
}

// The hub rows where they are not combined within clusters: a thread adds up four columns of a row.
template <typename T, int DIM>
__global__ void __launch_bounds__(128) combine_forward_kernel(const __grid_constant__ ForwardArguments p) {
  constexpr int kPerRow = DIM / 4, kPitch = DIM + 4;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  const int64_t batch_head = number / (p.sizes.hubs * kPerRow);
  const int rest = static_cast<int>(number % (p.sizes.hubs * kPerRow));
  const int row = rest / kPerRow, column = rest % kPerRow * 4;
  wait_for_previous_grid();
  if (batch_head >= p.sizes.batch * p.sizes.heads) return;
  const int parts = p.plan.num_segments;
  const int64_t part_pitch = p.sizes.hubs * kPitch;
  const float* first = p.partials + batch_head * parts * part_pitch + row * kPitch;
  combine_row<T, DIM>(
      p, batch_head / p.sizes.heads, static_cast<int>(batch_head % p.sizes.heads), row, column, parts,
      [&](int i) { return *reinterpret_cast<const float4*>(first + i * part_pitch + column); },
      [&](int i) { return *reinterpret_cast<const float2*>(first + i * part_pitch + DIM); });
}

}  // namespace fm::attention
