// Which kernel of a template a tile asks for, for harnesses whose kernels are cut alike; behind the kernel's header.
#pragma once

#include <cstdint>
#include <string>

#include "emulator.h"

namespace fm_emulation {

// Calls `launch<T, COLUMNS, SHARED>()`. SHARED: several blocks of a cluster share the depth of a tile.
template <typename T, typename Launch>
void by_tile(int64_t columns, int64_t split, Launch&& launch) {
  if (columns == 32 && split > 1) return launch.template operator()<T, 32, true>();
  if (columns == 32) return launch.template operator()<T, 32, false>();
  if (columns == 64 && split > 1) return launch.template operator()<T, 64, true>();
  if (columns == 64) return launch.template operator()<T, 64, false>();
  throw Error("there is no kernel of " + std::to_string(columns) + " columns here");
}

// The body of a harness's exported function: the same for the type, the columns and the split that are given.
template <typename Given, typename Launch>
int32_t run_by_tile(const Given& given, Launch&& launch) {
  return reported([&] {
    if (given.bfloat) by_tile<__nv_bfloat16>(given.columns, given.split, launch);
    else by_tile<__half>(given.columns, given.split, launch);
  });
}

}  // namespace fm_emulation
