// Pixels of images [N, H, W, 3] to shared memory, for the kernels that begin a backbone.
#pragma once

#include "common/device.cuh"

namespace fm_stem {

constexpr int kInputs = 3;
constexpr int kChunk = 8;  // numbers of 16 bytes

template <typename T>
struct Images {
  const T* x;  // [images, height, width, 3]
  int height, width;
  bool aligned;  // every eighth number of a row lies at a multiple of 16 bytes
};

template <typename T>
Images<T> make_images(const T* x, int height, int width) {
  return {x, height, width, width % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0};
}

// Eight numbers of a row of so many, from `at` on, zeros where the row has none.
template <typename T>
__device__ uint4 gathered(const T* row, int at, int numbers) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int low = at + 2 * i, high = low + 1;
    words[i] = fm::pack<T>(low >= 0 && low < numbers ? static_cast<float>(row[low]) : 0.f,
                           high >= 0 && high < numbers ? static_cast<float>(row[high]) : 0.f);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Starts the copies of a tile's pixels, zeros beyond the borders: Cut::kPixelRows rows from `first_row` on, of each
// Cut::kChunks times eight numbers from `first` on, a multiple of 8; Cut::kPitch bytes from one row to the next.
template <typename Cut, typename T>
__device__ __forceinline__ void load_pixels(const Images<T>& images, fm::SharedAddress pixels, int image, int first_row,
                                            int first) {
  const int numbers = kInputs * images.width;
  const T* const begin = images.x + static_cast<int64_t>(image) * images.height * numbers;
  for (int i = Cut::thread(); i < Cut::kPixelRows * Cut::kChunks; i += Cut::kThreads) {
    const int row = i / Cut::kChunks, chunk = i % Cut::kChunks, y = first_row + row, at = first + chunk * kChunk;
    const bool inside = y >= 0 && y < images.height;
    const T* const from = begin + static_cast<int64_t>(inside ? y : 0) * numbers;
    const fm::SharedAddress to = pixels + row * Cut::kPitch + chunk * 16;
    if (images.aligned) {
      const bool valid = inside && at >= 0 && at < numbers;  // a chunk lies in the image or beside it, never across
      fm::copy_async_16(to, valid ? from + at : images.x, valid);
    } else {
      fm::store_shared(to, inside ? gathered(from, at, numbers) : uint4{});
    }
  }
  fm::copy_async_commit();
}

}  // namespace fm_stem
