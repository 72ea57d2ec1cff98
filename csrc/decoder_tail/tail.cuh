// Everything of a narrow decoder layer behind its self-attention, for compute capability 9.0: 128 features, 8 heads of
// 16, up to 64 keys, hidden features in multiples of 64.
//
//   stream = tokens + attended Wo + bo                                 [rows, 128], float32 in registers from here on
//   stream += softmax(scale (norm(stream) Wq + bq) K) V Wc + bc        K, V: of the tile's sample, in shared memory
//   stream += relu(norm(stream) W1 + b1) W2 + b2                       64 hidden features at a time
//
// A group of four warps takes 64 rows of a sample through all of it. Rounded results stay in registers as the left
// operand of the next product; only weights, keys and values are in shared memory. Wo and Wq stay there; the others, 32
// KB at a time, come through a ring by a warp of its own, and both groups of a block use what comes. That warp's group
// gives its registers to the others.
// A group goes through tiles that follow one another, mostly of one sample.
#pragma once

#include "attend.cuh"

namespace fm_tail {

static_assert(kResident + 1 == kSquares, "Wo and Wq stay, Wc comes");
constexpr int kSharedBytes =
    ((kResident + kStages) * kPart + kGroups * kMemory) * kMatrix + (1 + kGroups + 2 * kStages) * 8;

template <typename T>
struct Problem {
  fm::TensorMap squares[kSquares], expand, contract, keys, values;  // Wo, Wq, Wc; W1; W2
  const T *tokens, *attended;
  T* out;                                                           // [samples, queries, 128]
  const T *out_bias, *query_bias, *cross_bias, *expand_bias, *contract_bias;
  int64_t tokens_sample, tokens_row, attended_sample, attended_row;  // strides
  int queries, count;                                                // of a sample; count: of keys
  int chunks, tiles_of_sample, tiles;
  float scale;        // of scores, not negative; as exponents of 2
  uint32_t opposite;  // the signs of two numbers, where scores are to be multiplied with less than 0
  float cross_epsilon, feed_forward_epsilon;
  bool constant_weights;  // the kernel in front does not write them
};

#ifdef FM_HOPPER

struct Places {
  fm::SharedAddress begin;

  __device__ __forceinline__ fm::SharedAddress square(int which) const { return begin + which * kPart * kMatrix; }
  __device__ __forceinline__ fm::SharedAddress part(int stage) const { return square(kResident + stage); }
  __device__ __forceinline__ fm::SharedAddress memory(int group) const {
    return part(kStages) + group * kMemory * kMatrix;
  }
  __device__ __forceinline__ fm::SharedAddress resident_full() const { return memory(kGroups); }
  __device__ __forceinline__ fm::SharedAddress memory_full(int group) const {
    return resident_full() + (1 + group) * 8;
  }
  __device__ __forceinline__ fm::SharedAddress full(int stage) const { return memory_full(kGroups) + stage * 8; }
  __device__ __forceinline__ fm::SharedAddress empty(int stage) const { return full(kStages) + stage * 8; }
};

// The tiles of a group: from, to.
template <typename T>
__device__ __forceinline__ int2 tiles_of(const Problem<T>& p, int group) {
  const int64_t number = int64_t{blockIdx.x} * kGroups + group, all = int64_t{gridDim.x} * kGroups;
  return {static_cast<int>(p.tiles * number / all), static_cast<int>(p.tiles * (number + 1) / all)};
}

// How often a block goes through the weights: for the group that has the most tiles.
template <typename T>
__device__ __forceinline__ int passes_of(const Problem<T>& p) {
  int most = 0;
  for (int group = 0; group < kGroups; group++) {
    const int2 tiles = tiles_of(p, group);
    most = max(most, tiles.y - tiles.x);
  }
  return most;
}

// How many parts of the weights come through the ring for a tile: the squares that do not stay, then hidden features.
template <typename T>
__device__ __forceinline__ int parts_of(const Problem<T>& p) {
  return kSquares - kResident + p.chunks;
}

// Starts the copy of a weight of 128 x 128.
template <typename T>
__device__ __forceinline__ void copy_square(const Problem<T>& p, int which, fm::SharedAddress to,
                                            fm::SharedAddress full) {
  for (int i = 0; i < kPart; i++) {
    const int input = i / kHalves, output = i % kHalves;
    fm::copy_weights(to + i * kMatrix, p.squares[which], full, input * kDepth, 0, output * kDepth);
  }
}

// The warp that brings weights.
template <typename T>
__device__ __forceinline__ void bring_weights(const Problem<T>& p, const Places& places) {
  const int lane = threadIdx.x % 32, passes = passes_of(p);
  if (!p.constant_weights) fm::wait_for_previous_grid();
  if (lane == 0) {
    fm::barrier_expect(places.resident_full(), kResident * kPart * kMatrix);
    for (int i = 0; i < kResident; i++) copy_square(p, i, places.square(i), places.resident_full());
    const int parts = parts_of(p);
    for (int number = 0; number < passes * parts; number++) {
      const int stage = number % kStages, square = kResident + number % parts, chunk = square - kSquares;
      const fm::SharedAddress to = places.part(stage), full = places.full(stage);
      if (number >= kStages) fm::barrier_wait(places.empty(stage), (number / kStages - 1) % 2);
      fm::barrier_expect(full, kPart * kMatrix);
      if (chunk < 0) {
        copy_square(p, square, to, full);
        continue;
      }
      for (int half = 0; half < kHalves; half++) {
        fm::copy_weights(to + half * kMatrix, p.expand, full, half * kDepth, 0, chunk * kDepth);
        fm::copy_weights(to + (kHalves + half) * kMatrix, p.contract, full, chunk * kDepth, 0, half * kDepth);
      }
    }
  }
  __syncwarp();
}

// A tile of a group: rows of a sample from `row` on.
struct TailTile {
  int sample, row;
};

template <typename T, int TILES, int WHOLE>
struct Group {
  const Problem<T>& p;
  Places places;
  int group;

  __device__ __forceinline__ TailTile tile_at(int place) const {
    const int sample = place / p.tiles_of_sample;
    return {sample, (place - sample * p.tiles_of_sample) * kRows};
  }

  __device__ __forceinline__ int own_row() const { return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4; }

  // This thread's first numbers of its two rows of a tile. Beyond the sample those of its last row: nobody stores them.
  __device__ __forceinline__ void own_rows(const T* (&rows)[2], const T* first, int64_t sample, int64_t row,
                                           const TailTile& tile) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      rows[i] = first + tile.sample * sample + min(tile.row + own_row() + 8 * i, p.queries - 1) * row + own_column();
    }
  }

  // Asks for a tile's rows, which the group will need next, to come to L2: two lines a thread.
  __device__ __forceinline__ void ask_for(const TailTile& tile) const {
    const int row = tile.row + threadIdx.x % kWarpgroup / 2, column = threadIdx.x % 2 * kDepth;
    if (row >= p.queries) return;
    fm::prefetch_l2(p.tokens + tile.sample * p.tokens_sample + row * p.tokens_row + column);
    fm::prefetch_l2(p.attended + tile.sample * p.attended_sample + row * p.attended_row + column);
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

  // Parts of the weights have numbers in the order in which they come, over all passes.
  __device__ __forceinline__ fm::SharedAddress part(int number) const { return places.part(number % kStages); }
  __device__ __forceinline__ void wait_for(int number) const {
    fm::barrier_wait(places.full(number % kStages), number / kStages % 2);
    __syncwarp();
  }
  __device__ __forceinline__ void release(int number) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) fm::barrier_arrive(places.empty(number % kStages));
  }

  // sums += what is held times a square weight.
  __device__ __forceinline__ void multiply_square(Stream& sums, const Held& held, fm::SharedAddress weights) const {
    fm::keep(sums);  // in registers before, not among products
    fm::products_begin();
    multiply_all<T>(sums, held, weights);
    fm::products_commit();
    fm::products_wait<0>();
    fm::keep(sums);
  }

  // tokens + attended Wo + bo.
  __device__ __forceinline__ void begin(Stream& stream, const TailTile& tile) const {
    Held attended;
    const T* rows[2];
    own_rows(rows, p.attended, p.attended_sample, p.attended_row, tile);
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        attended[k][i] = *reinterpret_cast<const uint32_t*>(rows[i % 2] + 16 * k + i / 2 * 8);
      }
    }
    own_rows(rows, p.tokens, p.tokens_sample, p.tokens_row, tile);
#pragma unroll
    for (int j = 0; j < kWidth / 8; j++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float2 two = load_two(rows[i] + 8 * j);
        stream[4 * j + 2 * i] = two.x, stream[4 * j + 2 * i + 1] = two.y;
      }
    }
    add_bias(stream, p.out_bias);
    fm::barrier_wait(places.resident_full(), 0);
    __syncwarp();
    multiply_square(stream, attended, places.square(0));
  }

  // Adds the cross-attention; `phase`: of the barrier of keys and values; `number`: of Wc's part.
  __device__ __forceinline__ void cross(Stream& stream, int phase, int number) const {
    Held held;
    normalize<T>(held, stream, p.cross_epsilon);
    {
      Stream query;
      begin_with(query, p.query_bias);
      multiply_square(query, held, places.square(1));
      round_to<T>(held, query);
    }
    fm::barrier_wait(places.memory_full(group), phase);
    __syncwarp();
    attend_all(held);
    add_bias(stream, p.cross_bias);
    wait_for(number);
    multiply_square(stream, held, part(number));
    release(number);
  }

  // Queries become what their heads attend to. The next head's scores are made beside the weights of this one.
  __device__ __forceinline__ void attend_all(Held& held) const {
    const fm::SharedAddress keys = own_keys(places.memory(group));
    const fm::SharedAddress values = own_values(places.memory(group) + kHalves * kMatrix);
    Scores<TILES> scores[2];
#pragma unroll
    for (int head = 0; head <= kHeads; head++) {
      if (head < kHeads) {
#pragma unroll
        for (int i = 0; i < 4; i++) held[head][i] ^= p.opposite;
        score<T, TILES>(scores[head % 2], held[head], head_at(keys, head));
      }
      if (head == 0) continue;
      const int now = head - 1;
      attend<T, TILES, WHOLE>(held[now], scores[now % 2], head_at(values, now), p.count, p.scale);
    }
  }

  // Products with W1 of a chunk begin.
  __device__ __forceinline__ void expand(Sums& hidden, const Held& normed, int chunk, int number) const {
    wait_for(number);
    begin_with(hidden, p.expand_bias + chunk * kDepth);
    fm::products_begin();
    multiply_all<T>(hidden, normed, part(number));
    fm::products_commit();
  }

  // Products of 64 hidden features with W2 begin.
  __device__ __forceinline__ void contract(Stream& stream, const uint32_t (&hidden)[kDepth / 16][4], int number) const {
    const uint64_t weights = fm::operand(part(number) + kHalves * kMatrix);
    fm::products_begin();
#pragma unroll
    for (int k = 0; k < kDepth / 16; k++) fm::multiply_held<T>(stream, hidden[k], weights + 2 * k);
    fm::products_commit();
  }

  // Adds the feed-forward block, its bias too; `number`: of its weights' first part.
  __device__ __forceinline__ void feed_forward(Stream& stream, int number) const {
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
      fm::keep(stream);
      release(number);
      fm::products_wait<0>();
      fm::keep(sums);
      round_to<T, true>(hidden, sums);
    }
    contract(stream, hidden, number);
    fm::products_wait<0>();
    fm::keep(stream);
    release(number);
  }

  __device__ __forceinline__ void store(const Stream& stream, const TailTile& tile) const {
#pragma unroll
    for (int later = 0; later < 2; later++) {
      const int row = tile.row + own_row() + 8 * later;
      if (row >= p.queries) continue;
      T* const to = p.out + (static_cast<int64_t>(tile.sample) * p.queries + row) * kWidth + own_column();
#pragma unroll
      for (int j = 0; j < kWidth / 8; j++) {
        const float* two = stream + 4 * j + 2 * later;
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
#pragma unroll 1
    for (int pass = 0; pass < passes; pass++) {
      const int parts = parts_of(p), number = pass * parts;
      if (tiles.x + pass >= tiles.y) {  // the other group has one tile more
        for (int i = 0; i < parts; i++) wait_for(number + i), release(number + i);
        continue;
      }
      const int place = tiles.x + pass;
      const TailTile tile = tile_at(place);
      if (tile.sample != sample) bring_memory(tile.sample), sample = tile.sample, phase ^= 1;
      Stream stream;
      begin(stream, tile);
      if (place + 1 < tiles.y) ask_for(tile_at(place + 1));
      cross(stream, phase, number);
      feed_forward(stream, number + 1);
      store(stream, tile);
    }
  }
};

#endif

// For up to 8 TILES keys, of which at least 8 WHOLE are there.
template <typename T, int TILES, int WHOLE>
__global__ void __launch_bounds__(kThreads, 1) tail_kernel(const __grid_constant__ Problem<T> p) {
#ifdef FM_HOPPER
  const Places places{fm::shared_address(fm::dynamic_shared())};
  const int group = threadIdx.x / kWarpgroup;
  if (threadIdx.x == 0) {
    fm::barrier_init(places.resident_full(), 1);
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
    Group<T, TILES, WHOLE>{p, places, group}.run();
  }
#endif
}

}  // namespace fm_tail
