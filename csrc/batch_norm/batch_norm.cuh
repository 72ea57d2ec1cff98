// Batch norm in training with the residual and ReLU behind it, forward and backward, each in one launch, in half
// precision. The specification is fastmetro_kernels/batch_norm/reference.py; who has which rows is told in tile.cuh.
//
// A channel's moments need all of its numbers before the first is normalised. Here the blocks that share a channel are
// a cluster: each sums its rows, reads what the others have found out of their shared memory, joins it in the same
// order as they do, and goes on with the rows that it still has. Nothing is counted, and no sums go through global
// memory.
#pragma once

#include "tile.cuh"

namespace fm_batch_norm {

// Rows of `channels` numbers, one after the other. Where there is no such tensor, null.
template <typename T>
struct Forward {
  const T *x, *residual;
  T* out;
  const float *weight, *bias;
  float *mean, *variance, *running_mean, *running_var;
  int64_t* batches;
  int rows, channels, held;  // held: as of layout_of
  float momentum, epsilon;
  bool relu;
};

template <typename T>
struct Backward {
  const T *grad, *more, *x, *out;
  T *behind, *grad_x;
  const float *weight, *bias, *mean, *variance;
  float *grad_weight, *grad_bias;
  int rows, channels, held;
  float epsilon;
  bool relu;

  __host__ __device__ int tensors() const { return 2 + (more ? 1 : 0) + (out ? 1 : 0); }
};

// A norm's result, before the residual; `apart`: x - mean. Both passes agree on what a ReLU lets through.
__device__ __forceinline__ float normalized(float apart, float scale, float low) {
  return __fmaf_rn(apart, scale, low);
}

template <typename T, int LANES>
__device__ __forceinline__ void copy_forward(const Tile<T, LANES>& tile, const Forward<T>& p) {
  int sweep = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    for (const int end = tile.group_end(group); sweep < end; ++sweep) tile.copy(0, p.x, sweep);
    fm::copy_async_commit();
  }
  if (p.residual) {
    for (sweep = 0; sweep < tile.held; ++sweep) tile.copy(1, p.residual, sweep);
  }
  fm::copy_async_commit();
}

// The mean of the first rows of the block, for each of the thread's channels: numbers are summed less it, so that their
// squares keep their digits.
template <typename T, int LANES>
__device__ __forceinline__ void near_mean(const Tile<T, LANES>& tile, float (&near)[kWide]) {
  using Here = Tile<T, LANES>;
  float sums[2 * kWide] = {};
  fm::copy_async_wait<kGroups>();
  in_batches<1>(
      0, tile.group_end(0), [&](int, int sweep) { return tile.kept(0, sweep); },
      [&](int sweep, const uint4(&words)[1]) {
        float values[kWide];
        unpack_word<T>(words[0], values);  // zeros behind the last row
#pragma unroll
        for (int i = 0; i < kWide; ++i) sums[i] += values[i];
      });
  store_sums(tile, sums);
  __syncthreads();
  if (threadIdx.x < Here::kChannels) {
    const int rows = min(tile.count, tile.group_end(0) * Here::kSweep);
    tile.shared().vectors[0][threadIdx.x] = sum_of_block(tile, 0) / static_cast<float>(max(rows, 1));
  }
  __syncthreads();
  tile.vector(0, near);
}

// The mean of the block's rows and the sum of the squares of what they are off it go to where the cluster finds them.
template <typename T, int LANES>
__device__ __forceinline__ void find_moments(const Tile<T, LANES>& tile, const Forward<T>& p) {
  float near[kWide], sums[2 * kWide] = {};
  near_mean(tile, near);
  const auto add = [&](int sweep, const uint4(&words)[1]) {
    if (!tile.inside(sweep)) return;
    float values[kWide];
    unpack_word<T>(words[0], values);
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const float apart = values[i] - near[i];
      sums[i] += apart;
      sums[kWide + i] = __fmaf_rn(apart, apart, sums[kWide + i]);
    }
  };
  in_batches<1>(tile.held, tile.sweeps, [&](int, int sweep) { return tile.load(p.x, sweep); }, add);
  as_they_arrive(tile, [&](int begin, int end) {
    in_batches<1>(begin, end, [&](int, int sweep) { return tile.kept(0, sweep); }, add);
  });
  store_sums(tile, sums);
  __syncthreads();
  if (threadIdx.x < Tile<T, LANES>::kChannels) {
    const float first = sum_of_block(tile, 0), second = sum_of_block(tile, 1);
    const float apart = first / static_cast<float>(max(tile.count, 1));
    tile.shared().found[threadIdx.x] =
        make_float2(tile.shared().vectors[0][threadIdx.x] + apart, second - first * apart);
  }
}

// The mean and the variance over all rows, of what the blocks have found (Chan, Golub and LeVeque 1983).
template <typename T, int LANES>
__device__ __forceinline__ float2 join_moments(const Tile<T, LANES>& tile, int rows) {
  float2 found[kMaxCluster];
  read_cluster(tile, found);
  float apart = 0.0f, squares = 0.0f;
#pragma unroll
  for (int rank = 0; rank < kMaxCluster; ++rank) {
    const float count = static_cast<float>(rank < tile.size ? rows_of(rows, rank, tile.size) : 0);
    if (count > 0.0f) apart += count * (found[rank].x - found[0].x);
  }
  const float mean = found[0].x + apart / static_cast<float>(rows);
#pragma unroll
  for (int rank = 0; rank < kMaxCluster; ++rank) {
    const float count = static_cast<float>(rank < tile.size ? rows_of(rows, rank, tile.size) : 0);
    const float off = found[rank].x - mean;
    if (count > 0.0f) squares += found[rank].y + count * off * off;
  }
  const float variance = squares / static_cast<float>(rows);
  return make_float2(mean, variance < 0.0f ? 0.0f : variance);  // not fmaxf: what is not a number stays so
}

// Once for each channel.
template <typename T>
__device__ __forceinline__ void store_moments(const Forward<T>& p, int channel, float2 moments) {
  p.mean[channel] = moments.x, p.variance[channel] = moments.y;
  if (!p.running_mean) return;
  const float rows = static_cast<float>(p.rows), unbiased = moments.y * (rows / (rows - 1.0f));
  const float mean = p.running_mean[channel], variance = p.running_var[channel];
  p.running_mean[channel] = mean + p.momentum * (moments.x - mean);
  p.running_var[channel] = variance + p.momentum * (unbiased - variance);
}

template <typename T, int LANES>
__device__ __forceinline__ void store_normalized(const Tile<T, LANES>& tile, const Forward<T>& p) {
  float mean[kWide], scale[kWide], low[kWide];
  tile.vector(0, mean), tile.vector(1, scale), tile.vector(2, low);
  const float floor = p.relu ? 0.0f : -INFINITY;
  const auto use = [&](int sweep, const uint4(&words)[2]) {
    if (!tile.inside(sweep)) return;
    float values[kWide], added[kWide];
    unpack_word<T>(words[0], values);
    unpack_word<T>(words[1], added);
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      float y = normalized(values[i] - mean[i], scale[i], low[i]);
      if (p.residual) y += added[i];
      values[i] = y < floor ? floor : y;  // what is not a number stays so
    }
    tile.store(p.out, sweep, pack_word<T>(values));
  };
  in_batches<2>(
      tile.held, tile.sweeps,
      [&](int k, int sweep) {
        return k == 0 ? tile.load(p.x, sweep) : p.residual ? tile.load(p.residual, sweep) : no_word();
      },
      use);
  fm::copy_async_wait<0>();
  in_batches<2>(
      0, tile.held,
      [&](int k, int sweep) { return k == 0 || p.residual ? tile.kept(k, sweep) : no_word(); }, use);
}

template <typename T, int LANES>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const Forward<T> p) {
  fm::wait_for_previous_grid();
  fm::launch_dependents();
  const Tile<T, LANES> tile(p.rows, p.channels, p.held);
  copy_forward(tile, p);
  const float weight = tile.owns ? p.weight[tile.channel] : 0.0f, bias = tile.owns ? p.bias[tile.channel] : 0.0f;
  find_moments(tile, p);
  meet_cluster(tile);
  float2 moments{};
  if (threadIdx.x < Tile<T, LANES>::kChannels) {
    moments = join_moments(tile, p.rows);
    float(&vectors)[4][Tile<T, LANES>::kChannels] = tile.shared().vectors;
    vectors[0][threadIdx.x] = moments.x;
    vectors[1][threadIdx.x] = weight * rsqrtf(moments.y + p.epsilon);
    vectors[2][threadIdx.x] = bias;
  }
  __syncthreads();
  // This block has read what it needs of the others, which may go on to their end when all have.
  fm::cluster_arrive<false>();
  store_normalized(tile, p);
  // Not sooner: nobody shall wait for the averages to come from memory.
  if (tile.rank == 0 && tile.owns) store_moments(p, tile.channel, moments);
  if (p.batches && blockIdx.x == 0 && threadIdx.x == 0) *p.batches += 1;
  fm::cluster_wait();
}

// Of a channel, what x - mean is multiplied by, and what it becomes: one over the deviation, and that times the weight.
struct Scales {
  float inverse, scale;
};

// The channels' means, scales and biases go to shared memory.
template <typename T, int LANES>
__device__ __forceinline__ Scales store_channels(const Tile<T, LANES>& tile, const Backward<T>& p) {
  Scales found{1.0f, 0.0f};
  if (threadIdx.x >= Tile<T, LANES>::kChannels) return found;
  float mean = 0.0f, bias = 0.0f;
  if (tile.owns) {
    found.inverse = rsqrtf(p.variance[tile.channel] + p.epsilon);
    found.scale = p.weight[tile.channel] * found.inverse;
    mean = p.mean[tile.channel], bias = p.bias[tile.channel];
  }
  float(&vectors)[4][Tile<T, LANES>::kChannels] = tile.shared().vectors;
  vectors[0][threadIdx.x] = mean, vectors[1][threadIdx.x] = found.scale, vectors[2][threadIdx.x] = bias;
  return found;
}

// The gradient in front of the ReLU. `words`: grad, x, more, out. `apart`: x - mean.
template <typename T>
__device__ __forceinline__ void gradient_before(const Backward<T>& p, const uint4 (&words)[4],
                                                const float (&apart)[kWide], const float (&scale)[kWide],
                                                const float (&low)[kWide], float (&g)[kWide]) {
  float other[kWide];
  unpack_word<T>(words[0], g);
  if (p.more) {
    unpack_word<T>(words[2], other);
#pragma unroll
    for (int i = 0; i < kWide; ++i) g[i] += other[i];
  }
  if (!p.relu) return;
  if (p.out) {
    unpack_word<T>(words[3], other);
  } else {
#pragma unroll
    for (int i = 0; i < kWide; ++i) other[i] = normalized(apart[i], scale[i], low[i]);
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i) g[i] = other[i] > 0.0f ? g[i] : 0.0f;
}

template <typename T, int LANES>
__device__ __forceinline__ void copy_backward(const Tile<T, LANES>& tile, const Backward<T>& p) {
  int sweep = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    for (const int end = tile.group_end(group); sweep < end; ++sweep) {
      tile.copy(0, p.grad, sweep), tile.copy(1, p.x, sweep);
      if (p.more) tile.copy(2, p.more, sweep);
      if (p.out) tile.copy(p.more ? 3 : 2, p.out, sweep);
    }
    fm::copy_async_commit();
  }
  fm::copy_async_commit();
}

// The block's sums of the gradient in front of the ReLU and of it times x - mean go to where the cluster finds them.
// That gradient, rounded as one of its tensors is, takes the place of `grad` in shared memory; of the other rows it is
// stored as `behind`, if asked for.
template <typename T, int LANES>
__device__ __forceinline__ void find_sums(const Tile<T, LANES>& tile, const Backward<T>& p) {
  float mean[kWide], scale[kWide], low[kWide], sums[2 * kWide] = {};
  tile.vector(0, mean), tile.vector(1, scale), tile.vector(2, low);
  const bool changed = p.more || p.relu;
  const auto add = [&](int sweep, const uint4(&words)[4]) {
    if (!tile.inside(sweep)) return;
    float apart[kWide], g[kWide];
    unpack_word<T>(words[1], apart);
#pragma unroll
    for (int i = 0; i < kWide; ++i) apart[i] -= mean[i];
    gradient_before(p, words, apart, scale, low, g);
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      sums[i] += g[i];
      sums[kWide + i] = __fmaf_rn(g[i], apart[i], sums[kWide + i]);
    }
    if (sweep < tile.held) {
      if (changed) tile.slot(0, sweep) = pack_word<T>(g);
    } else if (p.behind) {
      tile.store(p.behind, sweep, pack_word<T>(g));
    }
  };
  const T* const from[4] = {p.grad, p.x, p.more, p.out};
  in_batches<4>(
      tile.held, tile.sweeps, [&](int k, int sweep) { return from[k] ? tile.load(from[k], sweep) : no_word(); }, add);
  as_they_arrive(tile, [&](int begin, int end) {
    in_batches<4>(
        begin, end,
        [&](int k, int sweep) { return from[k] ? tile.kept(k == 3 && !p.more ? 2 : k, sweep) : no_word(); }, add);
  });
  store_sums(tile, sums);
  __syncthreads();
  if (threadIdx.x < Tile<T, LANES>::kChannels) {
    tile.shared().found[threadIdx.x] = make_float2(sum_of_block(tile, 0), sum_of_block(tile, 1));
  }
}

template <typename T, int LANES>
__device__ __forceinline__ void store_gradient(const Tile<T, LANES>& tile, const Backward<T>& p) {
  float mean[kWide], scale[kWide], common[kWide], slope[kWide];
  tile.vector(0, mean), tile.vector(1, scale), tile.vector(2, common), tile.vector(3, slope);
  const auto store = [&](int sweep, const float(&g)[kWide], const uint4& word) {
    float values[kWide];
    unpack_word<T>(word, values);
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      values[i] = (g[i] - common[i] - (values[i] - mean[i]) * slope[i]) * scale[i];
    }
    tile.store(p.grad_x, sweep, pack_word<T>(values));
  };
  in_batches<2>(0, tile.held, [&](int k, int sweep) { return tile.kept(k, sweep); },
                [&](int sweep, const uint4(&words)[2]) {
                  if (!tile.inside(sweep)) return;
                  // Not sooner: the barrier of the cluster waits for stores.
                  if (p.behind) tile.store(p.behind, sweep, words[0]);
                  float g[kWide];
                  unpack_word<T>(words[0], g);
                  store(sweep, g, words[1]);
                });
  if (tile.held == tile.sweeps) return;
  // Of the other rows that gradient is there where it was stored; else it is made once more, and rounded as above.
  Backward<T> again = p;
  if (p.behind) again.grad = p.behind, again.more = nullptr, again.relu = false;
  again.out = nullptr;
  const float* const bias = p.bias + (tile.channel - static_cast<int>(threadIdx.x)) + threadIdx.x % LANES * kWide;
  float low[kWide];
#pragma unroll
  for (int i = 0; i < kWide; ++i) low[i] = again.relu && tile.known ? bias[i] : 0.0f;
  const T* const from[4] = {again.grad, again.x, again.more, nullptr};
  in_batches<4>(
      tile.held, tile.sweeps, [&](int k, int sweep) { return from[k] ? tile.load(from[k], sweep) : no_word(); },
      [&](int sweep, const uint4(&words)[4]) {
        if (!tile.inside(sweep)) return;
        float apart[kWide], g[kWide];
        unpack_word<T>(words[1], apart);
#pragma unroll
        for (int i = 0; i < kWide; ++i) apart[i] -= mean[i];
        gradient_before(again, words, apart, scale, low, g);
        unpack_word<T>(pack_word<T>(g), g);
        store(sweep, g, words[1]);
      });
}

template <typename T, int LANES>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const Backward<T> p) {
  fm::wait_for_previous_grid();
  fm::launch_dependents();
  const Tile<T, LANES> tile(p.rows, p.channels, p.held);
  copy_backward(tile, p);
  const Scales scales = store_channels(tile, p);
  __syncthreads();
  find_sums(tile, p);
  meet_cluster(tile);
  if (threadIdx.x < Tile<T, LANES>::kChannels) {
    float2 found[kMaxCluster];
    read_cluster(tile, found);
    float all = 0.0f, times = 0.0f;
#pragma unroll
    for (int rank = 0; rank < kMaxCluster; ++rank) all += found[rank].x, times += found[rank].y;
    const float rows = static_cast<float>(p.rows), grad_weight = times * scales.inverse;
    float(&vectors)[4][Tile<T, LANES>::kChannels] = tile.shared().vectors;
    vectors[2][threadIdx.x] = all / rows, vectors[3][threadIdx.x] = grad_weight * scales.inverse / rows;
    if (tile.rank == 0 && tile.owns) p.grad_bias[tile.channel] = all, p.grad_weight[tile.channel] = grad_weight;
  }
  __syncthreads();
  fm::cluster_arrive<false>();  // as above
  store_gradient(tile, p);
  fm::cluster_wait();
}

}  // namespace fm_batch_norm
