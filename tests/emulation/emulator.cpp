// Launches: which thread of which block runs when, and barriers.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
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
Statistics totals;
bool launched = false;
std::string last_error;

uint32_t random_below(uint32_t limit) {  // splitmix64
  uint64_t x = random_state += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>((x ^ x >> 31) % limit);
}

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

const char* name_of(State state) { return state == State::at_barrier ? "__syncthreads" : "cluster_sync"; }

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
  block.parked = false;
  for (Lane& lane : block.lanes) {
    if (lane.state != from) continue;
    lane.state = State::ready;
    lane.value = value;
    ++block.warps[lane.warp].ready;
  }
  for (Warp& warp : block.warps) warp.at_barrier = 0;
}

// Opens the barrier of a block none of whose threads can go on; false when nobody is left, or when they wait for the
// rest of the cluster.
bool open_barrier(Block& block) {
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

// Lets one warp of the cluster go on, or opens a barrier; false when all threads have returned.
bool step() {
  const uint32_t count = static_cast<uint32_t>(current.cluster.size());
  const Schedule schedule = current.options.schedule;
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
  }
  for (Lane& lane : block.lanes) {
    lane.state = State::fresh;
    lane.copies.clear();
    lane.groups.clear();
    lane.open_copies = 0;
  }
  start_block_memory(block);
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

// "file.cuh:12" of an instruction, by way of addr2line; the innermost place that is not in the emulator.
std::string text_of_instruction(const void* address) {
  Dl_info info{};
  if (!dladdr(address, &info)) return "an unknown place";
  const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
  char command[1024], line[1024];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(offset));
  std::string found;
  if (FILE* pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof line, pipe)) {
      std::string text(line, std::strcspn(line, "\n "));
      if (found.empty() && text.find("cuda_emulation.h") == std::string::npos && text[0] != '?') found = text;
    }
    pclose(pipe);
  }
  if (!found.empty()) return found.substr(found.rfind('/') + 1);
  std::snprintf(line, sizeof line, "%s+0x%zx", info.dli_fname, static_cast<size_t>(offset));
  return line;
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
    current.cluster_epoch = 1;
    for (Block& block : current.cluster) start_block(block, cluster * size + block.rank);
    while (step()) {
      if (!current.failure.empty()) return;
    }
  }
}

void check_launch(dim3 grid, dim3 threads, size_t shared_bytes, const Options& options) {
  const uint64_t count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  if (count == 0 || count > kMaxThreads) throw Error("a block has 1 to 1024 threads, not " + std::to_string(count));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw Error("the grid is empty, which a GPU refuses too");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) throw Error("the grid is larger than a GPU allows");
  if (static_cast<uint64_t>(grid.x) * grid.y * grid.z > 0xffffffffu) throw Error("the grid is too large to emulate");
  if (options.cluster_size < 1 || options.cluster_size > kMaxCluster) {
    throw Error("a cluster has 1 to 8 blocks, not " + std::to_string(options.cluster_size));
  }
  if (grid.x % options.cluster_size != 0) {
    throw Error("the grid has " + std::to_string(grid.x) + " blocks along x, no multiple of the " +
                std::to_string(options.cluster_size) + " of a cluster");
  }
  if (shared_bytes > static_cast<size_t>(options.shared_limit)) {
    throw Error("a block asks for " + std::to_string(shared_bytes) + " bytes of shared memory; there are " +
                std::to_string(options.shared_limit));
  }
}

void wait_at(Lane& self, State barrier, int64_t value, const Place& place) {
  Warp& warp = self.block->warps[self.warp];
  if (!warp.gatherings.empty()) {
    check_nobody_waits_for(self, std::string("enters ") + name_of(barrier) + " at " + text_of(place));
  }
  self.state = barrier;
  self.place = place;
  self.value = value;
  warp.at_barrier |= 1u << self.lane;
  --warp.ready;
  switch_to_scheduler(self);
}

void add(Statistics& to, const Statistics& more) {
  to.blocks += more.blocks;
  to.barriers += more.barriers;
  to.shuffles += more.shuffles;
  to.matrix_loads += more.matrix_loads;
  to.matrix_wavefronts += more.matrix_wavefronts;
  to.multiply_adds += more.multiply_adds;
  to.copies += more.copies;
  to.zero_fills += more.zero_fills;
  to.global_read_bytes += more.global_read_bytes;
  to.global_write_bytes += more.global_write_bytes;
  to.cluster_barriers += more.cluster_barriers;
  to.cluster_reads += more.cluster_reads;
}

}  // namespace

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

Options& default_options() {
  static Options options;
  return options;
}

Options with_clusters(int32_t cluster_size) {
  Options options = default_options();
  options.cluster_size = cluster_size;
  return options;
}

Statistics launch(void (*call)(void*), void* kernel, dim3 grid, dim3 threads, size_t shared_bytes,
                  const Options& options) {
  if (launched) throw Error("a kernel is being emulated already");
  check_launch(grid, threads, shared_bytes, options);
  launched = true;
  struct AtEnd {
    ~AtEnd() { launched = false, current.running = nullptr; }
  } at_end;
  kernel_call = call;
  kernel_object = kernel;
  random_state = options.seed;
  gridDim = grid;
  blockDim = threads;
  current.options = options;
  current.shared_bytes = static_cast<uint32_t>(shared_bytes);
  current.statistics = {};
  current.failure.clear();
  current.failure_address = nullptr;
  make_cluster(static_cast<uint32_t>(options.cluster_size), threads);
  start_shared_memory();
  start_global_memory();
  run_clusters(grid.x * grid.y * grid.z / options.cluster_size);
  if (!current.failure.empty()) {
    if (current.failure_address) current.failure += " (" + text_of_instruction(current.failure_address) + ")";
    throw Error(current.failure);
  }
  add(totals, current.statistics);
  return current.statistics;
}

void trap(const char* what, const Place& place) { fail_at(what, current.running, place); }

void leave_kernel(Lane& self) {
  check_nobody_waits_for(self, "returns from the kernel");
  Block& block = *self.block;
  if (++block.exited == block.lanes.size()) check_nobody_reads(self);
  self.state = State::exited;
  Warp& warp = block.warps[self.warp];
  warp.exited |= 1u << self.lane;
  --warp.ready;
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

void set_last_error(const char* message) { last_error = message; }

}  // namespace fm_emulation

FM_EMULATION_EXPORT const char* fm_emulation_last_error() { return fm_emulation::last_error.c_str(); }

FM_EMULATION_EXPORT void fm_emulation_configure(int32_t schedule, int32_t races, uint64_t seed, int64_t shared_limit,
                                                int32_t cluster_size) {
  fm_emulation::default_options() = {static_cast<fm_emulation::Schedule>(schedule),
                                     static_cast<fm_emulation::Races>(races), seed, shared_limit, cluster_size};
  fm_emulation::totals = {};
}

FM_EMULATION_EXPORT void fm_emulation_totals(fm_emulation::Statistics* to) { *to = fm_emulation::totals; }
