// What the harnesses of both stems make of images as a test gives them.
#pragma once

#include "convolution/raw_pixels.cuh"

struct Given {
  const void* x;
  const float *mean, *scale;
  int64_t source;  // 0 for images of the weights' type, 1 for float32 planes, 2 for bytes
  int height, width;
};

template <typename T, typename With>
void as_source(const Given& given, const With& with) {
  const auto [x, mean, scale, source, height, width] = given;
  if (source == 1) with(fm_stem::make_planes(static_cast<const float*>(x), height, width));
  else if (source == 2) with(fm_stem::make_bytes(static_cast<const uint8_t*>(x), mean, scale, height, width));
  else with(fm_stem::make_images(static_cast<const T*>(x), height, width));
}
