// Threads as fibers, and the functions in which they meet.
//
// A thread runs until it has to wait; then the scheduler picks another. The last lane to enter a function of its warp
// does the work for all of them. Switching uses _setjmp and _longjmp, because swapcontext asks the kernel to save the
// signal mask each time.
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

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

const char* name_of(Call call) {
  switch (call) {
    case Call::sync_warp: return "__syncwarp";
    case Call::shuffle: return "a shuffle";
    case Call::vote: return "a vote or reduction";
    case Call::load_matrices: return "load_matrices";
    case Call::load_matrices_transposed: return "load_matrices_transposed";
    case Call::multiply_add: return "multiply_add_16x8x16";
  }
  return "?";
}

std::string describe(const Gathering& group) { return std::string(name_of(group.call)) + " at " + text_of(group.place); }

void switch_to_scheduler(Lane& self) {
  if (_setjmp(self.context) == 0) _longjmp(block.scheduler, 1);
}

// Lanes of `mask` in words, e.g. "0-3, 31".
std::string lanes_in(uint32_t mask) {
  std::string text;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    int last = lane;
    while (last + 1 < kWarp && (mask >> (last + 1) & 1)) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(lane) + (last > lane ? "-" + std::to_string(last) : "");
    lane = last;
  }
  return text;
}

// Nobody may leave for elsewhere while others of the warp count on it.
void check_nobody_waits_for(const Lane& self, const std::string& doing) {
  for (const Gathering& group : block.warps[self.warp].gatherings) {
    if (group.mask >> self.lane & 1) {
      fail(doing + " while lanes " + lanes_in(group.arrived) + " wait for it in " + describe(group), &self);
    }
  }
}

Lane& lane_of(const Lane& self, int lane) { return block.lanes[self.warp * kWarp + lane]; }

void do_shuffle(const Lane& self, uint32_t mask, const Place& place) {
  ++block.statistics.shuffles;
  std::array<int64_t, kWarp> results{};
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    const Lane& lane = lane_of(self, l);
    const int width = lane.width, segment = l & ~(width - 1), within = l & (width - 1);
    int source = l;
    switch (static_cast<Move>(lane.kind)) {
      case Move::index: source = segment + (lane.argument & (width - 1)); break;
      case Move::up: source = within >= lane.argument ? l - lane.argument : l; break;
      case Move::down: source = within + lane.argument < width ? l + lane.argument : l; break;
      case Move::exclusive_or: {  // lanes of later segments are out of reach, those of earlier ones are not
        const int other = l ^ lane.argument;
        source = other < segment + width ? other : l;
        break;
      }
    }
    if (source < 0 || source >= kWarp || !(mask >> source & 1)) {
      fail_at("a shuffle reads lane " + std::to_string(source) + ", which takes no part", &lane, place);
    }
    results[l] = lane_of(self, source).value;
  }
  for (int l = 0; l < kWarp; ++l) {
    if (mask >> l & 1) lane_of(self, l).value = results[l];
  }
}

void do_vote(const Lane& self, uint32_t mask) {
  int64_t result = 0;
  bool first = true;
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    const int64_t value = lane_of(self, l).value;
    switch (static_cast<Vote>(self.kind)) {
      case Vote::ballot: result |= (value ? int64_t{1} : 0) << l; break;
      case Vote::add: result += value; break;
      case Vote::smallest: result = first ? value : std::min(result, value); break;
      case Vote::largest: result = first ? value : std::max(result, value); break;
      case Vote::bit_and: result = first ? value : result & value; break;
      case Vote::bit_or: result |= value; break;
      case Vote::bit_xor: result ^= value; break;
    }
    first = false;
  }
  for (int l = 0; l < kWarp; ++l) {
    if (mask >> l & 1) lane_of(self, l).value = result;
  }
}

void do_load_matrices(const Lane& self, bool transposed, const Place& place) {
  ++block.statistics.matrix_loads;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t numbers[8][8];
    uint32_t rows[8];
    for (int row = 0; row < 8; ++row) {
      const Lane& supplier = lane_of(self, matrix * 8 + row);
      rows[row] = supplier.row;
      std::memcpy(numbers[row], read_matrix_row(supplier, supplier.row, place), 16);
    }
    // Each matrix takes one pass over the 32 banks, if no two different rows lie in the same four of them.
    int passes = 1;
    for (int i = 0; i < 8; ++i) {
      int other_rows_here = 1;
      for (int j = 0; j < i; ++j) other_rows_here += rows[j] / 16 % 8 == rows[i] / 16 % 8 && rows[j] != rows[i];
      passes = std::max(passes, other_rows_here);
    }
    block.statistics.matrix_wavefronts += passes;
    for (int l = 0; l < kWarp; ++l) {
      const int line = l / 4, pair = 2 * (l % 4);
      const uint16_t low = transposed ? numbers[pair][line] : numbers[line][pair];
      const uint16_t high = transposed ? numbers[pair + 1][line] : numbers[line][pair + 1];
      lane_of(self, l).words[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

float half_to_float(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t wide = magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : __builtin_bit_cast(uint32_t, scaled);
  return __builtin_bit_cast(float, wide | static_cast<uint32_t>(bits & 0x8000u) << 16);
}

float number(uint32_t word, int half, bool bfloat) {
  const auto bits = static_cast<uint16_t>(word >> 16 * half);
  return bfloat ? __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

// Fragments as in the PTX manual, "Matrix fragments for mma.m16n8k16 with floating point type".
void do_multiply_add(const Lane& self) {
  ++block.statistics.multiply_adds;
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const Lane& lane = lane_of(self, l);
    const bool bfloat = lane.kind != 0;
    const int group = l / 4, pair = 2 * (l % 4);
    for (int half = 0; half < 2; ++half) {
      a[group][pair + half] = number(lane.a[0], half, bfloat);
      a[group + 8][pair + half] = number(lane.a[1], half, bfloat);
      a[group][pair + 8 + half] = number(lane.a[2], half, bfloat);
      a[group + 8][pair + 8 + half] = number(lane.a[3], half, bfloat);
      b[pair + half][group] = number(lane.b[0], half, bfloat);
      b[pair + 8 + half][group] = number(lane.b[1], half, bfloat);
      c[group][pair + half] = lane.c[half];
      c[group + 8][pair + half] = lane.c[2 + half];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    float* to = lane_of(self, l).c;
    const int group = l / 4, pair = 2 * (l % 4);
    for (int half = 0; half < 2; ++half) {
      to[half] = c[group][pair + half];
      to[2 + half] = c[group + 8][pair + half];
    }
  }
}

void perform(const Lane& self, const Gathering& group) {
  switch (group.call) {
    case Call::sync_warp:
      if (group.mask == block.warps[self.warp].lanes) ++block.warps[self.warp].epoch;
      break;
    case Call::shuffle: do_shuffle(self, group.mask, group.place); break;
    case Call::vote: do_vote(self, group.mask); break;
    case Call::load_matrices: do_load_matrices(self, false, group.place); break;
    case Call::load_matrices_transposed: do_load_matrices(self, true, group.place); break;
    case Call::multiply_add: do_multiply_add(self); break;
  }
}

// Waits until all lanes of the mask are here; the last one does the work.
void meet(Lane& self, Call call, uint32_t mask, const Place& place) {
  Warp& warp = block.warps[self.warp];
  if (mask == kFullMask) mask = warp.lanes;
  const auto complain = [&](const std::string& what) { fail_at(std::string(name_of(call)) + ": " + what, &self, place); };
  if (!(mask >> self.lane & 1)) complain("the mask does not name the lane that calls");
  if (mask & ~warp.lanes) complain("the mask names lanes that the block does not have");
  if (call >= Call::load_matrices && mask != kFullMask) complain("the block has no 32 lanes in this warp");

  auto group = warp.gatherings.begin();
  for (; group != warp.gatherings.end(); ++group) {
    const bool expected = group->mask >> self.lane & 1;
    if (expected && group->call == call && group->mask == mask && same(group->place, place)) break;
    if (expected || (group->arrived & mask)) {
      complain("lanes " + lanes_in(group->arrived) + " wait in " + describe(*group) + " instead");
    }
  }
  if (group == warp.gatherings.end()) {
    if (mask & warp.exited) complain("lanes " + lanes_in(mask & warp.exited) + " have returned from the kernel");
    if (const uint32_t away = mask & warp.at_barrier) {
      const Lane& other = lane_of(self, std::countr_zero(away));
      complain("lanes " + lanes_in(away) + " wait in __syncthreads at " + text_of(other.place));
    }
    group = warp.gatherings.insert(group, Gathering{call, mask, 0, place});
  }
  group->arrived |= 1u << self.lane;
  if (group->arrived == mask) {
    const Gathering complete = *group;
    warp.gatherings.erase(group);
    perform(self, complete);
    for (int l = 0; l < kWarp; ++l) {
      if (mask >> l & 1) lane_of(self, l).state = State::ready;
    }
    warp.ready += std::popcount(mask) - 1;
    return;
  }
  self.state = State::waiting;
  self.place = place;
  --warp.ready;
  switch_to_scheduler(self);
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

void sync_warp(uint32_t mask, const Place& place) { meet(*block.running, Call::sync_warp, mask, place); }

uint64_t shuffle(uint32_t mask, uint64_t bits, Move move, int32_t argument, int32_t width, const Place& place) {
  Lane& self = *block.running;
  if (width < 1 || width > kWarp || (width & (width - 1))) fail_at("a shuffle's width must be 1 to 32, a power of 2", &self, place);
  self.value = static_cast<int64_t>(bits);
  self.kind = static_cast<int32_t>(move);
  self.argument = argument;
  self.width = width;
  meet(self, Call::shuffle, mask, place);
  return static_cast<uint64_t>(self.value);
}

int64_t vote(uint32_t mask, int64_t value, Vote kind, const Place& place) {
  Lane& self = *block.running;
  self.value = value;
  self.kind = static_cast<int32_t>(kind);
  meet(self, Call::vote, mask, place);
  return self.value;
}

void load_matrices(uint32_t* r, uint32_t row, bool transposed, const Place& place) {
  Lane& self = *block.running;
  self.words = r;
  self.row = row;
  meet(self, transposed ? Call::load_matrices_transposed : Call::load_matrices, kFullMask, place);
}

void multiply_add(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat, const Place& place) {
  Lane& self = *block.running;
  self.c = c;
  self.a = a;
  self.b[0] = b0;
  self.b[1] = b1;
  self.kind = bfloat;
  meet(self, Call::multiply_add, kFullMask, place);
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
