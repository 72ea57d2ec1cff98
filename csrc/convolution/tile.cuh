// What the kernels of convolutions are made of, for compute capability 9.0: a block's tile of the product, the copies that
// bring its operands, the products, and what becomes of the sums. See forward.cuh.
#pragma once

#include "common/hopper.cuh"

namespace fm_convolution {

constexpr int kRows = 64, kDepth = 64;  // of a tile; 64 16-bit numbers are the 128 bytes of a swizzled row
constexpr int kWarpgroup = 128;
constexpr int kMaxStages = 16;

// Divides numbers below 65536 by one below 65536 without a division.
struct Divisor {
  uint32_t number, reciprocal;

  static Divisor of(uint32_t number) {
    return {number, number > 1 ? static_cast<uint32_t>((1ull << 32) / number + 1) : 0};
  }
#if defined(__CUDACC__) || defined(FM_EMULATED)
  __device__ __forceinline__ int quotient(int x) const { return reciprocal != 0 ? __umulhi(x, reciprocal) : x; }
#endif
};

struct Input {
  fm::TensorMap pixels, weights;
  Divisor across, chunks;  // taps side by side; chunks of 64 channels
  int depth;               // chunks of all taps
  int stride, left;        // of the position's first pixel: stride * position - left
};

// What is multiplied.
struct Inputs {
  Input first, second;  // the second of depth 0 where there is none
  int height, width;    // of the output
  int stages;           // chunks under way
};

// What becomes of the sums.
template <typename T>
struct Output {
  const float* bias;   // [channels]
  const T* residual;   // [rows, channels] or null
  T* out;              // [rows, channels]
  int rows, channels;
  bool relu, late;     // late: the residual is added behind the ReLU
  int scale;  // results are repeated so often down and across, in front of the residual; then it and out are larger
};

// What a block notes of itself, in clocks of its multiprocessor; the last is which one that is.
enum Stamp { kStarted, kPrepared, kWaited, kAsked, kMultiplied, kExchanged, kStored, kMultiprocessor, kStamps };

#ifdef FM_HOPPER

struct Ring {
  fm::SharedAddress pixels, weights, full, empty;
};

// A chunk of the depth: which input's, which tap's, from which channel on.
struct Chunk {
  const Input& input;
  int tap, channel;
};

__device__ __forceinline__ Chunk chunk_of(const Inputs& p, int number) {
  const bool second = number >= p.first.depth;
  const Input& input = second ? p.second : p.first;
  const int place = second ? number - p.first.depth : number;
  const int tap = input.chunks.quotient(place);
  return {input, tap, (place - tap * static_cast<int>(input.chunks.number)) * kDepth};
}

// The part of the product that is this block's: rows and columns from `row` and `column` on, `count` chunks from `from`
// on.
template <int COLUMNS, int GROUPS>
struct Tile {
  static constexpr int kPixels = kRows * kDepth * 2, kWeights = COLUMNS * kDepth * 2;  // bytes of a copy
  const Inputs& p;
  Ring ring;
  int row, column, from, count;

  // How many chunks are asked for at once; each later one waits until a stage falls free.
  __device__ __forceinline__ int early() const { return min(count, p.stages); }

  __device__ __forceinline__ void copy_weights(const Chunk& chunk, int stage) const {
    fm::barrier_expect(ring.full + stage * 8, GROUPS * kPixels + kWeights);
    fm::copy_weights(ring.weights + stage * kWeights, chunk.input.weights, ring.full + stage * 8,
                     chunk.channel, chunk.tap, column);
  }

  __device__ __forceinline__ void copy_pixels(const Chunk& chunk, int stage, int group, int3 position) const {
    const Input& in = chunk.input;
    const int down = in.across.quotient(chunk.tap), right = chunk.tap - down * static_cast<int>(in.across.number);
    fm::copy_pixels(ring.pixels + (stage * GROUPS + group) * kPixels, in.pixels, ring.full + stage * 8, chunk.channel,
                    position.x * in.stride - in.left, position.y * in.stride - in.left, position.z,
                    static_cast<uint16_t>(right), static_cast<uint16_t>(down));
  }

  // Column, row and image of a group's first position.
  __device__ __forceinline__ int3 position(int group) const {
    const unsigned first = row + group * kRows, area = p.height * p.width, image = first / area;
    const unsigned inside = first - image * area;
    const unsigned y = inside / p.width;
    return {static_cast<int>(inside - y * p.width), static_cast<int>(y), static_cast<int>(image)};
  }
};

// The warp that asks for weights, which are there before the kernel in front of this one has finished; and, as stages
// fall free, for all that comes later: a lane per group for its pixels.
template <int COLUMNS, int GROUPS>
__device__ __forceinline__ void ask(const Tile<COLUMNS, GROUPS>& tile) {
  const int lane = threadIdx.x % 32, early = tile.early();
  if (lane < early) tile.copy_weights(chunk_of(tile.p, tile.from + lane), lane);
  if (lane >= GROUPS) return;
  const int3 position = tile.position(lane);
  fm::wait_for_previous_grid();
  for (int i = early, stage = 0, phase = 0; i < tile.count; i++) {
    const Chunk chunk = chunk_of(tile.p, tile.from + i);
    fm::barrier_wait(tile.ring.empty + stage * 8, phase);
    if (lane == 0) tile.copy_weights(chunk, stage);
    tile.copy_pixels(chunk, stage, lane, position);
    if (++stage == tile.p.stages) stage = 0, phase ^= 1;
  }
}

// A group's first pixels, by all its four warps: to ask for one copy takes about 70 cycles.
template <int COLUMNS, int GROUPS>
__device__ __forceinline__ void ask_for_first_pixels(const Tile<COLUMNS, GROUPS>& tile, int group, int3 position) {
  const int number = threadIdx.x % kWarpgroup / 32 + threadIdx.x % 32 * (kWarpgroup / 32);
  if (number < tile.early()) tile.copy_pixels(chunk_of(tile.p, tile.from + number), number, group, position);
  __syncwarp();
}

// The four warps of a group multiply.
template <typename T, int COLUMNS, int GROUPS>
__device__ __forceinline__ void multiply_chunks(const Tile<COLUMNS, GROUPS>& tile, int group,
                                                float (&sums)[COLUMNS / 2]) {
  const Ring& ring = tile.ring;
  for (int i = 0, stage = 0, phase = 0, before = 0; i < tile.count; i++) {
    fm::barrier_wait(ring.full + stage * 8, phase);
    __syncwarp();
    fm::products_begin();
    const uint64_t a = fm::operand(ring.pixels + (stage * GROUPS + group) * tile.kPixels);
    const uint64_t b = fm::operand(ring.weights + stage * tile.kWeights);
#pragma unroll
    for (int k = 0; k < kDepth / 16; k++) fm::multiply<T, COLUMNS>(sums, a + 2 * k, b + 2 * k, i > 0 || k > 0);
    fm::products_commit();
    if (i > 0) {
      fm::products_wait<1>();  // the chunk before is done: its stage may be filled again
      if (threadIdx.x % 32 == 0) fm::barrier_arrive(ring.empty + before * 8);
    }
    before = stage;
    if (++stage == tile.p.stages) stage = 0, phase ^= 1;
  }
  fm::products_wait<0>();
  fm::keep(sums);
}

// Sends each block of the cluster the rows that it finishes: kRows / split each, one part per sender.
template <int COLUMNS>
__device__ __forceinline__ void exchange(const float (&sums)[COLUMNS / 2], fm::SharedAddress parts,
                                         fm::SharedAddress arrived, int own) {
  constexpr int kPitch = (COLUMNS + 8) * 4;
  const int lane = threadIdx.x % 32;
  const uint32_t rank = fm::cluster_rank();
  const bool odd = lane % 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
    const uint32_t owner = row / static_cast<unsigned>(own);
    const uint32_t barrier = fm::cluster_address(arrived, owner);
    const uint32_t to = fm::cluster_address(parts, owner) + (rank * own + row - owner * own) * kPitch +
                        (8 * odd + lane % 4 / 2 * 4) * 4;
    // Neighbouring lanes swap pairs, so that each sends four columns at a time: even ones of the first eight, odd ones
    // of the next.
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 2) {
      const float* low = sums + 4 * j + 2 * half;
      const float* high = low + 4;
      const float first = __shfl_xor_sync(~0u, odd ? low[0] : high[0], 1);
      const float second = __shfl_xor_sync(~0u, odd ? low[1] : high[1], 1);
      const float4 four = odd ? float4{first, second, high[0], high[1]} : float4{low[0], low[1], first, second};
      fm::store_cluster(to + 8 * j * 4, four, barrier);
    }
  }
  fm::barrier_wait(arrived, 0);
}

// The sums of a group's threads, row by row in shared memory, so that a thread can finish eight channels of a row.
template <int COLUMNS>
__device__ __forceinline__ void lay_out_rows(const float (&sums)[COLUMNS / 2], fm::SharedAddress rows) {
  constexpr int kPitch = (COLUMNS + 8) * 4;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4 + 8 * half;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      fm::store_shared(rows + row * kPitch + (8 * j + lane % 4 * 2) * 4,
                       float2{sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]});
    }
  }
}

// Eight sums of a row, those of the parts of a cluster's blocks in their order; a part has `own` rows.
template <int COLUMNS>
__device__ __forceinline__ void add_in_order(float (&total)[8], fm::SharedAddress parts, int own, int row, int count) {
#pragma unroll
  for (int i = 0; i < 8; i++) total[i] = 0.f;
#pragma unroll 2
  for (int part = 0; part < count; part++) {
    const fm::SharedAddress at = parts + (part * own + row) * ((COLUMNS + 8) * 4) + threadIdx.x % (COLUMNS / 8) * 32;
    const float4 low = fm::load_shared<float4>(at), high = fm::load_shared<float4>(at + 16);
    total[0] += low.x, total[1] += low.y, total[2] += low.z, total[3] += low.w;
    total[4] += high.x, total[5] += high.y, total[6] += high.z, total[7] += high.w;
  }
}

// The larger of each two 16-bit numbers; what is not a number loses.
template <typename T>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const Two found = __hmax2(*reinterpret_cast<const Two*>(&a), *reinterpret_cast<const Two*>(&b));
  return *reinterpret_cast<const uint32_t*>(&found);
}

// What a thread of a group finishes: eight channels, the same in each of its rows, which are those of so many turns.
template <typename T, int COLUMNS, bool SHARED>
struct Share {
  static constexpr int kEighths = COLUMNS / 8, kStep = kWarpgroup / kEighths;
  static constexpr int kTurns = kRows / (SHARED ? 2 : 1) / kStep;
  int first, turns;  // row of the first turn among the block's own, how many there are
  int64_t offset;    // in the output, of the first turn
  int64_t step;      // and between turns
  float bias[8];
  uint4 kept[kTurns];  // of the residual

  // The bias does not depend on kernels in front. `several`: where the block has fewer rows than a turn, several threads
  // share one.
  __device__ __forceinline__ Share(const Output<T>& p, int row, int column, int own, bool several = false)
      : first(threadIdx.x % kWarpgroup / kEighths % (several ? min(own, kStep) : kStep)),
        step(static_cast<int64_t>(kStep) * p.channels) {
    const int channel = column + threadIdx.x % kEighths * 8;
    const int left = channel < p.channels ? min(own, p.rows - row) - first : 0;
    turns = left > 0 ? (left + kStep - 1) / kStep : 0;
    offset = static_cast<int64_t>(row + first) * p.channels + channel;
    if (turns == 0) return;
    const float4 low = *reinterpret_cast<const float4*>(p.bias + channel);
    const float4 high = *reinterpret_cast<const float4*>(p.bias + channel + 4);
    bias[0] = low.x, bias[1] = low.y, bias[2] = low.z, bias[3] = low.w;
    bias[4] = high.x, bias[5] = high.y, bias[6] = high.z, bias[7] = high.w;
  }

  // Asked for in front of the products: their time is that of the way from memory.
  __device__ __forceinline__ void load_residual(const Output<T>& p) {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      kept[turn] = {};
      if (p.residual != nullptr && turn < turns) kept[turn] = fm::load_coherent(p.residual + offset + turn * step);
    }
  }

  // Adds the parts of `split` blocks of a turn.
  __device__ __forceinline__ void add_parts(float (&total)[8], fm::SharedAddress parts, int own, int split,
                                            int turn) const {
    add_in_order<COLUMNS>(total, parts, own, first + turn * kStep, SHARED ? split : 1);
  }

  // Eight results: sums, bias, residual, ReLU; or the residual behind it: max(x, 0) + more is max(x + more, more). The
  // larger of rounded numbers is the larger one rounded, and words take fewer registers.
  __device__ __forceinline__ uint4 result(const float (&total)[8], const uint4& residual, const Output<T>& p) const {
    const uint32_t words[4] = {residual.x, residual.y, residual.z, residual.w};
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 more = fm::unpack<T>(words[i]);
      const float x = total[2 * i] + bias[2 * i] + more.x, y = total[2 * i + 1] + bias[2 * i + 1] + more.y;
      packed[i] = fm::pack<T>(x, y);
      if (p.relu) packed[i] = larger<T>(packed[i], p.late ? words[i] : 0);
    }
    return {packed[0], packed[1], packed[2], packed[3]};
  }

  // Adds the parts of `split` blocks in their order, bias and residual, applies ReLU and stores. `also` gets the results
  // of all turns with their row among the block's own.
  template <typename Also>
  __device__ __forceinline__ void finish(const Output<T>& p, fm::SharedAddress parts, int own, int split,
                                         const Also& also) const {
    float total[kTurns][8] = {};
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      if (SHARED && turn >= turns) break;  // beyond the parts
      add_parts(total[turn], parts, own, split, turn);
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      const uint4 packed = result(total[turn], kept[turn], p);
      if (turn < turns) *reinterpret_cast<uint4*>(p.out + offset + turn * step) = packed;
      also(first + turn * kStep, packed);
    }
  }

  __device__ __forceinline__ void finish(const Output<T>& p, fm::SharedAddress parts, int own, int split) const {
    finish(p, parts, own, split, [](int, const uint4&) {});
  }
};

// Barriers of a block: one thread prepares them and announces what the other blocks of the cluster send.
__device__ __forceinline__ void prepare(const Inputs& p, const Ring& ring, int groups, fm::SharedAddress arrived,
                                        int bytes) {
  fm::prefetch_map(p.first.pixels);
  fm::prefetch_map(p.first.weights);
  if (p.second.depth > 0) {
    fm::prefetch_map(p.second.pixels);
    fm::prefetch_map(p.second.weights);
  }
  for (int i = 0; i < p.stages; i++) {
    fm::barrier_init(ring.full + i * 8, 1);
    fm::barrier_init(ring.empty + i * 8, groups * kWarpgroup / 32);
  }
  fm::barrier_init(arrived, 1);
  fm::barriers_ready();
  if (bytes > 0) fm::barrier_expect(arrived, bytes);
}

#endif

}  // namespace fm_convolution
