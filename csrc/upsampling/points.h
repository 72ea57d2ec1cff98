// Which cut of a matrix the kernel for points takes, and its launch. Host code, like launch.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include "points.cuh"

namespace fm_upsampling {

constexpr int kSharedPerMultiprocessor = 228 * 1024, kSharedOfSystem = 1024;  // bytes, the latter per block

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes of one cut, as fastmetro_kernels/points.py lists them.
struct Cut {
  int64_t offset, blocks, block_rows, threads, slots, places, block_words;
};

// The cuts that a matrix has, and their tables on the device.
struct Cuts {
  const uint32_t* tables = nullptr;
  std::span<const Cut> list = {};
};

// Bytes of shared memory: a pack that is gathered from and, where there is more than one, a pack that is copied to.
template <typename T>
int64_t point_bytes(const Cut& cut, int batch_tile, int64_t packs) {
  return (packs > 1 ? kStageBytes : 0) + (cut.places + kZeroPlaces) * kPoint * batch_tile * static_cast<int64_t>(sizeof(T));
}

// `batch_tile` elements of a pack fill the 8 or 16 bytes that a lane reads at once. Offsets are 32 bits wide.
template <typename T>
bool can_take_points(const Problem<T>& p, const Cut& cut, int batch_tile, int64_t shared_limit) {
  constexpr int64_t most = std::numeric_limits<uint32_t>::max() / sizeof(T);
  const int64_t word = batch_tile * static_cast<int64_t>(sizeof(T));
  if (word != 8 && word != 16) return false;
  return p.channels == kPoint && p.batch_stride <= most &&
         cut.threads <= point_threads(static_cast<int>(cut.slots), batch_tile, false) &&
         p.rows * kPoint <= most && p.batch <= std::numeric_limits<int32_t>::max() &&
         point_bytes<T>(cut, batch_tile, 1) <= kStageBytes &&
         point_bytes<T>(cut, batch_tile, 2) <= shared_limit;
}

template <typename T, typename Launch>
class PointLauncher {
 public:
  PointLauncher(const Problem<T>& problem, const Cuts& cuts, const Cut& cut, int multiprocessors, bool early,
                const Launch& launch)
      : p_(problem), cuts_(cuts), cut_(cut), multiprocessors_(multiprocessors), early_(early), launch_(launch) {}

  // `parts`: lanes that would share a row in the other kernels.
  void run(int parts, int batch_tile) const {
    if (batch_tile * sizeof(T) == 16) return with_pack<16 / sizeof(T)>(parts);
    with_pack<8 / sizeof(T)>(parts);
  }

 private:
  template <int PACK>
  void with_pack(int parts) const {
    if (cut_.slots == 3) return start<PACK, 3, 1, 3>();
    switch (parts) {
      case 1: return start<PACK, kAnyLength, 1, kPointSlots>();
      case 2: return start<PACK, kAnyLength, 2, kPointSlots>();
      default: return start<PACK, kAnyLength, 4, kPointSlots>();
    }
  }

  // Blocks that fit the device at once, each with an equal share of the batch. Of several ways the one that leaves the
  // least to the busiest multiprocessor, with many blocks, which hide each other's waiting.
  int64_t packs_per_block(int64_t packs, int64_t threads, int64_t bytes) const {
    const int64_t residents =
        std::min<int64_t>(threads / cut_.threads, kSharedPerMultiprocessor / (bytes + kSharedOfSystem));
    int64_t best = packs, least = std::numeric_limits<int64_t>::max();
    for (int64_t resident = 1; resident <= std::max<int64_t>(1, residents); ++resident) {
      const int64_t groups = std::max<int64_t>(1, multiprocessors_ * resident / cut_.blocks);
      const int64_t each = ceil_div(packs, groups);
      const int64_t work = ceil_div(ceil_div(packs, each) * cut_.blocks, multiprocessors_) * each;
      if (work <= least) best = each, least = work;
    }
    return best;
  }

  template <int PACK, int LENGTH, int PARTS, int SLOTS>
  void start() const {
    const int64_t packs = ceil_div(p_.batch, PACK);
    const int64_t each = packs_per_block(packs, point_threads(SLOTS, PACK, false),
                                         point_bytes<T>(cut_, PACK, packs));
    if (each > 1) return start<PACK, LENGTH, PARTS, SLOTS, false>(packs, each);
    start<PACK, LENGTH, PARTS, SLOTS, true>(packs, 1);
  }

  template <int PACK, int LENGTH, int PARTS, int SLOTS, bool ONE>
  void start(int64_t packs, int64_t each) const {
    const Points points{cuts_.tables + cut_.offset, static_cast<int32_t>(cut_.block_words),
                        static_cast<int32_t>(cut_.block_rows), static_cast<int32_t>(cut_.places),
                        static_cast<int32_t>(each)};
    launch_.template operator()<points_kernel<T, PACK, LENGTH, PARTS, SLOTS, ONE>>(
        p_, points, static_cast<uint32_t>(cut_.blocks), static_cast<uint32_t>(ceil_div(packs, each)),
        static_cast<int>(cut_.threads), static_cast<uint32_t>(point_bytes<T>(cut_, PACK, each)), early_);
  }

  const Problem<T>& p_;
  const Cuts& cuts_;
  const Cut& cut_;
  int multiprocessors_;
  bool early_;
  const Launch& launch_;
};

}  // namespace fm_upsampling
