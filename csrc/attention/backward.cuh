// Backward pass: the same stream as the forward, with q and the gradient of the output beside k and v. A warp computes
// dq of the 16 queries of a window from its list of keys, then dk and dv of the same 16 vertices as keys from the list
// of the queries that see them: every gradient is gathered by the warp that owns it. For every tile of hubs one warp
// adds up dq and one dk and dv, over all steps. Two warps copy the rows of the next step.

#pragma once

#include "attention/gradients.cuh"

namespace fm::attention {

constexpr int kBackwardTables = 2;  // of the step, and of the next one on its way

// Shared memory: four rows per slot, their statistics, tables, with dropout the tokens of the slots.
template <int DIM, int BYTES = kGroupBytes<DIM>>
struct BackwardShared {
  static constexpr int kSlotStatistics = Layout<DIM, BYTES>::kHeads * static_cast<int>(sizeof(RowStatistics));
  Tables tables;
  int statistics, first_table, tokens, bytes;

  __host__ __device__ constexpr BackwardShared(int slots, int windows, int record_bytes, bool dropout)
      : tables{record_bytes, windows},
        statistics(slots * slot_bytes<DIM, BYTES>(4)),
        first_table(statistics + (slots * kSlotStatistics + 15) / 16 * 16),
        tokens(first_table + kBackwardTables * tables.bytes()),
        bytes(tokens + (dropout ? 4 * slots : 0)) {}
};

constexpr int kCopyingWarps = 2;

// Warps that share the heads of a tile of hubs in each role: in narrow groups one per head, if so many are left.
constexpr int kBackwardWarps = 16;
template <int DIM, int BYTES = kGroupBytes<DIM>>
__host__ __device__ constexpr int hub_shares(const Sizes& sizes, int windows) {
  constexpr int kHeads = Layout<DIM, BYTES>::kHeads;
  const bool room = windows + 2 * kHeads * hub_tiles(sizes) + kCopyingWarps <= kBackwardWarps;
  return Layout<DIM, BYTES>::kNarrow && room ? kHeads : 1;
}

template <int DIM, int BYTES = kGroupBytes<DIM>>
__host__ __device__ constexpr int backward_hub_warps(const Sizes& sizes, int windows) {
  return 2 * hub_tiles(sizes) * hub_shares<DIM, BYTES>(sizes, windows);
}

template <int DIM, int BYTES = kGroupBytes<DIM>>
constexpr int backward_threads(const Sizes& sizes, int windows) {
  return (windows + backward_hub_warps<DIM, BYTES>(sizes, windows) + kCopyingWarps) * kWarp;
}

// Tiles of hubs that fit: wide heads need all registers of a multiprocessor for eight warps.
template <int DIM>
constexpr int kBackwardHubTiles = DIM == 128 ? 1 : 4;

// Copies rows of k, v, q and the gradient to their slots, and computes sum(grad_out out) - grad_lse of each.
template <typename T, int DIM, int BYTES = kGroupBytes<DIM>>
struct BackwardCopier {
  using L = Layout<DIM, BYTES>;
  static constexpr int kRowsAtOnce = kWarp / L::kPieces;
  // A warp has so many reads of the output under way, and fewer where all warps of a narrow group's block share them.
  static constexpr int kRounds = 10, kRoundsOfAll = L::kNarrow ? 2 : kRounds;
  RowCopier<T, DIM, 4, 4, BYTES> rows;
  const unsigned char* out;
  const float *lse, *grad_lse;  // of the head of this lane's piece
  int out_bytes, piece;
  unsigned char* slots;
  RowStatistics* statistics;
  int* slot_tokens;  // null without dropout

  __device__ BackwardCopier(const BackwardArguments& p, const BlockPlace& place, unsigned char* memory,
                            RowStatistics* statistics, int* slot_tokens)
      : rows(p.inputs, p.sizes, place, shared_address(memory)),
        out_bytes(p.inputs[4].token_bytes),
        piece(threadIdx.x % L::kPieces),
        slots(memory),
        statistics(statistics + threadIdx.x % L::kPieces / L::kHeadPieces),
        slot_tokens(slot_tokens) {
    const int head = place.first_head + (rows.valid ? piece / L::kHeadPieces : 0);
    out = head_base<T>(p.inputs[4], place.batch, head) + (rows.valid ? piece % L::kHeadPieces * 16 : 0);
    const int64_t first = (place.batch * p.sizes.heads + head) * p.sizes.tokens;
    lse = p.lse + first;
    grad_lse = p.grad_lse == nullptr ? nullptr : p.grad_lse + first;
  }

  // The rows that entry(n) names (token, or below 0 for none, and slot) for n from `begin` on, together with the other
  // warps that work on this range. They have arrived at the end.
  template <int ROUNDS, typename Entry>
  __device__ __forceinline__ void copy(int begin, int end, int warp, int warps, Entry entry) const {
    const bool first_piece = piece % L::kHeadPieces == 0;  // of its head: writes the statistics
    for (int first = begin + warp * kRowsAtOnce; first < end; first += ROUNDS * warps * kRowsAtOnce) {
      int2 entries[ROUNDS];
      uint4 outs[ROUNDS];
      float row_lse[ROUNDS];
#pragma unroll
      for (int i = 0; i < ROUNDS; ++i) {
        const int number = first + i * warps * kRowsAtOnce + threadIdx.x % kWarp / L::kPieces;
        entries[i] = number < end ? entry(number) : make_int2(-1, 0);
      }
#pragma unroll
      for (int i = 0; i < ROUNDS; ++i) {
        const int token = entries[i].x;
        const bool read = token >= 0 && rows.valid;
        if (token >= 0) rows.copy(token, entries[i].y);
        outs[i] = make_uint4(0u, 0u, 0u, 0u);
        if (read) outs[i] = __ldg(reinterpret_cast<const uint4*>(out + static_cast<int64_t>(token) * out_bytes));
        row_lse[i] = read && first_piece ? __ldg(lse + token) : 0.f;
      }
      copy_async_commit();
      copy_async_wait<0>();
#pragma unroll
      for (int i = 0; i < ROUNDS; ++i) {
        const int token = entries[i].x, slot = entries[i].y;
        uint4 grads = make_uint4(0u, 0u, 0u, 0u);
        if (token >= 0) {  // this lane has copied this piece itself
          const int row = slot * slot_bytes<DIM, BYTES>(4) + 3 * L::kBytes;
          grads = *reinterpret_cast<const uint4*>(slots + row + 16 * piece);
        }
        float sum = dot_pieces<T>(grads, outs[i]);
#pragma unroll
        for (int distance = 1; distance < L::kHeadPieces; distance *= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        }
        if (token < 0) continue;
        if (slot_tokens != nullptr && piece == 0) slot_tokens[slot] = token;
        if (!first_piece) continue;
        if (grad_lse != nullptr && rows.valid) sum -= __ldg(grad_lse + token);
        statistics[slot * L::kHeads] = make_float2(row_lse[i] * kLog2e, sum);
      }
    }
  }
};

// All threads of a cluster: adds up the partial rows that lie at `partials` in the shared memory of its blocks.
template <typename T, int DIM>
__device__ __forceinline__ void add_up_in_cluster(const BackwardArguments& p, const BlockPlace& place,
                                                  SharedAddress partials) {
  constexpr int kHeads = Layout<DIM>::kHeads, kPerRow = DIM / 4, kPitchBytes = (DIM + 4) * 4;
  const int blocks = static_cast<int>(cluster_size()), per_tensor = kHeads * p.sizes.hubs;
  for (int e = threadIdx.x * blocks + cluster_rank(); e < 3 * per_tensor * kPerRow; e += blockDim.x * blocks) {
    const int number = e / kPerRow, column = e % kPerRow * 4;
    const int row = number % per_tensor, head = place.first_head + row / p.sizes.hubs;
    if (head >= p.sizes.heads) continue;
    add_up_row<T>(p, number / per_tensor, place.batch, head, row % p.sizes.hubs, column, blocks, [&](int i) {
      return load_cluster_float4(partials + number * kPitchBytes + 4 * column, i);
    });
  }
}

// With 128 registers two blocks of eight warps share a multiprocessor; heads of 128 and narrow groups have one to
// themselves.
template <typename T, int DIM, bool DROPOUT, int BYTES = kGroupBytes<DIM>>
__global__ void __launch_bounds__(DIM == 128 ? 256 : kBackwardWarps * kWarp, 1)
    backward_kernel(const __grid_constant__ BackwardArguments p) {
  using L = Layout<DIM, BYTES>;
  unsigned char* memory = dynamic_shared();
  const BackwardShared<DIM, BYTES> shared(p.plan.slots, p.plan.windows_per_step, p.plan.record_bytes, DROPOUT);
  const SharedAddress slots = shared_address(memory), tables = slots + shared.first_table;
  const int table_bytes = shared.tables.bytes();
  RowStatistics* statistics = reinterpret_cast<RowStatistics*>(memory + shared.statistics);
  int* slot_tokens = DROPOUT ? reinterpret_cast<int*>(memory + shared.tokens) : nullptr;
  const BlockPlace place = block_place<DIM, BYTES>(p.plan, p.sizes);
  const int warp = threadIdx.x / kWarp, windows = p.plan.windows_per_step;
  const int hub_shares_of_tile = hub_shares<DIM, BYTES>(p.sizes, windows);
  const int hub_warps = blockDim.x / kWarp - windows - kCopyingWarps;
  const SharedRows rows{slots, statistics, slot_tokens, in_register(p.scale_log2e)};
  launch_dependents();
  const Step first = read_step(p.plan, place.first_step);
  const BackwardCopier<T, DIM, BYTES> copier(p, place, memory, statistics, slot_tokens);
  const bool last_warp = warp == static_cast<int>(blockDim.x) / kWarp - 1;  // it has the fewest rows to copy
  if (last_warp) shared.tables.copy(p.plan, place.first_step, first, tables);
  wait_for_previous_grid();
  const auto restart = [&](int number) {
    const int4 entry = __ldg(p.plan.restarts + number);
    return make_int2(entry.z < place.end_step ? entry.x : -1, entry.y);
  };
  copier.template copy<copier.kRoundsOfAll>(first.restart_begin, first.restart_end, warp, blockDim.x / kWarp, restart);
  copy_async_commit();
  copy_async_wait<0>();
  const auto table = [&](int number) {
    return memory + shared.first_table + (number - place.first_step) % kBackwardTables * table_bytes;
  };
  float* partials = reinterpret_cast<float*>(memory);  // once nobody needs the slots any more
  const auto finish = [&](auto& gradients, int tensor) {
    if constexpr (L::kNarrow) return gradients.finish(p, place);
    const int64_t hub_rows = p.sizes.hubs * (DIM + 4);
    if (p.partials != nullptr) {
      const int64_t heads = p.sizes.batch * p.sizes.heads, segments = p.plan.num_segments;
      const int64_t first_head = place.batch * p.sizes.heads + place.first_head;
      gradients.store(p, place, p.partials + ((tensor * heads + first_head) * segments + place.segment) * hub_rows,
                      segments * hub_rows, heads * segments * hub_rows);
      return;
    }
    leave_slots();
    gradients.store(p, place, partials + tensor * L::kHeads * hub_rows, hub_rows, L::kHeads * hub_rows);
  };
  // Every kind of warp has a loop of its own, so that none keeps registers for the others' work.
  // The copying warps stand between those of the hubs: of four warps in a row each has a scheduler of its own, and those
  // that have three windows to see to should have no hubs.
  const int extra = warp - windows, hubs_before = hub_warps / 2, number_of_copier = extra - hubs_before;
  const bool copies = number_of_copier >= 0 && number_of_copier < kCopyingWarps;
  const int hub_role = extra < hubs_before ? extra : extra - kCopyingWarps;
  if (extra < 0) {
    each_step(place, [&](int number) {
      const unsigned char* record = record_of(table(number), warp, p.plan.record_bytes);
      if (record == nullptr) return;
      backward_window<T, DIM, false, DROPOUT, BYTES>(p, place, rows, record);
      backward_window<T, DIM, true, DROPOUT, BYTES>(p, place, rows, record);
    });
  } else if (!copies) {
    const auto accumulate = [&](auto& gradients) {
      gradients.begin(hub_role / 2, hub_shares_of_tile);
      each_step(place, [&](int number) {
        const int keys = reinterpret_cast<const Step*>(table(number))->hub_keys;
        gradients.template accumulate<DROPOUT>(p, place, rows, keys, table(number) + shared.tables.hub_offset());
      });
    };
    if (hub_role % 2 == 0) {
      HubGradients<T, DIM, false, BYTES> gradients;
      accumulate(gradients);
      finish(gradients, 0);
    } else {
      HubGradients<T, DIM, true, BYTES> gradients;
      accumulate(gradients);
      finish(gradients, 1);
    }
  } else {
    const int last = place.end_step - 1;
    Step next = read_step(p.plan, min(place.first_step + 1, last));
    each_step(place, [&](int number) {
      if (number == last) return;
      const Step now = next;
      next = read_step(p.plan, min(number + 2, last));
      if (number_of_copier == 0) {
        shared.tables.copy(p.plan, number + 1, now,
                           tables + (number + 1 - place.first_step) % kBackwardTables * table_bytes);
      }
      copier.template copy<copier.kRounds>(now.load_begin, now.load_end, number_of_copier, kCopyingWarps,
                                           [&](int entry) { return __ldg(p.plan.loads + entry); });
      copy_async_commit();
      copy_async_wait<0>();
    });
  }
  if constexpr (L::kNarrow) return;
  if (p.partials != nullptr || p.sizes.hubs == 0) return;
  if (extra >= 0 && !copies) {
    cluster_arrive<true>();
  } else {
    leave_slots();
    cluster_arrive<false>();
  }
  cluster_wait();
  add_up_in_cluster<T, DIM>(p, place, slots);
  if (p.plan.num_segments == 1) return;
  cluster_arrive<false>();  // the others may still read this block's rows
  cluster_wait();
}

// The hubs' gradients where they are not added up within clusters: a thread adds up four columns of a row.
template <typename T, int DIM>
__global__ void __launch_bounds__(128) combine_backward_kernel(const __grid_constant__ BackwardArguments p) {
  constexpr int kPerRow = DIM / 4, kPitch = DIM + 4;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  const int64_t heads = p.sizes.batch * p.sizes.heads, per_head = p.sizes.hubs * kPerRow;
  const int64_t tensor = number / (heads * per_head), batch_head = number / per_head % heads;
  const int row = static_cast<int>(number % per_head) / kPerRow, column = static_cast<int>(number % kPerRow) * 4;
  wait_for_previous_grid();
  if (tensor >= 3) return;
  const int64_t part_pitch = p.sizes.hubs * kPitch;
  const float* first = p.partials + (tensor * heads + batch_head) * p.plan.num_segments * part_pitch + row * kPitch;
  add_up_row<T>(p, static_cast<int>(tensor), batch_head / p.sizes.heads, static_cast<int>(batch_head % p.sizes.heads),
                row, column, p.plan.num_segments,
                [&](int i) { return *reinterpret_cast<const float4*>(first + i * part_pitch + column); });
}

}  // namespace fm::attention
