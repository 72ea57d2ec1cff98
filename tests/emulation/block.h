// State of the block that is being run, shared by the parts of the emulator. Not for kernels or callers.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <source_location>
#include <string>
#include <vector>

#include "emulator.h"

namespace fm_emulation {

using Place = std::source_location;

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;

// One value for what a thread does. A waiting thread waits in a function of its warp, one at the barrier for the block.
enum class State : uint8_t { fresh, ready, waiting, at_barrier, exited };

// The functions that all lanes of a warp enter together.
enum class Call : uint8_t { sync_warp, shuffle, vote, load_matrices, load_matrices_transposed, multiply_add };

struct Copy {
  uint32_t to;  // offset in shared memory
  const void* from;
  bool valid;
};

struct Lane {
  jmp_buf context;
  State state = State::fresh;
  uint16_t thread = 0;
  uint8_t warp = 0, lane = 0;
  uint3 index{};
  Place place;  // of the function it waits in

  // What it brought to that function, and takes from it.
  int32_t kind = 0, argument = 0, width = 0;
  int64_t value = 0;
  uint32_t row = 0;
  uint32_t* words = nullptr;
  const uint32_t* a = nullptr;
  uint32_t b[2] = {};
  float* c = nullptr;

  // Asynchronous copies that were asked for, oldest first, and how many belong to each closed group.
  std::vector<Copy> copies;
  std::vector<uint32_t> groups;
  uint32_t open_copies = 0;
};

// Lanes of a warp that have entered a function, until the last one of the mask arrives.
struct Gathering {
  Call call;
  uint32_t mask, arrived;
  Place place;
};

struct Warp {
  uint32_t lanes = 0;   // mask of those there are
  uint32_t exited = 0, at_barrier = 0;
  uint32_t epoch = 0;   // counts the __syncwarp of all its lanes, within a block
  int ready = 0;        // lanes that can go on
  std::vector<Gathering> gatherings;
};

struct Block {
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  uint32_t number = 0;  // in the order of blockIdx
  uint32_t epoch = 0;   // counts the barriers
  uint32_t shared_bytes = 0;
  Options options;
  Statistics statistics;
  Lane* running = nullptr;
  jmp_buf scheduler;
  std::string failure;
  const void* failure_address = nullptr;  // of the instruction, where the place is not known
};

extern Block block;

// Ends the launch with this message. From a thread of the block it leaves that thread for good.
[[noreturn]] void fail(const std::string& what, const Lane* lane);
[[noreturn]] void fail_at(const std::string& what, const Lane* lane, const Place& place);
std::string name_of(const Lane& lane);
std::string text_of(const Place& place);
bool same(const Place& a, const Place& b);
// Leaves the thread until its state says that it may go on.
void switch_to_scheduler(Lane& self);

// warp.cpp: nobody may leave for elsewhere while others of the warp count on it.
void check_nobody_waits_for(const Lane& self, const std::string& doing);

// memory.cpp
void start_launch_memory(const void* stacks, size_t stack_bytes);
void start_block_memory();
// 16 bytes for a matrix load.
const unsigned char* read_matrix_row(const Lane& lane, uint32_t address, const Place& place);
// A plain access by the code at `instruction`; `aligned`: to a multiple of its size.
void access(const void* pointer, size_t bytes, bool write, bool aligned, const void* instruction);

}  // namespace fm_emulation
