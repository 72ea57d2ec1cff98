// Launches, and threads as fibers.
//
// A thread runs until it has to wait; then the scheduler picks another. Switching uses _setjmp and _longjmp, because
// swapcontext asks the operating system to save the signal mask each time.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <utility>

#include "block.h"
#include "cuda_emulation.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fm_emulation {

Block block;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;

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

unsigned char* stacks() {
  static unsigned char* memory = [] {
    void* mapped = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw Error("no memory for the stacks of the threads");
    auto* bytes = static_cast<unsigned char*>(mapped);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(bytes + i * kStackBytes, kGuardBytes, PROT_NONE);
    return bytes;
  }();
  return memory;
}

void thread_main() {
  std::string thrown;
  try {
    kernel_call(kernel_object);
  } catch (const std::exception& error) {
    thrown = std::string("threw: ") + error.what();
  }
  if (!thrown.empty()) fail(thrown, block.running);
  Lane& self = *block.running;
  check_nobody_waits_for(self, "returns from the kernel");
  self.state = State::exited;
  Warp& warp = block.warps[self.warp];
  warp.exited |= 1u << self.lane;
  --warp.ready;
  _longjmp(block.scheduler, 1);
}

__attribute__((noinline)) void resume(Lane& lane) {
  static ucontext_t start;
  block.running = &lane;
  threadIdx = lane.index;
  if (_setjmp(block.scheduler) == 0) {
    if (lane.state != State::fresh) _longjmp(lane.context, 1);
    lane.state = State::ready;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks() + lane.thread * kStackBytes + kGuardBytes;
    start.uc_stack.ss_size = kStackBytes - kGuardBytes;
    start.uc_link = nullptr;
    makecontext(&start, thread_main, 0);
    setcontext(&start);
  }
  block.running = nullptr;
}

int pick_warp() {
  const int count = static_cast<int>(block.warps.size());
  switch (block.options.schedule) {
    case Schedule::forward:
      for (int w = 0; w < count; ++w) {
        if (block.warps[w].ready) return w;
      }
      return -1;
    case Schedule::reverse:
      for (int w = count - 1; w >= 0; --w) {
        if (block.warps[w].ready) return w;
      }
      return -1;
    case Schedule::random: {
      const int first = static_cast<int>(random_below(count));
      for (int w = 0; w < count; ++w) {
        if (block.warps[(first + w) % count].ready) return (first + w) % count;
      }
      return -1;
    }
  }
  return -1;
}

// Lets every lane that can go on do so, once.
void run_warp(int index) {
  std::array<int, kWarp> order;
  for (int l = 0; l < kWarp; ++l) order[l] = block.options.schedule == Schedule::reverse ? kWarp - 1 - l : l;
  if (block.options.schedule == Schedule::random) {
    for (int l = kWarp - 1; l > 0; --l) std::swap(order[l], order[random_below(l + 1)]);
  }
  for (const int l : order) {
    const size_t thread = static_cast<size_t>(index) * kWarp + l;
    if (thread >= block.lanes.size()) continue;
    Lane& lane = block.lanes[thread];
    if (lane.state != State::ready && lane.state != State::fresh) continue;
    resume(lane);
    if (!block.failure.empty()) return;
  }
}

// Opens the barrier when everybody who has not returned is there; false when nobody is left.
bool open_barrier() {
  const Lane* first = nullptr;
  int64_t count = 0;
  for (const Lane& lane : block.lanes) {
    if (lane.state == State::exited) continue;
    if (lane.state == State::waiting) fail("waits for ever in a function at " + text_of(lane.place), &lane);
    if (first && !same(first->place, lane.place)) {
      fail("waits in __syncthreads at " + text_of(lane.place) + " while " + name_of(*first) + " waits in another one at " +
               text_of(first->place),
           &lane);
    }
    first = first ? first : &lane;
    count += lane.value;
  }
  if (!first) return false;
  ++block.epoch;
  ++block.statistics.barriers;
  for (Lane& lane : block.lanes) {
    if (lane.state != State::at_barrier) continue;
    lane.state = State::ready;
    lane.value = count;
    ++block.warps[lane.warp].ready;
  }
  for (Warp& warp : block.warps) warp.at_barrier = 0;
  return true;
}

void start_block(uint32_t number) {
  block.number = number;
  block.epoch = 1;
  ++block.statistics.blocks;
  const uint64_t plane = static_cast<uint64_t>(gridDim.x) * gridDim.y;
  blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, static_cast<unsigned>(number / plane)};
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
  start_block_memory();
}

void make_threads(dim3 threads) {
  const unsigned count = threads.x * threads.y * threads.z;
  block.lanes.assign(count, Lane{});
  block.warps.assign((count + kWarp - 1) / kWarp, Warp{});
  for (unsigned t = 0; t < count; ++t) {
    Lane& lane = block.lanes[t];
    lane.thread = static_cast<uint16_t>(t);
    lane.warp = static_cast<uint8_t>(t / kWarp);
    lane.lane = static_cast<uint8_t>(t % kWarp);
    lane.index = {t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y)};
    block.warps[lane.warp].lanes |= 1u << lane.lane;
  }
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

void run_blocks(uint32_t count) {
  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; ++i) {
    order[i] = block.options.schedule == Schedule::reverse ? count - 1 - i : i;
  }
  if (block.options.schedule == Schedule::random) {
    for (uint32_t i = count; i-- > 1;) std::swap(order[i], order[random_below(i + 1)]);
  }
  for (const uint32_t number : order) {
    start_block(number);
    while (true) {
      const int warp = pick_warp();
      if (warp >= 0) {
        run_warp(warp);
        if (!block.failure.empty()) return;
      } else if (!open_barrier()) {
        break;
      }
    }
  }
}

void check_launch(dim3 grid, dim3 threads, size_t shared_bytes, const Options& options) {
  const uint64_t count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  if (count == 0 || count > kMaxThreads) throw Error("a block has 1 to 1024 threads, not " + std::to_string(count));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw Error("the grid is empty, which a GPU refuses too");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) throw Error("the grid is larger than a GPU allows");
  if (static_cast<uint64_t>(grid.x) * grid.y * grid.z > 0xffffffffu) throw Error("the grid is too large to emulate");
  if (shared_bytes > static_cast<size_t>(options.shared_limit)) {
    throw Error("a block asks for " + std::to_string(shared_bytes) + " bytes of shared memory; there are " +
                std::to_string(options.shared_limit));
  }
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
}

}  // namespace

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void switch_to_scheduler(Lane& self) {
  if (_setjmp(self.context) == 0) _longjmp(block.scheduler, 1);
}

std::string text_of(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

std::string name_of(const Lane& lane) {
  return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + "), warp " + std::to_string(lane.warp) + ", lane " + std::to_string(lane.lane);
}

void fail(const std::string& what, const Lane* lane) {
  std::string message = (lane ? name_of(*lane) + ": " : "") + what;
  if (!block.running) throw Error(message);
  block.failure = std::move(message);
  _longjmp(block.scheduler, 1);
}

void fail_at(const std::string& what, const Lane* lane, const Place& place) {
  fail(what + " (" + text_of(place) + ")", lane);
}

Options& default_options() {
  static Options options;
  return options;
}

Statistics launch(void (*call)(void*), void* kernel, dim3 grid, dim3 threads, size_t shared_bytes,
                  const Options& options) {
  if (launched) throw Error("a kernel is being emulated already");
  check_launch(grid, threads, shared_bytes, options);
  launched = true;
  struct AtEnd {
    ~AtEnd() { launched = false, block.running = nullptr; }
  } at_end;
  kernel_call = call;
  kernel_object = kernel;
  random_state = options.seed;
  gridDim = grid;
  blockDim = threads;
  block.options = options;
  block.shared_bytes = static_cast<uint32_t>(shared_bytes);
  block.statistics = {};
  block.failure.clear();
  block.failure_address = nullptr;
  make_threads(threads);
  start_launch_memory(stacks(), kMaxThreads * kStackBytes);
  run_blocks(grid.x * grid.y * grid.z);
  if (!block.failure.empty()) {
    if (block.failure_address) block.failure += " (" + text_of_instruction(block.failure_address) + ")";
    throw Error(block.failure);
  }
  add(totals, block.statistics);
  return block.statistics;
}

void trap(const char* what, const Place& place) { fail_at(what, block.running, place); }

void sync_threads(const Place& place) { sync_threads_count(false, place); }

int32_t sync_threads_count(bool predicate, const Place& place) {
  Lane& self = *block.running;
  check_nobody_waits_for(self, "enters __syncthreads at " + text_of(place));
  self.state = State::at_barrier;
  self.place = place;
  self.value = predicate;
  Warp& warp = block.warps[self.warp];
  warp.at_barrier |= 1u << self.lane;
  --warp.ready;
  switch_to_scheduler(self);
  return static_cast<int32_t>(self.value);
}

void set_last_error(const char* message) { last_error = message; }

}  // namespace fm_emulation

FM_EMULATION_EXPORT const char* fm_emulation_last_error() { return fm_emulation::last_error.c_str(); }

FM_EMULATION_EXPORT void fm_emulation_configure(int32_t schedule, int32_t races, uint64_t seed, int64_t shared_limit) {
  fm_emulation::default_options() = {static_cast<fm_emulation::Schedule>(schedule),
                                     static_cast<fm_emulation::Races>(races), seed, shared_limit};
  fm_emulation::totals = {};
}

FM_EMULATION_EXPORT void fm_emulation_totals(fm_emulation::Statistics* to) { *to = fm_emulation::totals; }
