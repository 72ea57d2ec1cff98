// Which cut of a matrix the streaming kernel takes, and its launch. Host code, like launch.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>

#include "stream.cuh"

namespace fm_upsampling {

// Sizes of one cut, as fastmetro_kernels/streams.py and bulk.py list them.
struct Cut {
  int64_t offset, blocks, block_rows, threads, slots, tokens, places, block_words;
  int64_t kind;  // 0: of stream.cuh; 1: of bulk.cuh, where tokens are segments
};

// The cuts that a matrix has, and their tables on the device.
struct Cuts {
  const uint32_t* tables = nullptr;
  std::span<const Cut> list = {};
};

constexpr int kStreamCut = 0, kBulkCut = 1;

constexpr int stream_copies(int length) { return length == 3 ? 6 : 8; }

// Blocks of a cut that share a multiprocessor; the registers decide.
inline int64_t stream_residents(const Cut& cut) { return std::max<int64_t>(1, kStreamThreads / cut.threads); }

// Shared memory: twice what is copied of x and twice what is written, or once where there is no next pack.
template <typename T>
int64_t stream_bytes(const Cut& cut, bool three_each, int batch_tile, int64_t packs) {
  const int64_t rows = three_each ? 0 : cut.block_rows;
  return std::min<int64_t>(packs, 2) * (cut.places + 1 + rows) * kPoint * batch_tile * sizeof(T);
}

template <typename T>
bool can_stream(const Problem<T>& p, const Cut& cut, bool three_each, int batch_tile, int64_t shared_limit) {
  const bool near = p.token_stride <= static_cast<int64_t>(std::numeric_limits<uint32_t>::max() / sizeof(T));
  return cut.kind == kStreamCut && near && p.channels == kPoint && stream_bytes<T>(cut, three_each, batch_tile, 2) <= shared_limit;
}

template <typename T, typename Launch>
class StreamLauncher {
 public:
  StreamLauncher(const Problem<T>& problem, const Cuts& cuts, const Cut& cut, int multiprocessors, bool early,
                 const Launch& launch)
      : p_(problem), cuts_(cuts), cut_(cut), multiprocessors_(multiprocessors), early_(early), launch_(launch) {}

  // `parts`: lanes that share a row; `three_each`: every row has exactly three entries.
  void run(bool three_each, int parts, int batch_tile) const {
    constexpr int word = 4 / sizeof(T);
    if (batch_tile == word) return with_batch<word>(three_each, parts);
    if constexpr (word == 1) {
      if (batch_tile == 2) return with_batch<2>(three_each, parts);
    }
    throw std::runtime_error("upsample_native: there is no kernel for tiles of so many batch elements");
  }

 private:
  template <int BATCH>
  void with_batch(bool three_each, int parts) const {
    if (three_each) {
      switch (cut_.slots) {
        case 3: return start<3, 1, 3, BATCH>();
        case 6: return start<3, 1, 6, BATCH>();
        case 9: return start<3, 1, 9, BATCH>();
      }
      refuse();
    }
    switch (parts) {
      case 1: return with_parts<1, BATCH>();
      case 2: return with_parts<2, BATCH>();
      case 4: return with_parts<4, BATCH>();
      default: return with_parts<16, BATCH>();
    }
  }

  template <int PARTS, int BATCH>
  void with_parts() const {
    switch (cut_.slots) {
      case 8: return start<kAnyLength, PARTS, 8, BATCH>();
      case 12: return start<kAnyLength, PARTS, 12, BATCH>();
      case 16: return start<kAnyLength, PARTS, 16, BATCH>();
    }
    refuse();
  }

  // As many blocks as fit the device at once, each with an equal share of the batch.
  template <int LENGTH, int PARTS, int SLOTS, int BATCH>
  void start() const {
    const int64_t packs = (p_.batch + BATCH - 1) / BATCH;
    const int64_t most = std::max<int64_t>(1, multiprocessors_ * stream_residents(cut_) / cut_.blocks);
    const int64_t each = (packs + most - 1) / most;
    const int64_t groups = (packs + each - 1) / each;
    if (each > std::numeric_limits<int32_t>::max()) {
      throw std::runtime_error("upsample_native: the batch is too large");
    }
    const Stream stream{cuts_.tables + cut_.offset,
                        static_cast<int32_t>(cut_.block_words),
                        static_cast<int32_t>(cut_.block_rows),
                        static_cast<int32_t>(cut_.tokens),
                        static_cast<int32_t>(cut_.places),
                        static_cast<int32_t>(each)};
    launch_.template operator()<stream_kernel<T, BATCH, LENGTH, PARTS, SLOTS, stream_copies(LENGTH)>>(
        p_, stream, static_cast<uint32_t>(cut_.blocks), static_cast<uint32_t>(groups), static_cast<int>(cut_.threads),
        static_cast<uint32_t>(stream_bytes<T>(cut_, LENGTH == 3, BATCH, each)), early_);
  }

  [[noreturn]] static void refuse() {
    throw std::runtime_error("upsample_native: there is no kernel for a cut with so many slots");
  }

  const Problem<T>& p_;
  const Cuts& cuts_;
  const Cut& cut_;
  int multiprocessors_;
  bool early_;
  const Launch& launch_;
};

}  // namespace fm_upsampling
