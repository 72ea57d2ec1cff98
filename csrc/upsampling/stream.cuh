// The product for three channels (points) and a batch that fills the GPU: x streams past a part of the matrix.
//
// A block owns a range of rows for good. Its entries lie in the registers of its threads, in the order in which they
// are used, and a list names the tokens of x that they touch (fastmetro_kernels/streams.py decides both, once per
// matrix). The block goes through its share of the batch: it copies those tokens, and no others, of the next BATCH
// batch elements to shared memory, interleaved, while it gathers from those of the last copy.
#pragma once

#include "kernels.cuh"

namespace fm_upsampling {

constexpr int kPoint = 3;             // channels
constexpr int kStreamThreads = 896;  // of a block at most, which leaves 72 registers to each
constexpr uint32_t kNothing = 0xffffffffu;  // fills up the list of tokens
constexpr uint32_t kNoRow = 0xffffu;        // row of a lane that has none

// One cut of the matrix; the words of block b begin at tables + b * block_words.
//
//   [1]            rows of the block
//   [warps]        slots that a warp uses
//   [warps]        mask of the slots after which a row of it ends
//   [warps]        where its slots begin
//   [tokens]       token | place << 16: what to copy where, or kNothing
//   [block_rows]   the rows of the block, unless all rows have three entries: then blocks are ranges of block_rows rows
//   of each warp:
//     [slots][32]  place | row << 16: the token of an entry, and the row, counted in the block, that it belongs to
//     [slots][32]  its value, a float
//
// Slots without an entry have the value 0 and the place `places`, which holds zeros.
struct Stream {
  const uint32_t* tables;
  int32_t block_words, block_rows, tokens, places;
  int32_t packs;  // of BATCH batch elements, per block
};

// 32 rows, one per lane, of BATCH batch elements: in three exchanges lane l gets positions l, 32 + l and 64 + l of the
// 96 that the rows have in memory. Exchange s passes on channel s: that of row r lands in lane (3 r + s) mod 32, in
// every lane once, because 3 and 32 have no common divisor.
template <typename T, int BATCH>
__device__ __forceinline__ void to_memory_order(const float (&sums)[BATCH][kPoint], int lane,
                                                uint32_t (&ordered)[kPoint][sizeof(T) * BATCH / 4]) {
  constexpr int words = sizeof(T) * BATCH / 4;
  uint32_t passed[kPoint][words];
#pragma unroll
  for (int s = 0; s < kPoint; ++s) {
    const int from = (lane - s) * 11 & 31;  // 3 * 11 = 33 = 1 mod 32
#pragma unroll
    for (int w = 0; w < words; ++w) {
      if constexpr (sizeof(T) == 4) {
        passed[s][w] = __float_as_uint(sums[w][s]);
      } else {
        passed[s][w] = fm::pack<T>(sums[2 * w][s], sums[2 * w + 1][s]);
      }
      passed[s][w] = __shfl_sync(0xffffffffu, passed[s][w], from);
    }
  }
  // What arrived by exchange s belongs to position 32 j + l with j = (l - s) mod 3.
  const int rest = lane % kPoint;
#pragma unroll
  for (int j = 0; j < kPoint; ++j) {
#pragma unroll
    for (int w = 0; w < words; ++w) {
      ordered[j][w] = rest == 0 ? passed[(3 - j) % 3][w] : rest == 1 ? passed[(4 - j) % 3][w] : passed[2 - j][w];
    }
  }
}

// Item i of numbers that are packed into words.
template <typename T, int WORDS>
__device__ __forceinline__ T item_of(const uint32_t (&words)[WORDS], int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else {
    const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
    T item;
    memcpy(&item, &bits, sizeof(T));
    return item;
  }
}

// Every row has three entries, the rows of a warp follow each other in memory. `out`: where the first position of this
// lane goes, of `room` that the block has from there on; without CHECKED all of the warp's are inside, and none is
// missing of BATCH batch elements. `entries` are offsets in bytes.
template <bool CHECKED, int SLOTS, typename T, int BATCH>
__device__ __forceinline__ void gather_threes(const Pack<T, BATCH>* stage, const uint32_t (&entries)[SLOTS],
                                              const float (&values)[SLOTS], T* out, int room, int64_t stride,
                                              int left) {
#pragma unroll
  for (int k = 0; k < SLOTS; k += 3) {
    float sums[BATCH][kPoint] = {};
#pragma unroll
    for (int e = 0; e < 3; ++e) {
      const auto* const from =
          reinterpret_cast<const Pack<T, BATCH>*>(reinterpret_cast<const unsigned char*>(stage) + entries[k + e]);
#pragma unroll
      for (int c = 0; c < kPoint; ++c) {
        const Pack<T, BATCH> pack = from[c];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) sums[i][c] = fmaf(values[k + e], to_float(pack.item[i]), sums[i][c]);
      }
    }
    uint32_t ordered[kPoint][sizeof(T) * BATCH / 4];
    to_memory_order<T, BATCH>(sums, threadIdx.x % 32, ordered);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (CHECKED && i >= left) break;
      T* const to = out + i * stride;
#pragma unroll
      for (int j = 0; j < kPoint; ++j) {
        const int position = (k + j) * 32;
        if (!CHECKED || position < room) to[position] = item_of<T>(ordered[j], i);
      }
    }
  }
}

// Rows of any length, PARTS lanes each; they are left in shared memory, [BATCH][positions].
template <int PARTS, int SLOTS, typename T, int BATCH>
__device__ __forceinline__ void gather_any(const Pack<T, BATCH>* stage, const uint32_t (&entries)[SLOTS],
                                           const float (&values)[SLOTS], int used, uint32_t ends, T* rows,
                                           uint32_t positions) {
  constexpr int kept = BATCH > PARTS ? BATCH / PARTS : 1;
  constexpr int copies = PARTS > BATCH ? PARTS / BATCH : 1;
  const int part = threadIdx.x % PARTS;
  float sums[BATCH][kPoint] = {};
#pragma unroll
  for (int k = 0; k < SLOTS; ++k) {
    if (k >= used) break;
    uint32_t place = entries[k];
    asm volatile("" : "+r"(place));
    const Pack<T, BATCH>* const from = stage + (place & 0xffffu) * kPoint;
#pragma unroll
    for (int c = 0; c < kPoint; ++c) {
      const Pack<T, BATCH> pack = from[c];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) sums[i][c] = fmaf(values[k], to_float(pack.item[i]), sums[i][c]);
    }
    if (!(ends >> k & 1)) continue;
    const uint32_t row = entries[k] >> 16;
    const int first = add_parts<PARTS>(sums, part);
    if (row != kNoRow && part % copies == 0) {
#pragma unroll
      for (int i = 0; i < kept; ++i) {
#pragma unroll
        for (int c = 0; c < kPoint; ++c) rows[(first + i) * positions + row * kPoint + c] = from_float<T>(sums[i][c]);
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
#pragma unroll
      for (int c = 0; c < kPoint; ++c) sums[i][c] = 0.0f;
    }
  }
}

// Writes what gather_any left of `left` batch elements. A block has a multiple of 96 threads, so that a thread writes
// one and the same channel every time.
template <typename T>
__device__ __forceinline__ void write_rows(const T* rows, const uint32_t* list, uint32_t positions, T* out,
                                           int64_t stride, int left) {
  for (uint32_t e = threadIdx.x; e < positions; e += blockDim.x) {
    T* const to = out + __ldg(list + e / kPoint) * kPoint + threadIdx.x % kPoint;
    for (int i = 0; i < left; ++i) to[i * stride] = rows[i * positions + e];
  }
}

// COPIES: words that a thread copies of a batch element, at most.
template <typename T, int BATCH, int LENGTH, int PARTS, int SLOTS, int COPIES>
__global__ void __launch_bounds__(kStreamThreads) stream_kernel(const Problem<T> p, const Stream s) {
  using Word = Pack<T, BATCH>;
  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const uint32_t* const table = s.tables + static_cast<int64_t>(blockIdx.x) * s.block_words;
  const uint32_t channel = threadIdx.x % kPoint;

  // The matrix is constant, so this need not wait for the kernel before.
  uint32_t copied[COPIES], entries[SLOTS];
  float values[SLOTS];
#pragma unroll
  for (int k = 0; k < COPIES; ++k) {
    const uint32_t token = (threadIdx.x + k * blockDim.x) / kPoint;
    copied[k] = token < static_cast<uint32_t>(s.tokens) ? __ldg(table + 1 + 3 * warps + token) : kNothing;
  }
  const int used = LENGTH == 3 ? SLOTS : __ldg(table + 1 + warp);
  const uint32_t ends = LENGTH == 3 ? 0 : __ldg(table + 1 + warps + warp);
  const uint32_t start =
      LENGTH == 3 ? 1 + 3 * warps + s.tokens + 64 * SLOTS * warp : __ldg(table + 1 + 2 * warps + warp);
#pragma unroll
  for (int k = 0; k < SLOTS; ++k) {
    const bool valid = k < used;
    entries[k] = valid ? __ldg(table + start + k * 32 + threadIdx.x % 32) : 0;
    values[k] = valid ? __uint_as_float(__ldg(table + start + (used + k) * 32 + threadIdx.x % 32)) : 0.0f;
    if constexpr (LENGTH == 3) entries[k] = (entries[k] & 0xffffu) * kPoint * sizeof(Word);  // the rows are in order
  }
  wait_for_previous_kernel();

  const int64_t batch = p.batch;
  int64_t first = static_cast<int64_t>(blockIdx.y) * s.packs * BATCH;
  const int count = static_cast<int>(min(static_cast<int64_t>(s.packs), (batch - first + BATCH - 1) / BATCH));
  const uint32_t begin = LENGTH == 3 ? blockIdx.x * s.block_rows * kPoint : 0;
  const uint32_t positions = __ldg(table) * kPoint;
  const uint32_t stage_words = (s.places + 1) * kPoint;
  const int64_t stride = p.rows * kPoint;
  Word* const stage = reinterpret_cast<Word*>(fm::dynamic_shared());
  T* const rows = reinterpret_cast<T*>(stage + (count > 1 ? 2 : 1) * stage_words);
  const T* x = p.x + first * p.batch_stride + channel * static_cast<uint32_t>(p.channel_stride);
  T* out = p.out + first * stride + begin;
  const uint32_t own = warp * SLOTS * 32;  // LENGTH == 3: first position of the warp, in the block
  const bool inside = own + SLOTS * 32 <= positions;
  if constexpr (LENGTH == 3) out += own + threadIdx.x % 32;
  const int room = static_cast<int>(positions - own - threadIdx.x % 32);

  Word items[COPIES];
  const uint32_t token_bytes = static_cast<uint32_t>(p.token_stride * sizeof(T));
  const auto fetch = [&](int64_t start) {
#pragma unroll
    for (int k = 0; k < COPIES; ++k) {
      if (k * blockDim.x >= kPoint * static_cast<uint32_t>(s.tokens)) break;
      uint32_t token = copied[k];
      asm volatile("" : "+r"(token));  // or else the addresses would be kept in registers, twice as many as the tokens
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const auto* const from = reinterpret_cast<const unsigned char*>(x + i * p.batch_stride);
        const uint64_t offset = static_cast<uint64_t>(token & 0xffffu) * token_bytes;
        const bool valid = token != kNothing && (i == 0 || start + i < batch);
        items[k].item[i] = valid ? *reinterpret_cast<const T*>(from + offset) : T(0.0f);
      }
    }
    x += BATCH * p.batch_stride;
  };
  const auto put = [&](Word* to) {
#pragma unroll
    for (int k = 0; k < COPIES; ++k) {
      if (k * blockDim.x >= kPoint * static_cast<uint32_t>(s.tokens)) break;
      if (copied[k] != kNothing) to[(copied[k] >> 16) * kPoint + channel] = items[k];
    }
  };

  fetch(first);
  if (threadIdx.x < kPoint) {
    for (int b = 0; b < (count > 1 ? 2 : 1); ++b) {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) stage[b * stage_words + s.places * kPoint + threadIdx.x].item[i] = T(0.0f);
    }
  }
  put(stage);
  __syncthreads();
  for (int pack = 0; pack < count; ++pack) {
    const bool more = pack + 1 < count;
    const int left = static_cast<int>(min(static_cast<int64_t>(BATCH), batch - first));
    const Word* const now = stage + (pack % 2) * stage_words;
    if (more) fetch(first + BATCH);
    if constexpr (LENGTH == 3) {
      if (inside && left == BATCH) {
        gather_threes<false>(now, entries, values, out, room, stride, left);
      } else {
        gather_threes<true>(now, entries, values, out, room, stride, left);
      }
    } else {
      gather_any<PARTS, SLOTS>(now, entries, values, used, ends, rows + (pack % 2) * BATCH * positions, positions);
    }
    if (more) put(stage + (1 - pack % 2) * stage_words);
    if (LENGTH != 3 || more) __syncthreads();
    if constexpr (LENGTH != 3) {
      const uint32_t* const list = table + 1 + 3 * warps + s.tokens;
      write_rows(rows + (pack % 2) * BATCH * positions, list, positions, out, stride, left);
    }
    first += BATCH;
    out += BATCH * stride;
  }
}

}  // namespace fm_upsampling
