// What the forward and the backward kernels share: the plan that tells which rows lie where in shared memory, the
// copies that keep it filled, and tiles of 16 rows x 64 gathered keys on tensor cores.
//
// A block works for one batch element and a group of heads whose rows make up 128 (or 256) bytes; a row of that width
// is one slot. fastmetro_kernels/plan.py decides which token lies in which slot at which step.

#pragma once

#include "common/device.cuh"

namespace fm::attention {

constexpr int kWarp = 32;
constexpr int kRows = 16;             // rows of a window, and of a tile of hubs
constexpr int kWindowsPerStep = 4;
constexpr int kKeys = 64;             // keys of one tile of scores
constexpr int kGroups = kKeys / 16;   // they are read sixteen at a time
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowest = -1e30f;     // stands for "no key seen yet" where -inf would give NaN

// The tensors of plan.py; see there.
struct Plan {
  const int* steps;                 // [S, 8]
  const int2* loads;                // token, slot
  const int4* restarts;             // token, slot, first step that needs it, 0
  const int* rows;                  // [W, 16] tokens or -1
  const int* row_slots;             // [W, 16]
  const int* extras;                // [W + 1]
  const uint2* lists;               // [chunks, 16 lanes]: four 16-bit slots
  const unsigned long long* masks;  // [chunks, 16 rows]
  int slots, num_windows, num_steps, steps_per_segment, num_segments;
};

struct Step {
  int load_begin, load_end, restart_begin, restart_end, window_begin, window_end, hub_chunk, hub_keys;
};

__device__ __forceinline__ Step read_step(const Plan& plan, int step) {
  const int4 a = __ldg(reinterpret_cast<const int4*>(plan.steps) + 2 * step);
  const int4 b = __ldg(reinterpret_cast<const int4*>(plan.steps) + 2 * step + 1);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

// A row to copy: token and slot, and the first step that needs it.
struct RowEntry {
  int token, slot, step;
};

// The rows of shared memory that hold a step's tokens when a block begins there (`restart`), or goes on to it.
struct RowRange {
  int begin, end;
  bool restart;
};

__device__ __forceinline__ RowRange rows_to_copy(const Step& step, bool restart) {
  if (restart) return {step.restart_begin, step.restart_end, true};
  return {step.load_begin, step.load_end, false};
}

__device__ __forceinline__ RowEntry read_entry(const Plan& plan, const RowRange& range, int number) {
  if (range.restart) {
    const int4 entry = __ldg(plan.restarts + number);
    return {entry.x, entry.y, entry.z};
  }
  const int2 entry = __ldg(plan.loads + number);
  return {entry.x, entry.y, 0};
}

// A [B, L, H, D] tensor of 16-bit numbers, strides in elements, unit stride along D.
struct Strided {
  const void* data;
  int64_t batch, token, head;
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

// How a group of heads lies in a slot. DIM is the head dim rounded up to 16, 32, 64 or 128.
template <int DIM>
struct Layout {
  static constexpr int kHeads = DIM < 64 ? 64 / DIM : 1;      // heads of a group
  static constexpr int kBytes = kHeads * DIM * 2;             // of a slot: 128, or 256 for DIM 128
  static constexpr int kPieces = kBytes / 16;                 // of 16 bytes
  static constexpr int kHeadPieces = DIM / 8;                 // of one head
  static constexpr int kDepth = DIM / 16;                     // tensor core steps along the head dim

  // Rows begin in the same banks: the pieces of a row are exchanged by its slot, so that the same piece of eight rows
  // with different slots modulo 8 can be read at once.
  __device__ static __forceinline__ uint32_t offset(int slot, int piece) {
    return static_cast<uint32_t>(slot * kBytes + ((piece ^ (slot & 7)) << 4));
  }
};

// The first element of batch element b, head h, of token 0.
template <typename T>
__device__ __forceinline__ const T* head_base(const Strided& tensor, int64_t batch, int head) {
  return static_cast<const T*>(tensor.data) + batch * tensor.batch + head * tensor.head;
}

// Which batch element, segment and heads a block works for.
struct BlockPlace {
  int64_t batch;
  int segment, first_head;
};

template <int DIM>
__device__ __forceinline__ BlockPlace block_place(const Plan& plan, const Sizes& sizes) {
  constexpr int kHeads = Layout<DIM>::kHeads;
  const int groups = (sizes.heads + kHeads - 1) / kHeads;
  const int rest = static_cast<int>(blockIdx.x) / groups;
  return {rest / plan.num_segments, rest % plan.num_segments, static_cast<int>(blockIdx.x) % groups * kHeads};
}

// The first element of batch element b, head h, of token 0 of a contiguous [B, L, H, D] tensor, and of its rows.
template <typename T>
__device__ __forceinline__ T* output_row(void* tensor, const Sizes& sizes, int64_t batch, int head, int token) {
  return static_cast<T*>(tensor) + ((batch * sizes.tokens + token) * sizes.heads + head) * sizes.dim;
}

// One thread's share of copying rows of TENSORS tensors into their slots: it always handles the same 16-byte piece.
template <typename T, int DIM, int TENSORS>
struct RowCopier {
  using L = Layout<DIM>;
  const Strided (&tensors)[TENSORS];
  const T* source[TENSORS];
  SharedAddress target;
  uint32_t tensor_bytes;  // distance of the tensors in shared memory
  bool valid;             // pieces beyond the head dim or the last head are zero

  __device__ RowCopier(const Strided (&tensors)[TENSORS], const Sizes& sizes, int64_t batch, int first_head, int slots,
                       SharedAddress to)
      : tensors(tensors), target(to), tensor_bytes(static_cast<uint32_t>(slots * L::kBytes)) {
    const int piece = threadIdx.x % L::kPieces, head = first_head + piece / L::kHeadPieces;
    const int column = piece % L::kHeadPieces * 8;
    valid = head < sizes.heads && column < sizes.dim;
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) {
      source[i] = head_base<T>(tensors[i], batch, valid ? head : first_head) + (valid ? column : 0);
    }
  }

  __device__ __forceinline__ void copy(int token, int slot) const {
    const uint32_t to = target + L::offset(slot, threadIdx.x % L::kPieces);
#pragma unroll
    for (int i = 0; i < TENSORS; ++i) {
      copy_async_16(to + i * tensor_bytes, source[i] + token * tensors[i].token, valid);
    }
  }

  // Starts to copy the rows of a range that are needed before `end_step`, and calls with_row(token, slot) for those
  // that this thread helps with. Four list entries are read at once: each takes its time to come.
  template <typename F>
  __device__ __forceinline__ void copy_rows(const Plan& plan, const RowRange& range, int end_step, F with_row) const {
    constexpr int kAtOnce = 4;
    const int row = threadIdx.x / L::kPieces, rows = blockDim.x / L::kPieces;
    for (int first = range.begin + row; first < range.end; first += kAtOnce * rows) {
      RowEntry entries[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) entries[i] = read_entry(plan, range, min(first + i * rows, range.end - 1));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * rows >= range.end || entries[i].step >= end_step) continue;
        copy(entries[i].token, entries[i].slot);
        with_row(entries[i].token, entries[i].slot);
      }
    }
  }
};

// Goes through the steps of a segment: while compute(step, next, goes_on) runs, the rows of the next step are copied.
// prepare(step) is called before the first step, arrive(step, number) as soon as the rows of a step are there. All
// threads of the block must take part.
template <typename Copier, typename WithRow, typename Prepare, typename Arrive, typename Compute>
__device__ __forceinline__ void stream_segment(const Plan& plan, int segment, const Copier& copier, WithRow with_row,
                                               Prepare prepare, Arrive arrive, Compute compute) {
  const int first = segment * plan.steps_per_segment;
  const int end = min(first + plan.steps_per_segment, plan.num_steps);
  Step step = read_step(plan, first);
  copier.copy_rows(plan, rows_to_copy(step, true), end, with_row);
  copy_async_commit();
  prepare(step);
  for (int number = first; number < end; ++number) {
    copy_async_wait<0>();
    __syncthreads();  // the rows of this step are there for all, and nobody needs those of the step before
    const bool goes_on = number + 1 < end;
    const Step next = goes_on ? read_step(plan, number + 1) : step;
    if (goes_on) copier.copy_rows(plan, rows_to_copy(next, false), end, with_row);
    copy_async_commit();
    arrive(step, number);
    compute(step, next, goes_on);
    step = next;
  }
}

// The slots that this lane addresses for the four groups of 16 keys of a chunk.
struct KeySlots {
  uint32_t low, high;
  __device__ __forceinline__ int operator[](int group) const {
    const uint32_t word = group < 2 ? low : high;
    return static_cast<int>(group % 2 ? word >> 16 : word & 0xffff);
  }
};

__device__ __forceinline__ KeySlots read_slots(const Plan& plan, int chunk) {
  const uint2 words = __ldg(plan.lists + chunk * 16 + threadIdx.x % 16);
  return {words.x, words.y};
}

// Makes what stands at group 1 that of group 0, and so on.
__device__ __forceinline__ void next_group(KeySlots& slots) {
  slots.low = slots.low >> 16 | slots.high << 16;
  slots.high >>= 16;
}

// The slot of key n (0 to 63) of a chunk.
__device__ __forceinline__ int slot_of_key(const Plan& plan, int chunk, int key) {
  const uint16_t* list = reinterpret_cast<const uint16_t*>(plan.lists + chunk * 16);
  return __ldg(list + key % 16 * 4 + key / 16);
}

// Where this lane reads from, for the given 16 rows (or keys): row l % 16, pieces from l / 16 on.
template <int DIM>
__device__ __forceinline__ uint32_t lane_offset(int slot, int head) {
  const int lane = threadIdx.x % kWarp;
  return Layout<DIM>::offset(slot, head * Layout<DIM>::kHeadPieces + lane / 16);
}

// Piece p + 2 i of a row whose piece p lies at `offset`: pieces differ in bits that the exchange leaves alone.
__device__ __forceinline__ uint32_t advance_pieces(uint32_t offset, int i) { return offset ^ (i << 5); }

// Fragments of 16 rows (slot of row l % 16 in `offset`) as the left factor, for all of the head dim.
template <typename T, int DIM>
__device__ __forceinline__ void read_rows(uint32_t (*a)[4], SharedAddress rows, uint32_t offset) {
#pragma unroll
  for (int depth = 0; depth < DIM / 16; ++depth) load_matrices(a[depth], rows + advance_pieces(offset, depth));
}

// The same for all heads of the group, from 16 rows that lie one after the other; `sign` flips them.
template <typename T, int DIM>
__device__ __forceinline__ void read_all_heads(uint32_t (*a)[4], SharedAddress rows, uint32_t sign) {
#pragma unroll
  for (int head = 0; head < Layout<DIM>::kHeads; ++head) {
    read_rows<T, DIM>(a + head * (DIM / 16), rows, lane_offset<DIM>(threadIdx.x % 16, head));
  }
#pragma unroll
  for (int i = 0; i < Layout<DIM>::kPieces / 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[i][j] ^= sign;
  }
}

// One warp copies the 16 rows of a window of one tensor to a buffer of its own; missing rows are zero.
template <typename T, int DIM>
__device__ __forceinline__ void copy_window(const Plan& plan, const Sizes& sizes, const Strided& tensor, int64_t batch,
                                            int first_head, int window, SharedAddress buffer) {
  using L = Layout<DIM>;
  constexpr int kRowsAtOnce = kWarp / L::kPieces;
  const int lane = threadIdx.x % kWarp, piece = lane % L::kPieces;
  const int head = first_head + piece / L::kHeadPieces, column = piece % L::kHeadPieces * 8;
  const bool valid = head < sizes.heads && column < sizes.dim;
  const T* base = head_base<T>(tensor, batch, valid ? head : first_head) + (valid ? column : 0);
#pragma unroll
  for (int first = 0; first < kRows; first += kRowsAtOnce) {
    const int row = first + lane / L::kPieces;
    const int listed = __ldg(plan.rows + window * kRows + row);
    const int token = max(listed, 0);
    copy_async_16(buffer + L::offset(row, piece), base + token * tensor.token, valid && listed >= 0);
  }
}

// scores[2], for 16 rows and 16 keys, += rows keys^T.
template <typename T, int DIM>
__device__ __forceinline__ void multiply_keys(float (*scores)[4], const uint32_t (*rows)[4], SharedAddress keys,
                                              uint32_t offset) {
#pragma unroll
  for (int depth = 0; depth < DIM / 16; ++depth) {
    uint32_t b[4];
    load_matrices(b, keys + advance_pieces(offset, depth));
    multiply_add_16x8x16<T>(scores[0], rows[depth], b[0], b[2]);
    multiply_add_16x8x16<T>(scores[1], rows[depth], b[1], b[3]);
  }
}

// out, for 16 rows and the head dim, += weights (16 x 16 keys) values.
template <typename T, int DIM>
__device__ __forceinline__ void multiply_values(float (*out)[4], const uint32_t (&weights)[4],
                                                SharedAddress values, uint32_t offset) {
#pragma unroll
  for (int column = 0; column < DIM / 16; ++column) {
    uint32_t b[4];
    load_matrices_transposed(b, values + advance_pieces(offset, column));
    multiply_add_16x8x16<T>(out[2 * column], weights, b[0], b[1]);
    multiply_add_16x8x16<T>(out[2 * column + 1], weights, b[2], b[3]);
  }
}

// The scores of 16 rows and 16 keys as the left factor of the next product.
template <typename T>
__device__ __forceinline__ void as_weights(uint32_t (&a)[4], const float (*scores)[4]) {
  a[0] = pack<T>(scores[0][0], scores[0][1]);
  a[1] = pack<T>(scores[0][2], scores[0][3]);
  a[2] = pack<T>(scores[1][0], scores[1][1]);
  a[3] = pack<T>(scores[1][2], scores[1][3]);
}

// Transposes a 4 x 4 matrix of which each of four neighbouring lanes holds a row.
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4]) {
  const int lane = threadIdx.x;
  const bool odd = lane & 1, upper = lane & 2;
  uint32_t sent = odd ? r[0] : r[1];
  uint32_t got = __shfl_xor_sync(0xffffffffu, sent, 1);
  r[0] = odd ? got : r[0];
  r[1] = odd ? r[1] : got;
  sent = odd ? r[2] : r[3];
  got = __shfl_xor_sync(0xffffffffu, sent, 1);
  r[2] = odd ? got : r[2];
  r[3] = odd ? r[3] : got;
  sent = upper ? r[0] : r[2];
  got = __shfl_xor_sync(0xffffffffu, sent, 2);
  r[0] = upper ? got : r[0];
  r[2] = upper ? r[2] : got;
  sent = upper ? r[1] : r[3];
  got = __shfl_xor_sync(0xffffffffu, sent, 2);
  r[1] = upper ? got : r[1];
  r[3] = upper ? r[3] : got;
}

// Sum and maximum over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Stores rows l / 4 and l / 4 + 8 of an accumulator, times a factor each, as 16-bit numbers, 16 bytes per lane. The
// pointers name the head's first element of a row; a row is left alone where its flag is false.
template <typename T, int DIM>
__device__ __forceinline__ void store_rows(const float (*acc)[4], float factor_low, float factor_high, T* row_low,
                                           T* row_high, bool has_low, bool has_high, int dim) {
  const int quad_lane = threadIdx.x % 4;
  if constexpr (DIM == 16) {
    // Two tiles of two rows: after the exchange the lanes hold low 0-7, low 8-15, high 0-7, high 8-15.
    uint32_t r[4] = {pack<T>(acc[0][0] * factor_low, acc[0][1] * factor_low),
                     pack<T>(acc[1][0] * factor_low, acc[1][1] * factor_low),
                     pack<T>(acc[0][2] * factor_high, acc[0][3] * factor_high),
                     pack<T>(acc[1][2] * factor_high, acc[1][3] * factor_high)};
    transpose_quad(r);
    const int column = quad_lane % 2 * 8;
    T* row = quad_lane < 2 ? row_low : row_high;
    const bool has = quad_lane < 2 ? has_low : has_high;
    if (has && column < dim) *reinterpret_cast<uint4*>(row + column) = make_uint4(r[0], r[1], r[2], r[3]);
  } else {
#pragma unroll
    for (int part = 0; part < DIM / 32; ++part) {
      uint32_t low[4], high[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&tile)[4] = acc[4 * part + i];
        low[i] = pack<T>(tile[0] * factor_low, tile[1] * factor_low);
        high[i] = pack<T>(tile[2] * factor_high, tile[3] * factor_high);
      }
      transpose_quad(low);
      transpose_quad(high);
      const int column = 32 * part + 8 * quad_lane;
      if (column < dim) {
        if (has_low) *reinterpret_cast<uint4*>(row_low + column) = make_uint4(low[0], low[1], low[2], low[3]);
        if (has_high) *reinterpret_cast<uint4*>(row_high + column) = make_uint4(high[0], high[1], high[2], high[3]);
      }
    }
  }
}

// Sum of the products of eight pairs of 16-bit numbers.
template <typename T>
__device__ __forceinline__ float dot_pieces(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack<T>(x[i]), v = unpack<T>(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

// The two rows (l / 4 and l / 4 + 8) of 16 rows that this lane holds scores of.
struct LaneRows {
  int low, high;
};

__device__ __forceinline__ LaneRows lane_rows() {
  const int row = threadIdx.x % kWarp / 4;
  return {row, row + 8};
}

}  // namespace fm::attention
