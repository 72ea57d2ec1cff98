// The copy engine and stores to other blocks of the cluster.
//
// What is asked for arrives at once, or as late as possible, or at any time (Schedule); until then its place means
// nothing, and whoever touches it fails. Stores of boxes are done at once; until the wait for them what they read may not
// be written to.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "cuda_emulation.h"
#include "hopper_emulation.h"
#include "tensor_maps_emulation.h"

namespace fm_emulation {
namespace {

constexpr uint32_t kRow = 128;  // bytes of 64 channels
constexpr uint32_t kRankShift = 24;

// Bytes on their way to the shared memory of a block: rows from global memory, or 16 bytes that are given.
struct Transfer {
  Block* to;
  uint32_t offset, barrier;
  std::vector<const unsigned char*> rows;  // null where there are only zeros
  uint32_t valid;                          // bytes of each row; zeros behind
  float4 four;
  bool late = false;  // it comes when nobody can go on without it
};

std::vector<Transfer> transfers;

struct Coordinates {
  int channel, at[3];  // of the other dimensions; those that there are not are 0
};

const Description& description_of(const TensorDescription& map, int dimensions, bool im2col, const Place& place) {
  const auto& found = reinterpret_cast<const Description&>(map);
  if (found.magic != Description::kMagic) fail_at("a tensor that was not described to the copy engine", current.running, place);
  if (found.dimensions != dimensions || found.im2col != im2col) {
    fail_at("the copy needs another description of its tensor", current.running, place);
  }
  return found;
}

unsigned char* place_of(const Description& d, int channel, const int (&at)[3]) {
  unsigned char* place = d.data + 2 * channel;
  for (int i = 0; i + 1 < d.dimensions; ++i) {
    if (at[i] < 0 || at[i] >= static_cast<int64_t>(d.sizes[i + 1])) return nullptr;
    place += at[i] * d.strides[i];
  }
  return place;
}

// Rows of a box in the order of shared memory, null for those outside.
std::vector<unsigned char*> rows_of_box(const Description& d, const Coordinates& from) {
  std::vector<unsigned char*> rows;
  const int last[3] = {d.box[1], d.box[2], d.dimensions > 3 ? d.box[3] : 1};
  for (int z = 0; z < last[2]; ++z) {
    for (int y = 0; y < last[1]; ++y) {
      for (int x = 0; x < last[0]; ++x) {
        rows.push_back(place_of(d, from.channel, {from.at[0] + x, from.at[1] + y, from.at[2] + z}));
      }
    }
  }
  return rows;
}

// Pixels of consecutive output positions: the position moves within the corners, row by row, and the tap beside it.
std::vector<unsigned char*> rows_of_pixels(const Description& d, const Coordinates& from, int right, int down) {
  std::vector<unsigned char*> rows;
  int x = from.at[0], y = from.at[1], n = from.at[2];
  for (int i = 0; i < d.box[1]; ++i) {
    rows.push_back(place_of(d, from.channel, {x + right, y + down, n}));
    if ((x += d.steps[0]) < static_cast<int>(d.sizes[1]) + d.high[0]) continue;
    x = d.low[0];
    if ((y += d.steps[1]) < static_cast<int>(d.sizes[2]) + d.high[1]) continue;
    y = d.low[1];
    ++n;
  }
  return rows;
}

uint32_t valid_bytes(const Lane& self, const Description& d, int channel, const Place& place) {
  if (channel < 0 || channel % 8 != 0) fail_at("a box begins at an odd channel", &self, place);
  const int64_t left = static_cast<int64_t>(d.sizes[0]) - channel;
  return static_cast<uint32_t>(std::clamp<int64_t>(2 * left, 0, kRow));
}

void perform(const Transfer& transfer) {
  Barrier& barrier = *find_barrier(*transfer.to, transfer.barrier);
  if (transfer.rows.empty()) {
    end_transfer(*transfer.to, barrier, transfer.offset, &transfer.four, 16);
    bytes_arrived(*transfer.to, barrier, 16);
    return;
  }
  uint32_t row_offset = transfer.offset;
  for (const unsigned char* from : transfer.rows) {
    unsigned char row[kRow] = {};
    if (from) std::memcpy(row, from, transfer.valid);
    for (uint32_t i = 0; i < kRow; i += 16) end_transfer(*transfer.to, barrier, swizzled(row_offset + i), row + i, 16);
    row_offset += kRow;
  }
  bytes_arrived(*transfer.to, barrier, static_cast<uint32_t>(transfer.rows.size()) * kRow);
}

void ask(Transfer transfer) {
  if (current.options.schedule == Schedule::forward) return perform(transfer);
  transfer.late = current.options.schedule == Schedule::reverse || random_below(2) == 0;
  transfers.push_back(std::move(transfer));
}

void ask_for_rows(uint32_t to, uint32_t barrier, std::vector<unsigned char*> rows, uint32_t valid, const Place& place) {
  const Lane& self = *current.running;
  const auto bytes = static_cast<uint32_t>(rows.size()) * kRow;
  const uint32_t offset = checked_offset(self, to, bytes, "a copy writes", place);
  if (offset % kRow != 0) fail_at("a copy to an address that is no multiple of 128", &self, place);
  const uint32_t barrier_offset = checked_offset(self, barrier, 8, "a barrier has", place);
  check_barrier_for_transfers(self, *self.block, barrier_offset, place);
  begin_transfer(self, *self.block, offset, bytes, place);
  const int64_t before = current.statistics.global_read_bytes;
  for (const unsigned char* row : rows) {
    if (row && valid) access_global(self, reinterpret_cast<uintptr_t>(row), valid, false, Origin{&place, nullptr});
  }
  current.statistics.global_read_bytes = before;
  ask({self.block, offset, barrier_offset, {rows.begin(), rows.end()}, valid, {}});
}

}  // namespace

void start_transfers() { transfers.clear(); }

bool perform_transfer(bool needed) {
  std::vector<size_t> possible;
  for (size_t i = 0; i < transfers.size(); ++i) {
    if (needed || !transfers[i].late) possible.push_back(i);
  }
  if (possible.empty()) return false;
  const bool random = current.options.schedule == Schedule::random;
  const size_t chosen = possible[random ? random_below(static_cast<uint32_t>(possible.size())) : 0];
  const Transfer transfer = std::move(transfers[chosen]);
  transfers.erase(transfers.begin() + static_cast<ptrdiff_t>(chosen));
  perform(transfer);
  return true;
}

void check_transfers_at_exit(const Lane& self) {
  const Block& block = *self.block;
  for (const Reading& reading : block.readings) {
    if (reading.product || reading.owner != self.thread) continue;
    fail_at("returns from the kernel while a store of a box reads its shared memory", &self, reading.place);
  }
  if (block.exited < block.lanes.size()) return;
  for (const Transfer& transfer : transfers) {
    if (transfer.to != &block) continue;
    fail("returns from the kernel, the last thread of its block, while its shared memory is written to", &self);
  }
}

void copy_box(uint32_t to, const TensorDescription& map, uint32_t barrier, int channel, const int (&at)[3],
              int dimensions, const Place& place) {
  const Description& d = description_of(map, dimensions, false, place);
  const auto valid = valid_bytes(*current.running, d, channel, place);
  ask_for_rows(to, barrier, rows_of_box(d, {channel, {at[0], at[1], at[2]}}), valid, place);
}

void copy_pixels(uint32_t to, const TensorDescription& map, uint32_t barrier, int channel, const int (&at)[3], int right,
                 int down, const Place& place) {
  const Description& d = description_of(map, 4, true, place);
  const auto valid = valid_bytes(*current.running, d, channel, place);
  ask_for_rows(to, barrier, rows_of_pixels(d, {channel, {at[0], at[1], at[2]}}, right, down), valid, place);
}

void store_box(const TensorDescription& map, uint32_t from, int channel, const int (&at)[3], const Place& place) {
  Lane& self = *current.running;
  const Description& d = description_of(map, 4, false, place);
  const std::vector<unsigned char*> rows = rows_of_box(d, {channel, {at[0], at[1], at[2]}});
  const uint32_t valid = valid_bytes(self, d, channel, place), bytes = static_cast<uint32_t>(rows.size()) * kRow;
  const uint32_t offset = checked_offset(self, from, bytes, "a store of a box reads", place);
  if (offset % kRow != 0) fail_at("a store of a box from an address that is no multiple of 128", &self, place);
  check_asynchronous_read(self, offset, bytes, place);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i] || valid == 0) continue;
    access_global(self, reinterpret_cast<uintptr_t>(rows[i]), valid, true, Origin{&place, nullptr});
    for (uint32_t byte = 0; byte < valid; ++byte) {
      rows[i][byte] = self.block->shared[swizzled(offset + static_cast<uint32_t>(i) * kRow + byte)];
    }
  }
  self.block->readings.push_back({offset, offset + bytes, offset, offset + bytes, self.thread, false, self.stores, place});
}

void stores_commit() { ++current.running->stores; }

void stores_wait(int pending) {
  Lane& self = *current.running;
  const auto left = static_cast<uint64_t>(pending);
  forget_readings(self, false, self.stores > left ? self.stores - left : 0);
}

uint32_t cluster_address(uint32_t address, uint32_t rank, const Place& place) {
  if (rank >= current.cluster.size()) {
    fail_at("names block " + std::to_string(rank) + " of a cluster of " + std::to_string(current.cluster.size()),
            current.running, place);
  }
  return address + ((rank + 1) << kRankShift);
}

void store_cluster(uint32_t to, const float4& four, uint32_t barrier, const Place& place) {
  const Lane& self = *current.running;
  const uint32_t rank = to >> kRankShift, mask = (1u << kRankShift) - 1;
  if (barrier >> kRankShift != rank) fail_at("stores to one block and counts at another's barrier", &self, place);
  Block& block = rank == 0 ? *self.block : current.cluster[rank - 1];
  if (to % 16 != 0) fail_at("stores 16 bytes at an address that is no multiple of 16", &self, place);
  if (block.exited == block.lanes.size()) {
    fail_at("stores to block " + std::to_string(block.rank) + " of the cluster, which has returned", &self, place);
  }
  const uint32_t offset = checked_offset(self, to & mask, 16, "stores", place);
  const uint32_t barrier_offset = checked_offset(self, barrier & mask, 8, "a barrier has", place);
  check_barrier_for_transfers(self, block, barrier_offset, place);
  begin_transfer(self, block, offset, 16, place);
  ask({&block, offset, barrier_offset, {}, 16, four});
}

}  // namespace fm_emulation
