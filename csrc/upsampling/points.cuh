// The product for three channels (points) and a batch that fills the GPU: a block keeps a part of the matrix.
//
// A block owns a range or a list of rows for good, and a lane one position (a row and a channel) at a time, whose
// entries it holds in registers. A list names the tokens of x that the rows of the block touch. The block goes through
// its share of the batch in packs of PACK elements: it copies those tokens, and no others, of the next pack to shared
// memory while it gathers from those of the last. A word of shared memory holds one channel of one token of all
// elements of the pack, so that a lane needs one read for an entry, and PACK multiply-adds.
//
// fastmetro_kernels/points.py decides once per matrix who owns what and where a token lies, so that lanes which are
// served at the same time rarely meet in a bank.
#pragma once

#include "kernels.cuh"

namespace fm_upsampling {

constexpr int kPoint = 3;         // channels
constexpr int kZeroPlaces = 8;   // which slots without an entry read, one in every bank
constexpr int kPointRows = 10;   // of a warp, where rows have any length
constexpr int kPointSlots = 16;  // entries of a position that a lane holds there, at most
constexpr uint32_t kNoPointRow = 0xffffffffu;
constexpr uint32_t kStageBytes = 48 * 1024;  // of a pack in shared memory at most

// Of a block at most, so that there are registers for what a thread holds. Where blocks have one pack, two of half the
// size fit a multiprocessor: the next kernel can start up beside this one.
constexpr int point_threads(int slots, int pack, bool one) {
  if (one) return slots == 3 || pack <= 4 ? 1024 : 768;
  return slots == 3 ? 896 : pack <= 4 ? 640 : 512;
}

// Words that a thread copies of a pack, at most.
template <int LENGTH>
constexpr int kPointCopies = LENGTH == 3 ? 3 : 4;

// One cut of the matrix; the words of block b begin at tables + b * block_words.
//
//   [1]             places that the block copies to, a multiple of 32
//   [warps]         slots that a warp uses | lanes that share a position << 8    } not where rows have three
//   [warps][10]     the rows of a warp, or kNoPointRow                           } entries: there they are in order
//   [places]        the token that goes to each place
//   of each warp:
//     [slots][rows] word of the first channel of an entry's token: 3 * place
//     [slots][rows] its value, a float
//
// Slots without an entry have the value 0 and one of the kZeroPlaces places behind `places`, which hold zeros. Where
// lanes share positions, row r of n and part q of them have column q * n + r.
struct Points {
  const uint32_t* tables;
  int32_t block_words, block_rows, places;
  int32_t packs;  // of PACK batch elements, per block
};

// Which of 32 neighbouring positions a lane has. 8 lanes, which shared memory serves at a time, have one channel of 8
// rows, because these often share a token; the last 8 have what is left.
__device__ __forceinline__ uint32_t position_of_lane(uint32_t lane) {
  return lane < 8 * kPoint ? lane / 8 + lane % 8 * kPoint : lane;
}

__device__ __forceinline__ uint32_t lane_of_position(uint32_t position) {
  return position < 8 * kPoint ? position / kPoint + position % kPoint * 8 : position;
}

// Keeps the compiler from making a number anew, from others, wherever it is used.
__device__ __forceinline__ void keep(uint32_t& number) { asm volatile("" : "+r"(number)); }

// Likewise a pointer, of which the compiler then has to be told that it still leads to global memory.
template <typename T>
__device__ __forceinline__ void keep(T*& pointer) {
  asm volatile("" : "+l"(pointer));
#ifndef FM_EMULATED
  __builtin_assume(__isGlobal(pointer));
#endif
}

// `count` times `bytes` behind a pointer: one instruction if the compiler knows neither.
template <typename T>
__device__ __forceinline__ T* behind(T* start, uint32_t count, uint32_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(start) + static_cast<uint64_t>(count) * bytes);
}

// Where PACK batch elements begin, from element `first` on. Elements beyond `last` are that one again: they are copied,
// computed and written a second time.
template <typename T, int PACK>
struct Elements {
  T* start;
  uint32_t stride_bytes, first, last;

  __device__ __forceinline__ void find(T* (&elements)[PACK]) const {
#pragma unroll
    for (uint32_t i = 0; i < PACK; ++i) {
      uint32_t stride = stride_bytes;
      keep(stride);
      elements[i] = behind(start, min(first + i, last), stride);
      keep(elements[i]);
    }
  }
};

// The words that a thread copies: neighbours go to neighbouring places.
template <typename T, int PACK, int COPIES>
struct Copier {
  uint32_t from[COPIES];  // offset in a batch element of x
  Pack<T, PACK> items[COPIES];
  fm::SharedAddress to;
  uint32_t item_bytes;
  int rounds;  // of this warp

  __device__ __forceinline__ Copier(const Problem<T>& p, const uint32_t* tokens, uint32_t places)
      : to(fm::shared_address(fm::dynamic_shared()) + threadIdx.x * static_cast<uint32_t>(sizeof(Pack<T, PACK>))),
        item_bytes(sizeof(T)),
        rounds(0) {
    keep(to);
    keep(item_bytes);
#pragma unroll
    for (int k = 0; k < COPIES; ++k) {
      const uint32_t word = threadIdx.x + k * blockDim.x;
      const bool has = word < places * kPoint;  // for all lanes of the warp or for none
      const uint32_t token = has ? __ldg(tokens + word / kPoint) : 0;
      from[k] = token * static_cast<uint32_t>(p.token_stride) + word % kPoint * static_cast<uint32_t>(p.channel_stride);
      rounds += has;
    }
  }

  __device__ __forceinline__ void fetch(const Elements<const T, PACK>& elements) {
    const T* x[PACK];
    elements.find(x);
#pragma unroll
    for (int k = 0; k < COPIES; ++k) {
      if (k >= rounds) break;
#pragma unroll
      for (int i = 0; i < PACK; ++i) items[k].item[i] = *behind(x[i], from[k], item_bytes);
    }
  }

  template <int STAGE>
  __device__ __forceinline__ void put() const {
#pragma unroll
    for (int k = 0; k < COPIES; ++k) {
      if (k >= rounds) break;
      fm::store_shared(to + k * blockDim.x * static_cast<uint32_t>(sizeof(items[k])) + STAGE * kStageBytes, items[k]);
    }
  }
};

// COUNT entries from number `start` on, all read before the first of them is used; those of one position go to sums
// 0, 1..., OWN of them, in turn.
template <int COUNT, int OWN, typename T, int PACK, int HELD>
__device__ __forceinline__ void add_entries(const uint32_t (&entries)[HELD], const float (&values)[HELD], int start,
                                            uint32_t stage, float (&sums)[OWN][PACK]) {
  Pack<T, PACK> packs[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) packs[k] = fm::load_shared<Pack<T, PACK>>(entries[start + k] + stage);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
      float& sum = sums[(start + k) % OWN][i];
      sum = fmaf(values[start + k], to_float(packs[k].item[i]), sum);
    }
  }
}

// Three positions, 32 apart, of three entries each; `room` is how many positions the block has from the first one on.
template <int STAGE, typename T, int PACK>
__device__ __forceinline__ void gather_points(const uint32_t (&entries)[9], const float (&values)[9],
                                              const Elements<T, PACK>& elements, int room) {
  T* out[PACK];
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    float sums[1][PACK] = {};
    add_entries<3, 1, T>(entries, values, 3 * s, STAGE * kStageBytes, sums);
    if (s == 0) elements.find(out);
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
      if (32 * s < room) out[i][32 * s] = from_float<T>(sums[0][i]);
    }
  }
}

// One position, whose entries SPLIT lanes share. Sums are taken in the order of add_row: PARTS parts, of which this lane
// has every SPLIT-th, are added up in a tree. All lanes of the warp must take part.
template <int STAGE, int PARTS, int SPLIT, int AT_ONCE, int SLOTS, typename T, int PACK>
__device__ __forceinline__ void gather_shared_point(const uint32_t (&entries)[SLOTS], const float (&values)[SLOTS],
                                                    int used, const Elements<T, PACK>& elements, bool writes) {
  constexpr int own = PARTS / SPLIT;
  float sums[own][PACK] = {};
#pragma unroll
  for (int k = 0; k < SLOTS; k += AT_ONCE) {
    if (k >= used) break;  // slots between `used` and the next multiple of AT_ONCE read zeros
    add_entries<AT_ONCE, own, T>(entries, values, k, STAGE * kStageBytes, sums);
  }
#pragma unroll
  for (int step = own / 2; step > 0; step /= 2) {
#pragma unroll
    for (int a = 0; a < step; ++a) {
#pragma unroll
      for (int i = 0; i < PACK; ++i) sums[a][i] += sums[a + step][i];
    }
  }
#pragma unroll
  for (int step = SPLIT / 2; step > 0; step /= 2) {
    // Only what the first lane of a position ends up with matters.
    const uint32_t position = position_of_lane(threadIdx.x % 32) + step * (kPointRows / SPLIT) * kPoint;
    const int other = static_cast<int>(lane_of_position(position % 32));
#pragma unroll
    for (int i = 0; i < PACK; ++i) sums[0][i] += __shfl_sync(0xffffffffu, sums[0][i], other);
  }
  if (!writes) return;
  T* out[PACK];
  elements.find(out);
#pragma unroll
  for (int i = 0; i < PACK; ++i) *out[i] = from_float<T>(sums[0][i]);
}

// What a lane holds of the matrix, and what it makes of a pack. LENGTH 3, or less: 32 rows of a warp are in the order of memory, so
// a lane has three positions, 32 apart; else it has one. PARTS: lanes that would share a row in gather_kernel; they
// determine the order of the sums.
template <int LENGTH, int PARTS, int SLOTS, int WORD>
struct PointLane {
  static constexpr bool threes = LENGTH == 3;
  static constexpr int rows = threes ? 32 : kPointRows, held = (threes ? 3 : 1) * SLOTS;
  static constexpr int kIdle = -32;  // less room than a lane of a warp with rows may have

  uint32_t entries[held];  // addresses in the first stage
  float values[held];
  uint32_t first;   // where the first position lies in an element of out
  int room;         // positions that the block has from there on
  int used, split;  // entries of a position, lanes of a position

  // `table` of the block, `own` of the warp.
  __device__ __forceinline__ PointLane(const uint32_t* table, const uint32_t* own, const Points& s, int64_t all_rows)
      : used(SLOTS), split(1) {
    const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Lanes that have none do as the last one does, so that they read nothing else.
    const uint32_t position = min(position_of_lane(lane), static_cast<uint32_t>(rows * kPoint - 1));
#pragma unroll
    for (int k = 0; k < held; ++k) {
      const uint32_t at = position + 32 * (k / SLOTS);
      const uint32_t* const word = own + k % SLOTS * rows + at / kPoint;
      entries[k] = fm::shared_address(fm::dynamic_shared()) + (__ldg(word) + at % kPoint) * WORD;
      keep(entries[k]);
      values[k] = __uint_as_float(__ldg(word + SLOTS * rows));
    }
    if constexpr (threes) {
      const uint32_t begin = blockIdx.x * s.block_rows + warp * rows;
      const int64_t end = min(static_cast<int64_t>(s.block_rows) * (blockIdx.x + 1), all_rows);
      first = begin * kPoint + position;
      room = begin < end ? static_cast<int>(end * kPoint - first) : kIdle;
    } else {
      const uint32_t word = __ldg(table + 1 + warp);
      const uint32_t row = __ldg(table + 1 + warps + warp * rows + position / kPoint);
      used = word & 0xffu;
      split = word >> 8;
      first = row * kPoint + position % kPoint;
      room = row != kNoPointRow && position == position_of_lane(lane);
    }
  }

  // AT_ONCE: entries of a position that are read before the first of them is used, where rows have any length.
  template <int STAGE, int AT_ONCE, typename T, int PACK>
  __device__ __forceinline__ void gather(const Elements<T, PACK>& out) const {
    if constexpr (threes) {
      if (room > kIdle) gather_points<STAGE>(entries, values, out, room);
    } else if (split == 1) {
      gather_shared_point<STAGE, PARTS, 1, AT_ONCE>(entries, values, used, out, room > 0);
    } else if (PARTS > 1 && split == 2) {
      gather_shared_point<STAGE, PARTS, PARTS < 2 ? 1 : 2, AT_ONCE>(entries, values, used, out, room > 0);
    } else {
      gather_shared_point<STAGE, PARTS, PARTS, AT_ONCE>(entries, values, used, out, room > 0);
    }
  }
};

// ONE: every block has one pack only.
template <typename T, int PACK, int LENGTH, int PARTS, int SLOTS, bool ONE>
__global__ void __launch_bounds__(point_threads(SLOTS, PACK, ONE)) points_kernel(const Problem<T> p, const Points s) {
  fm::launch_dependents();  // they wait for all of this kernel before they touch anything but tables
  using Word = Pack<T, PACK>;
  using Lane = PointLane<LENGTH, PARTS, SLOTS, sizeof(Word)>;
  const uint32_t* const table = s.tables + static_cast<int64_t>(blockIdx.x) * s.block_words;
  const uint32_t* const tokens = table + 1 + (Lane::threes ? 0 : blockDim.x / 32 * (1 + Lane::rows));

  // The matrix is constant, so this need not wait for the kernel before.
  Copier<T, PACK, kPointCopies<LENGTH>> copier(p, tokens, __ldg(table));
  const Lane lane(table, tokens + s.places + 2 * SLOTS * Lane::rows * (threadIdx.x / 32), s, p.rows);
  constexpr uint32_t zeros = kZeroPlaces * kPoint;
  for (uint32_t i = threadIdx.x; i < (ONE ? 1 : 2) * zeros; i += blockDim.x) {
    const uint32_t word = s.places * kPoint + i % zeros;
    const uint32_t offset = i / zeros * kStageBytes + word * static_cast<uint32_t>(sizeof(Word));
    fm::store_shared(fm::shared_address(fm::dynamic_shared()) + offset, Word{});
  }
  fm::wait_for_previous_grid();

  uint32_t element = blockIdx.y * s.packs * PACK;
  const uint32_t end = min(element + s.packs * PACK, static_cast<uint32_t>(p.batch));
  T* out = p.out + lane.first;
  keep(out);
  const uint32_t x_stride = static_cast<uint32_t>(p.batch_stride * sizeof(T));
  const uint32_t out_stride = static_cast<uint32_t>(p.rows * kPoint * sizeof(T));
  const auto fetch = [&](uint32_t from) { copier.fetch({p.x, x_stride, from, end - 1}); };
  const auto gather = [&]<int STAGE>(std::integral_constant<int, STAGE>) {
    lane.template gather<STAGE, ONE && PACK <= 4 ? 4 : 2>(Elements<T, PACK>{out, out_stride, element, end - 1});
  };
  fetch(element);
  copier.template put<0>();
  __syncthreads();
  if constexpr (ONE) {
    gather(std::integral_constant<int, 0>());
    return;
  }
  // One pack, and whether there is another.
  const auto step = [&]<int STAGE>(std::integral_constant<int, STAGE> stage) {
    const bool more = element + PACK < end;
    if (more) fetch(element + PACK);
    gather(stage);
    if (!more) return false;
    copier.template put<1 - STAGE>();
    __syncthreads();
    element += PACK;
    return true;
  };
  while (step(std::integral_constant<int, 0>()) && step(std::integral_constant<int, 1>())) {
  }
}

}  // namespace fm_upsampling
