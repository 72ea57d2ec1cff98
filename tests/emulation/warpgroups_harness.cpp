// Runs the example of warpgroups.cuh in the emulator, for test_emulation_warpgroups.py.
#include "convolution/tensor_maps.h"
#include "warpgroups.cuh"

namespace {

using fm_warpgroups::Mistake;

template <int MISTAKE = 0>
void run(int64_t mistake, const fm_warpgroups::Product& product) {
  if constexpr (MISTAKE > static_cast<int>(Mistake::wrong_group)) {
    throw fm_emulation::Error("there is no such mistake");
  } else if (mistake == MISTAKE) {
    fm_emulation::launch([&] { fm_warpgroups::product_kernel<static_cast<Mistake>(MISTAKE)>(product); }, 1, 128,
                         fm_warpgroups::kShared);
  } else {
    run<MISTAKE + 1>(mistake, product);
  }
}

}  // namespace

FM_EMULATION_EXPORT int32_t run_product(void* rows, void* weights, void* out, int64_t mistake) {
  return fm_emulation::reported([&] {
    const fm_convolution::Geometry g{1, 8, 8, 64, 1, 1, 1, 0};
    fm_warpgroups::Product product{};
    fm_convolution::encode_box(product.rows, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, rows, g, 8, 8);
    fm_convolution::encode_box(product.out, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, out, g, 8, 8);
    fm_convolution::encode_weights(product.weights, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, weights, g, 64, 64);
    run(mistake, product);
  });
}
