// A convolution with bias, residual and ReLU as one implicit product, for compute capability 9.0.
//
// The output is a matrix: a row per position (image, row, column), a column per output channel. A block makes 64 rows
// and COLUMNS columns of it; its depth runs over taps and, within a tap, chunks of 64 input channels, and behind them
// over the chunks of a second input under a 1 x 1 kernel of its own (a block's downsampling branch). For each chunk the
// copy engine brings 64 positions' pixels under the tap, with zeros beyond the borders, and the weights; a ring of STAGES
// chunks is under way. One warp asks for them, four multiply.
//
// SPLIT blocks of a cluster share the depth where there are few blocks: each multiplies its chunks and sends every
// other block the rows that that one finishes, in a fixed order of addition.
#pragma once

#include "hopper.cuh"

namespace fm_convolution {

constexpr int kRows = 64, kDepth = 64;  // of a tile; 64 16-bit numbers are the 128 bytes of a swizzled row
constexpr int kWarpgroup = 128, kThreads = kWarpgroup + 32;
constexpr int kMaxStages = 16;

struct Input {
  fm::TensorMap pixels, weights;
  int taps_across, taps, chunks;  // of the kernel; chunks of 64 channels
  int stride, left;               // of the position's first pixel: stride * position - left
};

template <typename T>
struct Problem {
  Input first, second;  // the second without chunks where there is none
  const float* bias;    // [channels]
  const T* residual;    // [rows, channels] or null
  T* out;               // [rows, channels]
  int rows, channels;   // of the output
  int height, width;    // of the output
  int stages;
  bool relu;
};

// Bytes of shared memory, in front of which up to 1023 are lost to alignment.
constexpr int shared_bytes(int columns, int split, int stages) {
  const int ring = stages * (kRows + columns) * kDepth * 2;
  const int sums = split > 1 ? kRows * (columns + 8) * 4 : 0;
  return ring + sums + (2 * kMaxStages + 1) * 8 + 1024;
}

struct Ring {
  fm::SharedAddress pixels, weights, full, empty;
  __device__ fm::SharedAddress pixels_of(int stage) const { return pixels + stage * kRows * kDepth * 2; }
};

// Which chunk of the depth comes when.
struct Chunk {
  const Input& input;
  int tap, channel;
};

template <typename T>
__device__ __forceinline__ Chunk chunk_of(const Problem<T>& p, int number) {
  const int first = p.first.taps * p.first.chunks;
  const bool second = number >= first;
  const Input& input = second ? p.second : p.first;
  const int place = second ? number - first : number;
  return {input, place / input.chunks, place % input.chunks * kDepth};
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // what follows exists on 9.0 only, not on chips after it

// The warp that asks for copies; one lane works.
template <typename T, int COLUMNS>
__device__ void copy_chunks(const Problem<T>& p, const Ring& ring, int begin, int end, int row, int column) {
  constexpr uint32_t kBytes = (kRows + COLUMNS) * kDepth * 2;
  const int positions = p.height * p.width;
  const int image = row / positions, y = row % positions / p.width, x = row % p.width;
  const auto weights = [&](int number, int stage) {
    const Chunk chunk = chunk_of(p, number);
    fm::copy_weights(ring.weights + stage * COLUMNS * kDepth * 2, chunk.input.weights, ring.full + stage * 8,
                     chunk.channel, chunk.tap, column);
  };
  const auto pixels = [&](int number, int stage) {
    const Chunk chunk = chunk_of(p, number);
    const Input& in = chunk.input;
    fm::copy_pixels(ring.pixels_of(stage), in.pixels, ring.full + stage * 8, chunk.channel, x * in.stride - in.left,
                    y * in.stride - in.left, image, static_cast<uint16_t>(chunk.tap % in.taps_across),
                    static_cast<uint16_t>(chunk.tap / in.taps_across));
  };
  // Weights are there before the kernel in front of this one has finished.
  const int early = min(end - begin, p.stages);
  for (int i = 0; i < early; i++) {
    fm::barrier_expect(ring.full + i * 8, kBytes);
    weights(begin + i, i);
  }
  fm::wait_for_previous_grid();
  for (int i = 0; i < early; i++) pixels(begin + i, i);
  for (int i = early; i < end - begin; i++) {
    const int stage = i % p.stages, turn = i / p.stages;
    fm::barrier_wait(ring.empty + stage * 8, (turn - 1) & 1);
    fm::barrier_expect(ring.full + stage * 8, kBytes);
    weights(begin + i, stage);
    pixels(begin + i, stage);
  }
}

// The four warps that multiply.
template <typename T, int COLUMNS>
__device__ void multiply_chunks(const Ring& ring, int count, int stages, float (&sums)[COLUMNS / 2]) {
  for (int i = 0; i < count; i++) {
    const int stage = i % stages;
    fm::barrier_wait(ring.full + stage * 8, (i / stages) & 1);
    __syncwarp();
    fm::products_begin();
    const uint64_t a = fm::operand(ring.pixels_of(stage));
    const uint64_t b = fm::operand(ring.weights + stage * COLUMNS * kDepth * 2);
#pragma unroll
    for (int k = 0; k < kDepth / 16; k++) fm::multiply<T, COLUMNS>(sums, a + 2 * k, b + 2 * k, i > 0 || k > 0);
    fm::products_commit();
    fm::products_wait<1>();  // the chunk before is done: its stage may be filled again
    if (i > 0 && threadIdx.x % 32 == 0) fm::barrier_arrive(ring.empty + (i - 1) % stages * 8);
  }
  fm::products_wait<0>();
  fm::keep(sums);
}

// Sends each block of the cluster the rows that it finishes: kRows / SPLIT each, one part per sender.
template <int COLUMNS, int SPLIT>
__device__ void exchange(const float (&sums)[COLUMNS / 2], fm::SharedAddress parts, fm::SharedAddress arrived) {
  constexpr int kOwn = kRows / SPLIT, kPitch = (COLUMNS + 8) * 4;
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
  const uint32_t rank = fm::cluster_rank();
  fm::cluster_wait();  // all barriers of the cluster are there
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
    const uint32_t owner = row / kOwn;
    const uint32_t to = fm::cluster_address(parts + (rank * kOwn + row % kOwn) * kPitch + column * 4, owner);
    const uint32_t barrier = fm::cluster_address(arrived, owner);
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      fm::store_cluster(to + j * 32, sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1], barrier);
    }
  }
  fm::barrier_wait(arrived, 0);
}

// Adds bias and residual, applies ReLU and stores eight channels.
template <typename T>
__device__ __forceinline__ void finish(const Problem<T>& p, float (&v)[8], int64_t at, int channel) {
  const float4 low = *reinterpret_cast<const float4*>(p.bias + channel);
  const float4 high = *reinterpret_cast<const float4*>(p.bias + channel + 4);
  const float bias[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint4 kept = {};
  if (p.residual != nullptr) kept = __ldcg(reinterpret_cast<const uint4*>(p.residual + at));
  const uint32_t words[4] = {kept.x, kept.y, kept.z, kept.w};
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 more = p.residual != nullptr ? fm::unpack<T>(words[i]) : float2{};
    float x = v[2 * i] + bias[2 * i] + more.x, y = v[2 * i + 1] + bias[2 * i + 1] + more.y;
    if (p.relu) x = fmaxf(x, 0.f), y = fmaxf(y, 0.f);
    packed[i] = fm::pack<T>(x, y);
  }
  *reinterpret_cast<uint4*>(p.out + at) = {packed[0], packed[1], packed[2], packed[3]};
}

#endif

template <typename T, int COLUMNS, int SPLIT>
__global__ void __launch_bounds__(kThreads) convolution_kernel(const __grid_constant__ Problem<T> p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kOwn = kRows / SPLIT, kPitch = COLUMNS + 8;
  const fm::SharedAddress begin = (fm::shared_address(fm::dynamic_shared()) + 1023) & ~1023u;
  const fm::SharedAddress parts = begin + p.stages * (kRows + COLUMNS) * kDepth * 2;
  const fm::SharedAddress full = parts + (SPLIT > 1 ? kRows * kPitch * 4 : 0);
  const Ring ring{begin, begin + p.stages * kRows * kDepth * 2, full, full + kMaxStages * 8};
  const fm::SharedAddress arrived = ring.empty + kMaxStages * 8;
  const int row = blockIdx.y * kRows, column = blockIdx.z * COLUMNS;
  const int depth = p.first.taps * p.first.chunks + p.second.taps * p.second.chunks;
  const int rank = SPLIT > 1 ? blockIdx.x : 0;
  const int from = depth * rank / SPLIT, to = depth * (rank + 1) / SPLIT;

  fm::launch_dependents();
  if (threadIdx.x == kWarpgroup) {
    fm::prefetch_map(p.first.pixels);
    fm::prefetch_map(p.first.weights);
    for (int i = 0; i < p.stages; i++) {
      fm::barrier_init(ring.full + i * 8, 1);
      fm::barrier_init(ring.empty + i * 8, kWarpgroup / 32);
    }
    fm::barrier_init(arrived, 1);
    fm::barriers_ready();
    if constexpr (SPLIT > 1) fm::barrier_expect(arrived, kRows * COLUMNS * 4);
  }
  __syncthreads();
  if constexpr (SPLIT > 1) fm::cluster_arrive<false>();

  if (threadIdx.x >= kWarpgroup) {
    if (threadIdx.x == kWarpgroup) copy_chunks<T, COLUMNS>(p, ring, from, to, row, column);
    if constexpr (SPLIT > 1) {
      __syncwarp();
      fm::cluster_wait();
    }
  } else {
    float sums[COLUMNS / 2];
    multiply_chunks<T, COLUMNS>(ring, to - from, p.stages, sums);
    fm::wait_for_previous_grid();  // before the residual is read and the output written
    if constexpr (SPLIT > 1) {
      exchange<COLUMNS, SPLIT>(sums, parts, arrived);
    } else {
      // The ring is read no more: rows are put together there, so that a thread stores eight channels of a row.
      asm volatile("bar.sync 1, 128;" ::: "memory");
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int own = threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
          fm::store_shared(begin + (own * kPitch + 8 * j + lane % 4 * 2) * 4,
                           float2{sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]});
        }
      }
      asm volatile("bar.sync 1, 128;" ::: "memory");
    }
    const fm::SharedAddress source = SPLIT > 1 ? parts : begin;
    for (int i = threadIdx.x; i < kOwn * COLUMNS / 8; i += kWarpgroup) {
      const int own = i / (COLUMNS / 8), eighth = i % (COLUMNS / 8) * 8;
      const int64_t position = row + rank * kOwn + own;
      if (position >= p.rows || column + eighth >= p.channels) continue;
      float v[8] = {};
#pragma unroll
      for (int part = 0; part < SPLIT; part++) {
        const fm::SharedAddress at = source + ((part * kOwn + own) * kPitch + eighth) * 4;
        const float4 low = fm::load_shared<float4>(at), high = fm::load_shared<float4>(at + 16);
        v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
        v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
      }
      finish(p, v, position * p.channels + column + eighth, column + eighth);
    }
  }
  // No block leaves before all that is sent to it has come, and what it sends itself needs it no more.
#endif
}

}  // namespace fm_convolution
