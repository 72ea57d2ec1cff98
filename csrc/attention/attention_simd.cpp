// The attention kernels of one instruction set; compiled once for each (see setup.py).
#include "attention/backward.h"
#include "attention/forward.h"
#include "attention/problem.h"

FM_DECLARE_ATTENTION_KERNELS(FM_SIMD_NS)

namespace FM_SIMD_NS::attention {

template <class A>
constexpr Kernels<A> kernels() {
  return {kLanes<A>,
          &forward_table_size<A>, &forward_partial_size<A>, &forward_scratch_size<A>,
          &forward_prepare<A>, &forward_chunk<A>, &forward_merge<A>,
          &backward_table_size<A>, &backward_partial_size<A>, &backward_scratch_size<A>,
          &backward_delta<A>, &backward_prepare<A>, &backward_chunk<A>, &backward_merge<A>,
          &pack_rows<A>};
}

const Kernels<float> kernels_of_float = kernels<float>();
const Kernels<double> kernels_of_double = kernels<double>();

}  // namespace FM_SIMD_NS::attention
