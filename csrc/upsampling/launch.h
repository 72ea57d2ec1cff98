// Which kernel runs, in which configuration, and its launch. Host code without torch and without the CUDA runtime, so
// that the emulator's tests take the same way to the kernels as the op does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "kernels.cuh"
#include "points.h"

namespace fm_upsampling {

enum class Kernel : int { gather, staged, points };

struct Plan {
  Kernel kernel;
  int batch_tile;  // batch elements per thread; of the points kernel: in a word
  int threads;     // of a block; 0: as many as spread the work evenly
  bool early;      // programmatic dependent launch: the kernel starts up while the one before it still runs
  int cut = 0;     // of the points kernel, which has its threads from there
};

struct Device {
  int multiprocessors;
  int shared_limit;   // bytes that a block may ask for
  bool early_launch;  // compute capability 9.0 or newer
};

// Offsets within one batch element of x and of out, and the positions of one tile.
template <typename T>
bool fits_32_bits(const Problem<T>& p) {
  const int64_t x_extent = (p.tokens - 1) * p.token_stride + (p.channels - 1) * p.channel_stride;
  const int64_t limit = std::numeric_limits<int32_t>::max() - kMaxThreads;
  return x_extent <= limit && p.rows * p.channels <= limit && p.tokens * p.channels <= limit;
}

// Whether packs of 16 bytes can be read from x and written to out.
template <typename T>
bool packs_fit(const Problem<T>& p) {
  constexpr int64_t pack = 16 / sizeof(T);
  return p.channel_stride == 1 && p.channels % pack == 0 && p.batch_stride % pack == 0 && p.token_stride % pack == 0 &&
         reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

template <typename T>
bool can_stage(const Problem<T>& p, int batch_tile, const Device& device) {
  const int64_t bytes = p.tokens * p.channels * static_cast<int64_t>(sizeof(T)) * batch_tile;
  return fits_32_bits(p) && (p.channels == 1 || p.channel_stride == 1) &&
         (p.tokens <= 1 || p.token_stride == p.channels) && bytes <= device.shared_limit;
}

// Lanes that share a row. Depends on the matrix alone, because it decides in which order a row is added up.
inline int parts_of(int64_t entries, int64_t rows) {
  const int64_t per_row = (entries + rows - 1) / rows;
  return per_row <= 4 ? 1 : per_row <= 8 ? 2 : per_row <= 32 ? 4 : 16;
}

// The table of configurations, the fastest on an H200 (bench/results/upsampling_points_h200.json).
// Points and a batch that fills the GPU take the kernel for them, with the widest reads of shared memory and the fewest
// blocks (they read the least) with which there is work for every multiprocessor. Where a block has one pack, two blocks
// share a multiprocessor: so reads of 16 bytes need more blocks before they pay. Other channels are staged where that
// fills the GPU too. What is left is gathered: rows of three entries leave room for eight elements under way in a
// thread, longer ones for four.
template <typename T>
Plan choose_plan(const Problem<T>& p, bool three_each, const Cuts& cuts, const Device& device) {
  const bool early = device.early_launch;
  constexpr int word = 4 / sizeof(T);  // batch elements in 4 bytes
  const int64_t enough = 2 * device.multiprocessors / 3;
  const int count = static_cast<int>(cuts.list.size());
  if (fits_32_bits(p)) {
    for (const int batch_tile : {4 * word, 2 * word}) {
      const int64_t blocks = device.multiprocessors * (batch_tile == 4 * word ? 15 : 9) / 10;
      for (int cut = 0; cut < count; ++cut) {
        if (cuts.list[cut].blocks * ceil_div(p.batch, batch_tile) >= blocks &&
            can_take_points(p, cuts.list[cut], batch_tile, device.shared_limit)) {
          return {Kernel::points, batch_tile, 0, early, cut};
        }
      }
    }
  }
  if (p.batch >= enough * word && !packs_fit(p)) {
    for (const int batch_tile : {4 * word, 2 * word, word}) {
      if (can_stage(p, batch_tile, device)) return {Kernel::staged, batch_tile, kMaxThreads, early};
    }
  }
  if (p.batch == 1) return {Kernel::gather, 1, 0, early};
  return {Kernel::gather, three_each && p.batch >= 16 ? 8 : 4, 0, early};
}

// Threads of a block of gather_kernel, where `lanes` lanes are needed for each of `tiles` tiles of batch elements:
// large blocks share more of what they read; but where there are only a few, no multiprocessor may get more of them
// than another.
inline int gather_threads(int64_t lanes, int64_t tiles, int most, const Device& device) {
  constexpr int64_t few = 2048;  // lanes per multiprocessor
  if (lanes * tiles <= few * device.multiprocessors) {
    for (int rounds = 1; rounds <= 8; ++rounds) {
      const int64_t blocks = std::max<int64_t>(1, rounds * device.multiprocessors / tiles);
      const int64_t threads = ceil_div(ceil_div(lanes, blocks), 32) * 32;
      if (threads <= most) return static_cast<int>(std::max<int64_t>(threads, 64));
    }
  }
  return std::min(most, 512);
}

// Into how many pieces staged_kernel cuts the positions: each piece copies x again, but idle multiprocessors cost more.
// Costs are passes through the memory pipe of a multiprocessor.
template <typename T>
int64_t staged_pieces(const Problem<T>& p, int64_t entries, int batch_tile, const Device& device) {
  const int64_t groups = ceil_div(p.batch, batch_tile);
  const int64_t copy = 2 * p.tokens * p.channels * batch_tile;
  const int64_t gather = p.channels * (2 * entries + (2 * entries + p.rows) * batch_tile);
  int64_t best = 1, best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t pieces = 1; pieces <= 32; ++pieces) {
    const int64_t cost = ceil_div(groups * pieces, device.multiprocessors) * (copy + gather / pieces);
    if (cost < best_cost) best = pieces, best_cost = cost;
  }
  return best;
}

// Calls launch.template operator()<KERNEL>(problem, grid, blocks.x, blocks.y, threads, shared_bytes, early).
template <typename T, typename Launch>
class Launcher {
 public:
  Launcher(const Problem<T>& problem, int64_t entries, bool three_each, const Cuts& cuts, const Plan& plan,
           const Device& device, const Launch& launch)
      : p_(problem),
        entries_(entries),
        three_each_(three_each),
        cuts_(cuts),
        plan_(plan),
        device_(device),
        launch_(launch) {}

  // `three_each`: every row has exactly three entries.
  void run() const {
    if (p_.batch == 0 || p_.rows == 0 || p_.channels == 0) return;
    if (plan_.kernel == Kernel::points) return points();
    if (!fits_32_bits(p_)) return far();
    switch (parts_of(entries_, p_.rows)) {
      case 1: return three_each_ ? with_rows<3, 1>() : with_rows<kAnyLength, 1>();
      case 2: return with_rows<kAnyLength, 2>();
      case 4: return with_rows<kAnyLength, 4>();
      default: return with_rows<kAnyLength, 16>();
    }
  }

 private:
  void points() const {
    if (plan_.cut >= static_cast<int>(cuts_.list.size()) || !fits_32_bits(p_) ||
        !can_take_points(p_, cuts_.list[plan_.cut], plan_.batch_tile, device_.shared_limit)) {
      throw std::runtime_error("upsample_native: there is no cut of this matrix for such points");
    }
    PointLauncher(p_, cuts_, cuts_.list[plan_.cut], device_.multiprocessors, plan_.early, launch_)
        .run(parts_of(entries_, p_.rows), plan_.batch_tile);
  }

  template <int LENGTH, int PARTS>
  void with_rows() const {
    if (plan_.kernel == Kernel::staged) return staged<LENGTH, PARTS>();
    if (packs_fit(p_)) return gather<16 / sizeof(T), LENGTH, PARTS, 4, uint32_t>();
    switch (plan_.batch_tile) {
      case 1: return gather<1, LENGTH, PARTS, 1, uint32_t>();
      case 4: return gather<1, LENGTH, PARTS, 4, uint32_t>();
      case 8: return gather<1, LENGTH, PARTS, 8, uint32_t>();
    }
    refuse();
  }

  void far() const {
    switch (parts_of(entries_, p_.rows)) {
      case 1: return gather<1, kAnyLength, 1, 1, int64_t>();
      case 2: return gather<1, kAnyLength, 2, 1, int64_t>();
      case 4: return gather<1, kAnyLength, 4, 1, int64_t>();
      default: return gather<1, kAnyLength, 16, 1, int64_t>();
    }
  }

  template <int VEC, int LENGTH, int PARTS, int BATCH, typename Index>
  void gather() const {
    const int64_t packs = p_.channels / VEC;
    const int64_t lanes = p_.rows * packs * PARTS;
    constexpr int most = max_threads(VEC, BATCH);
    const int64_t tiles = ceil_div(p_.batch, BATCH);
    const int threads =
        plan_.threads > 0 ? std::min(plan_.threads, most) : gather_threads(lanes, tiles, most, device_);
    start<gather_kernel<T, VEC, LENGTH, PARTS, BATCH, Index>, Index>(p_.rows * packs, packs, threads / PARTS, BATCH,
                                                                     threads, 0);
  }

  template <int LENGTH, int PARTS>
  void staged() const {
    constexpr int word = 4 / sizeof(T);
    if (!can_stage(p_, plan_.batch_tile, device_)) {
      throw std::runtime_error("upsample_native: x does not fit in shared memory as it is");
    }
    switch (plan_.batch_tile / word) {
      case 1: return staged<LENGTH, PARTS, word>();
      case 2: return staged<LENGTH, PARTS, 2 * word>();
      case 4: return staged<LENGTH, PARTS, 4 * word>();
    }
    refuse();
  }

  template <int LENGTH, int PARTS, int BATCH>
  void staged() const {
    const int64_t positions = p_.rows * p_.channels;
    const int64_t pieces = staged_pieces(p_, entries_, BATCH, device_);
    start<staged_kernel<T, LENGTH, PARTS, BATCH>, uint32_t>(positions, p_.channels, ceil_div(positions, pieces), BATCH,
                                                            plan_.threads > 0 ? plan_.threads : kMaxThreads,
                                                            p_.tokens * p_.channels * sizeof(T) * BATCH);
  }

  // One launch, unless there are half a million batch elements.
  template <auto KERNEL, typename Index>
  void start(int64_t positions, int64_t packs, int64_t block_positions, int batch_tile, int threads,
             int64_t shared_bytes) const {
    const int64_t blocks = ceil_div(positions, block_positions);
    if (blocks > std::numeric_limits<int32_t>::max()) {
      throw std::runtime_error("upsample_native: the output is too large: one batch element needs 2^31 blocks");
    }
    const Grid<Index> grid{static_cast<Index>(positions), static_cast<Index>(block_positions), Divisor<Index>(packs)};
    constexpr int64_t limit = 65535;  // of blockIdx.y
    for (int64_t first = 0; first < p_.batch; first += limit * batch_tile) {
      Problem<T> piece = p_;
      piece.x += first * p_.batch_stride;
      piece.out += first * p_.rows * p_.channels;
      piece.batch = std::min(p_.batch - first, limit * batch_tile);
      launch_.template operator()<KERNEL>(piece, grid, static_cast<uint32_t>(blocks),
                                          static_cast<uint32_t>(ceil_div(piece.batch, batch_tile)), threads,
                                          static_cast<uint32_t>(shared_bytes), plan_.early);
    }
  }

  [[noreturn]] static void refuse() {
    throw std::runtime_error("upsample_native: there is no kernel for tiles of so many batch elements");
  }

  const Problem<T>& p_;
  int64_t entries_;
  bool three_each_;
  Cuts cuts_;
  Plan plan_;
  Device device_;
  const Launch& launch_;
};

}  // namespace fm_upsampling
