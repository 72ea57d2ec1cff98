// The functions that the lanes of a warp enter together. The last lane to arrive does the work for all of them.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "block.h"
#include "cuda_emulation.h"
#include "numbers.h"

namespace fm_emulation {
namespace {

const char* name_of(Call call) {
  switch (call) {
    case Call::sync_warp: return "__syncwarp";
    case Call::shuffle: return "a shuffle";
    case Call::vote: return "a vote or reduction";
    case Call::load_matrices: return "load_matrices";
    case Call::load_matrices_transposed: return "load_matrices_transposed";
    case Call::multiply_add: return "multiply_add_16x8x16";
    case Call::store_matrices: return "store_matrices";
    case Call::products_begin: return "products_begin";
    case Call::multiply: return "multiply";
    case Call::multiply_held: return "multiply_held";
    case Call::products_commit: return "products_commit";
    case Call::products_wait: return "products_wait";
  }
  return "?";
}

std::string describe(const Gathering& group) { return std::string(name_of(group.call)) + " at " + text_of(group.place); }

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

void do_shuffle(const Lane& self, uint32_t mask, const Place& place) {
  ++current.statistics.shuffles;
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
  ++current.statistics.matrix_loads;
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
    current.statistics.matrix_wavefronts += passes;
    for (int l = 0; l < kWarp; ++l) {
      const int line = l / 4, pair = 2 * (l % 4);
      const uint16_t low = transposed ? numbers[pair][line] : numbers[line][pair];
      const uint16_t high = transposed ? numbers[pair + 1][line] : numbers[line][pair + 1];
      lane_of(self, l).words[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

// The way do_load_matrices loads them.
void do_store_matrices(const Lane& self, const Place& place) {
  for (int row = 0; row < kWarp; ++row) {
    const Lane& supplier = lane_of(self, row);
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = lane_of(self, row % 8 * 4 + i).a[row / 8];
    std::memcpy(write_matrix_row(supplier, supplier.row, place), words, 16);
  }
}

// Fragments as in the PTX manual, "Matrix fragments for mma.m16n8k16 with floating point type".
void do_multiply_add(const Lane& self) {
  ++current.statistics.multiply_adds;
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
      if (group.mask == self.block->warps[self.warp].lanes) ++self.block->warps[self.warp].epoch;
      break;
    case Call::shuffle: do_shuffle(self, group.mask, group.place); break;
    case Call::vote: do_vote(self, group.mask); break;
    case Call::load_matrices: do_load_matrices(self, false, group.place); break;
    case Call::load_matrices_transposed: do_load_matrices(self, true, group.place); break;
    case Call::multiply_add: do_multiply_add(self); break;
    case Call::store_matrices: do_store_matrices(self, group.place); break;
    default: do_products(self, group.call, group.place); break;
  }
}

}  // namespace

Lane& lane_of(const Lane& self, int lane) { return self.block->lanes[self.warp * kWarp + lane]; }

void meet(Lane& self, Call call, uint32_t mask, const Place& place) {
  Warp& warp = self.block->warps[self.warp];
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
      complain("lanes " + lanes_in(away) + " wait in " + name_of(other.state) + " at " + text_of(other.place));
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

void check_nobody_waits_for(const Lane& self, const std::string& doing) {
  for (const Gathering& group : self.block->warps[self.warp].gatherings) {
    if (group.mask >> self.lane & 1) {
      fail(doing + " while lanes " + lanes_in(group.arrived) + " wait for it in " + describe(group), &self);
    }
  }
}

void sync_warp(uint32_t mask, const Place& place) { meet(*current.running, Call::sync_warp, mask, place); }

uint64_t shuffle(uint32_t mask, uint64_t bits, Move move, int32_t argument, int32_t width, const Place& place) {
  Lane& self = *current.running;
  if (width < 1 || width > kWarp || (width & (width - 1))) fail_at("a shuffle's width must be 1 to 32, a power of 2", &self, place);
  self.value = static_cast<int64_t>(bits);
  self.kind = static_cast<int32_t>(move);
  self.argument = argument;
  self.width = width;
  meet(self, Call::shuffle, mask, place);
  return static_cast<uint64_t>(self.value);
}

int64_t vote(uint32_t mask, int64_t value, Vote kind, const Place& place) {
  Lane& self = *current.running;
  self.value = value;
  self.kind = static_cast<int32_t>(kind);
  meet(self, Call::vote, mask, place);
  return self.value;
}

void load_matrices(uint32_t* r, uint32_t row, bool transposed, const Place& place) {
  Lane& self = *current.running;
  self.words = r;
  self.row = row;
  meet(self, transposed ? Call::load_matrices_transposed : Call::load_matrices, kFullMask, place);
}

void multiply_add(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, bool bfloat, const Place& place) {
  Lane& self = *current.running;
  self.c = c;
  self.a = a;
  self.b[0] = b0;
  self.b[1] = b1;
  self.kind = bfloat;
  meet(self, Call::multiply_add, kFullMask, place);
}

void store_matrices(uint32_t row, const uint32_t* r, const Place& place) {
  Lane& self = *current.running;
  self.a = r;
  self.row = row;
  meet(self, Call::store_matrices, kFullMask, place);
}

}  // namespace fm_emulation
