// Results that are repeated to a finer resolution: scale x scale positions for each, with a residual of their own.
#pragma once

#include "tile.cuh"

namespace fm_convolution {

#ifdef FM_HOPPER

// What a thread stores of the eight channels of its rows: where a block has fewer rows than a turn, several threads
// share a row's positions, and each asks for the residual of kAtOnce of them before it stores one. The share must be of
// `several`.
template <typename T, int COLUMNS, bool SHARED>
class Repeats {
 public:
  using Mine = Share<T, COLUMNS, SHARED>;

  // row: the first of the block's own.
  __device__ __forceinline__ Repeats(const Mine& mine, const Output<T>& p, const Inputs& in, int row, int own)
      : mine_(mine), p_(p), in_(in), row_(row + mine.first), own_(own), channel_(mine.offset % p.channels),
        count_(p.scale * p.scale), across_(static_cast<int64_t>(in.width) * p.scale) {
    const int rows = min(own, Mine::kStep);
    share_ = threadIdx.x % kWarpgroup / Mine::kEighths / rows;
    shares_ = Mine::kStep / rows;
  }

  // The first residuals, asked for in front of the products.
  __device__ __forceinline__ void load_residual() {
    if (mine_.turns > 0) load(corner(0), share_);
  }

  // Adds the parts of `split` blocks in their order, the bias and each position's residual, applies ReLU and stores.
  __device__ __forceinline__ void finish(fm::SharedAddress parts, int split) {
#pragma unroll 1
    for (int turn = 0; turn < mine_.turns; turn++) {
      float total[8];
      mine_.add_parts(total, parts, own_, split, turn);
      const int64_t first = corner(turn);
#pragma unroll 1
      for (int from = share_; from < count_; from += kAtOnce * shares_) {
        if (turn > 0 || from > share_) load(first, from);
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
          const int i = from + k * shares_;
          if (i < count_) *reinterpret_cast<uint4*>(p_.out + at(first, i)) = mine_.result(total, residual_[k], p_);
        }
      }
    }
  }

 private:
  static constexpr int kAtOnce = 8;

  const Mine& mine_;
  const Output<T>& p_;
  const Inputs& in_;
  int row_, own_, channel_;
  int count_, share_, shares_;  // positions of a row, the thread's first, and how many threads share them
  int64_t across_;              // positions of a line of the output
  uint4 residual_[kAtOnce];

  // Of a turn's row in the output: the first of its positions.
  __device__ __forceinline__ int64_t corner(int turn) const {
    const unsigned position = row_ + turn * Mine::kStep, down = position / in_.width, x = position - down * in_.width;
    return (static_cast<int64_t>(down) * p_.scale * across_ + x * p_.scale) * p_.channels + channel_;
  }

  __device__ __forceinline__ int64_t at(int64_t corner, unsigned i) const {
    const unsigned down = i / p_.scale;
    return corner + (down * across_ + (i - down * p_.scale)) * p_.channels;
  }

  __device__ __forceinline__ void load(int64_t corner, int from) {
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int i = from + k * shares_;
      residual_[k] = {};
      if (p_.residual != nullptr && i < count_) residual_[k] = fm::load_coherent(p_.residual + at(corner, i));
    }
  }
};

#endif

}  // namespace fm_convolution
