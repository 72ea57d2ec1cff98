// The arithmetic of the rasteriser, shared word for word by the CPU and the CUDA backend.
//
// Everything here gives the same bits on both and in the PyTorch reference:
//  * coverage is integer arithmetic (vertices snapped to 1/256 pixel, edge functions in int64), so that triangles
//    which share an edge never both cover, nor both miss, a pixel;
//  * a floating-point result is either one rounded float operation or a sum of *exact* double products (a product of
//    two floats is exact in double), so that whether the compiler contracts a*b+c into an fma changes nothing.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FM_RASTER_FN __host__ __device__ __forceinline__
#else
#define FM_RASTER_FN inline
#endif

namespace fm {
namespace raster {

constexpr int kSubpixelBits = 8;
constexpr int32_t kPixel = 1 << kSubpixelBits;
constexpr int32_t kHalfPixel = kPixel / 2;
// |coordinate| <= 2^21 pixels: then every edge function stays below 2^61. Beyond, the triangle is dropped.
constexpr float kCoordinateLimit = 2097152.0f;
constexpr int32_t kInvalid = INT32_MIN;
// Triangles that span less than this (64 pixels) have edge functions that fit in int32 over their whole box.
constexpr int32_t kNarrowExtent = 64 * kPixel;
constexpr int64_t kMaxImageSize = 16384;

struct Vertex {
  int32_t x, y;  // in 1/256 pixel; x == kInvalid marks a vertex that drops its triangles
  float z;
};

FM_RASTER_FN Vertex snap_vertex(const float* position) {
  const float x = position[0], y = position[1], z = position[2];
  // Written so that NaN fails; z must be positive and finite.
  const bool valid = fabsf(x) <= kCoordinateLimit && fabsf(y) <= kCoordinateLimit && z > 0.0f && z <= 3.402823466e38f;
  if (!valid) return Vertex{kInvalid, 0, 0.0f};
  // The product is exact (a power of two); rint rounds halves to even.
  return Vertex{static_cast<int32_t>(rintf(x * kPixel)), static_cast<int32_t>(rintf(y * kPixel)), z};
}

template <typename T>
FM_RASTER_FN T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
FM_RASTER_FN T larger(T a, T b) {
  return a < b ? b : a;
}

struct Triangle {
  Vertex v[3];
  int64_t area;                      // twice the area in 1/65536 pixel^2, positive after orientation
  int32_t sign;                      // -1 where the vertices turn counter-clockwise on the screen
  int32_t x_min, x_max, y_min, y_max;  // pixels whose centre may be inside, inclusive, clipped to the image
  bool narrow;                       // edge functions fit in int32
};

// False: the triangle covers nothing (invalid vertex, no area, culled, or its box holds no pixel centre).
FM_RASTER_FN bool setup_triangle(
    Triangle& t, Vertex a, Vertex b, Vertex c, int32_t width, int32_t height, bool cull) {
  if (a.x == kInvalid || b.x == kInvalid || c.x == kInvalid) return false;
  const int32_t left = smaller(a.x, smaller(b.x, c.x)), right = larger(a.x, larger(b.x, c.x));
  const int32_t top = smaller(a.y, smaller(b.y, c.y)), bottom = larger(a.y, larger(b.y, c.y));
  // The centre of pixel i is at 256 i + 128; >> rounds towards minus infinity.
  t.x_min = larger((left + kHalfPixel - 1) >> kSubpixelBits, 0);
  t.y_min = larger((top + kHalfPixel - 1) >> kSubpixelBits, 0);
  t.x_max = smaller((right - kHalfPixel) >> kSubpixelBits, width - 1);
  t.y_max = smaller((bottom - kHalfPixel) >> kSubpixelBits, height - 1);
  if (t.x_min > t.x_max || t.y_min > t.y_max) return false;
  const int64_t area = static_cast<int64_t>(b.x - a.x) * (c.y - a.y) - static_cast<int64_t>(b.y - a.y) * (c.x - a.x);
  // y points down, so a negative area is a triangle seen counter-clockwise: its front.
  if (area == 0 || (cull && area > 0)) return false;
  t.v[0] = a;
  t.v[1] = b;
  t.v[2] = c;
  t.sign = area < 0 ? -1 : 1;
  t.area = area < 0 ? -area : area;
  t.narrow = right - left < kNarrowExtent && bottom - top < kNarrowExtent;
  return true;
}

// Edge function i (opposite vertex i), positive inside; `bias` is 0 on top and left edges and -1 on the others, so
// that a pixel is covered exactly where value + bias >= 0 for all three.
template <typename Int>
struct Edges {
  Int step_x[3], step_y[3];  // change for one pixel to the right, one pixel down
  Int bias[3];

  FM_RASTER_FN explicit Edges(const Triangle& t) {
    for (int i = 0; i < 3; ++i) {
      const Vertex& from = t.v[(i + 1) % 3];
      const Vertex& to = t.v[(i + 2) % 3];
      const int32_t dx = t.sign * (to.x - from.x), dy = t.sign * (to.y - from.y);
      step_x[i] = -static_cast<Int>(dy) * kPixel;
      step_y[i] = static_cast<Int>(dx) * kPixel;
      bias[i] = (dy < 0 || (dy == 0 && dx > 0)) ? 0 : -1;
    }
  }
};

// The value of edge function i at the centre of a pixel; exact in Int for pixels of the triangle's box.
template <typename Int>
FM_RASTER_FN Int edge_value(const Triangle& t, int i, int32_t pixel_x, int32_t pixel_y) {
  const Vertex& from = t.v[(i + 1) % 3];
  const Vertex& to = t.v[(i + 2) % 3];
  const Int dx = t.sign * (to.x - from.x), dy = t.sign * (to.y - from.y);
  const Int px = pixel_x * kPixel + kHalfPixel - from.x, py = pixel_y * kPixel + kHalfPixel - from.y;
  return dx * py - dy * px;
}

// Depth over a triangle from its edge functions (rounded to float): linear in z, or (perspective) linear in 1/z. Equal
// depths at the vertices give exactly that depth everywhere, and the result never leaves the range of the three.
template <bool kPerspective>
struct DepthFunction {
  float a, b, c, nearest, farthest;

  FM_RASTER_FN explicit DepthFunction(const Triangle& t) {
    const float z0 = t.v[0].z, z1 = t.v[1].z, z2 = t.v[2].z, area = static_cast<float>(t.area);
    nearest = smaller(z0, smaller(z1, z2));
    farthest = larger(z0, larger(z1, z2));
    if (kPerspective) {
      a = nearest / z0 / area;
      b = nearest / z1 / area;
      c = nearest / z2 / area;
    } else {
      a = z0;
      b = (z1 - z0) / area;
      c = (z2 - z0) / area;
    }
  }

  // nearest / depth (perspective)
  FM_RASTER_FN double sum(float w0, float w1, float w2) const {
    return static_cast<double>(w0) * a + static_cast<double>(w1) * b + static_cast<double>(w2) * c;
  }

  FM_RASTER_FN float at(float w0, float w1, float w2) const {
    const double z = kPerspective
        ? static_cast<double>(nearest) / sum(w0, w1, w2)
        : static_cast<double>(a) + static_cast<double>(w1) * b + static_cast<double>(w2) * c;
    return smaller(larger(static_cast<float>(z), nearest), farthest);
  }
};

struct Barycentrics {
  float w[3];
};

// Barycentrics at the centre of a covered pixel, as the output holds them.
template <bool kPerspective>
FM_RASTER_FN Barycentrics barycentrics_at(const Triangle& t, int32_t pixel_x, int32_t pixel_y) {
  const float area = static_cast<float>(t.area);
  float w[3];
  Barycentrics result;
  for (int i = 0; i < 3; ++i) {
    w[i] = static_cast<float>(edge_value<int64_t>(t, i, pixel_x, pixel_y));
    result.w[i] = w[i] / area;
  }
  if (kPerspective) {
    const DepthFunction<true> depth(t);
    const double sum = depth.sum(w[0], w[1], w[2]);
    if (sum > 0.0) {
      result.w[0] = static_cast<float>(static_cast<double>(w[0]) * depth.a / sum);
      result.w[1] = static_cast<float>(static_cast<double>(w[1]) * depth.b / sum);
      result.w[2] = static_cast<float>(static_cast<double>(w[2]) * depth.c / sum);
    }
  }
  return result;
}

// Faces as they come, int32 or int64. Indices out of range drop the face: nothing is ever read out of bounds.
struct Faces {
  const void* data;
  bool wide;  // int64
  int64_t num_vertices;

  FM_RASTER_FN int64_t index(int64_t face, int corner) const {
    return wide ? static_cast<const int64_t*>(data)[3 * face + corner]
                : static_cast<const int32_t*>(data)[3 * face + corner];
  }

  FM_RASTER_FN bool load(int64_t face, int64_t corners[3]) const {
    bool valid = true;
    for (int i = 0; i < 3; ++i) {
      corners[i] = index(face, i);
      valid = valid && corners[i] >= 0 && corners[i] < num_vertices;
    }
    return valid;
  }
};

}  // namespace raster
}  // namespace fm
