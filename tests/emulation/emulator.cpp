// Which thread of which block runs when, and barriers of the block and the cluster.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "block.h"
#include "cuda_emulation.h"

dim3 blockDim, gridDim;

namespace fm_emulation {

Launch current;

namespace {

void (*kernel_call)(void*) = nullptr;
void* kernel_object = nullptr;
uint64_t random_state = 0;

// A warp of the block that can go on, or -1.
int pick_warp(const Block& block) {
  const int count = static_cast<int>(block.warps.size());
  const Schedule schedule = current.options.schedule;
  const int first = schedule == Schedule::random ? static_cast<int>(random_below(count)) : 0;
  for (int w = 0; w < count; ++w) {
    const int warp = schedule == Schedule::reverse ? count - 1 - w : (first + w) % count;
    if (block.warps[warp].ready) return warp;
  }
  return -1;
}

// Lets every lane that can go on do so, once.
void run_warp(Block& block, int index) {
  std::array<int, kWarp> order;
  for (int l = 0; l < kWarp; ++l) order[l] = current.options.schedule == Schedule::reverse ? kWarp - 1 - l : l;
  if (current.options.schedule == Schedule::random) {
    for (int l = kWarp - 1; l > 0; --l) std::swap(order[l], order[random_below(l + 1)]);
  }
  for (const int l : order) {
    const size_t thread = static_cast<size_t>(index) * kWarp + l;
    if (thread >= block.lanes.size()) continue;
    Lane& lane = block.lanes[thread];
    if (lane.state != State::ready && lane.state != State::fresh) continue;
    resume(lane, kernel_call, kernel_object);
    if (!current.failure.empty()) return;
  }
}

// Whether it waits for something that only others can bring about, whoever these are.
bool waits_for_others(const Lane& lane) {
  return lane.state == State::at_group_barrier || lane.state == State::at_phase || lane.state == State::at_arrivals;
}

// All threads that have not returned must wait at one barrier, the same for all.
void check_same_barrier(const Lane& first, const Lane& lane) {
  if (lane.state == State::waiting) fail("waits for ever in a function at " + text_of(lane.place), &lane);
  if (first.state == lane.state && same(first.place, lane.place)) return;
  const std::string other = first.state == lane.state ? "another one" : name_of(first.state);
  fail(std::string("waits in ") + name_of(lane.state) + " at " + text_of(lane.place) + " while " + name_of(first) +
           " waits in " + other + " at " + text_of(first.place),
       &lane);
}

void release(Block& block, State from, int64_t value) {
  ++block.epoch;
  join_clocks(block);
  block.parked = false;
  for (Lane& lane : block.lanes) {
    if (lane.state != from) continue;
    lane.state = State::ready;
    lane.value = value;
    if (from == State::at_cluster_barrier) lane.cluster_seen = current.cluster_epoch;
    ++block.warps[lane.warp].ready;
  }
  for (Warp& warp : block.warps) warp.at_barrier = 0;
}

// Opens the barrier of a block none of whose threads can go on; false when nobody is left, or when they wait for the
// rest of the cluster.
bool open_barrier(Block& block) {
  for (const Lane& lane : block.lanes) {
    if (waits_for_others(lane)) return false;
  }
  const Lane* first = nullptr;
  int64_t count = 0;
  for (const Lane& lane : block.lanes) {
    if (lane.state == State::exited) continue;
    first = first ? first : &lane;
    check_same_barrier(*first, lane);
    count += lane.value;
  }
  block.parked = !first || first->state == State::at_cluster_barrier;
  if (block.parked) return false;
  ++current.statistics.barriers;
  release(block, State::at_barrier, count);
  return true;
}

// The same for the cluster, once all its blocks are parked.
bool open_cluster_barrier() {
  const Lane* first = nullptr;
  for (const Block& block : current.cluster) {
    for (const Lane& lane : block.lanes) {
      if (lane.state == State::exited) continue;
      first = first ? first : &lane;
      check_same_barrier(*first, lane);
    }
  }
  if (!first) return false;
  ++current.cluster_epoch;
  ++current.statistics.cluster_barriers;
  for (Block& block : current.cluster) {
    release(block, State::at_cluster_barrier, 0);
    block.cluster_start = block.epoch;
  }
  return true;
}

// Nobody can go on, and some wait for what others should have brought about: the launch has failed.
void check_deadlock() {
  for (const Block& block : current.cluster) {
    for (const Lane& lane : block.lanes) {
      if (waits_for_others(lane)) fail("waits for ever in " + describe_wait(lane), &lane);
    }
  }
}

// Lets one warp of the cluster go on, performs a transfer or opens a barrier; false when all threads have returned.
bool step() {
  const uint32_t count = static_cast<uint32_t>(current.cluster.size());
  const Schedule schedule = current.options.schedule;
  if (schedule == Schedule::random && random_below(4) == 0 && perform_transfer(false)) return true;
  const uint32_t first = schedule == Schedule::random && count > 1 ? random_below(count) : 0;
  for (uint32_t i = 0; i < count; ++i) {
    Block& block = current.cluster[schedule == Schedule::reverse ? count - 1 - i : (first + i) % count];
    if (block.parked) continue;
    const int warp = pick_warp(block);
    if (warp >= 0) {
      run_warp(block, warp);
      return true;
    }
    if (open_barrier(block)) return true;
  }
  if (perform_transfer(true)) return true;
  check_deadlock();
  return open_cluster_barrier();
}

void start_block(Block& block, uint32_t number) {
  block.number = number;
  block.epoch = block.cluster_start = 1;
  block.exited = 0;
  block.parked = false;
  ++current.statistics.blocks;
  const uint64_t plane = static_cast<uint64_t>(gridDim.x) * gridDim.y;
  block.index = {number % gridDim.x, number / gridDim.x % gridDim.y, static_cast<unsigned>(number / plane)};
  for (Warp& warp : block.warps) {
    warp.exited = warp.at_barrier = 0;
    warp.epoch = 1;
    warp.ready = std::popcount(warp.lanes);
    warp.gatherings.clear();
    warp.products_begun = false;
    warp.products = 1;
    warp.accumulators.clear();
  }
  for (Lane& lane : block.lanes) {
    lane.state = State::fresh;
    lane.copies.clear();
    lane.groups.clear();
    lane.open_copies = 0;
    lane.arrived = 0;
    lane.cluster_seen = 0;
    lane.fences = 1;
    lane.stores = 1;
  }
  start_block_memory(block);
  start_block_barriers(block);
}

void make_threads(Block& block, dim3 threads) {
  const unsigned count = threads.x * threads.y * threads.z;
  block.lanes.assign(count, Lane{});
  block.warps.assign((count + kWarp - 1) / kWarp, Warp{});
  for (unsigned t = 0; t < count; ++t) {
    Lane& lane = block.lanes[t];
    lane.block = &block;
    lane.thread = static_cast<uint16_t>(t);
    lane.stack = static_cast<uint16_t>(block.rank * count + t);
    lane.warp = static_cast<uint8_t>(t / kWarp);
    lane.lane = static_cast<uint8_t>(t % kWarp);
    lane.index = {t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y)};
    block.warps[lane.warp].lanes |= 1u << lane.lane;
  }
}

void make_cluster(uint32_t size, dim3 threads) {
  current.cluster.resize(size);
  for (uint32_t rank = 0; rank < size; ++rank) {
    current.cluster[rank].rank = rank;
    make_threads(current.cluster[rank], threads);
  }
  prepare_stacks(static_cast<size_t>(size) * threads.x * threads.y * threads.z);
}

void run_clusters(uint32_t count) {
  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; ++i) {
    order[i] = current.options.schedule == Schedule::reverse ? count - 1 - i : i;
  }
  if (current.options.schedule == Schedule::random) {
    for (uint32_t i = count; i-- > 1;) std::swap(order[i], order[random_below(i + 1)]);
  }
  const auto size = static_cast<uint32_t>(current.cluster.size());
  for (const uint32_t cluster : order) {
    current.cluster_epoch = current.arrival_phase = 1;
    current.arrivals = 0;
    start_transfers();
    for (Block& block : current.cluster) start_block(block, cluster * size + block.rank);
    while (step()) {
      if (!current.failure.empty()) return;
    }
  }
}

void wait_at(Lane& self, State barrier, int64_t value, const Place& place) {
  Warp& warp = self.block->warps[self.warp];
  if (!warp.gatherings.empty()) {
    check_nobody_waits_for(self, std::string("enters ") + name_of(barrier) + " at " + text_of(place));
  }
  self.value = value;
  wait_in(self, barrier, true, place);
}

}  // namespace

const char* name_of(State state) {
  switch (state) {
    case State::at_barrier: return "__syncthreads";
    case State::at_cluster_barrier: return "cluster_sync";
    case State::at_group_barrier: return "group_sync";
    case State::at_phase: return "barrier_wait";
    case State::at_arrivals: return "cluster_wait";
    default: return "a function";
  }
}

uint32_t random_below(uint32_t limit) {  // splitmix64
  uint64_t x = random_state += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>((x ^ x >> 31) % limit);
}

void wake(Lane& lane) {
  Warp& warp = lane.block->warps[lane.warp];
  lane.state = State::ready;
  warp.at_barrier &= ~(1u << lane.lane);
  ++warp.ready;
  lane.block->parked = false;
}

void wait_in(Lane& self, State state, bool together, const Place& place) {
  Warp& warp = self.block->warps[self.warp];
  self.state = state;
  self.place = place;
  if (together) warp.at_barrier |= 1u << self.lane;
  --warp.ready;
  switch_to_scheduler(self);
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string text_of(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

std::string name_of(const Lane& lane) {
  const uint3 index = lane.block->index;
  return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         "), warp " + std::to_string(lane.warp) + ", lane " + std::to_string(lane.lane);
}

void fail(const std::string& what, const Lane* lane) {
  std::string message = (lane ? name_of(*lane) + ": " : "") + what;
  if (!current.running) throw Error(message);
  current.failure = std::move(message);
  _longjmp(current.scheduler, 1);
}

void fail_at(const std::string& what, const Lane* lane, const Place& place) {
  fail(what + " (" + text_of(place) + ")", lane);
}

void run_grid(void (*call)(void*), void* kernel, dim3 grid, dim3 threads) {
  kernel_call = call;
  kernel_object = kernel;
  random_state = current.options.seed;
  gridDim = grid;
  blockDim = threads;
  const auto cluster_size = static_cast<uint32_t>(current.options.cluster_size);
  make_cluster(cluster_size, threads);
  start_shared_memory();
  start_global_memory();
  run_clusters(grid.x * grid.y * grid.z / cluster_size);
}

void trap(const char* what, const Place& place) { fail_at(what, current.running, place); }

void leave_kernel(Lane& self) {
  check_nobody_waits_for(self, "returns from the kernel");
  Block& block = *self.block;
  check_products_at_exit(self);
  if (++block.exited == block.lanes.size()) check_nobody_reads(self);
  check_transfers_at_exit(self);
  self.state = State::exited;
  Warp& warp = block.warps[self.warp];
  warp.exited |= 1u << self.lane;
  --warp.ready;
  open_arrivals();
}

void sync_threads(const Place& place) { sync_threads_count(false, place); }

int32_t sync_threads_count(bool predicate, const Place& place) {
  Lane& self = *current.running;
  wait_at(self, State::at_barrier, predicate, place);
  return static_cast<int32_t>(self.value);
}

void cluster_sync(const Place& place) { wait_at(*current.running, State::at_cluster_barrier, 0, place); }

uint32_t cluster_rank() { return current.running->block->rank; }

uint32_t cluster_size() { return static_cast<uint32_t>(current.cluster.size()); }

}  // namespace fm_emulation
