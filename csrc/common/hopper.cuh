// The instructions of compute capability 9.0 that kernels for it are made of: barriers that count bytes, copies of
// boxes by the tensor memory accelerator, products of warpgroups, stores to other blocks of the cluster.
#pragma once

#include "device.cuh"

namespace fm {

// A description of a tensor for the copy engine, which the host has encoded (CUtensorMap).
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// An operand of a product: rows of 64 16-bit numbers, 128 bytes each in the copy engine's 128-byte swizzle, at an
// address that is a multiple of 128; each 8 rows begin `group` bytes behind those before. 16 numbers further along the
// rows are 2 more.
__device__ __forceinline__ uint64_t operand(SharedAddress rows, int group = 1024) {
  constexpr uint64_t kSwizzle128 = 1;
  return (static_cast<uint64_t>(rows & 0x3ffff) >> 4) | (1ull << 16) | (static_cast<uint64_t>(group >> 4) << 32) |
         (kSwizzle128 << 62);
}

}  // namespace fm

// FM_HOPPER: what is made of these instructions exists. Products of warpgroups are on 9.0 only, not on chips after it.
#ifdef FM_EMULATED
#define FM_HOPPER
#include "hopper_emulation.h"
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FM_HOPPER

namespace fm {

// A barrier in shared memory, for `arrivals` arrivals and whatever bytes are announced per phase.
__device__ __forceinline__ void barrier_init(SharedAddress barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers visible to the other blocks of the cluster and to the copy engine.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes this thread's stores to shared memory visible to products and to the copy engine.
__device__ __forceinline__ void shared_stores_ready() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces so many bytes that copies or stores of others will bring.
__device__ __forceinline__ void barrier_expect(SharedAddress barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, uint32_t parity) {
  uint32_t done = 0;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts the copy of a box of 64 channels, one tap and some output channels of the weights to shared memory.
__device__ __forceinline__ void copy_weights(SharedAddress to, const TensorMap& map, SharedAddress barrier, int channel,
                                             int tap, int output) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to), "l"(&map), "r"(channel), "r"(tap), "r"(output), "r"(barrier)
      : "memory");
}

// Starts the copy of a box of 64 channels, some columns and rows of image n from column x and row y on. What lies outside
// is zero.
__device__ __forceinline__ void copy_box(SharedAddress to, const TensorMap& map, SharedAddress barrier, int channel, int x,
                                         int y, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(channel), "r"(x), "r"(y), "r"(n), "r"(barrier)
      : "memory");
}

// Starts the copy of 64 channels of consecutive output positions' pixels under one tap: the position's first pixel is at
// column x and row y of image n, and the tap is so many columns and rows further. What lies outside is zero.
__device__ __forceinline__ void copy_pixels(SharedAddress to, const TensorMap& map, SharedAddress barrier, int channel,
                                            int x, int y, int n, uint16_t right, uint16_t down) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6], {%7, %8};" ::"r"(to),
      "l"(&map), "r"(channel), "r"(x), "r"(y), "r"(n), "r"(barrier), "h"(right), "h"(down)
      : "memory");
}

// Starts the copy of a box, which this thread's group of stores is given, from shared memory: what copy_box would bring.
// What lies outside is not written.
__device__ __forceinline__ void store_box(const TensorMap& map, SharedAddress from, int channel, int x, int y, int n) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(channel), "r"(x), "r"(y), "r"(n), "r"(from)
               : "memory");
}

// Closes a group of this thread's stores.
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most the last PENDING groups of this thread's stores still read shared memory; or, below, are on their
// way.
template <int PENDING>
__device__ __forceinline__ void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING>
__device__ __forceinline__ void stores_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Waits for the other warps of a group of so many threads, which has a barrier of its own: not 0, which is __syncthreads.
template <int THREADS = 128>
__device__ __forceinline__ void group_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

// Stores four 8 x 8 matrices of 16-bit numbers, the way load_matrices loads them.
__device__ __forceinline__ void store_matrices(SharedAddress row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// Stores four numbers at the address of another block of the cluster and counts their bytes at a barrier there.
__device__ __forceinline__ void store_cluster(uint32_t to, const float4& v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
               : "memory");
}

// All warps of a warpgroup have so many registers a thread from here on, a multiple of 8; what some give up others may
// take, who wait for it.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Which multiprocessor this is.
__device__ __forceinline__ unsigned multiprocessor() {
  unsigned number;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
  return number;
}

// Loads 16 bytes that a kernel before wrote, here and now: later statements do not move in front.
__device__ __forceinline__ uint4 load_coherent(const void* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// The same of one number.
__device__ __forceinline__ float load_coherent_float(const float* from) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the last PENDING groups of products are under way.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of sums of asynchronous products before the wait for them.
template <int N>
__device__ __forceinline__ void keep(float (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

#define FM_8(d, i)                                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),           \
      "+f"(d[i + 7])
#define FM_PRODUCT(SHAPE, TYPE, REGISTERS, A, B, P, ...)                                                               \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;\n"                                                          \
               "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGISTERS "}, %" #A ", %" #B             \
               ", p, 1, 1, 0, 0;}\n"                                                                                  \
               : __VA_ARGS__                                                                                          \
               : "l"(a), "l"(b), "r"(add))
#define FM_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FM_R32 FM_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FM_R64                                                                                                        \
  FM_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
         "%59,%60,%61,%62,%63"

#define FM_R128                                                                                                       \
  FM_R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90," \
         "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113," \
         "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// sums (+)= a b for a 64 x 16 and b 16 x N, by the four warps of a warpgroup; T = __half or __nv_bfloat16. `add` 0
// overwrites the sums. Thread t holds of row 16 (t / 32) + t % 32 / 4 (+ 8) columns 8 j + 2 (t % 4) and the next, at
// sums[4 j] (+ 2).
template <typename T, int N>
__device__ __forceinline__ void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b, int add) {
  static_assert(N == 32 || N == 64 || N == 128 || N == 256);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (N == 32) {
    if constexpr (kHalf) FM_PRODUCT("m64n32k16", "f16", FM_R16, 16, 17, 18, FM_8(sums, 0), FM_8(sums, 8));
    else FM_PRODUCT("m64n32k16", "bf16", FM_R16, 16, 17, 18, FM_8(sums, 0), FM_8(sums, 8));
  } else if constexpr (N == 64) {
    if constexpr (kHalf)
      FM_PRODUCT("m64n64k16", "f16", FM_R32, 32, 33, 34, FM_8(sums, 0), FM_8(sums, 8), FM_8(sums, 16), FM_8(sums, 24));
    else FM_PRODUCT("m64n64k16", "bf16", FM_R32, 32, 33, 34, FM_8(sums, 0), FM_8(sums, 8), FM_8(sums, 16), FM_8(sums, 24));
  } else if constexpr (N == 128) {
    if constexpr (kHalf)
      FM_PRODUCT("m64n128k16", "f16", FM_R64, 64, 65, 66, FM_8(sums, 0), FM_8(sums, 8), FM_8(sums, 16), FM_8(sums, 24),
                 FM_8(sums, 32), FM_8(sums, 40), FM_8(sums, 48), FM_8(sums, 56));
    else
      FM_PRODUCT("m64n128k16", "bf16", FM_R64, 64, 65, 66, FM_8(sums, 0), FM_8(sums, 8), FM_8(sums, 16), FM_8(sums, 24),
                 FM_8(sums, 32), FM_8(sums, 40), FM_8(sums, 48), FM_8(sums, 56));
  } else {
    if constexpr (kHalf)
      FM_PRODUCT("m64n256k16", "f16", FM_R128, 128, 129, 130, FM_8(sums, 0), FM_8(sums, 8), FM_8(sums, 16),
                 FM_8(sums, 24), FM_8(sums, 32), FM_8(sums, 40),
                 FM_8(sums, 48), FM_8(sums, 56), FM_8(sums, 64), FM_8(sums, 72), FM_8(sums, 80), FM_8(sums, 88),
                 FM_8(sums, 96), FM_8(sums, 104), FM_8(sums, 112), FM_8(sums, 120));
    else
      FM_PRODUCT("m64n256k16", "bf16", FM_R128, 128, 129, 130, FM_8(sums, 0), FM_8(sums, 8), FM_8(sums, 16),
                 FM_8(sums, 24), FM_8(sums, 32), FM_8(sums, 40),
                 FM_8(sums, 48), FM_8(sums, 56), FM_8(sums, 64), FM_8(sums, 72), FM_8(sums, 80), FM_8(sums, 88),
                 FM_8(sums, 96), FM_8(sums, 104), FM_8(sums, 112), FM_8(sums, 120));
  }
}

// sums += a b, with N = 64 or 128 and a in registers: this thread's part of its warp's 16 rows is that of
// multiply_add_16x8x16.
template <typename T, int SUMS>
__device__ __forceinline__ void multiply_held(float (&sums)[SUMS], const uint32_t (&a)[4], uint64_t b) {
  static_assert(SUMS == 32 || SUMS == 64);
#define FM_HELD(SHAPE, TYPE, REGISTERS, A0, A1, A2, A3, B, ...)                                                        \
  asm volatile("wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" REGISTERS "}, {%" #A0 ",%" #A1 ",%" #A2 \
               ",%" #A3 "}, %" #B ", 1, 1, 1, 0;\n"                                                                    \
               : __VA_ARGS__                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define FM_HELD_64(TYPE)                                                                                               \
  FM_HELD("m64n64k16", TYPE, FM_R32, 32, 33, 34, 35, 36, FM_8(sums, 0), FM_8(sums, 8), FM_8(sums, 16), FM_8(sums, 24))
#define FM_HELD_128(TYPE)                                                                                              \
  FM_HELD("m64n128k16", TYPE, FM_R64, 64, 65, 66, 67, 68, FM_8(sums, 0), FM_8(sums, 8), FM_8(sums, 16), FM_8(sums, 24), \
          FM_8(sums, 32), FM_8(sums, 40), FM_8(sums, 48), FM_8(sums, 56))
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (SUMS == 32) {
    if constexpr (kHalf) FM_HELD_64("f16");
    else FM_HELD_64("bf16");
  } else {
    if constexpr (kHalf) FM_HELD_128("f16");
    else FM_HELD_128("bf16");
  }
#undef FM_HELD
#undef FM_HELD_64
#undef FM_HELD_128
}

#undef FM_8
#undef FM_PRODUCT
#undef FM_R16
#undef FM_R32
#undef FM_R64
#undef FM_R128

}  // namespace fm

#endif
