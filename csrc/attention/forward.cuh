// Forward pass: a block streams the windows of a segment. A warp per window attends for its 16 vertices, warps of the
// hubs go over the keys of the step, and one warp copies the rows of the next step. See docs/kernels.md.

#pragma once

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
  float scale;      // |scale| log2(e)
  uint32_t sign;    // flips q where the scale is negative
  Dropout dropout;
};

// A tile of hubs is the work of one warp, or where a group has several heads of two, each with half of the heads.
template <int DIM>
constexpr int kHubSplit = Layout<DIM>::kHeads > 1 ? 2 : 1;
template <int DIM>
__host__ __device__ constexpr int hub_warps(const Sizes& sizes) {
  return hub_tiles(sizes) * kHubSplit<DIM>;
}

constexpr int kForwardTables = 3;  // of the step, of the next one, and one on its way

// Where the first head of a block begins, for token 0. Kept in shared memory: every step needs these once, and in
// registers they would drive others out to local memory, which has hardly any cache beside so much shared memory.
struct BlockBases {
  const unsigned char* queries;
  void* out;
  float* lse;
};

// Shared memory: k and v of the slots, the queries of the windows, tables, bases, with dropout the tokens of the slots.
template <int DIM>
struct ForwardShared {
  Tables tables;
  int queries, first_table, bases, tokens, bytes;

  __host__ __device__ constexpr ForwardShared(int slots, int windows, bool dropout)
      : tables{kForwardRecordBytes, windows},
        queries(slots * slot_bytes<DIM>(2)),
        first_table(queries + windows * kRows * slot_bytes<DIM>(1)),
        bases(first_table + kForwardTables * tables.bytes()),
        tokens(bases + static_cast<int>(sizeof(BlockBases))),
        bytes(tokens + (dropout ? 4 * slots : 0)) {}
};

template <int DIM>
constexpr int forward_threads(const Sizes& sizes, int windows) {
  return (windows + hub_warps<DIM>(sizes) + 1) * kWarp;
}

// One warp copies the queries of its window to a buffer of its own; missing rows are zero.
template <typename T, int DIM>
__device__ __forceinline__ void copy_queries(const ForwardArguments& p, int first_head, const BlockBases& bases,
                                             const int* tokens, SharedAddress buffer) {
  using L = Layout<DIM>;
  constexpr int kRowsAtOnce = kWarp / L::kPieces;
  const int piece = threadIdx.x % L::kPieces, head = piece / L::kHeadPieces, column = piece % L::kHeadPieces * 8;
  const bool valid = first_head + head < p.sizes.heads && column < p.sizes.dim;
  const unsigned char* source = bases.queries + (valid ? 2 * (head * p.q.head + column) : 0);
#pragma unroll
  for (int first = 0; first < kRows; first += kRowsAtOnce) {
    const int row = first + threadIdx.x % kWarp / L::kPieces, token = tokens[row];
    copy_async_16(buffer + row * slot_bytes<DIM>(1) + 16 * piece, source + token_offset(p.q, max(token, 0)),
                  valid && token >= 0);
  }
}

// A window of queries, whose fragments (head * (DIM / 16) + depth) are in q, which is used up.
template <typename T, int DIM, bool DROPOUT>
__device__ __forceinline__ void attend_window(const ForwardArguments& p, const BlockPlace& place,
                                              const BlockBases& bases, const unsigned char* record,
                                              uint32_t (*q)[4], SharedAddress slots, const int* slot_tokens,
                                              float scale) {
  using L = Layout<DIM>;
  const LaneRows lane = lane_rows();
  const int* tokens = reinterpret_cast<const int*>(record + kRecordTokens);
  const int token_low = tokens[lane.low], token_high = tokens[lane.high];
  const Extras extras = *reinterpret_cast<const Extras*>(record + kRecordExtras);
  const int row_elements = p.sizes.heads * p.sizes.dim;
#pragma unroll 1
  for (int head = 0; head < L::kHeads; ++head) {
    SoftmaxState<DIM> state;
    const int64_t batch_head = place.batch * p.sizes.heads + place.first_head + head;
    const DropoutTile dropout{slot_tokens, DROPOUT ? dropout_key(*p.dropout.seed, batch_head) : 0u,
                              p.dropout.threshold, token_low, token_high};
    if (extras.groups == kGroups) {
      attend_keys<T, DIM, kGroups, DROPOUT, true>(state, q, slots, head, Chunk(record), 0, scale, dropout);
    } else {
      attend_keys<T, DIM, kGroups - 1, DROPOUT, true>(state, q, slots, head, Chunk(record), 0, scale, dropout);
    }
    for (int extra = extras.begin; extra < extras.end; ++extra) {
      const Chunk chunk(p.plan.extra_chunks + static_cast<int64_t>(extra) * kChunkBytes);
      attend_halves<T, DIM, DROPOUT>(state, q, slots, head, chunk, kKeys, scale, dropout);
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
                       out + static_cast<int64_t>(token_low) * row_elements,
                       out + static_cast<int64_t>(token_high) * row_elements, low, high, p.sizes.dim);
    if (threadIdx.x % 4 == 0) {
      float* lse = bases.lse + static_cast<int64_t>(head) * p.sizes.tokens;
      if (low) lse[token_low] = log_sum_exp(state.peak_low, sum_low);
      if (high) lse[token_high] = log_sum_exp(state.peak_high, sum_high);
    }
  }
}

// A tile of 16 hubs: what its warp keeps over all steps, for its share of the heads of the group.
template <typename T, int DIM>
struct HubQueries {
  using L = Layout<DIM>;
  static constexpr int kHeads = L::kHeads / kHubSplit<DIM>;
  uint32_t q[kHeads * L::kDepth][4];  // fragment head * (DIM / 16) + depth
  SoftmaxState<DIM> state[kHeads];
  int tile, first_head;  // the latter within the group

  __device__ __forceinline__ void begin(const ForwardArguments& p, const BlockPlace& place, int number) {
    tile = number / kHubSplit<DIM>;
    first_head = number % kHubSplit<DIM> * kHeads;
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
    for (int chunk = 0; chunk * kKeys < keys; ++chunk) {
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        const DropoutTile dropout{slot_tokens, DROPOUT ? dropout_key(*p.dropout.seed, batch_head + i) : 0u,
                                  p.dropout.threshold, tile * kRows + lane.low, tile * kRows + lane.high};
        attend_halves<T, DIM, DROPOUT>(state[i], q + i * L::kDepth, slots, first_head + i,
                                       Chunk(chunks + chunk * kChunkBytes), keys - chunk * kKeys, p.scale, dropout);
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

// With 96 registers two blocks of up to ten warps share a multiprocessor; heads of 128 have one to themselves.
template <typename T, int DIM, bool DROPOUT>
__global__ void __launch_bounds__(DIM == 128 ? 384 : DIM == 64 ? 512 : 640, 1)
    forward_kernel(const __grid_constant__ ForwardArguments p) {
  using L = Layout<DIM>;
  unsigned char* memory = dynamic_shared();
  const ForwardShared<DIM> shared(p.plan.slots, p.plan.windows_per_step, DROPOUT);
  const SharedAddress slots = shared_address(memory), tables = slots + shared.first_table;
  const int table_bytes = shared.tables.bytes();
  int* slot_tokens = reinterpret_cast<int*>(memory + shared.tokens);
  const BlockPlace place = block_place<DIM>(p.plan, p.sizes);
  const int warp = threadIdx.x / kWarp, windows = p.plan.windows_per_step;
  const RowCopier<T, DIM, 2, 2> copier(p.kv, p.sizes, place, slots);
  const auto copy = [&](int token, int slot) {
    copier.copy(token, slot);
    if (DROPOUT && threadIdx.x % L::kPieces == 0) slot_tokens[slot] = token;
  };
  const SharedAddress buffer = slots + shared.queries + warp * kRows * slot_bytes<DIM>(1);

  const Step first = read_step(p.plan, place.first_step);
  copy_restart<DIM>(p.plan, first, place.end_step, copy);
  if (warp < 2 && place.first_step + warp < place.end_step) {
    const int number = place.first_step + warp;
    shared.tables.copy(p.plan, number, read_step(p.plan, number), tables + warp * table_bytes);
  }
  const BlockBases bases{head_base<T>(p.q, place.batch, place.first_head),
                         output_row<T>(p.out, p.sizes, place.batch, place.first_head, 0),
                         p.lse + (place.batch * p.sizes.heads + place.first_head) * p.sizes.tokens};
  BlockBases* shared_bases = reinterpret_cast<BlockBases*>(memory + shared.bases);
  if (threadIdx.x == 0) *shared_bases = bases;
  if (warp < windows && first.window_begin + warp < first.window_end) {
    const unsigned char* record = p.plan.records + static_cast<int64_t>(first.window_begin + warp) * kForwardRecordBytes;
    copy_queries<T, DIM>(p, place.first_head, bases, reinterpret_cast<const int*>(record + kRecordTokens), buffer);
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
      read_all_heads<T, DIM>(q, buffer, p.sign);
      __syncwarp();
      if (number + 1 < place.end_step) {
        const unsigned char* record = record_of(table(number + 1), warp, kForwardRecordBytes);
        if (record != nullptr) {
          const int* tokens = reinterpret_cast<const int*>(record + kRecordTokens);
          copy_queries<T, DIM>(p, place.first_head, *shared_bases, tokens, buffer);
        }
      }
      copy_async_commit();
      const unsigned char* record = record_of(table(number), warp, kForwardRecordBytes);
      if (record != nullptr) {
        attend_window<T, DIM, DROPOUT>(p, place, *shared_bases, record, q, slots, slot_tokens, scale);
      }
      copy_async_wait<0>();
    });
  } else if (warp < windows + hub_warps<DIM>(p.sizes)) {
    HubQueries<T, DIM> hubs;
    hubs.begin(p, place, warp - windows);
    each_step(place, [&](int number) {
      const int keys = reinterpret_cast<const Step*>(table(number))->hub_keys;
      hubs.template attend<DROPOUT>(p, place, keys, table(number) + shared.tables.hub_offset(), slots, slot_tokens);
    });
    const int64_t rows = p.sizes.hubs * (DIM + 4);
    if (p.partials != nullptr) {
      const int64_t segments = p.plan.num_segments;
      const int64_t part = (place.batch * p.sizes.heads + place.first_head) * segments + place.segment;
      hubs.store(p, place, p.partials + part * rows, segments * rows);
      return;
    }
    leave_slots();
    hubs.store(p, place, reinterpret_cast<float*>(memory), rows);
  } else {
    const auto copy_listed = [&](int token, int slot) { copy_batch<DIM, kWarp>(token, slot, copy); };
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
  if (p.partials != nullptr || p.sizes.hubs == 0) return;
  if (warp >= windows && warp < windows + hub_warps<DIM>(p.sizes)) {
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
