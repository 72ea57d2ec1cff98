// Images as they come, to shared memory: float32 planes, and bytes that are normalised on the way. Both pass registers,
// where they become numbers of the stem's type, so that no kernel in front has to make those.
//
// A thread takes four pixels of a row at a time: three words of bytes, or four floats of each plane. Their 12 numbers are
// three stores of 8 bytes. All reads are under way before the first of them is used.
#pragma once

#include <type_traits>

#include "pixels.cuh"

namespace fm_stem {

constexpr int kPixels = 4;                   // of a thread at a time
constexpr int kNumbers = kPixels * kInputs;  // which they have
constexpr int kLead = 8;                     // numbers of a row's first four pixels that lie before the tile's

// float32 [images, 3, height, width].
struct Planes {
  const float* x;
  int height, width;
  bool aligned;  // every fourth number of a row lies at a multiple of 16 bytes
};

// uint8 [images, height, width, 3], of which (x - mean) * scale in float32 is taken.
struct Bytes {
  const uint8_t* x;
  const float *mean, *scale;  // [3] each
  int height, width;
  bool aligned;  // every fourth pixel of a row lies at a multiple of 4 bytes
};

inline Planes make_planes(const float* x, int height, int width) {
  return {x, height, width, width % kPixels == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0};
}

inline Bytes make_bytes(const uint8_t* x, const float* mean, const float* scale, int height, int width) {
  return {x, mean, scale, height, width, width % kPixels == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0};
}

// Reads planes, whose numbers are the stem's but for their rounding.
struct OfPlanes {
  using Word = float;

  __device__ __forceinline__ explicit OfPlanes(const Planes&) {}

  __device__ __forceinline__ float number(float x, int) const { return x; }

  // Four pixels from this column on of a row of an image, by pixels, then channels.
  static __device__ __forceinline__ void read(const Planes& images, int image, int row, int column,
                                              float (&numbers)[kNumbers]) {
    const int64_t plane = static_cast<int64_t>(images.height) * images.width;
    const float* const from = images.x + kInputs * plane * image + static_cast<int64_t>(row) * images.width;
    if (images.aligned) {
#pragma unroll
      for (int channel = 0; channel < kInputs; channel++) {
        const float4 four = *reinterpret_cast<const float4*>(from + channel * plane + column);
        numbers[channel] = four.x, numbers[kInputs + channel] = four.y;
        numbers[2 * kInputs + channel] = four.z, numbers[3 * kInputs + channel] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kNumbers; i++) {
        const int at = column + i / kInputs;
        numbers[i] = at >= 0 && at < images.width ? from[i % kInputs * plane + at] : 0.f;
      }
    }
  }
};

// Reads bytes and makes numbers of the stem of them.
struct OfBytes {
  using Word = uint32_t;
  float mean[kInputs], scale[kInputs];

  __device__ __forceinline__ explicit OfBytes(const Bytes& images) {
#pragma unroll
    for (int i = 0; i < kInputs; i++) mean[i] = images.mean[i], scale[i] = images.scale[i];
  }

  // Each of both operations is rounded, as in normalize_pixels.
  __device__ __forceinline__ float number(uint32_t x, int channel) const {
    return __fmul_rn(__fsub_rn(static_cast<float>(x), mean[channel]), scale[channel]);
  }

  static __device__ __forceinline__ void read(const Bytes& images, int image, int row, int column,
                                              uint32_t (&numbers)[kNumbers]) {
    const uint8_t* const from = images.x + (static_cast<int64_t>(image) * images.height + row) * images.width * kInputs;
    if (images.aligned) {
      uint32_t words[kNumbers / 4];
#pragma unroll
      for (int i = 0; i < kNumbers / 4; i++) {
        words[i] = reinterpret_cast<const uint32_t*>(from + column * kInputs)[i];
      }
#pragma unroll
      for (int i = 0; i < kNumbers; i++) numbers[i] = words[i / 4] >> i % 4 * 8 & 0xff;
    } else {
#pragma unroll
      for (int i = 0; i < kNumbers; i++) {
        const int at = column + i / kInputs;
        numbers[i] = at >= 0 && at < images.width ? from[column * kInputs + i] : 0;
      }
    }
  }
};

// See load_images.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void load_raw(const Source& images, fm::SharedAddress pixels, int image, int first_row,
                                         int first) {
  using Of = std::conditional_t<std::is_same_v<Source, Planes>, OfPlanes, OfBytes>;
  constexpr int kBytes = Cut::kChunks * 16, kFours = (kLead + Cut::kChunks * kChunk + kNumbers - 1) / kNumbers;
  const Of of(images);
  const int first_column = (first - kLead) / kInputs;
  for (int i = Cut::thread(); i < Cut::kPixelRows * kFours; i += Cut::kThreads) {
    const int row = i / kFours, four = i % kFours, y = first_row + row, column = first_column + four * kPixels;
    uint2 words[3]{};
    // Where rows are aligned so are their ends: four pixels lie in the image or beside it, never across.
    if (y >= 0 && y < images.height && column > -kPixels && column < images.width) {
      typename Of::Word read[kNumbers];
      Of::read(images, image, y, column, read);
      float numbers[kNumbers];
#pragma unroll
      for (int n = 0; n < kNumbers; n++) {
        const int at = column + n / kInputs;
        numbers[n] = at >= 0 && at < images.width ? of.number(read[n], n % kInputs) : 0.f;
      }
#pragma unroll
      for (int n = 0; n < 3; n++) {
        words[n] = {fm::pack<T>(numbers[4 * n], numbers[4 * n + 1]), fm::pack<T>(numbers[4 * n + 2], numbers[4 * n + 3])};
      }
    }
#pragma unroll
    for (int n = 0; n < 3; n++) {
      const int byte = (four * kNumbers - kLead + 4 * n) * 2;
      if (byte >= 0 && byte < kBytes) fm::store_shared(pixels + row * Cut::kPitch + byte, words[n]);
    }
  }
}

// A tile's pixels of images of any kind to shared memory, or copies on the way there; arguments as of load_pixels. `first`
// is 8 more than a multiple of 12, so that pixels of raw images are taken from a multiple of four on.
template <typename Cut, typename T, typename Source>
__device__ __forceinline__ void load_images(const Source& images, fm::SharedAddress pixels, int image, int first_row,
                                            int first) {
  if constexpr (std::is_same_v<Source, Images<T>>) load_pixels<Cut>(images, pixels, image, first_row, first);
  else load_raw<Cut, T>(images, pixels, image, first_row, first);
}

}  // namespace fm_stem
