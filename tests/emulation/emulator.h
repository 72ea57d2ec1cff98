// Runs CUDA kernels that were compiled as host code, block by block, every thread of a block on its own stack.
//
// This header is the side of the caller: launch() and its options. What kernels call is in cuda_emulation.h.
//
// What a run shows: wrong indices, wrong fragment layouts, wrong results; missing barriers and missing waits (races
// between threads are reported at the access, and orders of execution can be varied); accesses outside of the block's
// shared memory and outside of the registered buffers; lanes that miss a collective; bank conflicts of matrix loads;
// blocks of a cluster that read each other's shared memory too early, too late or after its end; how many instructions
// of each kind and how many bytes a kernel asks for. Of compute capability 9.0: sums that are used and operands that are
// overwritten before the wait for their product; copies of the copy engine and stores to other blocks that are not waited
// for, or that nobody can have room for yet; stores to shared memory that were not made ready for both; barriers that
// nobody ends, as deadlocks; blocks that return while others still write to them.
//
// What it cannot show: time, registers, occupancy, caches; how a GPU rounds inside a matrix product or an approximate
// exponential (here: IEEE float32, in order); reordering of accesses by the memory system beyond what the race check
// finds; anything about streams and launches.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#define FM_EMULATION_EXPORT extern "C" __attribute__((visibility("default")))

namespace fm_emulation {

// What went wrong, where, and in which thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Which of the threads that could go on does so: of the warps, of the lanes between two collectives, of the blocks of a
// cluster, of the clusters. What the copy engine is asked for comes at once (forward), when nobody can go on without it
// (reverse), or at any time.
enum class Schedule : int32_t { forward, reverse, random };

// Which unordered accesses are reported. Warps are ordered by __syncthreads, lanes of a warp also by __syncwarp, blocks
// of a cluster by cluster_sync alone; as on a GPU, shuffles and matrix instructions order nothing. Kernels whose warps
// wait for each other at other barriers too (group_sync, those in shared memory) need by_barriers, which knows all kinds,
// but neither lanes nor global memory.
enum class Races : int32_t { ignored, between_warps, between_lanes, by_barriers };

struct Options {
  Schedule schedule = Schedule::forward;
  Races races = Races::between_lanes;
  uint64_t seed = 0;                   // of Schedule::random
  int64_t shared_limit = 227 * 1024;  // bytes a block may ask for; 163 KiB on compute capability 8.0
  int32_t cluster_size = 1;           // so many consecutive blocks along x run side by side and see each other's memory
};

// Counts since the last reset, or of one launch. Those of matrices, copies and products are per warp or per lane as
// the instruction is: one matrix load or product per warp, one copy per lane.
struct Statistics {
  int64_t blocks = 0;
  int64_t barriers = 0;            // __syncthreads, per block
  int64_t shuffles = 0;            // per warp
  int64_t matrix_loads = 0;        // of four matrices each
  int64_t matrix_wavefronts = 0;   // passes over the banks they need: 4 per load when there is no conflict
  int64_t multiply_adds = 0;       // 16 x 8 x 16 products
  int64_t copies = 0;              // asynchronous copies of 16 bytes
  int64_t zero_fills = 0;          // those with nothing to copy
  int64_t global_read_bytes = 0;   // plain loads from registered buffers; copies are counted above
  int64_t global_write_bytes = 0;  // plain stores to registered buffers
  int64_t cluster_barriers = 0;    // cluster_sync, per cluster
  int64_t cluster_reads = 0;       // loads from the shared memory of a block of the cluster, per lane
};

// Options of launches that name none, set by the Python side.
Options& default_options();
// The same with clusters, for a harness some of whose launches have them.
Options with_clusters(int32_t cluster_size);

// Global memory that kernels may use. While any is registered, accesses elsewhere are errors. `name` is for messages.
void register_buffer(const std::string& name, const void* start, size_t bytes, bool writable);
void forget_buffers();

Statistics launch(void (*call)(void*), void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                  const Options& options);

// Runs `kernel()` once per thread; throws Error.
template <typename Kernel>
Statistics launch(Kernel&& kernel, dim3 grid, dim3 block, size_t shared_bytes,
                  const Options& options = default_options()) {
  // Not a std::function: the lambda must lie on the stack of the caller, which kernels may read.
  return launch([](void* self) { (*static_cast<std::remove_reference_t<Kernel>*>(self))(); },
                const_cast<void*>(static_cast<const void*>(&kernel)), grid, block, shared_bytes, options);
}

void set_last_error(const char* message);

// Body of an exported function: 0, or 1 after an exception, whose text the Python side then asks for.
template <typename Body>
int32_t reported(Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return 1;
  }
}

}  // namespace fm_emulation
