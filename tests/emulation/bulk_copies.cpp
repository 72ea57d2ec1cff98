// Bulk copies between shared and global memory, and the barriers that count them.
//
// A copy to shared memory is done when somebody waits for it: until then its place holds nonsense, and touching it is an
// error. Afterwards those may read who have waited too, or who have passed a __syncthreads since. A copy to global
// memory reads shared memory when its thread waits; who writes there before that fails, and so does a copy of what a
// thread wrote that has not called bulk_fence() since.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "cuda_emulation.h"

namespace fm_emulation {
namespace {

constexpr uint32_t kBulk = 16;  // bytes: addresses and sizes are multiples

Cell* cells_of(Block& block, uint32_t offset) { return block.cells.data() + offset / kSharedGranule; }

CopyBarrier& barrier_at(const Lane& lane, uint32_t address, const Place& place) {
  const auto found = lane.block->barriers.find(static_cast<uint32_t>(offset_of(address)));
  if (found == lane.block->barriers.end()) fail_at("a barrier for copies that was not started", &lane, place);
  CopyBarrier& barrier = found->second;
  if (barrier.epoch == lane.block->epoch && barrier.starter != lane.thread) {
    fail_at("race: uses a barrier for copies that " + name_of_thread(barrier.starter) +
                " has started since the last __syncthreads",
            &lane, place);
  }
  return barrier;
}

bool can_open(const CopyBarrier& barrier) { return barrier.missing == 0 && barrier.asked == barrier.expected; }

void next_count(Block& block, CopyBarrier& barrier) {
  barrier.missing = barrier.arrivals;
  barrier.expected = barrier.asked = 0;
  barrier.copies.clear();
  barrier.number = static_cast<uint32_t>(block.arrived.size());
  block.arrived.push_back(0);
}

void open(Block& block, CopyBarrier& barrier) {
  for (const BulkCopy& copy : barrier.copies) {
    std::memcpy(block.shared + copy.offset, copy.global, copy.bytes);
    Cell* const cells = cells_of(block, copy.offset);
    for (uint32_t i = 0; i < copy.bytes / kSharedGranule; ++i) {
      cells[i].arriving = 0;
      cells[i].bulk = barrier.number;
    }
  }
  block.arrived[barrier.number] = block.epoch;
  ++barrier.opened;
  barrier.last = barrier.number;
  next_count(block, barrier);
}

bool has_opened(const CopyBarrier& barrier, uint32_t turn) { return barrier.opened % 2 != turn; }

// Opens a barrier that somebody waits at, if it can be.
void let_through(Block& block, uint32_t offset, CopyBarrier& barrier) {
  if (!can_open(barrier)) return;
  const auto waits = [&](const Lane& lane) { return lane.state == State::at_copies && lane.awaited == offset; };
  if (std::none_of(block.lanes.begin(), block.lanes.end(), waits)) return;
  open(block, barrier);
  for (Lane& lane : block.lanes) {
    if (!waits(lane) || !has_opened(barrier, lane.awaited_turn)) continue;
    lane.state = State::ready;
    ++block.warps[lane.warp].ready;
  }
}

void check_multiples(const Lane& lane, uint32_t shared, const void* global, uint32_t bytes, const char* what,
                     const Place& place) {
  if (shared % kBulk == 0 && reinterpret_cast<uintptr_t>(global) % kBulk == 0 && bytes % kBulk == 0 && bytes > 0) return;
  fail_at(std::string(what) + " with addresses or a size that are no multiples of 16", &lane, place);
}

}  // namespace

void start_bulk_copies(Block& block) {
  block.barriers.clear();
  block.arrived.assign(1, 0);
}

void check_bulk(const Lane& lane, const Cell& cell, int64_t offset, bool write, const Origin& origin) {
  const std::string does = std::string(write ? "writes" : "reads") + " offset " + std::to_string(offset) +
                           " of shared memory, ";
  if (cell.arriving) {
    fail_from(does + "where a bulk_load of " + name_of_thread(cell.arriving - 1) + " is under way", lane, origin);
  }
  if (cell.leaving && write) {
    fail_from(does + "which a bulk_store of " + name_of_thread(cell.leaving - 1) + " may still read", lane, origin);
  }
  if (cell.bulk && lane.block->arrived[cell.bulk] == lane.block->epoch &&
      std::find(lane.seen.begin(), lane.seen.end(), cell.bulk) == lane.seen.end()) {
    fail_from("race: " + does + "where a bulk_load arrived that this thread has not waited for", lane, origin);
  }
}

void check_bulk_copies(const Lane& lane, bool last) {
  if (!lane.stores.empty()) fail("returns from the kernel while its bulk_store may still read shared memory", &lane);
  if (!last) return;
  for (const auto& [offset, barrier] : lane.block->barriers) {
    if (!barrier.copies.empty()) fail("returns from the kernel, the last thread, while a bulk_load is under way", &lane);
  }
}

void barrier_start(uint32_t address, uint32_t arrivals, const Place& place) {
  const Lane& lane = *current.running;
  if (address % 8 != 0) fail_at("a barrier for copies at an address that is no multiple of 8", &lane, place);
  const auto offset = static_cast<uint32_t>(offset_of(address));
  access_shared(lane, offset, 8, true, Origin{&place, nullptr});
  CopyBarrier& barrier = lane.block->barriers[offset];
  barrier = {arrivals, arrivals, 0, 0, 0, 0, 0, lane.block->epoch, lane.thread, {}};
  next_count(*lane.block, barrier);
}

void barrier_arrive_expecting(uint32_t address, uint32_t bytes, const Place& place) {
  const Lane& lane = *current.running;
  CopyBarrier& barrier = barrier_at(lane, address, place);
  if (barrier.missing == 0) {
    if (!can_open(barrier)) fail_at("arrives at a barrier for copies that has not opened yet", &lane, place);
    open(*lane.block, barrier);
  }
  --barrier.missing;
  barrier.expected += bytes;
  let_through(*lane.block, static_cast<uint32_t>(offset_of(address)), barrier);
}

void barrier_wait(uint32_t address, uint32_t turn, const Place& place) {
  Lane& lane = *current.running;
  CopyBarrier& barrier = barrier_at(lane, address, place);
  if (!has_opened(barrier, turn) && can_open(barrier)) open(*lane.block, barrier);
  if (!has_opened(barrier, turn)) {
    lane.state = State::at_copies;
    lane.place = place;
    lane.awaited = static_cast<uint32_t>(offset_of(address));
    lane.awaited_turn = turn;
    --lane.block->warps[lane.warp].ready;
    switch_to_scheduler(lane);
  }
  const auto old = [&](uint32_t number) { return lane.block->arrived[number] < lane.block->epoch; };
  lane.seen.erase(std::remove_if(lane.seen.begin(), lane.seen.end(), old), lane.seen.end());
  if (barrier.last) lane.seen.push_back(barrier.last);
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t address, const Place& place) {
  const Lane& lane = *current.running;
  check_multiples(lane, to, from, bytes, "bulk_load", place);
  CopyBarrier& barrier = barrier_at(lane, address, place);
  const auto offset = static_cast<uint32_t>(offset_of(to));
  const Origin origin{&place, nullptr};
  access_shared(lane, offset, bytes, true, origin);
  access_global(lane, reinterpret_cast<uintptr_t>(from), bytes, false, origin);
  poison(*lane.block, lane.block->shared + offset, bytes);
  Cell* const cells = cells_of(*lane.block, offset);
  for (uint32_t i = 0; i < bytes / kSharedGranule; ++i) {
    cells[i].write_epoch = 0;
    cells[i].arriving = lane.thread + 1;
  }
  barrier.asked += bytes;
  barrier.copies.push_back({offset, const_cast<void*>(from), bytes});
  let_through(*lane.block, static_cast<uint32_t>(offset_of(address)), barrier);
}

void bulk_store(void* to, uint32_t from, uint32_t bytes, const Place& place) {
  Lane& lane = *current.running;
  check_multiples(lane, from, to, bytes, "bulk_store", place);
  const auto offset = static_cast<uint32_t>(offset_of(from));
  const Origin origin{&place, nullptr};
  access_shared(lane, offset, bytes, false, origin);
  access_global(lane, reinterpret_cast<uintptr_t>(to), bytes, true, origin);
  Cell* const cells = cells_of(*lane.block, offset);
  for (uint32_t i = 0; i < bytes / kSharedGranule; ++i) {
    if (cells[i].write_epoch && lane.block->lanes[cells[i].writer].fences <= cells[i].fences) {
      fail_at("bulk_store of offset " + std::to_string(offset + i * kSharedGranule) + ", which " +
                  name_of_thread(cells[i].writer) + " wrote without a bulk_fence since",
              &lane, place);
    }
    cells[i].leaving = lane.thread + 1;
  }
  lane.stores.push_back({offset, to, bytes});
}

void bulk_commit() {
  Lane& lane = *current.running;
  lane.committed = lane.stores.size();
}

void bulk_wait_read(const Place&) {
  Lane& lane = *current.running;
  Block& block = *lane.block;
  for (size_t s = 0; s < lane.committed; ++s) {
    const BulkCopy& store = lane.stores[s];
    std::memcpy(store.global, block.shared + store.offset, store.bytes);
    Cell* const cells = cells_of(block, store.offset);
    for (uint32_t i = 0; i < store.bytes / kSharedGranule; ++i) {
      cells[i].leaving = 0;
      note_read(lane, block.epoch, block.warps[lane.warp].epoch, cells[i]);
    }
  }
  lane.stores.erase(lane.stores.begin(), lane.stores.begin() + static_cast<std::ptrdiff_t>(lane.committed));
  lane.committed = 0;
}

void bulk_fence() { ++current.running->fences; }

}  // namespace fm_emulation
