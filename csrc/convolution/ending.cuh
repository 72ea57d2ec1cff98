// The end of a residual block in one kernel: a 3 x 3 convolution of 64 channels, the pointwise one behind it that widens
// to 256, with the shortcut, and the next block's first, which narrows to 64 or 128. For compute capability 9.0.
//
// In a backbone's first stage memory is what these layers wait for, once there are many images: as three kernels they
// write and read both narrow results and read the wide one again. Here the results between them stay in the
// multiprocessor. A group of four warps makes 8 x 8 positions of an image at a time, the 64 rows of a product:
//
//   pixels, 10 x 10 of 64 channels --9 taps--> sums -> bias, ReLU, rounded: registers, the next product's left operand
//   for each 64 of the 256 wide channels:  --> sums -> bias, shortcut, ReLU, rounded: in place of the shortcut in shared
//   memory, from where the copy engine stores it, and where it is an operand --> sums of the narrow channels
//
// All weights stay in shared memory, and blocks go from tile to tile. While a tile is made, the copy engine brings the
// next one's pixels and shortcut. Positions outside the image are zeros when read, and are not stored.
#pragma once

#include "tile.cuh"

namespace fm_convolution {

// A residual is added; the same, and the next block's first convolution, to 64 or to 128 channels; or that to 64, and the
// shortcut is a pointwise convolution of a second input.
enum Ending { kResidual, kResidualNext, kResidualTwice, kSecondNext };

constexpr int kSide = 8, kHalo = kSide + 2;  // positions of a tile down and across, and with their neighbours
constexpr int kParts = 4;                    // of 64 wide channels
constexpr int kEndingTaps = 9, kEndingGroups = 2;
constexpr int kMatrix = kRows * kDepth * 2;  // bytes of the weights of a tap or part, or of a tile's 64 channels
constexpr int kHaloRow = kHalo * kDepth * 2, kHaloBytes = kHalo * kHaloRow;
constexpr int kHaloPlace = (kHaloBytes + 1023) / 1024 * 1024;  // a group's barriers lie in what is left

// Of 64 channels of the tile: a residual's four, in place of which the results come. Where weights leave no room for them
// two, which results pass in turn; then the residual comes to registers, and the second input through one of the two.
__host__ __device__ constexpr bool ending_in_place(Ending ending) { return ending <= kResidualNext; }
__host__ __device__ constexpr int ending_buffers(Ending ending) { return ending_in_place(ending) ? kParts : 2; }
__host__ __device__ constexpr int ending_group_bytes(Ending ending) {
  return kHaloPlace + ending_buffers(ending) * kMatrix;
}
__host__ __device__ constexpr int ending_matrices(Ending ending) {
  return kEndingTaps + kParts * (ending == kResidual ? 1 : ending == kResidualNext ? 2 : 3);
}
constexpr int ending_shared_bytes(Ending ending) {
  return ending_matrices(ending) * kMatrix + kEndingGroups * ending_group_bytes(ending);
}

struct EndingProblem {
  fm::TensorMap pixels, weights, last_weights, next_weights, second_weights;
  fm::TensorMap shortcut, wide, narrow;  // shortcut: the residual or the second input
  const float *bias, *last_bias, *next_bias;
  const void* residual;     // [images, height, width, 256] of kResidualTwice
  int height, width;        // of an image
  int down, across, tiles;  // tiles of an image, and of all
};

#ifdef FM_HOPPER

struct EndingTile {
  int x, y, image;
};

__device__ __forceinline__ EndingTile ending_tile(const EndingProblem& p, int number) {
  const unsigned row = static_cast<unsigned>(number) / p.across, image = row / p.down;
  return {static_cast<int>(number - row * p.across) * kSide, static_cast<int>(row - image * p.down) * kSide,
          static_cast<int>(image)};
}

// Where a group's pixels and buffers lie, and what arrives in them. A buffer holds 64 channels of the tile.
struct EndingPlaces {
  fm::SharedAddress pixels;

  __device__ __forceinline__ fm::SharedAddress buffer(int number) const {
    return pixels + kHaloPlace + number * kMatrix;
  }
  __device__ __forceinline__ fm::SharedAddress pixels_full() const { return pixels + kHaloBytes; }
  __device__ __forceinline__ fm::SharedAddress buffer_full(int number) const { return pixels + kHaloBytes + 8 + 8 * number; }
  __device__ __forceinline__ fm::SharedAddress weights_full() const { return pixels + kHaloBytes + 8 + 8 * kParts; }

  __device__ __forceinline__ void copy_pixels(const EndingProblem& p, const EndingTile& tile) const {
    fm::barrier_expect(pixels_full(), kHaloBytes);
    fm::copy_box(pixels, p.pixels, pixels_full(), 0, tile.x - 1, tile.y - 1, tile.image);
  }
  // 64 channels of the residual, or the second input's.
  __device__ __forceinline__ void copy_shortcut(const EndingProblem& p, const EndingTile& tile, int part, int number) const {
    fm::barrier_expect(buffer_full(number), kMatrix);
    fm::copy_box(buffer(number), p.shortcut, buffer_full(number), part * kDepth, tile.x, tile.y, tile.image);
  }
};

// By the first warp of the block: all weights, a lane for each of their matrices.
template <Ending ENDING>
__device__ __forceinline__ void copy_all_weights(const EndingProblem& p, fm::SharedAddress weights, fm::SharedAddress full) {
  constexpr int kAll = ending_matrices(ENDING);
  const int lane = threadIdx.x, kind = (lane - kEndingTaps) / kParts, part = (lane - kEndingTaps) % kParts;
  if (lane == 0) fm::barrier_expect(full, kAll * kMatrix);
  __syncwarp();
  const fm::SharedAddress to = weights + lane * kMatrix;
  if (lane < kEndingTaps) fm::copy_weights(to, p.weights, full, 0, lane, 0);
  else if (lane < kAll && kind == 0) fm::copy_weights(to, p.last_weights, full, 0, 0, part * kDepth);
  else if (lane < kAll && ENDING == kResidualTwice) {
    const int half = (lane - kEndingTaps - kParts) % 2, chunk = (lane - kEndingTaps - kParts) / 2;
    fm::copy_weights(to, p.next_weights, full, chunk * kDepth, 0, half * kDepth);
  } else if (lane < kAll && kind == 1) fm::copy_weights(to, p.next_weights, full, part * kDepth, 0, 0);
  else if (lane < kAll) fm::copy_weights(to, p.second_weights, full, 0, 0, part * kDepth);
  __syncwarp();
}

// Sums begin with their column's bias.
template <int COUNT>
__device__ __forceinline__ void begin_with(float (&sums)[COUNT], const float* bias) {
#pragma unroll
  for (int j = 0; j < COUNT / 4; j++) {
    const float2 two = *reinterpret_cast<const float2*>(bias + 8 * j + threadIdx.x % 4 * 2);
    sums[4 * j] = sums[4 * j + 2] = two.x;
    sums[4 * j + 1] = sums[4 * j + 3] = two.y;
  }
}

// Sums of 64 or 128 channels += rows of 64 numbers in shared memory, 8 of them every `group` bytes, times weights.
template <typename T, int COUNT>
__device__ __forceinline__ void multiply_rows(float (&sums)[COUNT], fm::SharedAddress rows, int group,
                                              fm::SharedAddress weights) {
  const uint64_t a = fm::operand(rows, group), b = fm::operand(weights);
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) fm::multiply<T, 2 * COUNT>(sums, a + 2 * k, b + 2 * k, 1);
}

// The 3 x 3 convolution with ReLU, rounded, as the left operand of a product.
template <typename T>
__device__ __forceinline__ void make_middle(uint32_t (&middle)[kDepth / 16][4], const EndingProblem& p,
                                            const EndingPlaces& places, fm::SharedAddress weights) {
  float sums[kDepth / 2];
  begin_with(sums, p.bias);
  fm::products_begin();
#pragma unroll
  for (int tap = 0; tap < kEndingTaps; tap++) {
    multiply_rows<T>(sums, places.pixels + (tap / 3 * kHalo + tap % 3) * kDepth * 2, kHaloRow, weights + tap * kMatrix);
  }
  fm::products_commit();
  fm::products_wait<0>();
  fm::keep(sums);
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      middle[k][i] = larger<T>(fm::pack<T>(sums[8 * k + 2 * i], sums[8 * k + 2 * i + 1]), 0);
    }
  }
}

// Where this thread's row of the 8 x 8 matrices lies in a buffer, in the copy engine's swizzle; for the k-th 16 channels
// bits 5 and 6 are flipped by k.
__device__ __forceinline__ uint32_t matrix_row() {
  const int lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
  return row * kDepth * 2 + ((lane / 16) ^ (row % 8)) * 16;
}

// A thread's numbers of 64 channels of the tile: of the k-th 16 those of its rows t and t + 8 of the 16 of its warp, t its
// lane / 4, columns 2 (lane % 4) and the next, and the same of columns 8 further. So a product takes its left operand.
using Held = uint32_t[kDepth / 16][4];

__device__ __forceinline__ void hold_rows(Held& held, fm::SharedAddress buffer) {
  const fm::SharedAddress row = buffer + matrix_row();
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) fm::load_matrices(held[k], row ^ (32 * k));
}

// 64 channels of a tile: the sums (from the `from`-th of a thread's on), with what is held added, ReLU, rounded, to a buffer.
template <typename T, int COUNT>
__device__ __forceinline__ void finish_channels(const float (&sums)[COUNT], const Held* held, fm::SharedAddress buffer,
                                                int from = 0) {
  const fm::SharedAddress row = buffer + matrix_row();
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 more = held != nullptr ? fm::unpack<T>((*held)[k][i]) : float2{};
      const float *const two = sums + from + 8 * k + 2 * i;
      packed[i] = larger<T>(held != nullptr ? fm::pack<T>(two[0] + more.x, two[1] + more.y) : fm::pack<T>(two[0], two[1]), 0);
    }
    fm::store_matrices(row ^ (32 * k), packed);
  }
}

template <typename T>
__device__ __forceinline__ void multiply_held_rows(float (&sums)[kDepth / 2], const Held& held,
                                                   fm::SharedAddress weights) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) fm::multiply_held<T>(sums, held[k], fm::operand(weights) + 2 * k);
}

// The residual of kResidualTwice passes registers on its way to a buffer, which is free only just before: a thread's 16
// bytes of each 16 positions, eight threads to a position.
template <typename T>
struct EndingResidual {
  static constexpr int kPieces = kRows / 16;
  using Pieces = uint4[kPieces];
  const T* first;  // of the first 16 positions; each later 16 are two rows of the image further
  int64_t step;
  int rows;  // of the tile in the image, from that position on; 0 where its column is outside

  __device__ __forceinline__ EndingResidual(const EndingProblem& p, const EndingTile& tile) {
    const int thread = threadIdx.x % kWarpgroup, x = tile.x + thread / 8 % kSide, y = tile.y + thread / 64;
    const int64_t place = (static_cast<int64_t>(tile.image) * p.height + y) * p.width + x;
    first = static_cast<const T*>(p.residual) + place * kParts * kDepth + thread % 8 * 8;
    step = static_cast<int64_t>(2) * p.width * kParts * kDepth;
    rows = x < p.width ? p.height - y : 0;
  }

  __device__ __forceinline__ void load(Pieces& pieces, int part) const {
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      pieces[i] = {};
      if (2 * i < rows) pieces[i] = fm::load_coherent(first + i * step + part * kDepth);
    }
  }

  static __device__ __forceinline__ void store(const Pieces& pieces, fm::SharedAddress buffer) {
    const int row = threadIdx.x % kWarpgroup / 8;
    const fm::SharedAddress to = buffer + row * kDepth * 2 + ((threadIdx.x ^ row) % 8) * 16;
#pragma unroll
    for (int i = 0; i < kPieces; i++) fm::store_shared(to + i * 16 * kDepth * 2, pieces[i]);
  }
};

// One group of a block at its tiles. Results leave by its first thread, which also asks for what comes.
template <typename T, Ending ENDING>
struct EndingGroup {
  static constexpr bool kHasNext = ENDING != kResidual, kHasSecond = ENDING == kSecondNext;
  static constexpr bool kTwice = ENDING == kResidualTwice, kInPlace = ending_in_place(ENDING);
  using Pieces = typename EndingResidual<T>::Pieces;
  static constexpr int kNarrow = kTwice ? kDepth : kDepth / 2;  // a thread's narrow sums
  const EndingProblem& p;
  EndingPlaces places;
  fm::SharedAddress weights;
  int group;

  __device__ __forceinline__ bool leads() const { return threadIdx.x % kWarpgroup == 0; }
  __device__ __forceinline__ fm::SharedAddress last(int part) const { return weights + (kEndingTaps + part) * kMatrix; }
  __device__ __forceinline__ fm::SharedAddress next(int part) const { return last(kParts + part * (kTwice ? 2 : 1)); }
  __device__ __forceinline__ fm::SharedAddress second_weights(int part) const { return last(2 * kParts + part); }
  // The buffer of a part's results. The second input is in buffer 0, which results pass once it is in registers.
  static __device__ __forceinline__ int buffer_of(int part) { return kInPlace ? part : (part + 1) % 2; }

  __device__ __forceinline__ void ask_for_first(const EndingTile& tile) const {
    places.copy_pixels(p, tile);
    if constexpr (kHasSecond) places.copy_shortcut(p, tile, 0, 0);
    if constexpr (kInPlace) for (int part = 0; part < kParts - 1; part++) places.copy_shortcut(p, tile, part, part);
  }

  // Behind it all warps may write to the buffer that is sent behind the last barrier but one, or read no more what they
  // read in front of it.
  __device__ __forceinline__ void stores_left_and_sync() const {
    if (leads()) fm::stores_wait_read<0>();
    __syncwarp();
    fm::group_sync(1 + group);
  }

  // The results of a part leave. In place: what the part in front held is then free, once it has left, for what comes
  // there, three parts later.
  __device__ __forceinline__ void send(const EndingTile& tile, const EndingTile& following, bool more, int part) const {
    fm::store_box(p.wide, places.buffer(buffer_of(part)), part * kDepth, tile.x, tile.y, tile.image);
    fm::stores_commit();
    if (part == 0 && more) places.copy_pixels(p, following);
    if constexpr (kInPlace) {
      fm::stores_wait_read<1>();
      if (part == 0) places.copy_shortcut(p, tile, kParts - 1, kParts - 1);
      else if (more) places.copy_shortcut(p, following, part - 1, part - 1);
    }
  }

  // 64 of the wide channels. `second`: the second input, if there is one; `pieces`: of the residual of kResidualTwice.
  __device__ __forceinline__ void make_part(const Held& middle, const Held& second, const Pieces& pieces,
                                            float (&narrow)[kNarrow], int part, int phase) const {
    float sums[kDepth / 2];
    const fm::SharedAddress buffer = places.buffer(buffer_of(part));
    if constexpr (kTwice) EndingResidual<T>::store(pieces, buffer);
    begin_with(sums, p.last_bias + part * kDepth);
    fm::products_begin();
    multiply_held_rows<T>(sums, middle, last(part));
    if constexpr (kHasSecond) multiply_held_rows<T>(sums, second, second_weights(part));
    fm::products_commit();
    fm::products_wait<0>();  // the narrow product of the part in front as well: its buffer may be filled again
    fm::keep(sums);
    if constexpr (kHasNext) fm::keep(narrow);
    Held residual;
    if constexpr (kInPlace) {
      fm::barrier_wait(places.buffer_full(part), phase);
      __syncwarp();
    }
    if constexpr (kTwice) fm::group_sync(1 + group);
    if constexpr (!kHasSecond) hold_rows(residual, buffer);
    finish_channels<T>(sums, kHasSecond ? nullptr : &residual, buffer);
    fm::shared_stores_ready();
    if constexpr (kInPlace) fm::group_sync(1 + group);
    else stores_left_and_sync();
  }

  // The narrow results leave through buffers from which the wide ones have left.
  __device__ __forceinline__ void finish_narrow(const float (&narrow)[kNarrow], const EndingTile& tile,
                                                const EndingTile& following, bool more) const {
    constexpr int kHalves = kTwice ? 2 : 1, kLast = ending_buffers(ENDING) - 1;
    if constexpr (!kHasSecond) stores_left_and_sync();
#pragma unroll
    for (int half = 0; half < kHalves; half++) {
      finish_channels<T>(narrow, nullptr, places.buffer(kLast - half), half * kDepth / 2);
    }
    fm::shared_stores_ready();
    fm::group_sync(1 + group);
    if (leads()) {
      for (int half = 0; half < kHalves; half++) {
        fm::store_box(p.narrow, places.buffer(kLast - half), half * kDepth, tile.x, tile.y, tile.image);
      }
      fm::stores_commit();
      if constexpr (kHasSecond) {
        fm::stores_wait_read<1>();
        if (more) places.copy_shortcut(p, following, 0, 0);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void make_tile(const EndingTile& tile, const EndingTile& following, bool more, int phase) const {
    Held middle, second;
    Pieces pieces[2];
    float narrow[kNarrow];
    const EndingResidual<T> residual(p, tile);
    if constexpr (kTwice) residual.load(pieces[0], 0), residual.load(pieces[1], 1);
    fm::barrier_wait(places.pixels_full(), phase);
    __syncwarp();
    make_middle<T>(middle, p, places, weights);
    if constexpr (kHasNext) begin_with(narrow, p.next_bias);
    if constexpr (kHasSecond) {
      fm::barrier_wait(places.buffer_full(0), phase);
      __syncwarp();
      hold_rows(second, places.buffer(0));
    }
    if constexpr (!kInPlace) stores_left_and_sync();
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      make_part(middle, second, pieces[part % 2], narrow, part, phase);
      if (leads()) send(tile, following, more, part);
      __syncwarp();
      if constexpr (kHasNext) {
        fm::products_begin();
        multiply_rows<T>(narrow, places.buffer(buffer_of(part)), 1024, next(part));
        fm::products_commit();
      }
      if constexpr (kTwice) if (part < kParts - 2) residual.load(pieces[part % 2], part + 2);
    }
    if constexpr (kHasNext) {
      fm::products_wait<0>();
      fm::keep(narrow);
      finish_narrow(narrow, tile, following, more);
    }
  }
};

#endif

template <typename T, Ending ENDING>
__global__ void __launch_bounds__(kEndingGroups* kWarpgroup) ending_kernel(const __grid_constant__ EndingProblem p) {
#ifdef FM_HOPPER
  const fm::SharedAddress weights = fm::shared_address(fm::dynamic_shared());
  const EndingPlaces first{weights + ending_matrices(ENDING) * kMatrix};
  const int number = threadIdx.x / kWarpgroup, step = gridDim.x * kEndingGroups;
  const EndingGroup<T, ENDING> group{p, {first.pixels + number * ending_group_bytes(ENDING)}, weights, number};
  int place = blockIdx.x + number * gridDim.x;  // few tiles lie on many multiprocessors
  EndingTile tile = ending_tile(p, place);

  fm::launch_dependents();
  if (group.leads()) {
    if (number == 0) fm::barrier_init(first.weights_full(), 1);
    fm::barrier_init(group.places.pixels_full(), 1);
    for (int i = 0; i < ending_buffers(ENDING); i++) fm::barrier_init(group.places.buffer_full(i), 1);
    fm::barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x < 32) copy_all_weights<ENDING>(p, weights, first.weights_full());
  if (ENDING == kResidualTwice || group.leads()) fm::wait_for_previous_grid();
  if (group.leads() && place < p.tiles) group.ask_for_first(tile);
  __syncwarp();
  fm::barrier_wait(first.weights_full(), 0);
  for (int phase = 0; place < p.tiles; phase ^= 1, place += step) {
    const EndingTile following = ending_tile(p, place + step);
    group.make_tile(tile, following, place + step < p.tiles, phase);
    tile = following;
  }
  if (group.leads()) fm::stores_wait<0>();  // shared memory is read until then
#endif
}

}  // namespace fm_convolution
