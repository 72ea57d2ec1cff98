// The product for three channels (points) that lie one behind the other: the copy engine brings whole runs of tokens.
//
// As in stream.cuh a block owns a range of rows, keeps their entries in registers and goes through its share of the
// batch, an element at a time. But nothing is picked from x by threads: one warp asks for bulk copies of the segments
// that the block needs, several elements ahead. They lie in shared memory as they lie in memory. Sums go to shared
// memory and are taken from there by a bulk copy too, so that rows may be dealt to lanes in any order;
// fastmetro_kernels/bulk.py takes one in which lanes rarely meet in a bank. One __syncthreads per element.
//
// Bulk copies move multiples of 16 bytes, and batch elements begin anywhere. All copies of an element begin equally far
// from such a multiple, because segments begin at multiples of 8 tokens. So a copy starts at the multiple before its
// segment and ends at the one behind; the element then lies `shift` bytes further on. What a copy would touch beyond
// the element is left out, and the up to 7 items that are left out with it at each end are moved one by one.
#pragma once

#include "stream.cuh"

namespace fm_upsampling {

constexpr uint32_t kNone = 0xffffffffu;
constexpr int kBulkRowBits = 14;
constexpr uint32_t kBulkNoRow = (1u << kBulkRowBits) - 1;
constexpr int kBulkHeader = 5, kBulkSegments = 32, kBulkMasks = 4;
constexpr int kBulkStages = 4;                // batch elements in shared memory at most
constexpr uint32_t kBarrierBytes = 64;        // of shared memory, before the elements
constexpr uint32_t kGranule = 16;             // bytes that a bulk copy moves at least
constexpr uint32_t kZeros = 32 + kPoint - 1;  // items behind each element, which lanes without an entry read

// Threads of a block at most, so that there are registers for the entries.
constexpr int bulk_threads(int slots) { return slots <= 12 ? 1024 : slots <= 18 ? 896 : 768; }

// One cut of the matrix; the words of block b begin at tables + b * block_words.
//
//   [1] first row     [1] rows     [1] segments
//   [1] where the first item of a batch element lies in shared memory, or kNone     [1] the last one
//   [3][32]           first token of each segment, its tokens, and where its first item lies
//   [warps]           slots that a warp uses
//   [warps]           where they begin
//   [4][warps]        masks of the slots after which a row ends; and of those where 2, 4, 8 lanes share a row
//   of each warp:
//     [slots][32]     item << 16 | row: where the token of an entry lies, and the row, counted in the block, which the
//                     lane writes (one lane per row; the others have kBulkNoRow)
//     [slots][32]     its value, a float
struct Bulk {
  const uint32_t* tables;
  int32_t block_words;
  int32_t stage_items;  // of a batch element in shared memory, without the zeros
  int32_t out_bytes;    // of the rows of a block in shared memory
  int32_t stages;
  int32_t elements;     // of the batch, per block
};

__host__ __device__ constexpr uint32_t bulk_stage_bytes(uint32_t stage_items, uint32_t item_bytes) {
  return ((stage_items + kZeros) * item_bytes + 2 * kGranule - 1) / kGranule * kGranule;
}

// Where something of `bytes` bytes begins and ends, and what of it bulk copies can move.
struct Span {
  uintptr_t begin, low, high;
  uint32_t shift;  // of its begin from a multiple of 16

  __device__ __forceinline__ Span(const void* pointer, uint32_t bytes)
      : begin(reinterpret_cast<uintptr_t>(pointer)),
        low((begin + kGranule - 1) & ~static_cast<uintptr_t>(kGranule - 1)),
        high((begin + bytes) & ~static_cast<uintptr_t>(kGranule - 1)),
        shift(static_cast<uint32_t>(begin) % kGranule) {}

  // Whether bulk copies leave out the item that begins `offset` bytes behind the begin.
  __device__ __forceinline__ bool leaves_out(uint32_t offset) const {
    return begin + offset < low || begin + offset >= high;
  }
};

// The first and the last items of something, one for each lane: those that bulk copies may leave out.
template <typename T>
__device__ __forceinline__ int edge_item(int lane, int items) {
  constexpr int most = kGranule / sizeof(T);
  const int item = lane < most ? lane : items - 1 - (lane - most);
  return lane < most ? (item < items ? item : -1) : lane < 2 * most && item >= most ? item : -1;
}

// What the first warp does beside its rows: lane l asks for segment l.
template <typename T>
struct Producer {
  uint32_t begin, bytes, place;  // of the segment, in bytes from the begin of an element
  int edge;                      // item of x that this lane moves where bulk copies leave it out, or -1
  uint32_t edge_place;           // where it goes, in bytes
  uint32_t element_bytes;

  __device__ __forceinline__ Producer(const uint32_t* table, int lane, uint32_t items) {
    const uint32_t* const segments = table + kBulkHeader;
    begin = __ldg(segments + lane) * kPoint * static_cast<uint32_t>(sizeof(T));
    bytes = __ldg(segments + kBulkSegments + lane) * kPoint * static_cast<uint32_t>(sizeof(T));
    place = __ldg(segments + 2 * kBulkSegments + lane) * static_cast<uint32_t>(sizeof(T));
    constexpr int most = kGranule / sizeof(T);
    const uint32_t head = __ldg(table + 3), tail = __ldg(table + 4);
    edge = edge_item<T>(lane, static_cast<int>(items));
    if ((lane < most ? head : tail) == kNone) edge = -1;
    edge_place = (lane < most ? head + lane : tail - (lane - most)) * static_cast<uint32_t>(sizeof(T));
    element_bytes = items * static_cast<uint32_t>(sizeof(T));
  }

  // Starts the copies of the batch element at x, whose arrival `barrier` counts.
  __device__ __forceinline__ void ask(const T* x, unsigned char* stage, fm::SharedAddress barrier) const {
    const Span element(x, element_bytes);
    const uintptr_t from = element.begin - element.shift + begin;
    const uintptr_t first = from > element.low ? from : element.low;
    uintptr_t last = from + bytes + (element.shift > 0 ? kGranule : 0);
    if (last > element.high) last = element.high;
    const uint32_t size = bytes > 0 && last > first ? static_cast<uint32_t>(last - first) : 0;
    fm::barrier_arrive_expecting(barrier, size);
    if (size > 0) {
      fm::bulk_load(fm::shared_address(stage + place + (first - from)), reinterpret_cast<const void*>(first), size,
                    barrier);
    }
  }

  // The item of the element at x that this lane moves itself.
  __device__ __forceinline__ T fetch(const T* x) const {
    return edge >= 0 && Span(x, element_bytes).leaves_out(edge * static_cast<uint32_t>(sizeof(T))) ? x[edge] : T(0.0f);
  }
  __device__ __forceinline__ void put(const T* x, T item, unsigned char* stage) const {
    const Span element(x, element_bytes);
    if (edge >= 0 && element.leaves_out(edge * static_cast<uint32_t>(sizeof(T)))) {
      *reinterpret_cast<T*>(stage + element.shift + edge_place) = item;
    }
  }
};

// Takes the rows of a block from shared memory, where they lie shifted as they do at `to`. By the lanes of a warp.
template <typename T>
__device__ __forceinline__ void store_rows(const unsigned char* rows, T* to, int items, int lane) {
  const Span span(to, static_cast<uint32_t>(items * sizeof(T)));
  if (lane == 0 && span.high > span.low) {
    const uint32_t first = static_cast<uint32_t>(span.low - span.begin) + span.shift;
    fm::bulk_store(reinterpret_cast<void*>(span.low), fm::shared_address(rows + first),
                   static_cast<uint32_t>(span.high - span.low));
  }
  fm::bulk_commit();
  const int edge = edge_item<T>(lane, items);
  if (edge >= 0 && span.leaves_out(static_cast<uint32_t>(edge * sizeof(T)))) {
    to[edge] = reinterpret_cast<const T*>(rows + span.shift)[edge];
  }
}

// Adds the sums of 2, 4 or 8 neighbouring lanes, in the first of them; `level` tells by its bits how many.
__device__ __forceinline__ void add_lanes(float (&sums)[kPoint], bool two, bool four, bool eight) {
  if (!two) return;
#pragma unroll
  for (int c = 0; c < kPoint; ++c) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], 1);
  if (!four) return;
#pragma unroll
  for (int c = 0; c < kPoint; ++c) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], 2);
  if (!eight) return;
#pragma unroll
  for (int c = 0; c < kPoint; ++c) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], 4);
}

// The rows of a warp: `masks` tell after which of its `used` slots rows end. Entries are offset in bytes << 14 | row.
template <int LENGTH, int SLOTS, typename T>
__device__ __forceinline__ void gather_rows(const unsigned char* element, const uint32_t (&entries)[SLOTS],
                                            const float (&values)[SLOTS], int used,
                                            const uint32_t (&masks)[kBulkMasks], T* rows) {
  float sums[kPoint] = {};
  T ahead[kPoint];  // what the next entry meets: asked for before it is known whether a row ends
  const auto ask = [&](int k) {
    const T* const from = reinterpret_cast<const T*>(element + (entries[k] >> kBulkRowBits));
#pragma unroll
    for (int c = 0; c < kPoint; ++c) ahead[c] = from[c];
  };
  if (LENGTH != 3 && used == 0) return;
  ask(0);
#pragma unroll
  for (int k = 0; k < SLOTS; ++k) {
    const T met[kPoint] = {ahead[0], ahead[1], ahead[2]};
    if (k + 1 < SLOTS) ask(k + 1);
#pragma unroll
    for (int c = 0; c < kPoint; ++c) sums[c] = fmaf(values[k], to_float(met[c]), sums[c]);
    const bool ends = LENGTH == 3 ? k % 3 == 2 : masks[0] >> k & 1;
    if (!ends) continue;
    if constexpr (LENGTH != 3) add_lanes(sums, masks[1] >> k & 1, masks[2] >> k & 1, masks[3] >> k & 1);
    const uint32_t row = entries[k] & kBulkNoRow;
    if (row != kBulkNoRow) {
#pragma unroll
      for (int c = 0; c < kPoint; ++c) rows[row * kPoint + c] = from_float<T>(sums[c]);
    }
    if (LENGTH != 3 && k + 1 >= used) return;
#pragma unroll
    for (int c = 0; c < kPoint; ++c) sums[c] = 0.0f;
  }
}

template <typename T, int LENGTH, int SLOTS>
__global__ void __launch_bounds__(bulk_threads(SLOTS)) bulk_kernel(const Problem<T> p, const Bulk s) {
  fm::launch_dependents();  // they wait for all of this kernel before they touch anything but tables
  constexpr uint32_t item_bytes = sizeof(T);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t* const table = s.tables + static_cast<int64_t>(blockIdx.x) * s.block_words;
  const uint32_t stage_bytes = bulk_stage_bytes(s.stage_items, item_bytes);
  unsigned char* const shared = fm::dynamic_shared();
  unsigned char* const stages = shared + kBarrierBytes;
  unsigned char* const outs = stages + s.stages * stage_bytes;
  const fm::SharedAddress barriers = fm::shared_address(shared);

  // The matrix is constant, so this need not wait for the kernel before.
  const uint32_t* const own = table + kBulkHeader + 3 * kBulkSegments + warp;
  const int used = LENGTH == 3 ? SLOTS : __ldg(own);
  const uint32_t* const words = table + __ldg(own + warps) + lane;
  uint32_t entries[SLOTS], masks[kBulkMasks];
  float values[SLOTS];
#pragma unroll
  for (int k = 0; k < SLOTS; ++k) {
    const bool valid = k < used;
    const uint32_t entry = valid ? __ldg(words + k * 32) : 0;
    values[k] = valid ? __uint_as_float(__ldg(words + (used + k) * 32)) : 0.0f;
    entries[k] = (entry >> 16) * item_bytes << kBulkRowBits | (entry & kBulkNoRow);
  }
#pragma unroll
  for (int m = 0; m < kBulkMasks; ++m) masks[m] = LENGTH == 3 ? 0 : __ldg(own + (2 + m) * warps);
  const Producer<T> producer(table, lane, static_cast<uint32_t>(p.tokens) * kPoint);
  const int items = __ldg(table + 1) * kPoint;
  if (threadIdx.x < s.stages) fm::barrier_start(barriers + 8 * threadIdx.x, 32);
  for (int i = threadIdx.x; i < s.stages * static_cast<int>(kZeros + kGranule / item_bytes); i += blockDim.x) {
    const uint32_t each = kZeros + kGranule / item_bytes;
    // Some zeros more, because elements are shifted.
    const uint32_t at = s.stage_items * item_bytes + i % each * item_bytes;
    if (at + item_bytes <= stage_bytes) *reinterpret_cast<T*>(stages + i / each * stage_bytes + at) = T(0.0f);
  }
  fm::bulk_fence();
  __syncthreads();
  fm::wait_for_previous_grid();

  const int64_t begin = static_cast<int64_t>(blockIdx.y) * s.elements;
  const int count = static_cast<int>(min(static_cast<int64_t>(s.elements), p.batch - begin));
  const T* const x = p.x + begin * p.batch_stride;
  T* out = p.out + (begin * p.rows + __ldg(table)) * kPoint;
  T next = T(0.0f);  // what this lane moves itself of the next element
  if (warp == 0) {
    for (int i = 0; i < min(count, s.stages); ++i) {
      producer.ask(x + i * p.batch_stride, stages + i * stage_bytes, barriers + 8 * i);
    }
    producer.put(x, producer.fetch(x), stages);
    if (count > 1) next = producer.fetch(x + p.batch_stride);
  }
  __syncthreads();
  int stage = 0;
  uint32_t turn = 0;
  for (int i = 0; i < count; ++i) {
    const T* const here = x + i * p.batch_stride;
    const int after = stage + 1 < s.stages ? stage + 1 : 0;
    unsigned char* const rows = outs + (i % 2) * s.out_bytes;
    const uint32_t shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(here)) % kGranule;
    const uint32_t out_shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(out)) % kGranule;
    fm::barrier_wait(barriers + 8 * stage, turn);
    gather_rows<LENGTH, SLOTS>(stages + stage * stage_bytes + shift, entries, values, used, masks,
                               reinterpret_cast<T*>(rows + out_shift));
    if (warp == 0) {
      if (i + 1 < count) producer.put(here + p.batch_stride, next, stages + after * stage_bytes);
      if (i + 2 < count) next = producer.fetch(here + 2 * p.batch_stride);
      fm::bulk_wait_read();  // for the rows of the element before, whose place the next one takes
    }
    fm::bulk_fence();
    __syncthreads();
    if (warp == 0) {
      store_rows(rows, out, items, lane);
      if (i + s.stages < count) {
        producer.ask(here + s.stages * p.batch_stride, stages + stage * stage_bytes, barriers + 8 * stage);
      }
    }
    out += p.rows * kPoint;
    turn ^= after == 0;
    stage = after;
  }
  if (warp == 0) fm::bulk_wait_read();
}

}  // namespace fm_upsampling
