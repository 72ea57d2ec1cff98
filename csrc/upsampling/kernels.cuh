// The CUDA kernels of upsample_native: out[b, m, c] = sum_e values[e] * x[b, columns[e], c].
//
// A thread makes one output position (a row and a channel, or 16 bytes of channels) of several batch elements, which
// share the loads of the row's indices and values. Neighbouring threads take neighbouring positions, so that 3 channels
// are written without gaps. Long rows are split over PARTS neighbouring lanes and added up by shuffles. Sums are in
// float32, and their order depends on the matrix alone: not on strides, and not on which of the kernels runs.
//
//   gather_kernel  reads x where it lies; the rows of a block share what they read through L1
//   staged_kernel  first copies whole batch elements of x to shared memory, where scattered reads are cheaper
//   points_kernel  for points and large batches, with tables that are made once per matrix: see points.cuh
#pragma once

#include "common/device.cuh"

namespace fm_upsampling {

constexpr int kAnyLength = 0;  // value of LENGTH: row_offsets tells how many entries a row has

template <typename T>
struct Problem {
  const T* x;  // [batch, tokens, channels], strides in elements
  T* out;      // contiguous [batch, rows, channels]
  const int32_t* row_offsets;
  const int32_t* columns;
  const float* values;
  int64_t batch, tokens, rows, channels;
  int64_t batch_stride, token_stride, channel_stride;
};

// Division by a number that is known at the launch. With 32 bits, for numerators below 2^31, by a multiplication:
// Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
template <typename Index>
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(0) {
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

template <>
struct Divisor<int64_t> {
  int64_t divisor;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(d) {}
  __device__ __forceinline__ int64_t divide(int64_t n) const { return n / divisor; }
};

// How blocks share the work: blockIdx.x is a piece of the positions, blockIdx.y a tile of batch elements. Index is
// uint32_t where every offset within one batch element is below 2^31.
template <typename Index>
struct Grid {
  Index positions;        // rows * packs
  Index block_positions;  // of one block
  Divisor<Index> packs;   // positions of a row
};

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T item[VEC];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, float>) return value;
}

// A kernel that is launched with programmatic stream serialization may start while the one before it still runs. It
// must not touch memory before this returns; then it lets its own successor start up.
__device__ __forceinline__ void wait_for_previous_kernel() {
  fm::wait_for_previous_grid();
  fm::launch_dependents();
}

// Adds COUNT entries, PARTS apart; with CHECKED only those before `last`. `read(column, items)` fetches
// Pack<T, VEC>[BATCH]. All that is read is asked for before the first of it is used.
template <int COUNT, int PARTS, bool CHECKED, typename T, int VEC, int BATCH, typename Read>
__device__ __forceinline__ void add_some_entries(const Problem<T>& p, uint32_t entry, uint32_t last, const Read& read,
                                                 float (&sums)[BATCH][VEC]) {
  int32_t columns[COUNT];
  float values[COUNT];
  Pack<T, VEC> items[COUNT][BATCH];
#pragma unroll
  for (int e = 0; e < COUNT; ++e) {
    const bool valid = !CHECKED || entry + e * PARTS < last;
    columns[e] = valid ? __ldg(p.columns + entry + e * PARTS) : -1;
    values[e] = valid ? __ldg(p.values + entry + e * PARTS) : 0.0f;
  }
#pragma unroll
  for (int e = 0; e < COUNT; ++e) {
    if (!CHECKED || columns[e] >= 0) {
      read(columns[e], items[e]);
    } else {
#pragma unroll
      for (int i = 0; i < BATCH; ++i) items[e][i] = {};
    }
  }
#pragma unroll
  for (int e = 0; e < COUNT; ++e) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
#pragma unroll
      for (int c = 0; c < VEC; ++c) sums[i][c] = fmaf(values[e], to_float(items[e][i].item[c]), sums[i][c]);
    }
  }
}

// Adds the entries of `row` that belong to `part`.
template <int LENGTH, int PARTS, typename T, int VEC, int BATCH, typename Index, typename Read>
__device__ __forceinline__ void add_row(const Problem<T>& p, Index row, int part, const Read& read,
                                        float (&sums)[BATCH][VEC]) {
  // There are less than 2^31 entries, so that stepping past the last one does not wrap around.
  if constexpr (LENGTH != kAnyLength) {
    static_assert(PARTS == 1);
    const uint32_t entry = static_cast<uint32_t>(row) * LENGTH;
    add_some_entries<LENGTH, 1, false>(p, entry, entry + LENGTH, read, sums);
  } else {
    constexpr int count = VEC > 1 || BATCH > 4 ? 2 : 4;
    const uint32_t last = __ldg(p.row_offsets + row + 1);
    for (uint32_t entry = __ldg(p.row_offsets + row) + part; entry < last; entry += PARTS * count) {
      add_some_entries<count, PARTS, true>(p, entry, last, read, sums);
    }
  }
}

// Adds the sums of PARTS neighbouring lanes, always in the same tree. Each lane is left with its own share of the batch
// elements, in sums[0] and following: the first is returned. All lanes of the warp must take part.
template <int PARTS, int VEC, int BATCH>
__device__ __forceinline__ int add_parts(float (&sums)[BATCH][VEC], int part) {
  int first = 0;
  int count = BATCH;
#pragma unroll
  for (int lanes = PARTS / 2; lanes > 0; lanes /= 2) {
    const bool upper = part & lanes;
    if (count > 1) count /= 2;
    const bool split = BATCH * lanes >= PARTS;  // then there is something to give away
    if (split && upper) first += count;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (i >= count) break;
#pragma unroll
      for (int c = 0; c < VEC; ++c) {
        const float mine = sums[i][c];
        const float other = split ? sums[(i + count) % BATCH][c] : mine;
        const float given = split && !upper ? other : mine;
        sums[i][c] = (split && upper ? other : mine) + __shfl_xor_sync(0xffffffffu, given, lanes);
      }
    }
  }
  return first;
}

// Adds up the parts and writes a position of `left` batch elements, the first of them at `out`.
template <int PARTS, typename T, int VEC, int BATCH>
__device__ __forceinline__ void finish(float (&sums)[BATCH][VEC], int part, bool active, T* out, int64_t stride,
                                       int left) {
  constexpr int kept = BATCH > PARTS ? BATCH / PARTS : 1;    // batch elements that a lane is left with
  constexpr int copies = PARTS > BATCH ? PARTS / BATCH : 1;  // lanes that are left with the same one
  const int first = add_parts<PARTS>(sums, part);
  if (!active || part % copies != 0) return;
  out += first * stride;
#pragma unroll
  for (int i = 0; i < kept; ++i) {
    if (first + i >= left) break;
    Pack<T, VEC> pack;
#pragma unroll
    for (int c = 0; c < VEC; ++c) pack.item[c] = from_float<T>(sums[i][c]);
    *reinterpret_cast<Pack<T, VEC>*>(out) = pack;
    out += stride;
  }
}

constexpr int kMaxThreads = 1024;

// Of a block of gather_kernel: where a thread has much under way, it needs registers.
constexpr int max_threads(int vec, int batch) { return vec > 1 ? 256 : batch > 1 ? 512 : kMaxThreads; }

// Blocks that must fit on a multiprocessor. Without this the compiler saves registers to fit more, and does it by
// waiting for the first reads before it asks for the last.
constexpr int min_blocks(int vec, int batch) { return vec > 1 || batch > 1 ? 2 : 1; }

// One position of the batch elements first to first + BATCH - 1.
template <int LENGTH, int PARTS, int VEC, int BATCH, typename T, typename Index>
__device__ __forceinline__ void gather_elements(const Problem<T>& p, const Grid<Index>& grid, int first, Index position,
                                                int part, bool active) {
  float sums[BATCH][VEC] = {};
  if (active) {
    const Index row = grid.packs.divide(position);
    const Index channel = (position - row * grid.packs.divisor) * VEC;
    const T* const source = p.x + first * p.batch_stride + channel * static_cast<Index>(p.channel_stride);
    const auto read = [&](int32_t column, Pack<T, VEC>(&items)[BATCH]) {
      const T* from = source + static_cast<Index>(column) * static_cast<Index>(p.token_stride);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        items[i] = *reinterpret_cast<const Pack<T, VEC>*>(from);
        from += p.batch_stride;
      }
    };
    add_row<LENGTH, PARTS>(p, row, part, read, sums);
  }
  const int64_t stride = p.rows * p.channels;
  finish<PARTS>(sums, part, active, p.out + first * stride + position * VEC, stride, BATCH);
}

// The same for `left` batch elements, less than 2 BATCH: at the end of the batch 4, 2, 1 at a time.
template <int LENGTH, int PARTS, int VEC, int BATCH, typename T, typename Index>
__device__ __forceinline__ void gather_rest(const Problem<T>& p, const Grid<Index>& grid, int first, int left,
                                            Index position, int part, bool active) {
  if (left & BATCH) {
    gather_elements<LENGTH, PARTS, VEC, BATCH>(p, grid, first, position, part, active);
    first += BATCH;
  }
  if constexpr (BATCH > 1) gather_rest<LENGTH, PARTS, VEC, BATCH / 2>(p, grid, first, left, position, part, active);
}

template <typename T, int VEC, int LENGTH, int PARTS, int BATCH, typename Index>
__global__ void __launch_bounds__(max_threads(VEC, BATCH), min_blocks(VEC, BATCH))
    gather_kernel(const Problem<T> p, const Grid<Index> grid) {
  wait_for_previous_kernel();
  const Index position = static_cast<Index>(blockIdx.x) * grid.block_positions + threadIdx.x / PARTS;
  const int part = threadIdx.x % PARTS;
  const bool active = position < grid.positions;
  if (PARTS == 1 && !active) return;

  const int first = blockIdx.y * BATCH;
  const int left = min(BATCH, static_cast<int>(p.batch) - first);
  gather_rest<LENGTH, PARTS, VEC, BATCH>(p, grid, first, left, position, part, active);
}

// The batch elements of a block lie interleaved in shared memory, so that one read serves them all. x must be
// contiguous within a batch element.
template <typename T, int LENGTH, int PARTS, int BATCH>
__global__ void __launch_bounds__(kMaxThreads) staged_kernel(const Problem<T> p, const Grid<uint32_t> grid) {
  wait_for_previous_kernel();
  const int first = blockIdx.y * BATCH;
  const int left = min(BATCH, static_cast<int>(p.batch) - first);
  auto* const stage = reinterpret_cast<Pack<T, BATCH>*>(fm::dynamic_shared());
  const T* const source = p.x + first * p.batch_stride;
  const uint32_t count = static_cast<uint32_t>(p.tokens * p.channels);
  constexpr int copies = 4;  // under way at once
  for (uint32_t start = threadIdx.x; start < count; start += copies * blockDim.x) {
    Pack<T, BATCH> packs[copies];
#pragma unroll
    for (int k = 0; k < copies; ++k) {
      const uint32_t e = min(start + k * blockDim.x, count - 1);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) packs[k].item[i] = i < left ? source[i * p.batch_stride + e] : T(0.0f);
    }
#pragma unroll
    for (int k = 0; k < copies; ++k) {
      if (start + k * blockDim.x < count) stage[start + k * blockDim.x] = packs[k];
    }
  }
  __syncthreads();

  const uint32_t begin = blockIdx.x * grid.block_positions;
  const uint32_t end = min(begin + grid.block_positions, grid.positions);
  const int part = threadIdx.x % PARTS;
  const int64_t stride = p.rows * p.channels;
  T* const out = p.out + first * stride;
  for (uint32_t start = begin; start < end; start += blockDim.x / PARTS) {
    const uint32_t position = start + threadIdx.x / PARTS;
    const bool active = position < end;
    float sums[BATCH][1] = {};
    if (active) {
      const uint32_t row = grid.packs.divide(position);
      const uint32_t channel = position - row * grid.packs.divisor;
      const auto read = [&](int32_t column, Pack<T, 1>(&items)[BATCH]) {
        const Pack<T, BATCH> pack = stage[static_cast<uint32_t>(column) * grid.packs.divisor + channel];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) items[i].item[0] = pack.item[i];
      };
      add_row<LENGTH, PARTS>(p, row, part, read, sums);
    }
    finish<PARTS>(sums, part, active, out + position, stride, left);
  }
}

}  // namespace fm_upsampling
