// Races::by_barriers: what any kind of barrier orders between the warps of a block, by vector clocks.
//
// Each warp counts its own time and knows up to which time it has seen the others; a barrier passes on what its threads
// knew when they arrived. An access must have seen every access of another warp that it conflicts with. Products read when
// they are asked for and, for those who write later, until they are waited for. What the copy engine or another block
// brings is a write in the time of its barrier, which passes it on when the phase ends; whoever asks for it must have seen
// all that was done at its place before.
#include <algorithm>
#include <bit>

#include "block.h"
#include "cuda_emulation.h"

namespace fm_emulation {
namespace {

constexpr uint32_t kGranule = 2;  // bytes, as those of cells

constexpr int kBarrierTimes = 16;  // of barriers in shared memory, behind those of so many warps

std::string who(int writer) {
  return writer < kBarrierTimes ? "warp " + std::to_string(writer) + " has " : "what was asked for has ";
}

[[noreturn]] void fail_unordered(const Lane& lane, size_t cell, bool write, const char* done, int by,
                                 const Origin& origin) {
  fail_from(std::string("race: ") + (write ? "writes" : "reads") + " offset " + std::to_string(cell * kGranule) +
                " of shared memory, which " + who(by) + done + ": no barrier is between them",
            lane, origin);
}

Clock& clock_of(const Lane& lane) { return lane.block->clocks[lane.warp]; }

// Which time is a barrier's, or kWarp if the block has too many warps. Many barriers share them.
int time_of(const Block& block, const Barrier& barrier) {
  if (block.warps.size() > kBarrierTimes) return kWarp;
  return kBarrierTimes + static_cast<int>(&barrier - block.barriers.data()) % (kWarp - kBarrierTimes);
}

void join(Clock& to, const Clock& other) {
  for (int w = 0; w < kWarp; ++w) to[w] = std::max(to[w], other[w]);
}

}  // namespace

bool clocks_run() { return current.options.races == Races::by_barriers; }

void start_clocks(Block& block) {
  if (!clocks_run()) return;
  const size_t warps = block.warps.size();
  block.clocks.assign(warps, Clock{});
  for (size_t w = 0; w < warps; ++w) block.clocks[w][w] = 1;
  block.arrived = {};
  block.stamps.assign(block.cells.size(), Stamp{});
  block.read_times.resize(block.cells.size() * warps);
}

void check_order(const Lane& lane, uint32_t offset, uint32_t bytes, bool write, const Origin& origin) {
  if (!clocks_run()) return;
  Block& block = *lane.block;
  const Clock& seen = clock_of(lane);
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    Stamp& stamp = block.stamps[i];
    if (stamp.written > seen[stamp.writer]) fail_unordered(lane, i, write, "written", stamp.writer, origin);
    uint32_t* const reads = &block.read_times[i * block.warps.size()];
    if (!write) {
      stamp.readers |= 1u << lane.warp;
      reads[lane.warp] = seen[lane.warp];
      continue;
    }
    for (uint32_t left = stamp.readers & ~(1u << lane.warp); left; left &= left - 1) {
      const int reader = std::countr_zero(left);
      if (reads[reader] > seen[reader]) fail_unordered(lane, i, write, "read", reader, origin);
    }
    stamp = {seen[lane.warp], 0, lane.warp};
  }
}

void note_reads(const Lane& lane, uint32_t offset, uint32_t bytes) {
  if (!clocks_run()) return;
  Block& block = *lane.block;
  const uint32_t now = clock_of(lane)[lane.warp];
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    block.stamps[i].readers |= 1u << lane.warp;
    block.read_times[i * block.warps.size() + lane.warp] = now;
  }
}

void note_arrival(Block& block, const Barrier& barrier, uint32_t offset, uint32_t bytes) {
  if (!clocks_run()) return;
  const int time = time_of(block, barrier);
  for (size_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    block.stamps[i] = {time < kWarp ? barrier.arriving[time] + 1 : 0, 0, static_cast<uint8_t>(time % kWarp)};
  }
}

void count_arrival(const Block& block, Barrier& barrier) {
  if (const int time = time_of(block, barrier); clocks_run() && time < kWarp) ++barrier.arriving[time];
}

void give_clock(const Lane& lane, Clock& to) {
  if (!clocks_run()) return;
  Clock& mine = clock_of(lane);
  join(to, mine);
  ++mine[lane.warp];
}

void take_clock(const Lane& lane, const Clock& from) {
  if (clocks_run()) join(clock_of(lane), from);
}

void join_clocks(Block& block) {
  if (!clocks_run()) return;
  Clock all{};
  for (const Clock& one : block.clocks) join(all, one);
  for (size_t w = 0; w < block.clocks.size(); ++w) {
    block.clocks[w] = all;
    ++block.clocks[w][w];
  }
}

}  // namespace fm_emulation
