// Two pointwise convolutions in one kernel, as in pair.cuh, for many positions: the last of a residual block, with the
// shortcut, and the first of the next block. For compute capability 9.0.
//
// With many images these layers wait for memory and for products. Each of a block's two groups of four warps takes 64
// positions at a time, whose pixels stay in shared memory. For 64 of the wide channels after the other it multiplies,
// adds the shortcut, which the copy engine has brought to a buffer, and puts the results in its place; from there they are
// stored, and there they are an operand of the narrow product, whose sums stay in registers. So the wide channels are
// read for the shortcut alone. A warp of its own brings the weights, which both groups share, two parts ahead; blocks go
// from tile to tile.
#pragma once

#include "parts.cuh"

namespace fm_convolution {

constexpr int kManyGroups = 2, kManyRows = kManyGroups * kRows, kManyThreads = kManyGroups * kWarpgroup + 32;
constexpr int kManySlots = 2, kMaxBuffers = 4;

template <typename T>
struct ManyPair {
  Inputs inputs;                             // weights in boxes of 64 outputs
  fm::TensorMap residual, wide, narrow, next;  // next: weights in boxes of NARROW outputs
  const float *bias, *next_bias;
  int tiles, parts, buffers;  // parts: of 64 wide channels
  bool adds;                  // a residual
};

constexpr int kManyBarriers = (kManyGroups * (1 + kMaxBuffers) + 4 * kManySlots) * 8;
constexpr int many_pair_shared_bytes(int chunks, int narrow, int buffers) {
  const int pixels = kManyGroups * chunks * kMatrix, weights = kManySlots * (chunks * kMatrix + narrow * kDepth * 2);
  return pixels + weights + kManyGroups * buffers * kMatrix + kManyBarriers;
}

#ifdef FM_HOPPER

// Where everything lies. Slots hold the weights of a part, for the wide and for the narrow product.
template <int CHUNKS, int NARROW>
struct ManyPlaces {
  static constexpr int kWeights = CHUNKS * kMatrix, kNext = NARROW * kDepth * 2;
  fm::SharedAddress begin;
  int buffers;

  __device__ __forceinline__ fm::SharedAddress pixels(int group) const { return begin + group * kWeights; }
  __device__ __forceinline__ fm::SharedAddress weights(int slot) const {
    return begin + (kManyGroups + slot) * kWeights;
  }
  __device__ __forceinline__ fm::SharedAddress next(int slot) const { return weights(kManySlots) + slot * kNext; }
  __device__ __forceinline__ fm::SharedAddress buffer(int group, int number) const {
    return next(kManySlots) + (group * buffers + number) * kMatrix;
  }
  __device__ __forceinline__ fm::SharedAddress barrier(int number) const { return buffer(kManyGroups, 0) + number * 8; }
  __device__ __forceinline__ fm::SharedAddress weights_full(int slot) const { return barrier(slot); }
  __device__ __forceinline__ fm::SharedAddress weights_empty(int slot) const { return barrier(kManySlots + slot); }
  __device__ __forceinline__ fm::SharedAddress next_full(int slot) const { return barrier(2 * kManySlots + slot); }
  __device__ __forceinline__ fm::SharedAddress next_empty(int slot) const { return barrier(3 * kManySlots + slot); }
  __device__ __forceinline__ fm::SharedAddress pixels_full(int group) const { return barrier(4 * kManySlots + group); }
  __device__ __forceinline__ fm::SharedAddress buffer_full(int group, int number) const {
    return barrier(4 * kManySlots + kManyGroups + group * kMaxBuffers + number);
  }
};

// By one thread: the weights of all parts of all tiles, which do not depend on kernels in front.
template <typename T, int CHUNKS, int NARROW>
__device__ __forceinline__ void ask_for_parts(const ManyPair<T>& p, const ManyPlaces<CHUNKS, NARROW>& places) {
  int count = 0;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    for (int part = 0; part < p.parts; part++, count++) {
      const int slot = count % kManySlots, phase = count / kManySlots % 2;
      if (count >= kManySlots) fm::barrier_wait(places.weights_empty(slot), phase ^ 1);
      fm::barrier_expect(places.weights_full(slot), places.kWeights);
      for (int i = 0; i < CHUNKS; i++) {
        const Chunk chunk = chunk_of(p.inputs, i);
        fm::copy_weights(places.weights(slot) + i * kMatrix, chunk.input.weights, places.weights_full(slot), chunk.channel,
                         chunk.tap, part * kDepth);
      }
      if (count >= kManySlots) fm::barrier_wait(places.next_empty(slot), phase ^ 1);
      fm::barrier_expect(places.next_full(slot), places.kNext);
      fm::copy_weights(places.next(slot), p.next, places.next_full(slot), part * kDepth, 0, 0);
    }
  }
}

// One group at its tiles. Its first thread asks for pixels and shortcuts and sends results; see EndingGroup, too.
template <typename T, int CHUNKS, int NARROW, bool ADDS>
struct ManyGroup {
  const ManyPair<T>& p;
  const ManyPlaces<CHUNKS, NARROW>& places;
  int group;
  int count;  // parts of all tiles so far

  __device__ __forceinline__ bool leads() const { return threadIdx.x % kWarpgroup == 0; }
  __device__ __forceinline__ int slot() const { return count % kManySlots; }
  __device__ __forceinline__ int phase() const { return count / kManySlots % 2; }
  __device__ __forceinline__ int row(int tile) const { return tile * kManyRows + group * kRows; }
  __device__ __forceinline__ fm::SharedAddress buffer(int number) const { return places.buffer(group, number); }

  __device__ __forceinline__ void copy_pixels(int tile) const {
    const Tile<kDepth, kManyGroups> place{p.inputs, {places.begin, 0, 0, 0}, tile * kManyRows, 0, 0, 0};
    const int3 position = place.position(group);
    const fm::SharedAddress full = places.pixels_full(group);
    fm::barrier_expect(full, places.kWeights);
    for (int i = 0; i < CHUNKS; i++) {
      const Chunk chunk = chunk_of(p.inputs, i);
      const Input& in = chunk.input;
      fm::copy_pixels(places.pixels(group) + i * kMatrix, in.pixels, full, chunk.channel, position.x * in.stride - in.left,
                      position.y * in.stride - in.left, position.z, 0, 0);
    }
  }

  __device__ __forceinline__ void copy_residual(int tile, int part, int number) const {
    fm::barrier_expect(places.buffer_full(group, number), kMatrix);
    fm::copy_box(buffer(number), p.residual, places.buffer_full(group, number), part * kDepth, row(tile), 0, 0);
  }

  __device__ __forceinline__ void arrive(fm::SharedAddress barrier) const {
    if (threadIdx.x % 32 == 0) fm::barrier_arrive(barrier);
  }

  // Behind the barrier of a part: its results leave, and what the part in front held takes the shortcut of a later one.
  __device__ __forceinline__ void send(int tile, int part, int number) const {
    fm::store_box(p.wide, buffer(number), part * kDepth, row(tile), 0, 0);
    fm::stores_commit();
    const int following = tile + gridDim.x, later = part + p.buffers - 1;
    if (part == p.parts - 1 && following < p.tiles) copy_pixels(following);
    if constexpr (ADDS) {
      fm::stores_wait_read<1>();
      const int free = number == 0 ? p.buffers - 1 : number - 1;
      if (later < p.parts) copy_residual(tile, later, free);
      else if (following < p.tiles) copy_residual(following, later - p.parts, free);
    }
  }

  // The products of a part's wide channels, whose weights are in this slot.
  __device__ __forceinline__ void multiply_wide(float (&sums)[kDepth / 2], int slot) const {
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      multiply_rows<T>(sums, places.pixels(group) + i * kMatrix, 1024, places.weights(slot) + i * kMatrix);
    }
  }

  // A part's results to its buffer, from where they leave.
  __device__ __forceinline__ void finish_part(const float (&sums)[kDepth / 2], int tile, int part) const {
    const int number = count % p.buffers;
    Held residual;
    if constexpr (ADDS) {
      fm::barrier_wait(places.buffer_full(group, number), count / p.buffers % 2);
      __syncwarp();
      hold_rows(residual, buffer(number));
    }
    finish_channels<T>(sums, ADDS ? &residual : nullptr, buffer(number));
    fm::shared_stores_ready();
    if (!ADDS && leads()) fm::stores_wait_read<0>();  // behind the barrier the next part may write to its buffer
    __syncwarp();
    fm::group_sync(1 + group);
    if (leads()) send(tile, part, number);
    __syncwarp();
  }

  // All parts of a tile. The narrow product of one and the wide one of the next are under way together.
  __device__ __forceinline__ void make_parts(float (&narrow)[NARROW / 2], int tile) {
    float sums[kDepth / 2];
    begin_with(sums, p.bias);
    fm::barrier_wait(places.weights_full(slot()), phase());
    __syncwarp();
    fm::keep(sums);
    fm::products_begin();
    multiply_wide(sums, slot());
    fm::products_commit();
    fm::products_wait<0>();
    fm::keep(sums);
    arrive(places.weights_empty(slot()));
#pragma unroll 1
    for (int part = 0; part < p.parts - 1; part++) {
      const int before = slot(), number = count % p.buffers;
      finish_part(sums, tile, part);
      begin_with(sums, p.bias + (part + 1) * kDepth);
      fm::barrier_wait(places.next_full(before), phase());
      count++;
      fm::barrier_wait(places.weights_full(slot()), phase());
      __syncwarp();
      fm::keep(sums);  // in registers from here on: nothing but products may touch them behind the next line
      fm::keep(narrow);
      fm::products_begin();
      multiply_rows<T>(narrow, buffer(number), 1024, places.next(before));
      multiply_wide(sums, slot());
      fm::products_commit();
      fm::products_wait<0>();
      fm::keep(narrow);
      fm::keep(sums);
      arrive(places.next_empty(before));
      arrive(places.weights_empty(slot()));
    }
    finish_part(sums, tile, p.parts - 1);
    fm::barrier_wait(places.next_full(slot()), phase());
    __syncwarp();
    fm::keep(narrow);
    fm::products_begin();
    multiply_rows<T>(narrow, buffer(count % p.buffers), 1024, places.next(slot()));
    fm::products_commit();
    fm::products_wait<0>();
    fm::keep(narrow);
    arrive(places.next_empty(slot()));
    count++;
  }

  // The narrow results leave through the last part's buffer, 64 channels after the other.
  __device__ __forceinline__ void finish_narrow(const float (&narrow)[NARROW / 2], int tile) const {
    const fm::SharedAddress last = buffer((count - 1) % p.buffers);
#pragma unroll
    for (int channel = 0; channel < NARROW; channel += kDepth) {
      if (leads()) fm::stores_wait_read<0>();
      __syncwarp();
      fm::group_sync(1 + group);
      finish_channels<T>(narrow, nullptr, last, channel / 2);
      fm::shared_stores_ready();
      fm::group_sync(1 + group);
      if (leads()) {
        fm::store_box(p.narrow, last, channel, row(tile), 0, 0);
        fm::stores_commit();
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ void make_tiles() {
    if (leads()) {
      fm::wait_for_previous_grid();
      copy_pixels(blockIdx.x);
      if constexpr (ADDS) {
        for (int part = 0; part < p.buffers - 1; part++) copy_residual(blockIdx.x, part, part);
      }
    }
    __syncwarp();
    for (int tile = blockIdx.x, phase = 0; tile < p.tiles; tile += gridDim.x, phase ^= 1) {
      float narrow[NARROW / 2];
      begin_with(narrow, p.next_bias);
      fm::barrier_wait(places.pixels_full(group), phase);
      __syncwarp();
      make_parts(narrow, tile);
      finish_narrow(narrow, tile);
    }
    if (leads()) fm::stores_wait<0>();  // shared memory is read until then
  }
};

#endif

// CHUNKS: of 64 channels of the inputs, both together.
template <typename T, int CHUNKS, int NARROW, bool ADDS>
__global__ void __maxnreg__(224) many_pair_kernel(const __grid_constant__ ManyPair<T> p) {
#ifdef FM_HOPPER
  const ManyPlaces<CHUNKS, NARROW> places{fm::shared_address(fm::dynamic_shared()), p.buffers};
  fm::launch_dependents();
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kManySlots; slot++) {
      fm::barrier_init(places.weights_full(slot), 1);
      fm::barrier_init(places.next_full(slot), 1);
      fm::barrier_init(places.weights_empty(slot), kManyGroups * kWarpgroup / 32);
      fm::barrier_init(places.next_empty(slot), kManyGroups * kWarpgroup / 32);
    }
    for (int group = 0; group < kManyGroups; group++) {
      fm::barrier_init(places.pixels_full(group), 1);
      for (int number = 0; number < p.buffers; number++) fm::barrier_init(places.buffer_full(group, number), 1);
    }
    fm::barriers_ready();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group < kManyGroups) {
    ManyGroup<T, CHUNKS, NARROW, ADDS>{p, places, group, 0}.make_tiles();
  } else if (threadIdx.x % 32 == 0) {
    ask_for_parts(p, places);
  }
#endif
}

}  // namespace fm_convolution
