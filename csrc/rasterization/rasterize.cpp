// Z-buffer rasteriser for CPU tensors: threads over the images of the batch and bands of their rows. Every band walks
// the faces in ascending order, so equal depths go to the lowest face index and the result has no race in it.
#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "geometry.h"

namespace fm {
namespace raster {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int32_t kMinBandRows = 16;
// Rows wider than this get their covered span by division; narrower ones are tested pixel by pixel.
constexpr int32_t kSpanWidth = 24;

struct Image {
  int32_t width, height;
  int32_t* face_index;
  float* barycentrics;
  float* depth;
};

// The pixels of one row (relative to the first, inclusive) where value + step * i >= 0.
inline void clip_span(int64_t value, int64_t step, int64_t& first, int64_t& last) {
  if (step > 0) {
    if (value < 0) first = std::max(first, (-value + step - 1) / step);
  } else if (value < 0) {
    last = -1;
  } else if (step < 0) {
    last = std::min(last, value / -step);
  }
}

template <bool kPerspective, typename Int>
void fill_triangle(const Triangle& t, int32_t face, int32_t row_begin, int32_t row_end, const Image& image) {
  const Edges<Int> edges(t);
  const DepthFunction<kPerspective> depth(t);
  const int32_t y_first = std::max(t.y_min, row_begin), y_last = std::min(t.y_max, row_end - 1);
  Int row[3];
  for (int i = 0; i < 3; ++i) row[i] = edge_value<Int>(t, i, t.x_min, y_first);
  for (int32_t y = y_first; y <= y_last; ++y) {
    int64_t first = 0, last = t.x_max - t.x_min;
    if (last >= kSpanWidth) {
      for (int i = 0; i < 3; ++i) clip_span(row[i] + edges.bias[i], edges.step_x[i], first, last);
    }
    const int64_t offset = static_cast<int64_t>(y) * image.width + t.x_min;
    Int w[3];
    for (int i = 0; i < 3; ++i) w[i] = row[i] + static_cast<Int>(first) * edges.step_x[i];
    bool entered = false;
    for (int64_t x = first; x <= last; ++x) {
      if (((w[0] + edges.bias[0]) | (w[1] + edges.bias[1]) | (w[2] + edges.bias[2])) >= 0) {
        entered = true;
        const float z = depth.at(static_cast<float>(w[0]), static_cast<float>(w[1]), static_cast<float>(w[2]));
        if (z < image.depth[offset + x]) {
          image.depth[offset + x] = z;
          image.face_index[offset + x] = face;
        }
      } else if (entered) {
        break;  // a row of a triangle is one span
      }
      for (int i = 0; i < 3; ++i) w[i] += edges.step_x[i];
    }
    for (int i = 0; i < 3; ++i) row[i] += edges.step_y[i];
  }
}

template <bool kPerspective>
void resolve_band(const std::vector<Vertex>& vertices, const Faces& faces, int32_t row_begin, int32_t row_end,
                  const Image& image) {
  Triangle t{};
  int32_t current = -1;
  for (int32_t y = row_begin; y < row_end; ++y) {
    for (int32_t x = 0; x < image.width; ++x) {
      const int64_t pixel = static_cast<int64_t>(y) * image.width + x;
      const int32_t face = image.face_index[pixel];
      float* out = image.barycentrics + 3 * pixel;
      if (face < 0) {
        out[0] = out[1] = out[2] = 0.0f;
        continue;
      }
      if (face != current) {
        int64_t v[3];
        faces.load(face, v);
        setup_triangle(t, vertices[v[0]], vertices[v[1]], vertices[v[2]], image.width, image.height, false);
        current = face;
      }
      const Barycentrics result = barycentrics_at<kPerspective>(t, x, y);
      for (int i = 0; i < 3; ++i) out[i] = result.w[i];
    }
  }
}

template <bool kPerspective>
void rasterize_band(const std::vector<Vertex>& vertices, const Faces& faces, int64_t num_faces, bool cull,
                    int32_t row_begin, int32_t row_end, const Image& image) {
  const int64_t begin = static_cast<int64_t>(row_begin) * image.width;
  const int64_t end = static_cast<int64_t>(row_end) * image.width;
  std::fill(image.depth + begin, image.depth + end, std::numeric_limits<float>::infinity());
  std::fill(image.face_index + begin, image.face_index + end, -1);
  Triangle t{};
  for (int64_t face = 0; face < num_faces; ++face) {
    int64_t v[3];
    if (!faces.load(face, v)) continue;
    if (!setup_triangle(t, vertices[v[0]], vertices[v[1]], vertices[v[2]], image.width, image.height, cull)) continue;
    if (t.y_max < row_begin || t.y_min >= row_end) continue;
    if (t.narrow) {
      fill_triangle<kPerspective, int32_t>(t, static_cast<int32_t>(face), row_begin, row_end, image);
    } else {
      fill_triangle<kPerspective, int64_t>(t, static_cast<int32_t>(face), row_begin, row_end, image);
    }
  }
  resolve_band<kPerspective>(vertices, faces, row_begin, row_end, image);
}

std::tuple<Tensor, Tensor, Tensor> rasterize_cpu(const Tensor& vertices, const Tensor& faces, int64_t height,
                                                 int64_t width, bool cull, bool perspective_correct) {
  STD_TORCH_CHECK(vertices.dim() == 3 && vertices.size(2) == 3 && vertices.is_contiguous() &&
                      vertices.scalar_type() == ScalarType::Float,
                  "rasterize_native: vertices must be contiguous float32 [B, V, 3]");
  STD_TORCH_CHECK(faces.dim() == 2 && faces.size(1) == 3 && faces.is_contiguous() && faces.is_cpu() &&
                      (faces.scalar_type() == ScalarType::Int || faces.scalar_type() == ScalarType::Long),
                  "rasterize_native: faces must be contiguous int32 or int64 [F, 3] on the device of vertices");
  STD_TORCH_CHECK(height >= 1 && height <= kMaxImageSize && width >= 1 && width <= kMaxImageSize,
                  "rasterize_native: height and width must be in 1..", kMaxImageSize);
  STD_TORCH_CHECK(faces.size(0) < std::numeric_limits<int32_t>::max(), "rasterize_native: too many faces");

  const int64_t batch = vertices.size(0), num_vertices = vertices.size(1), num_faces = faces.size(0);
  Tensor face_index = torch::stable::new_empty(vertices, {batch, height, width}, ScalarType::Int);
  Tensor barycentrics = torch::stable::new_empty(vertices, {batch, height, width, 3});
  Tensor depth = torch::stable::new_empty(vertices, {batch, height, width});
  if (batch == 0) return {face_index, barycentrics, depth};

  const float* positions = vertices.const_data_ptr<float>();
  const Faces face_list{faces.data_ptr(), faces.scalar_type() == ScalarType::Long, num_vertices};
  int32_t* face_index_data = face_index.mutable_data_ptr<int32_t>();
  float* barycentrics_data = barycentrics.mutable_data_ptr<float>();
  float* depth_data = depth.mutable_data_ptr<float>();

  // Enough bands to feed the threads when the batch alone does not.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = batch >= 2 * threads ? 1 : (2 * threads + batch - 1) / batch;
  const int64_t bands = threads == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, height / kMinBandRows));
  torch::stable::parallel_for(0, batch * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<Vertex> snapped(num_vertices);
    int64_t snapped_item = -1;
    for (int64_t work = begin; work < end; ++work) {
      const int64_t item = work / bands, band = work % bands;
      if (item != snapped_item) {
        for (int64_t i = 0; i < num_vertices; ++i) snapped[i] = snap_vertex(positions + 3 * (item * num_vertices + i));
        snapped_item = item;
      }
      const int64_t pixels = item * height * width;
      const Image image{static_cast<int32_t>(width), static_cast<int32_t>(height), face_index_data + pixels,
                        barycentrics_data + 3 * pixels, depth_data + pixels};
      const int32_t row_begin = static_cast<int32_t>(height * band / bands);
      const int32_t row_end = static_cast<int32_t>(height * (band + 1) / bands);
      if (perspective_correct) {
        rasterize_band<true>(snapped, face_list, num_faces, cull, row_begin, row_end, image);
      } else {
        rasterize_band<false>(snapped, face_list, num_faces, cull, row_begin, row_end, image);
      }
    }
  });
  return {face_index, barycentrics, depth};
}

}  // namespace
}  // namespace raster
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CPU, m) {
  m.impl("rasterize_native", TORCH_BOX(&fm::raster::rasterize_cpu));
}
