// upsample_native on CUDA: one launch per call, no atomics, sums in float32 in a fixed order.
//
// Rows are usually short. The default kernel gives every thread one output position (a row and a pack of channels;
// neighbouring threads take neighbouring positions, so that three channels are read and written without gaps) for
// several batch elements, which share the loads of the indices. Long rows with few positions, as transposed matrices
// have, are split over the lanes of a group and summed by shuffles.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <limits>

#include "checks.h"
#include "common/cuda.h"

namespace {

using fm_upsampling::ScalarType;
using fm_upsampling::Tensor;

constexpr int kThreads = 256;
constexpr int kBatchTile = 4;     // batch elements per thread
constexpr int kChannelTile = 4;   // channels per lane group in long_row_kernel
constexpr int kCsr = -1;          // value of WIDTH: rows are listed by row_offsets
constexpr int kAnyWidth = 0;      // value of WIDTH: padded table, width known at run time

template <typename T>
struct Problem {
  const T* x;
  T* out;  // contiguous [batch, rows, channels]
  const int32_t* row_offsets;
  const int32_t* columns;  // of the padded table (-1: empty slot) unless WIDTH is kCsr
  const float* values;
  int width;
  int64_t batch, rows, channels;
  int64_t batch_stride, token_stride, channel_stride;  // of x, in elements
};

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T item[VEC];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

template <typename T, int VEC, int WIDTH, int BATCH_TILE>
__global__ void __launch_bounds__(kThreads) short_row_kernel(const Problem<T> p) {
  // Position of this thread in the flat [rows, packs] plane. Only the tile's start needs 64-bit division.
  const uint32_t packs = static_cast<uint32_t>(p.channels / VEC);
  const int64_t plane_tiles = (p.rows * packs + kThreads - 1) / kThreads;
  const int64_t tile_start = (blockIdx.x % plane_tiles) * kThreads;
  const uint32_t within = static_cast<uint32_t>(tile_start % packs) + threadIdx.x;
  const int64_t row = tile_start / packs + within / packs;
  const int64_t channel = static_cast<int64_t>(within % packs) * VEC;
  if (row >= p.rows) return;
  const int64_t batch_start = (blockIdx.x / plane_tiles) * BATCH_TILE;

  const T* __restrict__ source = p.x + batch_start * p.batch_stride + channel * p.channel_stride;
  float sums[BATCH_TILE][VEC] = {};
  const auto add = [&](int64_t entry) {
    const int64_t column = __ldg(p.columns + entry);
    if (WIDTH != kCsr && column < 0) return;
    const float value = __ldg(p.values + entry);
    const T* from = source + column * p.token_stride;
#pragma unroll
    for (int i = 0; i < BATCH_TILE; ++i) {
      if (BATCH_TILE > 1 && batch_start + i >= p.batch) break;
      const auto pack = *reinterpret_cast<const Pack<T, VEC>*>(from + i * p.batch_stride);
#pragma unroll
      for (int c = 0; c < VEC; ++c) sums[i][c] = fmaf(value, to_float(pack.item[c]), sums[i][c]);
    }
  };
  if constexpr (WIDTH == kCsr) {
    const int64_t last = __ldg(p.row_offsets + row + 1);
#pragma unroll 4
    for (int64_t entry = __ldg(p.row_offsets + row); entry < last; ++entry) add(entry);
  } else {
    const int width = WIDTH == kAnyWidth ? p.width : WIDTH;
#pragma unroll
    for (int slot = 0; slot < width; ++slot) add(row * width + slot);
  }

  T* out = p.out + (batch_start * p.rows + row) * p.channels + channel;
#pragma unroll
  for (int i = 0; i < BATCH_TILE; ++i) {
    if (BATCH_TILE > 1 && batch_start + i >= p.batch) break;
    Pack<T, VEC> pack;
#pragma unroll
    for (int c = 0; c < VEC; ++c) pack.item[c] = from_float<T>(sums[i][c]);
    *reinterpret_cast<Pack<T, VEC>*>(out + i * p.rows * p.channels) = pack;
  }
}

// A group of LANES lanes sums one row of one batch element for up to kChannelTile channels.
template <typename T, int LANES>
__global__ void __launch_bounds__(kThreads) long_row_kernel(const Problem<T> p) {
  const int64_t channel_tiles = (p.channels + kChannelTile - 1) / kChannelTile;
  const int64_t group = blockIdx.x * static_cast<int64_t>(kThreads / LANES) + threadIdx.x / LANES;
  const int lane = threadIdx.x % LANES;
  const int64_t channel = (group % channel_tiles) * kChannelTile;
  const int64_t row = group / channel_tiles % p.rows;
  const int64_t batch = group / (channel_tiles * p.rows);
  const bool active = batch < p.batch;  // idle groups stay for the shuffles

  float sums[kChannelTile] = {};
  if (active) {
    const T* __restrict__ source = p.x + batch * p.batch_stride + channel * p.channel_stride;
    const int64_t last = __ldg(p.row_offsets + row + 1);
#pragma unroll 2
    for (int64_t entry = __ldg(p.row_offsets + row) + lane; entry < last; entry += LANES) {
      const float value = __ldg(p.values + entry);
      const T* from = source + __ldg(p.columns + entry) * p.token_stride;
#pragma unroll
      for (int c = 0; c < kChannelTile; ++c) {
        if (channel + c < p.channels) sums[c] = fmaf(value, to_float(from[c * p.channel_stride]), sums[c]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kChannelTile; ++c) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], step);
  }
  if (!active) return;
  T* out = p.out + (batch * p.rows + row) * p.channels + channel;
#pragma unroll
  for (int c = 0; c < kChannelTile; ++c) {
    if (lane == c && channel + c < p.channels) out[c] = from_float<T>(sums[c]);
  }
}

unsigned int grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "upsample_native: the output is too large, it needs ",
                  blocks, " blocks");
  return static_cast<unsigned int>(blocks);
}

template <typename T, int VEC, int WIDTH>
void launch_short(const Problem<T>& p, cudaStream_t stream) {
  const int64_t plane_tiles = (p.rows * (p.channels / VEC) + kThreads - 1) / kThreads;
  if (p.batch == 1) {
    short_row_kernel<T, VEC, WIDTH, 1><<<grid_size(plane_tiles), kThreads, 0, stream>>>(p);
  } else {
    const int64_t batch_tiles = (p.batch + kBatchTile - 1) / kBatchTile;
    short_row_kernel<T, VEC, WIDTH, kBatchTile><<<grid_size(plane_tiles * batch_tiles), kThreads, 0, stream>>>(p);
  }
}

template <typename T, int LANES>
void launch_long(const Problem<T>& p, cudaStream_t stream) {
  const int64_t groups = p.batch * p.rows * ((p.channels + kChannelTile - 1) / kChannelTile);
  constexpr int groups_per_block = kThreads / LANES;
  const unsigned int blocks = grid_size((groups + groups_per_block - 1) / groups_per_block);
  long_row_kernel<T, LANES><<<blocks, kThreads, 0, stream>>>(p);
}

template <typename T, int VEC>
void launch_layout(const Problem<T>& p, cudaStream_t stream) {
  if (p.width == 0) return launch_short<T, VEC, kCsr>(p, stream);
  if (p.width == 3) return launch_short<T, VEC, 3>(p, stream);
  launch_short<T, VEC, kAnyWidth>(p, stream);
}

// Whether packs of 16 bytes can be read from x and written to out.
template <typename T>
bool packs_fit(const Problem<T>& p) {
  constexpr int64_t pack = 16 / sizeof(T);
  return p.channel_stride == 1 && p.channels % pack == 0 && p.batch_stride % pack == 0 && p.token_stride % pack == 0 &&
         reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

template <typename T>
void launch(Problem<T> p, int64_t entries, cudaStream_t stream) {
  // Split rows over lanes where they are long and there are too few positions to keep the device busy otherwise.
  const int64_t entries_per_row = entries / p.rows;
  const bool few_positions = p.channels <= kChannelTile || p.batch * p.rows * p.channels < (1 << 16);
  if (p.width == 0 && entries_per_row >= 16 && few_positions) {
    if (entries_per_row < 128) return launch_long<T, 8>(p, stream);
    return launch_long<T, 32>(p, stream);
  }
  if (packs_fit(p)) return launch_layout<T, 16 / sizeof(T)>(p, stream);
  launch_layout<T, 1>(p, stream);
}

Tensor upsample(Tensor x, Tensor row_offsets, Tensor columns, Tensor values, std::optional<Tensor> ell_columns,
                std::optional<Tensor> ell_values, int64_t rows) {
  fm_upsampling::check_arguments(x, row_offsets, columns, values, ell_columns, ell_values, rows);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {x.size(0), rows, x.size(2)});
  if (x.size(0) == 0 || rows == 0 || x.size(2) == 0) return out;
  STD_TORCH_CHECK(x.size(2) <= std::numeric_limits<int32_t>::max(), "upsample_native: too many channels: ", x.size(2));

  const bool ell = ell_columns.has_value() && ell_columns->size(1) > 0;
  const auto run = [&]<typename T>(T*) {
    launch<T>(Problem<T>{static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
                         row_offsets.const_data_ptr<int32_t>(),
                         (ell ? *ell_columns : columns).const_data_ptr<int32_t>(),
                         (ell ? *ell_values : values).const_data_ptr<float>(),
                         ell ? static_cast<int>(ell_columns->size(1)) : 0, x.size(0), rows, x.size(2), x.stride(0),
                         x.stride(1), x.stride(2)},
              columns.size(0), fm::current_stream(x));
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: run(static_cast<float*>(nullptr)); break;
    case ScalarType::Half: run(static_cast<__half*>(nullptr)); break;
    case ScalarType::BFloat16: run(static_cast<__nv_bfloat16*>(nullptr)); break;
    default:
      STD_TORCH_CHECK(false, "upsample_native: on CUDA x must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) { m.impl("upsample_native", TORCH_BOX(&upsample)); }
