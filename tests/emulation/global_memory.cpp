// Global memory: bounds and races; and what becomes of each access that the compiler announces.
//
// The compiler announces every access to memory that others can see (hooks.cpp). What it keeps in registers, or proves
// to be one thread's own, it does not announce.
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <deque>

#include "block.h"
#include "cuda_emulation.h"

namespace fm_emulation {
namespace {

constexpr uint32_t kGranule = 2;  // bytes; smaller accesses are taken for whole granules

struct Buffer {
  std::string name;
  uintptr_t start, end;
  bool writable;
  std::vector<uint64_t> writers;  // per granule: block + 1, epoch, thread; 0 is nobody
};
std::deque<Buffer> buffers;
Buffer* last_buffer = nullptr;

Region caller_stack;
std::vector<Region> modules;  // code and static data of the process

Buffer* find_buffer(uintptr_t address) {
  if (last_buffer && address >= last_buffer->start && address < last_buffer->end) return last_buffer;
  for (Buffer& buffer : buffers) {
    if (address >= buffer.start && address < buffer.end) return last_buffer = &buffer;
  }
  return nullptr;
}

// Where an address lies that belongs to no buffer: relative to the nearest one.
std::string nearest_buffer(uintptr_t address) {
  const Buffer* nearest = nullptr;
  uint64_t smallest = UINT64_MAX;
  for (const Buffer& buffer : buffers) {
    const uint64_t distance = address < buffer.start ? buffer.start - address : address - buffer.end;
    if (distance < smallest) smallest = distance, nearest = &buffer;
  }
  const bool before = address < nearest->start;
  return std::to_string(before ? smallest : smallest + 1) + (before ? " bytes before '" : " bytes past the last of '") +
         nearest->name + "' (" + std::to_string(nearest->end - nearest->start) + " bytes)";
}

constexpr uint32_t kEpochs = 0x3fffff;

// Whether another block of the same cluster wrote this before the last cluster_sync.
bool before_cluster_sync(const Block& block, uint64_t writer) {
  const uint64_t size = current.cluster.size(), number = (writer >> 32) - 1;
  if (number / size != block.number / size) return false;
  return (writer >> 10 & kEpochs) < (current.cluster[number % size].cluster_start & kEpochs);
}

void note_global(const Lane& lane, Buffer& buffer, uintptr_t address, uint32_t bytes, bool write,
                 const Origin& origin) {
  if (!buffer.writable || current.options.races == Races::ignored || clocks_run()) return;
  const Block& block = *lane.block;
  const uint64_t me = static_cast<uint64_t>(block.number + 1) << 32 | (block.epoch & kEpochs) << 10 | lane.thread;
  const size_t first = (address - buffer.start) / kGranule, last = (address - buffer.start + bytes - 1) / kGranule;
  for (size_t i = first; i <= last; ++i) {
    const uint64_t writer = buffer.writers[i];
    const bool other_block = writer >> 32 != me >> 32;
    if (writer && writer != me && (other_block ? !before_cluster_sync(block, writer) : writer >> 10 == me >> 10)) {
      const std::string by = other_block ? "block number " + std::to_string((writer >> 32) - 1) + " of this launch"
                                         : name_of_thread(writer & 1023) + " since the last __syncthreads";
      fail_from(std::string("race: ") + (write ? "writes" : "reads") + " byte " + std::to_string(i * kGranule) +
                    " of '" + buffer.name + "', which was written by " + by,
                lane, origin);
    }
    if (write) buffer.writers[i] = me;
  }
}

Region stack_of_caller() {
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) throw Error("the stack of the caller cannot be found");
  void* low = nullptr;
  size_t size = 0;
  pthread_attr_getstack(&attributes, &low, &size);
  pthread_attr_destroy(&attributes);
  return {reinterpret_cast<uintptr_t>(low), reinterpret_cast<uintptr_t>(low) + size};
}

}  // namespace

void fail_from(const std::string& what, const Lane& lane, const Origin& origin) {
  if (origin.place) fail_at(what, &lane, *origin.place);
  current.failure_address = origin.instruction;
  fail(what, &lane);
}

std::string name_of_thread(uint32_t thread) {
  return "warp " + std::to_string(thread / kWarp) + ", lane " + std::to_string(thread % kWarp);
}

void access_global(const Lane& lane, uintptr_t address, uint32_t bytes, bool write, const Origin& origin) {
  if (buffers.empty() || caller_stack.contains(address)) return;
  Buffer* buffer = find_buffer(address);
  if (!buffer) {
    for (const Region& module : modules) {
      if (module.contains(address)) return;
    }
  }
  if (!buffer || address + bytes > buffer->end) {
    fail_from(std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes outside of all buffers: " +
                  nearest_buffer(buffer ? buffer->end : address),
              lane, origin);
  }
  if (write && !buffer->writable) fail_from("writes to '" + buffer->name + "', which is read-only", lane, origin);
  (write ? current.statistics.global_write_bytes : current.statistics.global_read_bytes) += bytes;
  note_global(lane, *buffer, address, bytes, write, origin);
}

void access(const void* pointer, size_t bytes, bool write, bool aligned, const void* instruction) {
  const Lane* lane = current.running;
  if (!lane || bytes == 0) return;  // the harness itself
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (thread_stacks.contains(address)) return;
  const Origin origin{nullptr, instruction};
  if (aligned && address % bytes != 0) {
    fail_from(std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at an address that is no multiple of " +
                  std::to_string(bytes),
              *lane, origin);
  }
  const auto size = static_cast<uint32_t>(bytes);
  if (shared_arenas.contains(address)) {
    access_shared(*lane, static_cast<const unsigned char*>(pointer) - lane->block->shared, size, write, origin);
  } else {
    access_global(*lane, address, size, write, origin);
  }
}

void register_buffer(const std::string& name, const void* start, size_t bytes, bool writable) {
  const auto address = reinterpret_cast<uintptr_t>(start);
  buffers.push_back({name, address, address + bytes, writable, {}});
}

void forget_buffers() {
  buffers.clear();
  last_buffer = nullptr;
}

void start_global_memory() {
  if (buffers.empty()) return;
  for (Buffer& buffer : buffers) {
    if (buffer.writable) buffer.writers.assign((buffer.end - buffer.start + kGranule - 1) / kGranule, 0);
  }
  caller_stack = stack_of_caller();
  modules.clear();
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD) continue;
          modules.push_back({info->dlpi_addr + segment.p_vaddr, info->dlpi_addr + segment.p_vaddr + segment.p_memsz});
        }
        return 0;
      },
      nullptr);
}

void check_prefetch(const void* pointer, const Place& place) {
  if (!buffers.empty() && !find_buffer(reinterpret_cast<uintptr_t>(pointer))) {
    fail_at("prefetch_l2 outside of all buffers: " + nearest_buffer(reinterpret_cast<uintptr_t>(pointer)),
            current.running, place);
  }
}

}  // namespace fm_emulation

FM_EMULATION_EXPORT void fm_emulation_register_buffer(const char* name, const void* start, uint64_t bytes,
                                                      int32_t writable) {
  fm_emulation::register_buffer(name, start, bytes, writable != 0);
}

FM_EMULATION_EXPORT void fm_emulation_forget_buffers() { fm_emulation::forget_buffers(); }
