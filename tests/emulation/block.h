// State of the launch that is being run, shared by the parts of the emulator. Not for kernels or callers.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <source_location>
#include <string>
#include <vector>

#include "emulator.h"

namespace fm_emulation {

using Place = std::source_location;

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;  // of a block
inline constexpr int kMaxCluster = 8;     // blocks; what every device with clusters allows

// One value for what a thread does. A waiting thread waits in a function of its warp, one at a barrier for the block or
// the cluster; in group_sync for some threads of the block, in barrier_wait for the end of a phase, in cluster_wait for
// all arrivals.
enum class State : uint8_t {
  fresh,
  ready,
  waiting,
  at_barrier,
  at_cluster_barrier,
  at_group_barrier,
  at_phase,
  at_arrivals,
  exited
};

// The functions that all lanes of a warp enter together.
enum class Call : uint8_t {
  sync_warp,
  shuffle,
  vote,
  load_matrices,
  load_matrices_transposed,
  multiply_add,
  store_matrices,
  products_begin,
  multiply,
  multiply_held,
  products_commit,
  products_wait
};

struct Copy {
  uint32_t to;  // offset in shared memory
  const void* from;
  bool valid;
};

struct Block;

struct Lane {
  jmp_buf context;
  Block* block = nullptr;
  State state = State::fresh;
  uint16_t thread = 0;
  uint16_t stack = 0;  // which of the stacks it runs on
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
  uint64_t left = 0, right = 0;  // operands of a product
  int32_t columns = 0;           // and its width

  // What it waits for: the number of a group's barrier, the offset of one that counts bytes, arrivals of the cluster.
  uint32_t waits_for = 0;
  uint64_t arrived = 0;  // the phase of the cluster's barrier at which it arrived last; 0 is none
  uint64_t cluster_seen = 0;  // the epoch of the cluster that began with its last barrier
  uint32_t fences = 1;   // how often it has made its stores ready, and 1
  uint64_t stores = 1;   // the group of stores that is open

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

// Sums of a warp's 16 rows while products are under way; who looks at them sees numbers that mean nothing.
struct Accumulator {
  std::array<float*, kWarp> sums;
  int32_t columns;
  uint64_t group;  // of the last product
  std::vector<float> values;  // [16, columns]
  Place place;
};

struct Warp {
  uint32_t lanes = 0;   // mask of those there are
  uint32_t exited = 0, at_barrier = 0;
  uint32_t epoch = 0;   // counts the __syncwarp of all its lanes, within a block
  int ready = 0;        // lanes that can go on
  std::vector<Gathering> gatherings;

  bool products_begun = false;
  uint64_t products = 1;  // the group of products that is open
  std::vector<Accumulator> accumulators;
};

// Who touched two bytes of shared memory last.
struct Cell {
  uint32_t write_epoch, write_warp_epoch;
  uint32_t read_epoch, read_warp_epoch;
  uint32_t reading_warps;  // in read_epoch
  uint32_t reading_lanes;  // of reading_warp, in read_warp_epoch
  uint16_t writer;         // thread
  uint16_t pending;        // thread + 1 whose asynchronous copy has not been waited for, or kTransfer
  uint16_t storer;         // thread + 1 of the last plain store, 0 after one of the copy engine or another block
  uint32_t storer_fences;  // of that thread then
  uint8_t reading_warp;
};

// Times of the warps of a block, of Races::by_barriers.
using Clock = std::array<uint32_t, kWarp>;

// When two bytes of shared memory were touched last, by which warp; when each read them is in Block::read_times.
struct Stamp {
  uint32_t written = 0;  // in the writer's time
  uint32_t readers = 0;  // warps, since then
  uint8_t writer = 0;
};

inline constexpr uint16_t kTransfer = 0xffff;  // pending: of the copy engine, or from another block

// A barrier of barrier_init.
struct Barrier {
  uint32_t offset, count;
  int64_t arrivals, bytes;  // that the phase still waits for
  uint32_t phase;
  uint16_t maker;  // thread
  bool ready;      // for the copy engine
  uint64_t made;   // in which epoch of the cluster
  Clock arriving{}, passed{};  // of those who have arrived, and who had when the last phase ended
};

// A part of shared memory that products or stores of boxes read until they have been waited for; of a left operand the
// warp itself reads less.
struct Reading {
  uint32_t begin, end;
  uint32_t own_begin, own_end;
  uint16_t owner;  // warp of products, thread of stores
  bool product;
  uint64_t group;
  Place place;
};

struct Block {
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<Cell> cells;
  std::vector<uint64_t> cluster_reads;  // of a cell by another block: cluster epoch, and its rank; only in clusters
  unsigned char* shared = nullptr;
  uint32_t rank = 0;    // within the cluster
  uint32_t number = 0;  // in the order of blockIdx
  uint3 index{};
  uint32_t epoch = 0;           // counts the barriers
  uint32_t cluster_start = 0;   // the epoch that began with the last barrier of the cluster
  size_t exited = 0;            // threads
  bool parked = false;          // all others wait for the rest of the cluster
  uint64_t last_cluster_read = 0;  // of any cell

  std::vector<Barrier> barriers;
  std::vector<Reading> readings;
  std::array<uint32_t, 16> group_arrivals{}, group_threads{};  // of group_sync
  std::array<Clock, 16> together{};

  // Of Races::by_barriers.
  std::vector<Clock> clocks;  // of each warp
  std::vector<Stamp> stamps;  // of each cell
  std::vector<uint32_t> read_times;  // [cells, warps]
  Clock arrived{};                   // of those who have arrived at the cluster's barrier
};

struct Launch {
  std::vector<Block> cluster;  // the blocks that run side by side; one where the launch asks for no cluster
  uint64_t cluster_epoch = 0;  // counts the barriers of the cluster
  uint64_t arrivals = 0, arrival_phase = 1;  // of the barrier that cluster_arrive and cluster_wait share
  uint32_t shared_bytes = 0;
  Options options;
  Statistics statistics;
  Lane* running = nullptr;
  jmp_buf scheduler;
  std::string failure;
  const void* failure_address = nullptr;  // of the instruction, where the place is not known
};

extern Launch current;

// Ends the launch with this message. From a thread of the block it leaves that thread for good.
[[noreturn]] void fail(const std::string& what, const Lane* lane);
[[noreturn]] void fail_at(const std::string& what, const Lane* lane, const Place& place);
std::string name_of(const Lane& lane);
std::string text_of(const Place& place);
bool same(const Place& a, const Place& b);

struct Region {
  uintptr_t start = 0, end = 0;
  bool contains(uintptr_t address) const { return address >= start && address < end; }
};

// emulator.cpp: all blocks of a launch, as far as they come.
void run_grid(void (*call)(void*), void* kernel, dim3 grid, dim3 threads);
// After the last statement of the kernel.
void leave_kernel(Lane& self);
const char* name_of(State state);
uint32_t random_below(uint32_t limit);
// Lets a thread that waits go on.
void wake(Lane& lane);
// The thread waits in this state, until somebody wakes it; `together`: the lanes of its warp, all of them, wait there.
void wait_in(Lane& self, State state, bool together, const Place& place);

// fibers.cpp
extern Region thread_stacks;
// Makes room for so many threads at once.
void prepare_stacks(size_t threads);
// Lets the thread run until it waits, returns from the kernel or fails.
void resume(Lane& lane, void (*kernel)(void*), void* object);
// Leaves the thread until its state says that it may go on.
void switch_to_scheduler(Lane& self);

// warp.cpp: a lane of the same warp.
Lane& lane_of(const Lane& self, int lane);
// Waits until all lanes of the mask are here; the last one does the work.
void meet(Lane& self, Call call, uint32_t mask, const Place& place);
// Nobody may leave for elsewhere while others of the warp count on it.
void check_nobody_waits_for(const Lane& self, const std::string& doing);

// The place of an access: a line that is known, or the address of the instruction.
struct Origin {
  const Place* place;
  const void* instruction;
};
[[noreturn]] void fail_from(const std::string& what, const Lane& lane, const Origin& origin);
std::string name_of_thread(uint32_t thread);

// global_memory.cpp
void start_global_memory();
// A plain access by the code at `instruction`; `aligned`: to a multiple of its size.
void access(const void* pointer, size_t bytes, bool write, bool aligned, const void* instruction);
void access_global(const Lane& lane, uintptr_t address, uint32_t bytes, bool write, const Origin& origin);

// shared_memory.cpp
extern const Region shared_arenas;
void start_shared_memory();
void start_block_memory(Block& block);
void access_shared(const Lane& lane, int64_t offset, uint32_t bytes, bool write, const Origin& origin);
// 16 bytes for a matrix load.
const unsigned char* read_matrix_row(const Lane& lane, uint32_t address, const Place& place);
unsigned char* write_matrix_row(const Lane& lane, uint32_t address, const Place& place);
// An offset in shared memory; `bytes` from there must be the block's.
uint32_t checked_offset(const Lane& lane, uint32_t address, uint32_t bytes, const char* doing, const Place& place);
// Where products or the copy engine read.
void check_asynchronous_read(const Lane& lane, uint32_t offset, uint32_t bytes, const Place& place);
// The copy engine or another block will write there, by way of `asker`, and has written there.
void begin_transfer(const Lane& asker, Block& to, uint32_t offset, uint32_t bytes, const Place& place);
void end_transfer(Block& to, const Barrier& barrier, uint32_t offset, const void* data, uint32_t bytes);
void forget_readings(const Lane& lane, bool product, uint64_t before);
// A block of a cluster may not return while another may still read its shared memory.
void check_nobody_reads(const Lane& last);

// barriers.cpp
void start_block_barriers(Block& block);
// A copy or store has brought so many bytes to the barrier at this offset.
void bytes_arrived(Block& block, Barrier& barrier, uint32_t bytes);
Barrier* find_barrier(Block& block, uint32_t offset);
void check_barrier_for_transfers(const Lane& asker, const Block& block, uint32_t barrier, const Place& place);
// Why a thread that waits may wait for ever.
std::string describe_wait(const Lane& lane);
// Opens the barrier of cluster_arrive if everybody has arrived or returned.
void open_arrivals();

// clocks.cpp: all but the first do nothing without Races::by_barriers.
bool clocks_run();
void start_clocks(Block& block);
void check_order(const Lane& lane, uint32_t offset, uint32_t bytes, bool write, const Origin& origin);
// Reads that have gone on until now.
void note_reads(const Lane& lane, uint32_t offset, uint32_t bytes);
// What a transfer has brought there is seen by those who wait for its barrier; and one more has come for the barrier.
void note_arrival(Block& block, const Barrier& barrier, uint32_t offset, uint32_t bytes);
void count_arrival(const Block& block, Barrier& barrier);
// The warp passes on what it has seen, or learns what others had seen.
void give_clock(const Lane& lane, Clock& to);
void take_clock(const Lane& lane, const Clock& from);
void join_clocks(Block& block);

// copy_engine.cpp
void start_transfers();
// Performs one of the transfers that are under way, one that may come late only if it is `needed`; false if there is none.
bool perform_transfer(bool needed);
// At the end of a thread, which may be the last of its block.
void check_transfers_at_exit(const Lane& self);

// products.cpp: what the last lane of a warp does for all.
void do_products(const Lane& self, Call call, const Place& place);
void check_products_at_exit(const Lane& self);

}  // namespace fm_emulation
