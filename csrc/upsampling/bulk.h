// Which cut of a matrix the bulk kernel takes, and its launch. Host code, like launch.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "bulk.cuh"
#include "stream.h"

namespace fm_upsampling {

constexpr int kSharedPerMultiprocessor = 228 * 1024, kSharedOfSystem = 1024;  // bytes, the latter per block

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a block in shared memory, shifted as they are in memory.
template <typename T>
int64_t bulk_out_bytes(const Cut& cut) {
  return (cut.block_rows * kPoint * static_cast<int64_t>(sizeof(T)) + 2 * kGranule - 1) / kGranule * kGranule;
}

template <typename T>
int64_t bulk_bytes(const Cut& cut, int64_t stages) {
  return kBarrierBytes + stages * bulk_stage_bytes(static_cast<uint32_t>(cut.places), sizeof(T)) +
         std::min<int64_t>(stages, 2) * bulk_out_bytes<T>(cut);
}

// `hopper`: the device has the copy engine.
template <typename T>
bool can_bulk(const Problem<T>& p, const Cut& cut, int stages, bool hopper, int64_t shared_limit) {
  const bool points = p.channels == kPoint && p.channel_stride == 1 && p.token_stride == kPoint;
  return cut.kind == kBulkCut && hopper && points && stages >= 2 && stages <= kBulkStages && bulk_bytes<T>(cut, stages) <= shared_limit;
}

// Blocks that share a multiprocessor.
template <typename T>
int64_t bulk_residents(const Cut& cut, int stages) {
  const int64_t registers = std::max<int64_t>(1, bulk_threads(static_cast<int>(cut.slots)) / cut.threads);
  const int64_t shared = kSharedPerMultiprocessor / (bulk_bytes<T>(cut, stages) + kSharedOfSystem);
  return std::max<int64_t>(1, std::min(registers, shared));
}

template <typename T, typename Launch>
class BulkLauncher {
 public:
  BulkLauncher(const Problem<T>& problem, const Cuts& cuts, const Cut& cut, int stages, int multiprocessors, bool early,
               const Launch& launch)
      : p_(problem),
        cuts_(cuts),
        cut_(cut),
        stages_(stages),
        multiprocessors_(multiprocessors),
        early_(early),
        launch_(launch) {}

  void run(bool three_each) const {
    if (three_each) {
      switch (cut_.slots) {
        case 3: return start<3, 3>();
        case 6: return start<3, 6>();
        case 9: return start<3, 9>();
        case 12: return start<3, 12>();
        case 18: return start<3, 18>();
        case 27: return start<3, 27>();
      }
    } else {
      switch (cut_.slots) {
        case 8: return start<kAnyLength, 8>();
        case 12: return start<kAnyLength, 12>();
        case 16: return start<kAnyLength, 16>();
        case 18: return start<kAnyLength, 18>();
        case 24: return start<kAnyLength, 24>();
      }
    }
    throw std::runtime_error("upsample_native: there is no kernel for a cut with so many slots");
  }

 private:
  // Blocks that fit the device at once, each with an equal share of the batch. Of several ways the one that leaves the
  // least to the busiest multiprocessor, with few blocks: there the next kernel can start up.
  int64_t elements_per_block() const {
    int64_t best = p_.batch, least = std::numeric_limits<int64_t>::max();
    for (int64_t residents = 1; residents <= bulk_residents<T>(cut_, stages_); ++residents) {
      const int64_t groups = std::max<int64_t>(1, multiprocessors_ * residents / cut_.blocks);
      const int64_t each = ceil_div(p_.batch, groups);
      const int64_t work = ceil_div(ceil_div(p_.batch, each) * cut_.blocks, multiprocessors_) * each;
      if (work < least) best = each, least = work;
    }
    return best;
  }

  template <int LENGTH, int SLOTS>
  void start() const {
    const int64_t each = elements_per_block();
    const int64_t groups = ceil_div(p_.batch, each);
    if (each > std::numeric_limits<int32_t>::max()) {
      throw std::runtime_error("upsample_native: the batch is too large");
    }
    const auto stages = static_cast<int32_t>(std::min<int64_t>(stages_, each));
    const Bulk bulk{cuts_.tables + cut_.offset,
                    static_cast<int32_t>(cut_.block_words),
                    static_cast<int32_t>(cut_.places),
                    static_cast<int32_t>(bulk_out_bytes<T>(cut_)),
                    stages,
                    static_cast<int32_t>(each)};
    launch_.template operator()<bulk_kernel<T, LENGTH, SLOTS>>(
        p_, bulk, static_cast<uint32_t>(cut_.blocks), static_cast<uint32_t>(groups), static_cast<int>(cut_.threads),
        static_cast<uint32_t>(bulk_bytes<T>(cut_, stages)), early_);
  }

  const Problem<T>& p_;
  const Cuts& cuts_;
  const Cut& cut_;
  int stages_, multiprocessors_;
  bool early_;
  const Launch& launch_;
};

}  // namespace fm_upsampling
