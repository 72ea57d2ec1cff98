// Barriers that are not the whole block's: those of a group of warps, those in shared memory that count arrivals and
// bytes, and the two halves of the cluster's.
#include <algorithm>

#include "block.h"
#include "cuda_emulation.h"
#include "hopper_emulation.h"

namespace fm_emulation {
namespace {

// Of a barrier as PTX allows it.
constexpr uint32_t kMostArrivals = (1u << 20) - 1;

// The barrier of the running thread's block at this address.
Barrier& barrier_at(uint32_t address, const Place& place) {
  const Lane& self = *current.running;
  const uint32_t offset = checked_offset(self, address, 8, "a barrier has", place);
  Barrier* const barrier = find_barrier(*self.block, offset);
  if (!barrier) fail_at("there is no barrier at offset " + std::to_string(offset) + " of shared memory", &self, place);
  return *barrier;
}

// Ends the phase if all has come that it waits for.
void settle(Block& block, Barrier& barrier) {
  if (barrier.arrivals > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.arrivals = barrier.count;
  barrier.passed = barrier.arriving;
  for (Lane& lane : block.lanes) {
    if (lane.state == State::at_phase && lane.waits_for == barrier.offset) wake(lane);
  }
}

void arrive(uint32_t address, uint32_t bytes, const Place& place) {
  Lane& self = *current.running;
  Barrier& barrier = barrier_at(address, place);
  if (barrier.arrivals == 0) fail_at("arrives more often than the barrier's phase waits for", &self, place);
  --barrier.arrivals;
  barrier.bytes += bytes;
  give_clock(self, barrier.arriving);
  settle(*self.block, barrier);
}

bool has_arrived(const Lane& lane) { return lane.state == State::exited || lane.arrived == current.arrival_phase; }

}  // namespace

Barrier* find_barrier(Block& block, uint32_t offset) {
  const auto found = std::ranges::find(block.barriers, offset, &Barrier::offset);
  return found == block.barriers.end() ? nullptr : &*found;
}

void start_block_barriers(Block& block) {
  block.barriers.clear();
  block.readings.clear();
  block.group_arrivals = {};
}

void barrier_init(uint32_t address, uint32_t arrivals, const Place& place) {
  const Lane& self = *current.running;
  const uint32_t offset = checked_offset(self, address, 8, "a barrier has", place);
  if (offset % 8 != 0) fail_at("a barrier at an address that is no multiple of 8", &self, place);
  if (arrivals == 0 || arrivals > kMostArrivals) fail_at("a barrier of too few or too many arrivals", &self, place);
  if (find_barrier(*self.block, offset)) fail_at("makes a barrier where there is one", &self, place);
  access_shared(self, offset, 8, true, Origin{&place, nullptr});
  self.block->barriers.push_back({offset, arrivals, arrivals, 0, 0, self.thread, false, current.cluster_epoch, {}, {}});
}

void barriers_ready() {
  Lane& self = *current.running;
  for (Barrier& barrier : self.block->barriers) barrier.ready |= barrier.maker == self.thread;
  ++self.fences;
}

void shared_stores_ready() { ++current.running->fences; }

void barrier_arrive(uint32_t address, const Place& place) { arrive(address, 0, place); }

void barrier_expect(uint32_t address, uint32_t bytes, const Place& place) { arrive(address, bytes, place); }

void barrier_wait(uint32_t address, uint32_t parity, const Place& place) {
  Lane& self = *current.running;
  if (parity > 1) fail_at("a phase has parity 0 or 1, not " + std::to_string(parity), &self, place);
  self.waits_for = barrier_at(address, place).offset;
  self.value = parity;
  // As on a GPU: who comes too late, when the phase after the awaited one has ended too, waits on.
  while (barrier_at(address, place).phase % 2 == parity) wait_in(self, State::at_phase, false, place);
  take_clock(self, barrier_at(address, place).passed);
}

void bytes_arrived(Block& block, Barrier& barrier, uint32_t bytes) {
  count_arrival(block, barrier);
  barrier.bytes -= bytes;
  settle(block, barrier);
}

void check_barrier_for_transfers(const Lane& asker, const Block& block, uint32_t offset, const Place& place) {
  const auto found = std::ranges::find(block.barriers, offset, &Barrier::offset);
  if (found == block.barriers.end()) {
    fail_at("there is no barrier at offset " + std::to_string(offset) + " of the shared memory written to", &asker, place);
  }
  if (&block != asker.block && asker.cluster_seen <= found->made) {
    fail_at("names a barrier of another block, which may not be there: no barrier of the cluster is between", &asker, place);
  }
  if (!found->ready) fail_at("names a barrier that barriers_ready has not made visible", &asker, place);
}

void group_sync(int barrier, int threads, const Place& place) {
  Lane& self = *current.running;
  Block& block = *self.block;
  check_nobody_waits_for(self, "enters group_sync at " + text_of(place));
  if (barrier < 1 || barrier > 15) fail_at("group_sync has barriers 1 to 15, not " + std::to_string(barrier), &self, place);
  if (threads <= 0 || threads % kWarp != 0) fail_at("a group is of whole warps", &self, place);
  uint32_t& arrivals = block.group_arrivals[barrier];
  if (arrivals == 0) {
    block.group_threads[barrier] = threads;
    block.together[barrier] = {};
  }
  if (block.group_threads[barrier] != static_cast<uint32_t>(threads)) {
    fail_at("group_sync for " + std::to_string(threads) + " threads, where others wait for " +
                std::to_string(block.group_threads[barrier]),
            &self, place);
  }
  give_clock(self, block.together[barrier]);
  if (++arrivals < block.group_threads[barrier]) {
    self.waits_for = barrier;
    wait_in(self, State::at_group_barrier, true, place);
    return;
  }
  arrivals = 0;
  take_clock(self, block.together[barrier]);
  for (Lane& lane : block.lanes) {
    if (lane.state != State::at_group_barrier || lane.waits_for != static_cast<uint32_t>(barrier)) continue;
    take_clock(lane, block.together[barrier]);
    wake(lane);
  }
}

void open_arrivals() {
  if (current.arrivals == 0) return;
  for (const Block& block : current.cluster) {
    if (!std::ranges::all_of(block.lanes, has_arrived)) return;
  }
  current.arrivals = 0;
  ++current.arrival_phase;
  ++current.cluster_epoch;
  ++current.statistics.cluster_barriers;
  for (Block& block : current.cluster) {
    block.cluster_start = ++block.epoch;
    for (Lane& lane : block.lanes) {
      if (lane.state == State::at_arrivals) wake(lane);
    }
  }
}

void cluster_arrive(const Place& place) {
  Lane& self = *current.running;
  if (self.arrived != 0) fail_at("cluster_arrive twice without cluster_wait", &self, place);
  self.arrived = current.arrival_phase;
  ++current.arrivals;
  give_clock(self, self.block->arrived);
  open_arrivals();
}

void cluster_wait(const Place& place) {
  Lane& self = *current.running;
  check_nobody_waits_for(self, "enters cluster_wait at " + text_of(place));
  if (self.arrived == 0) fail_at("cluster_wait without cluster_arrive", &self, place);
  if (self.arrived == current.arrival_phase) wait_in(self, State::at_arrivals, true, place);
  take_clock(self, self.block->arrived);
  self.arrived = 0;
  self.cluster_seen = current.cluster_epoch;
}

std::string describe_wait(const Lane& lane) {
  const std::string where = std::string(name_of(lane.state)) + " at " + text_of(lane.place);
  if (lane.state == State::at_arrivals) return where;
  if (lane.state == State::at_group_barrier) {
    return where + ", where " + std::to_string(lane.block->group_arrivals[lane.waits_for]) + " of " +
           std::to_string(lane.block->group_threads[lane.waits_for]) + " threads have arrived";
  }
  const Barrier& barrier = *find_barrier(*lane.block, lane.waits_for);
  return where + ", for phase " + std::to_string(barrier.phase) + " of the barrier at offset " +
         std::to_string(barrier.offset) + ": " + std::to_string(barrier.arrivals) + " of " +
         std::to_string(barrier.count) + " arrivals and " + std::to_string(barrier.bytes) + " bytes are missing";
}

}  // namespace fm_emulation
