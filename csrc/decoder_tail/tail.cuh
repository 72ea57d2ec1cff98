// Everything of a narrow decoder layer behind its self-attention, for compute capability 9.0: 128 features, 8 heads of
// 16, up to 64 keys, hidden features in multiples of 64.
//
//   stream = tokens + attended Wo + bo                                 [rows, 128], float32 in registers from here on
//   stream += softmax(scale (norm(stream) Wq + bq) K) V Wc + bc        K, V: of the tile's sample, in shared memory
//   stream += relu(norm(stream) W1 + b1) W2 + b2                       64 hidden features at a time
//
// A group of four warps takes 64 rows of a sample through all of it. Rounded results stay in registers as the left
// operand of the next product; only weights, keys and values are in shared memory. The three square weights stay there,
// those of the feed-forward block come through a ring, by a warp of its own, and both groups of a block use what comes.
// That warp's group gives its registers to the others.
// A group goes through tiles that follow one another, mostly of one sample.
#pragma once

#include "attend.cuh"

namespace fm_tail {

constexpr int kSharedBytes = (kSquares * kSquare + kGroups * kMemory + kStages * kChunk) * kMatrix +
                             (1 + kGroups + 2 * kStages) * 8;

template <typename T>
struct Problem {
  fm::TensorMap squares[kSquares], expand, contract, keys, values;  // Wo, Wq, Wc; W1; W2
  const T *tokens, *attended;
  T* out;                                                           // [samples, queries, 128]
  const T *out_bias, *query_bias, *cross_bias, *expand_bias, *contract_bias;
  int64_t tokens_sample, tokens_row, attended_sample, attended_row;  // strides
  int queries, count;                                                // of a sample; count: of keys
  int chunks, tiles_of_sample, tiles;
  float scale, cross_epsilon, feed_forward_epsilon;
  bool constant_weights;  // the kernel in front does not write them
};

#ifdef FM_HOPPER

struct Places {
  fm::SharedAddress begin;

  __device__ __forceinline__ fm::SharedAddress square(int which) const { return begin + which * kSquare * kMatrix; }
  __device__ __forceinline__ fm::SharedAddress memory(int group) const {
    return begin + (kSquares * kSquare + group * kMemory) * kMatrix;
  }
  __device__ __forceinline__ fm::SharedAddress chunk(int stage) const {
    return begin + (kSquares * kSquare + kGroups * kMemory + stage * kChunk) * kMatrix;
  }
  __device__ __forceinline__ fm::SharedAddress weights_full() const { return chunk(kStages); }
  __device__ __forceinline__ fm::SharedAddress memory_full(int group) const { return weights_full() + (1 + group) * 8; }
  __device__ __forceinline__ fm::SharedAddress full(int stage) const { return memory_full(kGroups) + stage * 8; }
  __device__ __forceinline__ fm::SharedAddress empty(int stage) const { return full(kStages) + stage * 8; }
};

// The tiles of a group: from, to.
template <typename T>
__device__ __forceinline__ int2 tiles_of(const Problem<T>& p, int group) {
  const int64_t number = int64_t{blockIdx.x} * kGroups + group, all = int64_t{gridDim.x} * kGroups;
  return {static_cast<int>(p.tiles * number / all), static_cast<int>(p.tiles * (number + 1) / all)};
}

// How often a block goes through the feed-forward weights: for the group that has the most tiles.
template <typename T>
__device__ __forceinline__ int passes_of(const Problem<T>& p) {
  int most = 0;
  for (int group = 0; group < kGroups; group++) {
    const int2 tiles = tiles_of(p, group);
    most = max(most, tiles.y - tiles.x);
  }
  return most;
}

// The warp that brings weights.
template <typename T>
__device__ __forceinline__ void bring_weights(const Problem<T>& p, const Places& places) {
  const int lane = threadIdx.x % 32, passes = passes_of(p);
  if (!p.constant_weights) fm::wait_for_previous_grid();
  if (lane == 0) {
    fm::barrier_expect(places.weights_full(), kSquares * kSquare * kMatrix);
    for (int i = 0; i < kSquares * kSquare; i++) {
      const int which = i / kSquare, output = i % kSquare / kHalves, input = i % kHalves;
      fm::copy_weights(places.square(0) + i * kMatrix, p.squares[which], places.weights_full(), input * kDepth, 0,
                       output * kDepth);
    }
    for (int number = 0; number < passes * p.chunks; number++) {
      const int stage = number % kStages, chunk = number % p.chunks;
      if (number >= kStages) fm::barrier_wait(places.empty(stage), (number / kStages - 1) % 2);
      fm::barrier_expect(places.full(stage), kChunk * kMatrix);
      for (int half = 0; half < kHalves; half++) {
        const fm::SharedAddress to = places.chunk(stage) + half * kMatrix;
        fm::copy_weights(to, p.expand, places.full(stage), half * kDepth, 0, chunk * kDepth);
        fm::copy_weights(to + kHalves * kMatrix, p.contract, places.full(stage), chunk * kDepth, 0, half * kDepth);
      }
    }
  }
  __syncwarp();
}

// A tile of a group: rows of a sample from `row` on.
struct TailTile {
  int sample, row;
};

template <typename T, int TILES>
struct Group {
  const Problem<T>& p;
  Places places;
  int group;

  __device__ __forceinline__ int own_row() const { return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4; }

  // Two numbers of this thread's row (or the one 8 further) of a tile; 0 beyond the sample.
  __device__ __forceinline__ uint32_t two(const T* sample, int64_t stride, const TailTile& tile, bool later,
                                          int column) const {
    const int row = tile.row + own_row() + (later ? 8 : 0);
    if (row >= p.queries) return 0;
    return *reinterpret_cast<const uint32_t*>(sample + row * stride + column + own_column());
  }

  // Keys and values of another sample; all warps have read those before.
  __device__ __forceinline__ void bring_memory(int sample) const {
    fm::group_sync(1 + group);
    if (threadIdx.x % kWarpgroup == 0) {
      const fm::SharedAddress full = places.memory_full(group), to = places.memory(group);
      fm::barrier_expect(full, kMemory * kMatrix);
      for (int half = 0; half < kHalves; half++) {
        fm::copy_weights(to + half * kMatrix, p.keys, full, half * kDepth, 0, sample);
        fm::copy_weights(to + (kHalves + half) * kMatrix, p.values, full, half * kDepth, 0, sample);
      }
    }
    __syncwarp();
  }

  // tokens + attended Wo + bo.
  __device__ __forceinline__ void begin(Sums (&stream)[kHalves], const TailTile& tile) const {
    Held attended;
    const T* from = p.attended + tile.sample * p.attended_sample;
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) attended[k][i] = two(from, p.attended_row, tile, i % 2, 16 * k + i / 2 * 8);
    }
    from = p.tokens + tile.sample * p.tokens_sample;
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
#pragma unroll
      for (int i = 0; i < kDepth / 4; i++) {  // pairs: columns 8 (i / 2), row t or t + 8
        const float2 x = fm::unpack<T>(two(from, p.tokens_row, tile, i % 2, half * kDepth + i / 2 * 8));
        stream[half][2 * i] = x.x, stream[half][2 * i + 1] = x.y;
      }
    }
    add_bias(stream, p.out_bias);
    multiply_square<T>(stream, attended, places.square(0));
  }

  // Adds the cross-attention; `phase`: of the barrier of keys and values.
  __device__ __forceinline__ void cross(Sums (&stream)[kHalves], int phase) const {
    Held held;
    normalize<T>(held, stream, p.cross_epsilon);
    {
      Sums query[kHalves];
#pragma unroll
      for (int half = 0; half < kHalves; half++) begin_with(query[half], p.query_bias + half * kDepth);
      multiply_square<T>(query, held, places.square(1));
#pragma unroll
      for (int half = 0; half < kHalves; half++) round_to<T>(held + half * (kDepth / 16), query[half]);
    }
    fm::barrier_wait(places.memory_full(group), phase);
    __syncwarp();
#pragma unroll
    for (int head = 0; head < kHeads; head++) {
      const fm::SharedAddress keys = places.memory(group) + head / 4 * kMatrix;
      uint32_t found[4];
      attend<T, TILES>(found, held[head], keys, keys + kHalves * kMatrix, head % 4 * 2, p.count, p.scale);
#pragma unroll
      for (int i = 0; i < 4; i++) held[head][i] = found[i];
    }
    add_bias(stream, p.cross_bias);
    multiply_square<T>(stream, held, places.square(2));
  }

  __device__ __forceinline__ void release(int number) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) fm::barrier_arrive(places.empty(number % kStages));
  }

  __device__ __forceinline__ void wait_for_chunk(int number) const {
    fm::barrier_wait(places.full(number % kStages), number / kStages % 2);
    __syncwarp();
  }

  // Products with W1 of a chunk begin.
  __device__ __forceinline__ void expand(Sums& hidden, const Held& normed, int chunk, int number) const {
    wait_for_chunk(number);
    begin_with(hidden, p.expand_bias + chunk * kDepth);
    fm::products_begin();
    multiply_all<T>(hidden, normed, places.chunk(number % kStages));
    fm::products_commit();
  }

  // Products of 64 hidden features with W2 begin.
  __device__ __forceinline__ void contract(Sums (&stream)[kHalves], const uint32_t (&hidden)[kDepth / 16][4],
                                           int number) const {
    fm::products_begin();
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
      const uint64_t weights = fm::operand(places.chunk(number % kStages) + (kHalves + half) * kMatrix);
#pragma unroll
      for (int k = 0; k < kDepth / 16; k++) fm::multiply_held<T>(stream[half], hidden[k], weights + 2 * k);
    }
    fm::products_commit();
  }

  // Adds the feed-forward block, its bias too; `number`: of the first chunk among all that come through the ring.
  __device__ __forceinline__ void feed_forward(Sums (&stream)[kHalves], int number) const {
    Held normed;
    Sums sums;
    uint32_t hidden[kDepth / 16][4];
    normalize<T>(normed, stream, p.feed_forward_epsilon);
    add_bias(stream, p.contract_bias);
    expand(sums, normed, 0, number);
    fm::products_wait<0>();
    fm::keep(sums);
    round_to<T, true>(hidden, sums);
#pragma unroll 1
    for (int chunk = 1; chunk < p.chunks; chunk++, number++) {
      contract(stream, hidden, number);
      expand(sums, normed, chunk, number + 1);  // beside it
      fm::products_wait<1>();
#pragma unroll
      for (int half = 0; half < kHalves; half++) fm::keep(stream[half]);
      release(number);
      fm::products_wait<0>();
      fm::keep(sums);
      round_to<T, true>(hidden, sums);
    }
    contract(stream, hidden, number);
    fm::products_wait<0>();
#pragma unroll
    for (int half = 0; half < kHalves; half++) fm::keep(stream[half]);
    release(number);
  }

  __device__ __forceinline__ void store(const Sums (&stream)[kHalves], const TailTile& tile) const {
#pragma unroll
    for (int later = 0; later < 2; later++) {
      const int row = tile.row + own_row() + 8 * later;
      if (row >= p.queries) continue;
      T* const to = p.out + (static_cast<int64_t>(tile.sample) * p.queries + row) * kWidth + own_column();
#pragma unroll
      for (int j = 0; j < kWidth / 8; j++) {
        const float* two = stream[j / 8] + j % 8 * 4 + 2 * later;
        *reinterpret_cast<uint32_t*>(to + 8 * j) = fm::pack<T>(two[0], two[1]);
      }
    }
  }

  __device__ __forceinline__ void run() const {
    const int2 tiles = tiles_of(p, group);
    const int passes = passes_of(p);
    int sample = -1, phase = 1;
    fm::wait_for_previous_grid();
    fm::launch_dependents();  // not before: what is constant may have been written by any kernel but the last
    fm::barrier_wait(places.weights_full(), 0);
    __syncwarp();
#pragma unroll 1
    for (int pass = 0; pass < passes; pass++) {
      const int number = pass * p.chunks;
      if (tiles.x + pass >= tiles.y) {  // the other group has one tile more
        for (int chunk = 0; chunk < p.chunks; chunk++) wait_for_chunk(number + chunk), release(number + chunk);
        continue;
      }
      const int place = tiles.x + pass, own = place / p.tiles_of_sample;
      const TailTile tile{own, (place - own * p.tiles_of_sample) * kRows};
      if (own != sample) bring_memory(own), sample = own, phase ^= 1;
      Sums stream[kHalves];
      begin(stream, tile);
      cross(stream, phase);
      feed_forward(stream, number);
      store(stream, tile);
    }
  }
};

#endif

template <typename T, int TILES>
__global__ void __launch_bounds__(kThreads, 1) tail_kernel(const __grid_constant__ Problem<T> p) {
#ifdef FM_HOPPER
  const Places places{fm::shared_address(fm::dynamic_shared())};
  const int group = threadIdx.x / kWarpgroup;
  if (threadIdx.x == 0) {
    fm::barrier_init(places.weights_full(), 1);
    for (int i = 0; i < kGroups; i++) fm::barrier_init(places.memory_full(i), 1);
    for (int i = 0; i < kStages; i++) {
      fm::barrier_init(places.full(i), 1);
      fm::barrier_init(places.empty(i), kGroups * kWarpgroup / 32);
    }
    fm::barriers_ready();
  }
  __syncthreads();
  if (group == kGroups) {
    fm::give_registers<kFewRegisters>();
    if (threadIdx.x % kWarpgroup < 32) bring_weights(p, places);
  } else {
    fm::take_registers<kManyRegisters>();
    Group<T, TILES>{p, places, group}.run();
  }
#endif
}

}  // namespace fm_tail
