// Shared memory, a block's own and that of the others of its cluster: bounds, poison, asynchronous copies, races.
//
// __syncthreads orders what the threads of a block do with its memory, __syncwarp also what the lanes of a warp do.
// Between the blocks of a cluster only cluster_sync orders.
#include <algorithm>
#include <bit>
#include <cstring>

#include "block.h"
#include "cuda_emulation.h"

namespace fm_emulation {
namespace {

constexpr size_t kMargin = 64 * 1024;
constexpr size_t kCapacity = 256 * 1024;
constexpr size_t kArena = kMargin + kCapacity + kMargin;
// On a GPU the first bytes belong to the system, so that addresses of our shared memory do not begin at 0.
constexpr uint32_t kSharedStart = 1024;
constexpr uint32_t kGranule = 2;  // bytes; smaller accesses are taken for whole granules

alignas(1024) unsigned char arenas[kMaxCluster * kArena];  // pages that no launch asks for never become real

// Whether barriers of whole blocks and clusters are all there are.
bool checks_epochs() {
  return current.options.races == Races::between_warps || current.options.races == Races::between_lanes;
}

[[noreturn]] void fail_race(const Lane& lane, int64_t offset, bool write, const char* done, const std::string& by,
                            bool same_warp, const Origin& origin) {
  fail_from(std::string("race: ") + (write ? "writes" : "reads") + " offset " + std::to_string(offset) +
                " of shared memory, which " + by + " has " + done + " since the last __syncthreads" +
                (same_warp ? " and __syncwarp" : ""),
            lane, origin);
}

// Of a cell that another thread wrote since the last __syncthreads, or that a copy will write.
void check_after_write(const Lane& lane, const Cell& cell, int64_t offset, bool write, const Origin& origin) {
  if (cell.pending) {
    fail_from(std::string(write ? "writes" : "reads") + " offset " + std::to_string(offset) +
                  " of shared memory, where a copy_async_16 of " + name_of_thread(cell.pending - 1) +
                  " is under way: no copy_async_wait has covered it",
              lane, origin);
  }
  const bool same_warp = cell.writer / kWarp == lane.warp;
  if (same_warp && (current.options.races != Races::between_lanes ||
                    cell.write_warp_epoch != lane.block->warps[lane.warp].epoch)) {
    return;
  }
  fail_race(lane, offset, write, "written", name_of_thread(cell.writer), same_warp, origin);
}

// Of a cell that was read since the last __syncthreads.
void check_after_reads(const Lane& lane, const Cell& cell, int64_t offset, const Origin& origin) {
  if (const uint32_t others = cell.reading_warps & ~(1u << lane.warp)) {
    fail_race(lane, offset, true, "read", "warp " + std::to_string(std::countr_zero(others)), false, origin);
  }
  const uint32_t lanes = cell.reading_lanes & ~(1u << lane.lane);
  if (lanes && current.options.races == Races::between_lanes && cell.reading_warp == lane.warp &&
      cell.read_warp_epoch == lane.block->warps[lane.warp].epoch) {
    fail_race(lane, offset, true, "read", "lane " + std::to_string(std::countr_zero(lanes)), true, origin);
  }
}

// A read by another block, as one number: when, and which rank.
uint64_t cluster_read_by(uint32_t rank) { return current.cluster_epoch << 8 | rank; }
bool since_cluster_sync(uint64_t cluster_read) { return cluster_read >> 8 == current.cluster_epoch; }
std::string reader_of(uint64_t cluster_read) {
  return "block " + std::to_string(cluster_read & 255) + " of the cluster";
}

void check_after_cluster_reads(const Lane& lane, uint64_t cluster_read, int64_t offset, const Origin& origin) {
  if (!since_cluster_sync(cluster_read)) return;
  fail_from("race: writes offset " + std::to_string(offset) + " of shared memory, which " + reader_of(cluster_read) +
                " has read since the last cluster_sync",
            lane, origin);
}

void note_read(const Lane& lane, uint32_t epoch, uint32_t warp_epoch, Cell& cell) {
  if (cell.read_epoch != epoch) {
    cell.read_epoch = epoch;
    cell.reading_warps = cell.reading_lanes = 0;
  }
  if (cell.reading_warp != lane.warp || cell.read_warp_epoch != warp_epoch) {
    cell.reading_warp = lane.warp;
    cell.read_warp_epoch = warp_epoch;
    cell.reading_lanes = 0;
  }
  cell.reading_warps |= 1u << lane.warp;
  cell.reading_lanes |= 1u << lane.lane;
}

void check_bounds(const Lane& lane, int64_t offset, uint32_t bytes, bool write, const Origin& origin) {
  if (offset >= 0 && offset + bytes <= current.shared_bytes) return;
  fail_from(std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at offset " +
                std::to_string(offset) + " of shared memory; the block has " + std::to_string(current.shared_bytes),
            lane, origin);
}

// A read by `lane` from the memory of another block of its cluster.
void check_cluster_read(const Lane& lane, Block& owner, int64_t offset, uint32_t bytes, const Origin& origin) {
  check_bounds(lane, offset, bytes, false, origin);
  const auto there = [&] { return "shared memory of block " + std::to_string(owner.rank) + " of the cluster"; };
  if (owner.exited == owner.lanes.size()) {
    fail_from("reads " + there() + ", which has returned from the kernel", lane, origin);
  }
  if (!checks_epochs()) return;
  owner.last_cluster_read = cluster_read_by(lane.block->rank);
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    const Cell& cell = owner.cells[i];
    const bool written = cell.write_epoch >= owner.cluster_start;
    if (cell.pending || written) {
      fail_from("race: reads offset " + std::to_string(i * kGranule) + " of " + there() + ", " +
                    (cell.pending ? "where a copy_async_16 of its " + name_of_thread(cell.pending - 1) +
                                        " is under way: no copy_async_wait has covered it"
                                  : "which its " + name_of_thread(cell.writer) +
                                        " has written since the last cluster_sync"),
                lane, origin);
    }
    owner.cluster_reads[i] = owner.last_cluster_read;
  }
}

void poison(const Block& block, unsigned char* to, size_t bytes) {
  // All ones and 0x7FFF are NaN in every float format; as indices they are -1 and very large.
  const uint16_t pattern = (block.number + block.epoch) % 2 ? 0xFFFF : 0x7FFF;
  for (size_t i = 0; i < bytes; ++i) to[i] = static_cast<unsigned char>(pattern >> 8 * (i % 2));
}

void perform(Lane& lane, const Copy& copy, const Place& place) {
  for (uint32_t i = 0; i < 16 / kGranule; ++i) lane.block->cells[copy.to / kGranule + i].pending = 0;
  access_shared(lane, copy.to, 16, true, Origin{&place, nullptr});
  if (copy.valid) {
    std::memcpy(lane.block->shared + copy.to, copy.from, 16);
  } else {
    std::memset(lane.block->shared + copy.to, 0, 16);
  }
}

std::string at_offset(size_t cell) { return "offset " + std::to_string(cell * kGranule) + " of shared memory"; }

void check_readings(const Lane& lane, const Block& block, uint32_t offset, uint32_t bytes, const Origin& origin) {
  for (const Reading& reading : block.readings) {
    if (reading.end <= offset || offset + bytes <= reading.begin) continue;
    fail_from("writes offset " + std::to_string(std::max(offset, reading.begin)) + " of shared memory, which " +
                  (reading.product ? "a product of warp " + std::to_string(reading.owner)
                                   : "a store of a box by " + name_of_thread(reading.owner)) +
                  " reads (" + text_of(reading.place) + "): it has not been waited for",
              lane, origin);
  }
}

// What holds between threads and what goes on beside them, whatever is ordered.
void check_transfers(const Lane& lane, uint32_t offset, uint32_t bytes, bool write, const Origin& origin) {
  Block& block = *lane.block;
  if (write && !block.readings.empty()) check_readings(lane, block, offset, bytes, origin);
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    Cell& cell = block.cells[i];
    if (cell.pending == kTransfer) {
      fail_from(std::string(write ? "writes " : "reads ") + at_offset(i) + ", where what was asked for has not arrived",
                lane, origin);
    }
    if (!write) continue;
    cell.storer = lane.thread + 1;
    cell.storer_fences = lane.fences;
  }
}

}  // namespace

const Region shared_arenas{reinterpret_cast<uintptr_t>(arenas), reinterpret_cast<uintptr_t>(arenas) + sizeof arenas};

void access_shared(const Lane& lane, int64_t offset, uint32_t bytes, bool write, const Origin& origin) {
  check_bounds(lane, offset, bytes, write, origin);
  check_transfers(lane, static_cast<uint32_t>(offset), bytes, write, origin);
  check_order(lane, static_cast<uint32_t>(offset), bytes, write, origin);
  if (!checks_epochs()) return;
  Block& block = *lane.block;
  const uint32_t warp_epoch = block.warps[lane.warp].epoch;
  const auto first = static_cast<size_t>(offset) / kGranule, last = static_cast<size_t>(offset + bytes - 1) / kGranule;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = block.cells[i];
    const auto at = static_cast<int64_t>(i * kGranule);
    const bool touched = cell.write_epoch == block.epoch && cell.writer != lane.thread;
    if (touched || cell.pending) check_after_write(lane, cell, at, write, origin);
    if (write) {
      if (cell.read_epoch == block.epoch) check_after_reads(lane, cell, at, origin);
      if (!block.cluster_reads.empty()) check_after_cluster_reads(lane, block.cluster_reads[i], at, origin);
      cell.write_epoch = block.epoch;
      cell.write_warp_epoch = warp_epoch;
      cell.writer = lane.thread;
    } else {
      note_read(lane, block.epoch, warp_epoch, cell);
    }
  }
}

void start_shared_memory() {
  const size_t cells = (current.shared_bytes + kGranule - 1) / kGranule;
  for (Block& block : current.cluster) {
    block.shared = arenas + block.rank * kArena + kMargin;
    block.cells.assign(cells, Cell{});
    block.cluster_reads.assign(current.cluster.size() > 1 ? cells : 0, 0);
  }
}

void start_block_memory(Block& block) {
  poison(block, block.shared, current.shared_bytes);
  std::fill(block.cells.begin(), block.cells.end(), Cell{});
  std::fill(block.cluster_reads.begin(), block.cluster_reads.end(), 0);
  block.last_cluster_read = 0;
  start_clocks(block);
}

void check_nobody_reads(const Lane& last) {
  const uint64_t read = last.block->last_cluster_read;
  if (!since_cluster_sync(read)) return;
  fail("returns from the kernel, the last thread of its block, whose shared memory " + reader_of(read) +
           " has read since the last cluster_sync",
       &last);
}

unsigned char* shared_memory() { return current.running->block->shared; }

uint32_t shared_address(const void* pointer, const Place& place) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - shared_memory();
  if (offset < 0 || offset > static_cast<ptrdiff_t>(kCapacity)) {
    fail_at("shared_address of something that is not in shared memory", current.running, place);
  }
  return static_cast<uint32_t>(offset) + kSharedStart;
}

const unsigned char* read_matrix_row(const Lane& lane, uint32_t address, const Place& place) {
  if (address % 16 != 0) fail_at("a matrix row at an address that is no multiple of 16", &lane, place);
  const int64_t offset = static_cast<int64_t>(address) - kSharedStart;
  access_shared(lane, offset, 16, false, Origin{&place, nullptr});
  return lane.block->shared + offset;
}

unsigned char* write_matrix_row(const Lane& lane, uint32_t address, const Place& place) {
  if (address % 16 != 0) fail_at("a matrix row at an address that is no multiple of 16", &lane, place);
  const int64_t offset = static_cast<int64_t>(address) - kSharedStart;
  access_shared(lane, offset, 16, true, Origin{&place, nullptr});
  return lane.block->shared + offset;
}

uint32_t checked_offset(const Lane& lane, uint32_t address, uint32_t bytes, const char* doing, const Place& place) {
  const int64_t offset = static_cast<int64_t>(address) - kSharedStart;
  if (offset < 0 || offset + bytes > current.shared_bytes) {
    fail_at(std::string(doing) + " " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
                " of shared memory; the block has " + std::to_string(current.shared_bytes),
            &lane, place);
  }
  return static_cast<uint32_t>(offset);
}

void check_asynchronous_read(const Lane& lane, uint32_t offset, uint32_t bytes, const Place& place) {
  const Block& block = *lane.block;
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    const Cell& cell = block.cells[i];
    if (cell.pending) fail_at("reads " + at_offset(i) + ", where what was asked for has not arrived", &lane, place);
    if (cell.storer && block.lanes[cell.storer - 1].fences == cell.storer_fences) {
      fail_at("reads " + at_offset(i) + ", which " + name_of_thread(cell.storer - 1) +
                  " has written without shared_stores_ready",
              &lane, place);
    }
  }
  check_order(lane, offset, bytes, false, Origin{&place, nullptr});
}

void begin_transfer(const Lane& asker, Block& to, uint32_t offset, uint32_t bytes, const Place& place) {
  check_readings(asker, to, offset, bytes, Origin{&place, nullptr});
  for (size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) {
    if (to.cells[i].pending) {
      fail_at("asks for a copy to " + at_offset(i) + ", where another is under way", &asker, place);
    }
    to.cells[i].pending = kTransfer;
  }
  if (&to == asker.block) check_order(asker, offset, bytes, true, Origin{&place, nullptr});
  poison(to, to.shared + offset, bytes);
}

void end_transfer(Block& to, const Barrier& barrier, uint32_t offset, const void* data, uint32_t bytes) {
  std::memcpy(to.shared + offset, data, bytes);
  for (size_t i = offset / kGranule; i < (offset + bytes) / kGranule; ++i) to.cells[i].pending = to.cells[i].storer = 0;
  note_arrival(to, barrier, offset, bytes);
}

void forget_readings(const Lane& lane, bool product, uint64_t before) {
  const uint16_t owner = product ? lane.warp : lane.thread;
  std::erase_if(lane.block->readings, [&](const Reading& reading) {
    const bool done = reading.owner == owner && reading.product == product && reading.group < before;
    if (done) note_reads(lane, reading.own_begin, reading.own_end - reading.own_begin);
    return done;
  });
}

void load_cluster(void* to, uint32_t bytes, uint32_t address, uint32_t rank, const Place& place) {
  const Lane& lane = *current.running;
  const Origin origin{&place, nullptr};
  if (rank >= current.cluster.size()) {
    fail_at("reads shared memory of block " + std::to_string(rank) + " of a cluster of " +
                std::to_string(current.cluster.size()),
            &lane, place);
  }
  if (address % bytes != 0) {
    fail_at("reads " + std::to_string(bytes) + " bytes at an address that is no multiple of " + std::to_string(bytes),
            &lane, place);
  }
  ++current.statistics.cluster_reads;
  const int64_t offset = static_cast<int64_t>(address) - kSharedStart;
  Block& owner = current.cluster[rank];
  if (&owner == lane.block) {
    access_shared(lane, offset, bytes, false, origin);
  } else {
    check_cluster_read(lane, owner, offset, bytes, origin);
  }
  std::memcpy(to, owner.shared + offset, bytes);
}

void copy_async_16(uint32_t to, const void* from, bool valid, const Place& place) {
  Lane& lane = *current.running;
  const auto source = reinterpret_cast<uintptr_t>(from);
  if (to % 16 != 0 || source % 16 != 0) {
    fail_at("copy_async_16 between addresses that are no multiples of 16", &lane, place);
  }
  const int64_t offset = static_cast<int64_t>(to) - kSharedStart;
  const Origin origin{&place, nullptr};
  access_shared(lane, offset, 16, true, origin);
  if (valid) {
    const int64_t before = current.statistics.global_read_bytes;
    access_global(lane, source, 16, false, origin);
    current.statistics.global_read_bytes = before;
    ++current.statistics.copies;
  } else {
    ++current.statistics.zero_fills;
  }
  // The hardware may write at any time from now on; who looks before the wait sees neither old nor new.
  poison(*lane.block, lane.block->shared + offset, 16);
  for (uint32_t i = 0; i < 16 / kGranule; ++i) lane.block->cells[offset / kGranule + i].pending = lane.thread + 1;
  lane.copies.push_back({static_cast<uint32_t>(offset), from, valid});
  ++lane.open_copies;
}

void copy_async_commit() {
  Lane& lane = *current.running;
  lane.groups.push_back(lane.open_copies);
  lane.open_copies = 0;
}

void copy_async_wait(int pending, const Place& place) {
  Lane& lane = *current.running;
  while (lane.groups.size() > static_cast<size_t>(pending)) {
    for (uint32_t i = 0; i < lane.groups.front(); ++i) perform(lane, lane.copies[i], place);
    lane.copies.erase(lane.copies.begin(), lane.copies.begin() + lane.groups.front());
    lane.groups.erase(lane.groups.begin());
  }
}

}  // namespace fm_emulation
