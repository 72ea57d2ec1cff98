// Products of warpgroups. They are computed when they are asked for; until the wait for them their sums mean nothing and
// what they read may not be written to.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "block.h"
#include "cuda_emulation.h"
#include "hopper_emulation.h"
#include "numbers.h"

namespace fm_emulation {
namespace {

constexpr int kDepth = 16, kGroupWarps = 4;
const uint32_t kPoison = 0x7fedcba9;  // a float that is not a number, and that no product gives

// An operand as fm::operand describes it.
struct Operand {
  uint32_t address, group;

  // Where eight 16-bit numbers of a row lie.
  uint32_t eighth(int row, int number) const {
    return swizzled(address + row / 8 * group + row % 8 * 128 + number * 16);
  }
};

Operand operand_of(const Lane& self, uint64_t description, const Place& place) {
  const auto address = static_cast<uint32_t>(description & 0x3fff) << 4;
  const auto group = static_cast<uint32_t>(description >> 32 & 0x3fff) << 4;
  if (description >> 62 != 1) fail_at("an operand without the 128-byte swizzle", &self, place);
  if (description >> 46 & 0xffff) fail_at("the address of an operand has run over", &self, place);
  return {address, group};
}

// Rows of 16 numbers as float, [rows, 16], from shared memory.
void read_rows(const Lane& self, const Operand& operand, int first, int rows, bool bfloat, float* to,
               const Place& place) {
  for (int row = 0; row < rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t offset = checked_offset(self, operand.eighth(first + row, half), 16, "a product reads", place);
      check_asynchronous_read(self, offset, 16, place);
      uint16_t numbers[8];
      std::memcpy(numbers, self.block->shared + offset, 16);
      for (int i = 0; i < 8; ++i) to[row * kDepth + half * 8 + i] = to_float(numbers[i], bfloat);
    }
  }
}

// The whole operand, which the other warps read too; `first` and `own`: rows of this warp.
void note_reading(const Lane& self, const Operand& operand, int rows, int first, int own, const Place& place) {
  const uint32_t begin = checked_offset(self, operand.address & ~127u, 0, "a product reads", place);
  const auto place_of_row = [&](int row) { return begin + row / 8 * operand.group; };
  const uint64_t group = self.block->warps[self.warp].products;
  self.block->readings.push_back({begin, place_of_row(rows - 8) + 1024, place_of_row(first),
                                  place_of_row(first + own - 8) + 1024, self.warp, true, group, place});
}

// The place of a lane's i-th sum in [16, columns].
int place_of_sum(int lane, int i, int columns) {
  return (lane / 4 + i % 4 / 2 * 8) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

Accumulator& begin_sums(const Lane& self, bool add, const Place& place) {
  Warp& warp = self.block->warps[self.warp];
  const auto known = std::ranges::find_if(warp.accumulators, [&](const Accumulator& a) {
    return a.sums[0] == lane_of(self, 0).c;
  });
  if (known != warp.accumulators.end()) return known->group = warp.products, *known;
  Accumulator made{{}, self.columns, warp.products, std::vector<float>(16 * self.columns), place};
  for (int l = 0; l < kWarp; ++l) {
    float* const sums = made.sums[l] = lane_of(self, l).c;
    for (int i = 0; i < self.columns / 2; ++i) {
      if (add) made.values[place_of_sum(l, i, self.columns)] = sums[i];
      std::memcpy(sums + i, &kPoison, 4);
    }
  }
  return warp.accumulators.emplace_back(std::move(made));
}

template <int COLUMNS>
void add_product(float* sums, const float (&a)[16 * kDepth], const float* b) {
  float turned[kDepth][COLUMNS];
  for (int column = 0; column < COLUMNS; ++column) {
    for (int k = 0; k < kDepth; ++k) turned[k][column] = b[column * kDepth + k];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      const float left = a[row * kDepth + k];
      for (int column = 0; column < COLUMNS; ++column) sums[row * COLUMNS + column] += left * turned[k][column];
    }
  }
}

void add_product(int columns, float* sums, const float (&a)[16 * kDepth], const float* b) {
  switch (columns) {
    case 32: return add_product<32>(sums, a, b);
    case 64: return add_product<64>(sums, a, b);
    case 128: return add_product<128>(sums, a, b);
    default: return add_product<256>(sums, a, b);
  }
}

// The left operand that lanes hold, as multiply_add_16x8x16 takes it.
void gather_held(const Lane& self, bool bfloat, float (&a)[16 * kDepth]) {
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int row = l / 4 + i % 2 * 8, k = l % 4 * 2 + i / 2 * 8 + half;
        a[row * kDepth + k] = number(lane_of(self, l).a[i], half, bfloat);
      }
    }
  }
}

void do_multiply(const Lane& self, bool held, const Place& place) {
  Warp& warp = self.block->warps[self.warp];
  if (!warp.products_begun) fail_at("a product without products_begin in front of its group", &self, place);
  for (int l = 0; l < kWarp; ++l) {
    const Lane& lane = lane_of(self, l);
    if (lane.left != self.left || lane.right != self.right || lane.argument != self.argument) {
      fail_at("the lanes of a warp name different operands", &lane, place);
    }
  }
  const bool bfloat = self.kind != 0;
  const Operand right = operand_of(self, self.right, place);
  float a[16 * kDepth];
  std::vector<float> b(static_cast<size_t>(self.columns) * kDepth);
  if (held) {
    gather_held(self, bfloat, a);
  } else {
    const Operand left = operand_of(self, self.left, place);
    const int first = self.warp % kGroupWarps * 16;
    read_rows(self, left, first, 16, bfloat, a, place);
    note_reading(self, left, 64, first, 16, place);
  }
  read_rows(self, right, 0, self.columns, bfloat, b.data(), place);
  note_reading(self, right, self.columns, 0, self.columns, place);
  Accumulator& sums = begin_sums(self, self.argument != 0, place);
  if (sums.columns != self.columns) fail_at("the same sums are of products of different widths", &self, place);
  if (self.argument == 0) std::ranges::fill(sums.values, 0.0f);
  add_product(self.columns, sums.values.data(), a, b.data());
}

void finish_sums(const Lane& self, const Accumulator& sums) {
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < sums.columns / 2; ++i) {
      float* const to = sums.sums[l] + i;
      if (std::memcmp(to, &kPoison, 4) != 0) {
        fail_at("sums were written to while the product was under way", &lane_of(self, l), sums.place);
      }
      *to = sums.values[place_of_sum(l, i, sums.columns)];
    }
  }
}

void do_wait(const Lane& self) {
  Warp& warp = self.block->warps[self.warp];
  const auto pending = static_cast<uint64_t>(self.argument);
  const uint64_t done = warp.products > pending ? warp.products - pending : 0;  // groups before this one
  for (const Accumulator& sums : warp.accumulators) {
    if (sums.group < done) finish_sums(self, sums);
  }
  std::erase_if(warp.accumulators, [&](const Accumulator& sums) { return sums.group < done; });
  forget_readings(self, true, done);
}

}  // namespace

void do_products(const Lane& self, Call call, const Place& place) {
  Warp& warp = self.block->warps[self.warp];
  switch (call) {
    case Call::products_begin: warp.products_begun = true; break;
    case Call::multiply: do_multiply(self, false, place); break;
    case Call::multiply_held: do_multiply(self, true, place); break;
    case Call::products_commit:
      warp.products_begun = false;
      ++warp.products;
      break;
    default: do_wait(self); break;
  }
}

void check_products_at_exit(const Lane& self) {
  const Warp& warp = self.block->warps[self.warp];
  if (warp.accumulators.empty()) return;
  fail_at("returns from the kernel while a product is under way", &self, warp.accumulators.front().place);
}

void products_begin(const Place& place) { meet(*current.running, Call::products_begin, kFullMask, place); }

void products_commit(const Place& place) { meet(*current.running, Call::products_commit, kFullMask, place); }

void products_wait(int pending, const Place& place) {
  current.running->argument = pending;
  meet(*current.running, Call::products_wait, kFullMask, place);
}

void multiply(float* sums, int columns, uint64_t a, uint64_t b, bool add, bool bfloat, const Place& place) {
  Lane& self = *current.running;
  self.c = sums;
  self.columns = columns;
  self.left = a;
  self.right = b;
  self.argument = add;
  self.kind = bfloat;
  meet(self, Call::multiply, kFullMask, place);
}

void multiply_held(float* sums, int columns, const uint32_t* a, uint64_t b, bool bfloat, const Place& place) {
  Lane& self = *current.running;
  self.c = sums;
  self.columns = columns;
  self.a = a;
  self.left = 0;
  self.right = b;
  self.argument = 1;
  self.kind = bfloat;
  meet(self, Call::multiply_held, kFullMask, place);
}

}  // namespace fm_emulation
