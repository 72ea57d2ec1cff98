// Launches: their options, what a GPU would refuse, what they count, and how they fail.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "block.h"

namespace fm_emulation {
namespace {

Statistics totals;
bool launched = false;
std::string last_error;

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
      if (found.empty() && text.find("_emulation.h") == std::string::npos && text[0] != '?') found = text;
    }
    pclose(pipe);
  }
  if (!found.empty()) return found.substr(found.rfind('/') + 1);
  std::snprintf(line, sizeof line, "%s+0x%zx", info.dli_fname, static_cast<size_t>(offset));
  return line;
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
  current.options = options;
  current.shared_bytes = static_cast<uint32_t>(shared_bytes);
  current.statistics = {};
  current.failure.clear();
  current.failure_address = nullptr;
  run_grid(call, kernel, grid, threads);
  if (!current.failure.empty()) {
    if (current.failure_address) current.failure += " (" + text_of_instruction(current.failure_address) + ")";
    throw Error(current.failure);
  }
  add(totals, current.statistics);
  return current.statistics;
}

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
