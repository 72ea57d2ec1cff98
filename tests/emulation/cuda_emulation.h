// Device code as host code: what CUDA's compiler and csrc/common/device.cuh give to kernels, for the emulator.
//
// Included by csrc/common/device.cuh when FM_EMULATED is defined, after the CUDA headers. Functions of a warp or a
// block stop the calling thread until the others have arrived; all remember the line they were called from.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "emulator.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#undef __grid_constant__
#define __grid_constant__
#undef __shared__
#define __shared__ _Pragma("GCC error \"the emulator knows no static shared memory; use fm::dynamic_shared()\"")

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace fm_emulation {

using Place = std::source_location;
inline constexpr uint32_t kFullMask = 0xffffffffu;

enum class Move : int32_t { index, up, down, exclusive_or };
enum class Vote : int32_t { ballot, add, smallest, largest, bit_and, bit_or, bit_xor };

[[noreturn]] void trap(const char* what, const Place& place);
void sync_threads(const Place& place);
int32_t sync_threads_count(bool predicate, const Place& place);
void sync_warp(uint32_t mask, const Place& place);
uint64_t shuffle(uint32_t mask, uint64_t bits, Move move, int32_t argument, int32_t width, const Place& place);
int64_t vote(uint32_t mask, int64_t value, Vote kind, const Place& place);
unsigned char* shared_memory();
uint32_t shared_address(const void* pointer, const Place& place);
void copy_async_16(uint32_t to, const void* from, bool valid, const Place& place);
void copy_async_commit();
void copy_async_wait(int pending, const Place& place);
void load_matrices(uint32_t* r, uint32_t row, bool transposed, const Place& place);
void multiply_add(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat, const Place& place);
void check_prefetch(const void* pointer, const Place& place);
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_sync(const Place& place);
void cluster_arrive(const Place& place);
void cluster_wait(const Place& place);
void load_cluster(void* to, uint32_t bytes, uint32_t address, uint32_t rank, const Place& place);

template <typename T>
T shuffled(uint32_t mask, T value, Move move, int32_t argument, int32_t width, const Place& place) {
  static_assert((sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8) && !std::is_pointer_v<T>,
                "shuffles move numbers of 2, 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, move, argument, width, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Results and operands below the smallest normal number become zero, as with ".ftz".
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

}  // namespace fm_emulation

// Barriers, shuffles and votes.
inline void __syncthreads(fm_emulation::Place place = fm_emulation::Place::current()) {
  fm_emulation::sync_threads(place);
}
inline int __syncthreads_count(int predicate, fm_emulation::Place place = fm_emulation::Place::current()) {
  return fm_emulation::sync_threads_count(predicate != 0, place);
}
inline int __syncthreads_or(int predicate, fm_emulation::Place place = fm_emulation::Place::current()) {
  return fm_emulation::sync_threads_count(predicate != 0, place) > 0;
}
inline int __syncthreads_and(int predicate, fm_emulation::Place place = fm_emulation::Place::current()) {
  return fm_emulation::sync_threads_count(predicate == 0, place) == 0;
}
inline void __syncwarp(uint32_t mask = fm_emulation::kFullMask,
                       fm_emulation::Place place = fm_emulation::Place::current()) {
  fm_emulation::sync_warp(mask, place);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              fm_emulation::Place place = fm_emulation::Place::current()) {
  return fm_emulation::shuffled(mask, value, fm_emulation::Move::index, source, width, place);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 fm_emulation::Place place = fm_emulation::Place::current()) {
  return fm_emulation::shuffled(mask, value, fm_emulation::Move::up, static_cast<int>(delta), width, place);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   fm_emulation::Place place = fm_emulation::Place::current()) {
  return fm_emulation::shuffled(mask, value, fm_emulation::Move::down, static_cast<int>(delta), width, place);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32,
                  fm_emulation::Place place = fm_emulation::Place::current()) {
  return fm_emulation::shuffled(mask, value, fm_emulation::Move::exclusive_or, lanes, width, place);
}
inline unsigned __ballot_sync(uint32_t mask, int predicate,
                              fm_emulation::Place place = fm_emulation::Place::current()) {
  return static_cast<unsigned>(fm_emulation::vote(mask, predicate != 0, fm_emulation::Vote::ballot, place));
}
inline int __any_sync(uint32_t mask, int predicate, fm_emulation::Place place = fm_emulation::Place::current()) {
  return fm_emulation::vote(mask, predicate != 0, fm_emulation::Vote::ballot, place) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, fm_emulation::Place place = fm_emulation::Place::current()) {
  return fm_emulation::vote(mask, predicate == 0, fm_emulation::Vote::ballot, place) == 0;
}
template <typename T>
T __reduce_add_sync(uint32_t mask, T value, fm_emulation::Place place = fm_emulation::Place::current()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "32-bit integers are reduced");
  return static_cast<T>(fm_emulation::vote(mask, value, fm_emulation::Vote::add, place));
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value, fm_emulation::Place place = fm_emulation::Place::current()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "32-bit integers are reduced");
  return static_cast<T>(fm_emulation::vote(mask, value, fm_emulation::Vote::smallest, place));
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value, fm_emulation::Place place = fm_emulation::Place::current()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "32-bit integers are reduced");
  return static_cast<T>(fm_emulation::vote(mask, value, fm_emulation::Vote::largest, place));
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned value,
                                 fm_emulation::Place place = fm_emulation::Place::current()) {
  return static_cast<unsigned>(fm_emulation::vote(mask, value, fm_emulation::Vote::bit_or, place));
}
inline unsigned __reduce_and_sync(uint32_t mask, unsigned value,
                                  fm_emulation::Place place = fm_emulation::Place::current()) {
  return static_cast<unsigned>(fm_emulation::vote(mask, value, fm_emulation::Vote::bit_and, place));
}
[[noreturn]] inline void __trap(fm_emulation::Place place = fm_emulation::Place::current()) {
  fm_emulation::trap("__trap()", place);
}

// Loads and stores with cache hints.
template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcg(const T* p) { return *p; }
template <typename T>
T __ldca(const T* p) { return *p; }
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
void __stcg(T* p, T value) { *p = value; }
template <typename T>
void __stcs(T* p, T value) { *p = value; }
template <typename T>
void __stwt(T* p, T value) { *p = value; }

// Integers.
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    result |= static_cast<unsigned>(both >> 8 * (selector >> 4 * byte & 7) & 0xff) << 8 * byte;
  }
  return result;
}

// CUDA has these in the global namespace, for mixed integers too; a NaN loses against a number.
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmin(static_cast<C>(a), static_cast<C>(b));
  return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmax(static_cast<C>(a), static_cast<C>(b));
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}

// Floating point.
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// The host part of CUDA's headers leaves these out. Products of 16-bit numbers are exact in double.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(__low2half(a), __low2half(b), __low2half(c)),
                        __hfma(__high2half(a), __high2half(b), __high2half(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) + __bfloat162float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(__low2bfloat16(a), __low2bfloat16(b), __low2bfloat16(c)),
                            __hfma(__high2bfloat16(a), __high2bfloat16(b), __high2bfloat16(c)));
}

// The wrappers of csrc/common/device.cuh.
namespace fm {

using SharedAddress = uint32_t;
using fm_emulation::Place;

inline SharedAddress shared_address(const void* pointer, Place place = Place::current()) {
  return fm_emulation::shared_address(pointer, place);
}
// What an address names; accesses are checked where they happen.
template <typename Word>
inline Word* shared_word(SharedAddress address, const Place& place) {
  unsigned char* const start = fm_emulation::shared_memory();
  if (address % sizeof(Word) != 0) fm_emulation::trap("shared memory at an address that is no multiple of a word", place);
  return reinterpret_cast<Word*>(start + (address - fm_emulation::shared_address(start, place)));
}
template <typename Word>
inline Word load_shared(SharedAddress address, Place place = Place::current()) {
  return *shared_word<Word>(address, place);
}
template <typename Word>
inline void store_shared(SharedAddress address, const Word& word, Place place = Place::current()) {
  *shared_word<Word>(address, place) = word;
}
inline unsigned char* dynamic_shared() { return fm_emulation::shared_memory(); }

inline void copy_async_16(SharedAddress to, const void* from, bool valid, Place place = Place::current()) {
  fm_emulation::copy_async_16(to, from, valid, place);
}
inline void copy_async_commit() { fm_emulation::copy_async_commit(); }
template <int PENDING>
inline void copy_async_wait(Place place = Place::current()) {
  static_assert(PENDING >= 0 && PENDING <= 7);
  fm_emulation::copy_async_wait(PENDING, place);
}

inline void load_matrices(uint32_t (&r)[4], SharedAddress row, Place place = Place::current()) {
  fm_emulation::load_matrices(r, row, false, place);
}
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row, Place place = Place::current()) {
  fm_emulation::load_matrices(r, row, true, place);
}
template <typename T>
inline void multiply_add_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 Place place = Place::current()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  fm_emulation::multiply_add(c, a, b0, b1, std::is_same_v<T, __nv_bfloat16>, place);
}

template <typename T>
inline void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             Place place = Place::current()) {
  c[0] = c[1] = c[2] = c[3] = 0.0f;
  multiply_add_16x8x16<T>(c, a, b0, b1, place);
}

inline float exp2_fast(float x) {
  return fm_emulation::flushed(std::exp2(fm_emulation::flushed(x)));
}
inline float log2_fast(float x) {
  return fm_emulation::flushed(std::log2(fm_emulation::flushed(x)));
}
inline float reciprocal_fast(float x) {
  return fm_emulation::flushed(1.0f / fm_emulation::flushed(x));
}
inline void prefetch_l2(const void* pointer, Place place = Place::current()) {
  fm_emulation::check_prefetch(pointer, place);
}

inline uint32_t cluster_rank() { return fm_emulation::cluster_rank(); }
inline uint32_t cluster_size() { return fm_emulation::cluster_size(); }
inline void cluster_sync(Place place = Place::current()) { fm_emulation::cluster_sync(place); }
template <bool WRITES>
inline void cluster_arrive(Place place = Place::current()) { fm_emulation::cluster_arrive(place); }
inline void cluster_wait(Place place = Place::current()) { fm_emulation::cluster_wait(place); }
inline float4 load_cluster_float4(SharedAddress address, uint32_t rank, Place place = Place::current()) {
  float4 v;
  fm_emulation::load_cluster(&v, sizeof v, address, rank, place);
  return v;
}
inline float2 load_cluster_float2(SharedAddress address, uint32_t rank, Place place = Place::current()) {
  float2 v;
  fm_emulation::load_cluster(&v, sizeof v, address, rank, place);
  return v;
}
// Launches run one after the other here.
inline void launch_dependents() {}
inline void wait_for_previous_grid() {}

template <typename T>
inline uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  uint32_t both;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    std::memcpy(&both, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    std::memcpy(&both, &pair, 4);
  }
  return both;
}

template <typename T>
inline uint32_t pack_relu(float low, float high) {
  return pack<T>(low < 0.0f ? 0.0f : low, high < 0.0f ? 0.0f : high);
}

}  // namespace fm
