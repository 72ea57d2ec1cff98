// What the forward and the backward kernels share: the plan that tells which rows lie where in shared memory, and the
// copies that keep it filled.
//
// A block works for one batch element and a group of heads whose rows make up 128 (or 64, or 256) bytes; a slot holds
// such a row of several tensors. fastmetro_kernels/plan.py decides which token lies in which slot at which step. One
// warp or two copy the rows of the next step while the others compute.

#pragma once

#include "common/device.cuh"

namespace fm::attention {

constexpr int kWarp = 32;
constexpr int kRows = 16;  // rows of a window, and of a tile of hubs
constexpr int kKeys = 64;  // keys of a chunk
constexpr int kGroup = 16;  // of which so many are read at a time

// Where things lie in the bytes of a chunk and of a record (fastmetro_kernels/packing.py).
constexpr int kChunkBytes = 256;
constexpr int kChunkMasks = 128;
constexpr int kRecordTokens = 256;
constexpr int kRecordExtras = 320;  // see Extras
constexpr int kForwardRecordBytes = 336;
constexpr int kRecordRowSlots = 336;
constexpr int kBackwardRecordBytes = 368;
constexpr int kRecordTransposed = 368;        // where the pattern is not symmetric
constexpr int kRecordTransposedExtras = 624;
constexpr int kAsymmetricRecordBytes = 640;

// The tensors of packing.py; see there.
struct Plan {
  const int* steps;                   // [S, 8]
  const int2* loads;                  // token, slot
  const int4* restarts;               // token, slot, first step that needs it, 0
  const unsigned char* records;       // [W, record_bytes]
  const unsigned char* hub_chunks;    // [., 256]
  const unsigned char* extra_chunks;  // [., 256]
  int record_bytes, slots, windows_per_step, num_steps, steps_per_segment, num_segments;
};

// Most chunks of keys that the hubs meet in a step: its rows, and in the first step the hubs themselves.
__host__ __device__ constexpr int hub_chunks_per_step(int windows) { return (windows * kRows + 64 + kKeys - 1) / kKeys; }

struct Step {
  int load_begin, load_end, restart_begin, restart_end, window_begin, window_end, hub_chunk, hub_keys;

  __device__ __forceinline__ int hub_chunks() const { return (hub_keys + kKeys - 1) / kKeys; }
};

// Of a record: extra chunks of the window, and groups of 16 keys of its first one.
struct Extras {
  int begin, end, groups, unused;
};

__device__ __forceinline__ Step read_step(const Plan& plan, int step) {
  const int4 a = __ldg(reinterpret_cast<const int4*>(plan.steps) + 2 * step);
  const int4 b = __ldg(reinterpret_cast<const int4*>(plan.steps) + 2 * step + 1);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// A [B, L, H, D] tensor of 16-bit numbers with unit stride along D; strides in elements, that of tokens in bytes.
struct Strided {
  const void* data;
  int64_t batch, head;
  int token_bytes;
};

struct Sizes {
  int64_t batch;
  int tokens, heads, dim, hubs;
};

// Tiles of 16 that the hubs make up.
__host__ __device__ constexpr int hub_tiles(const Sizes& sizes) { return (sizes.hubs + kRows - 1) / kRows; }

struct Dropout {
  const int64_t* seed;  // null without dropout
  uint32_t threshold;
  float keep_scale;
};

// Bytes of a row of a group of heads. Half of them where the rows of a whole mesh fit into one block (cuda_arguments.h
// says when): then there are twice as many blocks, of which each walks over the mesh alone.
template <int DIM>
constexpr int kGroupBytes = DIM < 64 ? 128 : 2 * DIM;
constexpr int kNarrowBytes = 64;

// How a group of heads lies in a row. DIM is the head dim rounded up to 16, 32, 64 or 128.
template <int DIM, int BYTES = kGroupBytes<DIM>>
struct Layout {
  static constexpr int kHeads = BYTES / (2 * DIM);  // heads of a group
  static constexpr int kBytes = BYTES;
  static constexpr bool kNarrow = BYTES == kNarrowBytes;
  static constexpr int kPieces = kBytes / 16;             // of 16 bytes
  static constexpr int kHeadPieces = DIM / 8;             // of one head
  static constexpr int kDepth = DIM / 16;                 // tensor core steps along the head dim
};

// Rows (or slots) begin 16 bytes further than a multiple of 128: the same piece of eight of them can be read at once
// if their numbers differ modulo 8.
template <int DIM, int BYTES = kGroupBytes<DIM>>
__host__ __device__ constexpr int slot_bytes(int tensors) { return tensors * BYTES + 16; }

// The first byte of batch element b, head h, of token 0.
template <typename T>
__device__ __forceinline__ const unsigned char* head_base(const Strided& tensor, int64_t batch, int head) {
  return reinterpret_cast<const unsigned char*>(static_cast<const T*>(tensor.data) + batch * tensor.batch +
                                                head * tensor.head);
}

// The bytes from one token to another that is `tokens` further on.
__device__ __forceinline__ int64_t token_offset(const Strided& tensor, int tokens) {
  return static_cast<int64_t>(tokens) * tensor.token_bytes;
}

// Which batch element, segment and heads a block works for. Blocks of the same batch element and heads follow each
// other, so that they can be a cluster; in a grid of narrow groups they are x, and the batch elements y.
struct BlockPlace {
  int64_t batch;
  int segment, first_head, first_step, end_step;
};

template <int DIM, int BYTES = kGroupBytes<DIM>>
__device__ __forceinline__ BlockPlace block_place(const Plan& plan, const Sizes& sizes) {
  constexpr int kHeads = Layout<DIM, BYTES>::kHeads;
  if constexpr (Layout<DIM, BYTES>::kNarrow) {  // nothing to divide: every warp would wait for it
    return {blockIdx.y, 0, static_cast<int>(blockIdx.x) * kHeads, 0, plan.num_steps};
  }
  const int groups = (sizes.heads + kHeads - 1) / kHeads;
  const int segment = static_cast<int>(blockIdx.x) % plan.num_segments;
  const int chain = static_cast<int>(blockIdx.x) / plan.num_segments;
  const int first_step = segment * plan.steps_per_segment;
  return {chain / groups, segment, chain % groups * kHeads, first_step,
          min(first_step + plan.steps_per_segment, plan.num_steps)};
}

// The first element of a row of a contiguous [B, L, H, D] tensor.
template <typename T>
__device__ __forceinline__ T* output_row(void* tensor, const Sizes& sizes, int64_t batch, int head, int token) {
  return static_cast<T*>(tensor) + ((batch * sizes.tokens + token) * sizes.heads + head) * sizes.dim;
}

// One lane's share of copying rows of TENSORS tensors into slots for SLOT_TENSORS: always the same 16-byte piece.
template <typename T, int DIM, int TENSORS, int SLOT_TENSORS, int BYTES = kGroupBytes<DIM>>
struct RowCopier {
  using L = Layout<DIM, BYTES>;
  static constexpr int kRowsAtOnce = kWarp / L::kPieces;
  static constexpr int kSlotBytes = slot_bytes<DIM, BYTES>(SLOT_TENSORS);
  const unsigned char* source[TENSORS];
  int token_bytes[TENSORS];
  SharedAddress target;
  bool valid;  // pieces beyond the head dim or the last head are zero

  __device__ RowCopier(const Strided* tensors, const Sizes& sizes, const BlockPlace& place, SharedAddress slots) {
    const int piece = threadIdx.x % L::kPieces, head = place.first_head + piece / L::kHeadPieces;
    const int column = piece % L::kHeadPieces * 8;
    valid = head < sizes.heads && column < sizes.dim;
    target = slots + piece * 16;
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) {
      source[i] = head_base<T>(tensors[i], place.batch, valid ? head : place.first_head) + (valid ? 2 * column : 0);
      token_bytes[i] = tensors[i].token_bytes;
    }
  }

  __device__ __forceinline__ void copy(int token, int slot) const {
    const SharedAddress to = target + slot * kSlotBytes;
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) {
      copy_async_16(to + i * L::kBytes, source[i] + static_cast<int64_t>(token) * token_bytes[i], valid);
    }
  }
};

// Calls copy(token, slot) for ROWS rows, of which each lane holds one; tokens below 0 are left out. The lanes that hold
// the pieces of a row make a copy together.
template <int DIM, int ROWS, int BYTES = kGroupBytes<DIM>, typename Copy>
__device__ __forceinline__ void copy_batch(int token, int slot, Copy copy) {
  constexpr int kRowsAtOnce = kWarp / Layout<DIM, BYTES>::kPieces;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int first = 0; first < ROWS; first += kRowsAtOnce) {
    const int row = first + lane / Layout<DIM, BYTES>::kPieces;
    const int row_token = __shfl_sync(0xffffffffu, token, row), row_slot = __shfl_sync(0xffffffffu, slot, row);
    if (row_token >= 0) copy(row_token, row_slot);
  }
}

// All warps: what the cache holds when a block begins at its first step. Waits for the grid before as late as it can.
template <int DIM, int BYTES = kGroupBytes<DIM>, typename Copy>
__device__ __forceinline__ void copy_restart(const Plan& plan, const Step& step, int end_step, Copy copy) {
  constexpr int kBatch = 16;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int number = step.restart_begin + warp * kBatch + lane % kBatch;
  const auto entry_of = [&] { return __ldg(plan.restarts + min(number, step.restart_end - 1)); };
  int4 entry = step.restart_begin < step.restart_end ? entry_of() : make_int4(0, 0, 0, 0);
  wait_for_previous_grid();
  for (int first = step.restart_begin + warp * kBatch; first < step.restart_end; first += warps * kBatch) {
    const bool needed = number < step.restart_end && entry.z < end_step;
    copy_batch<DIM, kBatch, BYTES>(needed ? entry.x : -1, entry.y, copy);
    number += warps * kBatch;
    if (first + warps * kBatch < step.restart_end) entry = entry_of();
  }
}

// One warp: goes through the list of rows to copy, a batch of 32 at a time; the list entries of the next batch are
// under way while a batch is copied.
struct LoadList {
  const int2* list;
  int2 entry;  // of this lane, of the batch that begins at `position`
  int position, end;

  // `end`: of all the entries that the block will need.
  __device__ __forceinline__ void begin(const Plan& plan, int first, int end_of_all) {
    list = plan.loads;
    position = first;
    end = end_of_all;
    fetch();
  }

  __device__ __forceinline__ void fetch() {
    if (position < end) entry = __ldg(list + min(position + static_cast<int>(threadIdx.x % kWarp), end - 1));
  }

  // Hands the entries before `until`, which is where a step's entries end, to batch(token, slot), 32 at a time: each
  // lane has one, with a token below 0 where there is none.
  template <typename Batch>
  __device__ __forceinline__ void copy_rows(int until, Batch batch) {
    while (position < until) {
      const int2 now = entry;
      const int token = position + static_cast<int>(threadIdx.x % kWarp) < until ? now.x : -1;
      position = min(position + kWarp, until);
      fetch();
      batch(token, now.y);
    }
  }
};

// The part of shared memory that holds a step: the numbers of the plan, the records of its windows, and the chunks of
// its hubs.
struct Tables {
  int record_bytes, windows;

  __host__ __device__ static constexpr int record_offset() { return static_cast<int>(sizeof(Step)); }
  __host__ __device__ constexpr int hub_offset() const { return record_offset() + windows * record_bytes; }
  __host__ __device__ constexpr int bytes() const { return hub_offset() + hub_chunks_per_step(windows) * kChunkBytes; }

  // One warp copies them: each part lies in one piece.
  __device__ __forceinline__ void copy(const Plan& plan, int number, const Step& step, SharedAddress to) const {
    copy_bytes(to, reinterpret_cast<const unsigned char*>(plan.steps) + number * sizeof(Step), sizeof(Step));
    const unsigned char* records = plan.records + static_cast<int64_t>(step.window_begin) * record_bytes;
    copy_bytes(to + record_offset(), records, (step.window_end - step.window_begin) * record_bytes);
    const unsigned char* chunks = plan.hub_chunks + static_cast<int64_t>(step.hub_chunk) * kChunkBytes;
    copy_bytes(to + hub_offset(), chunks, step.hub_chunks() * kChunkBytes);
  }

  __device__ static __forceinline__ void copy_bytes(SharedAddress to, const unsigned char* from, int bytes) {
    for (int i = threadIdx.x % kWarp * 16; i < bytes; i += kWarp * 16) copy_async_16(to + i, from + i, true);
  }
};

// The record of a warp's window in a table, or null where the step has fewer windows.
__device__ __forceinline__ const unsigned char* record_of(const unsigned char* table, int warp, int record_bytes) {
  const Step* step = reinterpret_cast<const Step*>(table);
  return warp < step->window_end - step->window_begin ? table + Tables::record_offset() + warp * record_bytes : nullptr;
}

// Calls work(number) for the steps of a segment, each after a barrier that tells that its rows are there and that
// nobody needs those of the step before. Every warp of the block runs such a loop.
template <typename Work>
__device__ __forceinline__ void each_step(const BlockPlace& place, Work work) {
  for (int number = place.first_step; number < place.end_step; ++number) {
    __syncthreads();
    work(number);
  }
}

// Every warp calls it after its last step: from then on nobody needs the slots.
__device__ __forceinline__ void leave_slots() { __syncthreads(); }

}  // namespace fm::attention
