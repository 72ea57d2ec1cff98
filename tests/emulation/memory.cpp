// Shared and global memory: bounds, poison, asynchronous copies, races.
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

constexpr size_t kMargin = 64 * 1024;
constexpr size_t kCapacity = 256 * 1024;
// On a GPU the first bytes belong to the system, so that addresses of our shared memory do not begin at 0.
constexpr uint32_t kSharedStart = 1024;
constexpr uint32_t kGranule = 2;  // bytes; smaller accesses are taken for whole granules

alignas(1024) unsigned char arena[kMargin + kCapacity + kMargin];
unsigned char* const shared = arena + kMargin;

// Who touched two bytes of shared memory last.
struct Cell {
  uint32_t write_epoch, write_warp_epoch;
  uint32_t read_epoch, read_warp_epoch;
  uint32_t reading_warps;  // in read_epoch
  uint32_t reading_lanes;  // of reading_warp, in read_warp_epoch
  uint16_t writer;         // thread
  uint16_t pending;        // thread + 1 whose asynchronous copy has not been waited for
  uint8_t reading_warp;
};
std::vector<Cell> cells;

struct Buffer {
  std::string name;
  uintptr_t start, end;
  bool writable;
  std::vector<uint64_t> writers;  // per granule: block + 1, epoch, thread; 0 is nobody
};
std::deque<Buffer> buffers;
Buffer* last_buffer = nullptr;

struct Region {
  uintptr_t start, end;
};
Region thread_stacks, caller_stack;
std::vector<Region> modules;  // code and static data of the process

bool contains(const Region& region, uintptr_t address) { return address >= region.start && address < region.end; }

// The place of an access: a line that is known, or the address of the instruction.
struct Origin {
  const Place* place;
  const void* instruction;
};

[[noreturn]] void fail_from(const std::string& what, const Lane& lane, const Origin& origin) {
  if (origin.place) fail_at(what, &lane, *origin.place);
  block.failure_address = origin.instruction;
  fail(what, &lane);
}

std::string name_of_thread(uint32_t thread) {
  return "warp " + std::to_string(thread / kWarp) + ", lane " + std::to_string(thread % kWarp);
}

[[noreturn]] void fail_race(const Lane& lane, int64_t offset, bool write, const char* done, const std::string& by,
                            bool same_warp, const Origin& origin) {
  fail_from(std::string("race: ") + (write ? "writes" : "reads") + " offset " + std::to_string(offset) +
                " of shared memory, which " + by + " has " + done + " since the last __syncthreads" +
                (same_warp ? " and __syncwarp" : ""),
            lane, origin);
}

void check_after_write(const Lane& lane, const Cell& cell, int64_t offset, bool write, const Origin& origin) {
  if (cell.pending) {
    fail_from(std::string(write ? "writes" : "reads") + " offset " + std::to_string(offset) +
                  " of shared memory, where a copy_async_16 of " + name_of_thread(cell.pending - 1) +
                  " is under way: no copy_async_wait has covered it",
              lane, origin);
  }
  if (cell.write_epoch != block.epoch || cell.writer == lane.thread) return;
  const bool same_warp = cell.writer / kWarp == lane.warp;
  if (same_warp && (block.options.races != Races::between_lanes ||
                    cell.write_warp_epoch != block.warps[lane.warp].epoch)) {
    return;
  }
  fail_race(lane, offset, write, "written", name_of_thread(cell.writer), same_warp, origin);
}

void check_after_reads(const Lane& lane, const Cell& cell, int64_t offset, const Origin& origin) {
  if (cell.read_epoch != block.epoch) return;
  if (const uint32_t others = cell.reading_warps & ~(1u << lane.warp)) {
    fail_race(lane, offset, true, "read", "warp " + std::to_string(std::countr_zero(others)), false, origin);
  }
  const uint32_t lanes = cell.reading_lanes & ~(1u << lane.lane);
  if (lanes && block.options.races == Races::between_lanes && cell.reading_warp == lane.warp &&
      cell.read_warp_epoch == block.warps[lane.warp].epoch) {
    fail_race(lane, offset, true, "read", "lane " + std::to_string(std::countr_zero(lanes)), true, origin);
  }
}

void note_read(const Lane& lane, Cell& cell) {
  const uint32_t warp_epoch = block.warps[lane.warp].epoch;
  if (cell.read_epoch != block.epoch) {
    cell.read_epoch = block.epoch;
    cell.reading_warps = cell.reading_lanes = 0;
  }
  if (cell.reading_warp != lane.warp || cell.read_warp_epoch != warp_epoch) {
    cell.reading_warp = lane.warp;
    cell.read_warp_epoch = warp_epoch;
    cell.reading_lanes = 0;
  }
  cell.reading_warps |= 1u << lane.warp;
  cell.reading_lanes |= 1u << lane.lane;
}

void access_shared(const Lane& lane, int64_t offset, uint32_t bytes, bool write, const Origin& origin) {
  if (offset < 0 || offset + bytes > block.shared_bytes) {
    fail_from(std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at offset " +
                  std::to_string(offset) + " of shared memory; the block has " + std::to_string(block.shared_bytes),
              lane, origin);
  }
  if (block.options.races == Races::ignored) return;
  const uint32_t warp_epoch = block.warps[lane.warp].epoch;
  const auto first = static_cast<size_t>(offset) / kGranule, last = static_cast<size_t>(offset + bytes - 1) / kGranule;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = cells[i];
    check_after_write(lane, cell, static_cast<int64_t>(i * kGranule), write, origin);
    if (write) {
      check_after_reads(lane, cell, static_cast<int64_t>(i * kGranule), origin);
      cell.write_epoch = block.epoch;
      cell.write_warp_epoch = warp_epoch;
      cell.writer = lane.thread;
    } else {
      note_read(lane, cell);
    }
  }
}

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

void note_global(const Lane& lane, Buffer& buffer, uintptr_t address, uint32_t bytes, bool write,
                 const Origin& origin) {
  if (!buffer.writable || block.options.races == Races::ignored) return;
  const uint64_t me = static_cast<uint64_t>(block.number + 1) << 32 | (block.epoch & 0x3fffffu) << 10 | lane.thread;
  const size_t first = (address - buffer.start) / kGranule, last = (address - buffer.start + bytes - 1) / kGranule;
  for (size_t i = first; i <= last; ++i) {
    const uint64_t writer = buffer.writers[i];
    const bool other_block = writer >> 32 != me >> 32;
    if (writer && writer != me && (other_block || writer >> 10 == me >> 10)) {
      const std::string by = other_block ? "block number " + std::to_string((writer >> 32) - 1) + " of this launch"
                                         : name_of_thread(writer & 1023) + " since the last __syncthreads";
      fail_from(std::string("race: ") + (write ? "writes" : "reads") + " byte " + std::to_string(i * kGranule) +
                    " of '" + buffer.name + "', which was written by " + by,
                lane, origin);
    }
    if (write) buffer.writers[i] = me;
  }
}

void access_global(const Lane& lane, uintptr_t address, uint32_t bytes, bool write, const Origin& origin) {
  if (buffers.empty() || contains(caller_stack, address)) return;
  Buffer* buffer = find_buffer(address);
  if (!buffer) {
    for (const Region& module : modules) {
      if (contains(module, address)) return;
    }
  }
  if (!buffer || address + bytes > buffer->end) {
    fail_from(std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes outside of all buffers: " +
                  nearest_buffer(buffer ? buffer->end : address),
              lane, origin);
  }
  if (write && !buffer->writable) fail_from("writes to '" + buffer->name + "', which is read-only", lane, origin);
  (write ? block.statistics.global_write_bytes : block.statistics.global_read_bytes) += bytes;
  note_global(lane, *buffer, address, bytes, write, origin);
}

void poison(unsigned char* to, size_t bytes) {
  // All ones and 0x7FFF are NaN in every float format; as indices they are -1 and very large.
  const uint16_t pattern = (block.number + block.epoch) % 2 ? 0xFFFF : 0x7FFF;
  for (size_t i = 0; i < bytes; ++i) to[i] = static_cast<unsigned char>(pattern >> 8 * (i % 2));
}

void perform(Lane& lane, const Copy& copy, const Place& place) {
  for (uint32_t i = 0; i < 16 / kGranule; ++i) cells[copy.to / kGranule + i].pending = 0;
  access_shared(lane, copy.to, 16, true, Origin{&place, nullptr});
  if (copy.valid) {
    std::memcpy(shared + copy.to, copy.from, 16);
  } else {
    std::memset(shared + copy.to, 0, 16);
  }
}

}  // namespace

void access(const void* pointer, size_t bytes, bool write, bool aligned, const void* instruction) {
  const Lane* lane = block.running;
  if (!lane || bytes == 0) return;  // the harness itself
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (contains(thread_stacks, address)) return;
  const Origin origin{nullptr, instruction};
  if (aligned && address % bytes != 0) {
    fail_from(std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at an address that is no multiple of " +
                  std::to_string(bytes),
              *lane, origin);
  }
  const auto size = static_cast<uint32_t>(bytes);
  if (address - reinterpret_cast<uintptr_t>(arena) < sizeof arena) {
    access_shared(*lane, static_cast<const unsigned char*>(pointer) - shared, size, write, origin);
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

void start_launch_memory(const void* stacks, size_t stack_bytes) {
  const auto start = reinterpret_cast<uintptr_t>(stacks);
  thread_stacks = {start, start + stack_bytes};
  cells.assign((block.shared_bytes + kGranule - 1) / kGranule, Cell{});
  if (buffers.empty()) return;
  for (Buffer& buffer : buffers) {
    if (buffer.writable) buffer.writers.assign((buffer.end - buffer.start + kGranule - 1) / kGranule, 0);
  }
  pthread_attr_t attributes;
  void* low = nullptr;
  size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &size);
  pthread_attr_destroy(&attributes);
  caller_stack = {reinterpret_cast<uintptr_t>(low), reinterpret_cast<uintptr_t>(low) + size};
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

void start_block_memory() {
  poison(shared, block.shared_bytes);
  std::fill(cells.begin(), cells.end(), Cell{});
}

unsigned char* shared_memory() { return shared; }

uint32_t shared_address(const void* pointer, const Place& place) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(kCapacity)) {
    fail_at("shared_address of something that is not in shared memory", block.running, place);
  }
  return static_cast<uint32_t>(offset) + kSharedStart;
}

const unsigned char* read_matrix_row(const Lane& lane, uint32_t address, const Place& place) {
  if (address % 16 != 0) fail_at("a matrix row at an address that is no multiple of 16", &lane, place);
  const int64_t offset = static_cast<int64_t>(address) - kSharedStart;
  access_shared(lane, offset, 16, false, Origin{&place, nullptr});
  return shared + offset;
}

void copy_async_16(uint32_t to, const void* from, bool valid, const Place& place) {
  Lane& lane = *block.running;
  const auto source = reinterpret_cast<uintptr_t>(from);
  if (to % 16 != 0 || source % 16 != 0) {
    fail_at("copy_async_16 between addresses that are no multiples of 16", &lane, place);
  }
  const int64_t offset = static_cast<int64_t>(to) - kSharedStart;
  const Origin origin{&place, nullptr};
  access_shared(lane, offset, 16, true, origin);
  if (valid) {
    const int64_t before = block.statistics.global_read_bytes;
    access_global(lane, source, 16, false, origin);
    block.statistics.global_read_bytes = before;
    ++block.statistics.copies;
  } else {
    ++block.statistics.zero_fills;
  }
  // The hardware may write at any time from now on; who looks before the wait sees neither old nor new.
  poison(shared + offset, 16);
  for (uint32_t i = 0; i < 16 / kGranule; ++i) cells[offset / kGranule + i].pending = lane.thread + 1;
  lane.copies.push_back({static_cast<uint32_t>(offset), from, valid});
  ++lane.open_copies;
}

void copy_async_commit() {
  Lane& lane = *block.running;
  lane.groups.push_back(lane.open_copies);
  lane.open_copies = 0;
}

void copy_async_wait(int pending, const Place& place) {
  Lane& lane = *block.running;
  while (lane.groups.size() > static_cast<size_t>(pending)) {
    for (uint32_t i = 0; i < lane.groups.front(); ++i) perform(lane, lane.copies[i], place);
    lane.copies.erase(lane.copies.begin(), lane.copies.begin() + lane.groups.front());
    lane.groups.erase(lane.groups.begin());
  }
}

void check_prefetch(const void* pointer, const Place& place) {
  if (!buffers.empty() && !find_buffer(reinterpret_cast<uintptr_t>(pointer))) {
    fail_at("prefetch_l2 outside of all buffers: " + nearest_buffer(reinterpret_cast<uintptr_t>(pointer)),
            block.running, place);
  }
}

}  // namespace fm_emulation

FM_EMULATION_EXPORT void fm_emulation_register_buffer(const char* name, const void* start, uint64_t bytes,
                                                      int32_t writable) {
  fm_emulation::register_buffer(name, start, bytes, writable != 0);
}

FM_EMULATION_EXPORT void fm_emulation_forget_buffers() { fm_emulation::forget_buffers(); }
