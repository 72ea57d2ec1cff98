// Which kernel of a template a test's tile asks for, for harnesses whose kernels are cut alike.
#pragma once

#include <cstdint>

#include "emulator.h"

namespace fm_emulation {

// Calls `launch<COLUMNS, SHARED>()` for a tile of 32 or 64 columns; SHARED: several blocks of a cluster share its depth.
template <typename Launch>
void by_columns_and_split(int64_t columns, int64_t split, Launch&& launch) {
  if (columns == 32 && split > 1) return launch.template operator()<32, true>();
  if (columns == 32) return launch.template operator()<32, false>();
  if (columns == 64 && split > 1) return launch.template operator()<64, true>();
  if (columns == 64) return launch.template operator()<64, false>();
  throw Error("there is no kernel of " + std::to_string(columns) + " columns here");
}

}  // namespace fm_emulation
