// What csrc/common/hopper.cuh gives to kernels, for the emulator, which takes the place of compute capability 9.0.
#pragma once

#include "cuda_emulation.h"

namespace fm_emulation {

// Of fm::TensorMap: what tensor_maps_emulation.h has made of a tensor.
struct TensorDescription;

void barrier_init(uint32_t address, uint32_t arrivals, const Place& place);
void barriers_ready();
void shared_stores_ready();
void barrier_arrive(uint32_t address, const Place& place);
void barrier_expect(uint32_t address, uint32_t bytes, const Place& place);
void barrier_wait(uint32_t address, uint32_t parity, const Place& place);
void group_sync(int barrier, int threads, const Place& place);
void copy_box(uint32_t to, const TensorDescription& map, uint32_t barrier, int channel, const int (&at)[3],
              int dimensions, const Place& place);
void copy_pixels(uint32_t to, const TensorDescription& map, uint32_t barrier, int channel, const int (&at)[3], int right,
                 int down, const Place& place);
void store_box(const TensorDescription& map, uint32_t from, int channel, const int (&at)[3], const Place& place);
void stores_commit();
void stores_wait(int pending);
void store_matrices(uint32_t row, const uint32_t* r, const Place& place);
uint32_t cluster_address(uint32_t address, uint32_t rank, const Place& place);
void store_cluster(uint32_t to, const float4& four, uint32_t barrier, const Place& place);
void products_begin(const Place& place);
void products_commit(const Place& place);
void products_wait(int pending, const Place& place);
void multiply(float* sums, int columns, uint64_t a, uint64_t b, bool add, bool bfloat, const Place& place);
void multiply_held(float* sums, int columns, const uint32_t* a, uint64_t b, bool bfloat, const Place& place);

// Where the copy engine and products find what has this place without a swizzle. Of addresses as of offsets: shared
// memory begins at a multiple of 1024.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

}  // namespace fm_emulation

// Of a timed kernel.
inline long long clock64() {
  static constinit long long clock = 0;
  return ++clock;
}

namespace fm {

struct TensorMap;

inline const fm_emulation::TensorDescription& description(const TensorMap& map) {
  return reinterpret_cast<const fm_emulation::TensorDescription&>(map);
}

inline void barrier_init(SharedAddress barrier, uint32_t arrivals, Place place = Place::current()) {
  fm_emulation::barrier_init(barrier, arrivals, place);
}
inline void barriers_ready() { fm_emulation::barriers_ready(); }
inline void shared_stores_ready() { fm_emulation::shared_stores_ready(); }
inline void barrier_arrive(SharedAddress barrier, Place place = Place::current()) {
  fm_emulation::barrier_arrive(barrier, place);
}
inline void barrier_expect(SharedAddress barrier, uint32_t bytes, Place place = Place::current()) {
  fm_emulation::barrier_expect(barrier, bytes, place);
}
inline void barrier_wait(SharedAddress barrier, uint32_t parity, Place place = Place::current()) {
  fm_emulation::barrier_wait(barrier, parity, place);
}
template <int THREADS = 128>
inline void group_sync(int barrier, Place place = Place::current()) {
  fm_emulation::group_sync(barrier, THREADS, place);
}

inline void prefetch_map(const TensorMap&) {}
inline void copy_weights(SharedAddress to, const TensorMap& map, SharedAddress barrier, int channel, int tap, int output,
                         Place place = Place::current()) {
  fm_emulation::copy_box(to, description(map), barrier, channel, {tap, output, 0}, 3, place);
}
inline void copy_box(SharedAddress to, const TensorMap& map, SharedAddress barrier, int channel, int x, int y, int n,
                     Place place = Place::current()) {
  fm_emulation::copy_box(to, description(map), barrier, channel, {x, y, n}, 4, place);
}
inline void copy_pixels(SharedAddress to, const TensorMap& map, SharedAddress barrier, int channel, int x, int y, int n,
                        uint16_t right, uint16_t down, Place place = Place::current()) {
  fm_emulation::copy_pixels(to, description(map), barrier, channel, {x, y, n}, right, down, place);
}
inline void store_box(const TensorMap& map, SharedAddress from, int channel, int x, int y, int n,
                      Place place = Place::current()) {
  fm_emulation::store_box(description(map), from, channel, {x, y, n}, place);
}
inline void stores_commit() { fm_emulation::stores_commit(); }
// Stores are done at once, so both waits are for shared memory.
template <int PENDING>
inline void stores_wait_read() { fm_emulation::stores_wait(PENDING); }
template <int PENDING>
inline void stores_wait() { fm_emulation::stores_wait(PENDING); }

inline void store_matrices(SharedAddress row, const uint32_t (&r)[4], Place place = Place::current()) {
  fm_emulation::store_matrices(row, r, place);
}
inline uint32_t cluster_address(SharedAddress address, uint32_t rank, Place place = Place::current()) {
  return fm_emulation::cluster_address(address, rank, place);
}
inline void store_cluster(uint32_t to, const float4& v, uint32_t barrier, Place place = Place::current()) {
  fm_emulation::store_cluster(to, v, barrier, place);
}
template <int COUNT>
inline void give_registers() {}
template <int COUNT>
inline void take_registers() {}
inline unsigned multiprocessor() { return 0; }
inline uint4 load_coherent(const void* from) { return *static_cast<const uint4*>(from); }
inline float load_coherent_float(const float* from) { return *from; }

inline void products_begin(Place place = Place::current()) { fm_emulation::products_begin(place); }
inline void products_commit(Place place = Place::current()) { fm_emulation::products_commit(place); }
template <int PENDING>
inline void products_wait(Place place = Place::current()) { fm_emulation::products_wait(PENDING, place); }
template <int N>
inline void keep(float (&)[N]) {}

template <typename T, int N>
inline void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b, int add, Place place = Place::current()) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 256);
  fm_emulation::multiply(sums, N, a, b, add != 0, std::is_same_v<T, __nv_bfloat16>, place);
}
template <typename T, int SUMS>
inline void multiply_held(float (&sums)[SUMS], const uint32_t (&a)[4], uint64_t b, Place place = Place::current()) {
  static_assert(SUMS == 32 || SUMS == 64);
  fm_emulation::multiply_held(sums, 2 * SUMS, a, b, std::is_same_v<T, __nv_bfloat16>, place);
}

}  // namespace fm
