// Z-buffer rasteriser for CUDA tensors.
//
// Each pixel holds depth bits and face index packed in 64 bits (positive floats order like their bits), and fragments
// are merged by an atomic minimum, which gives the same result in any order: the nearest, and of equal depths the
// lowest face. A mesh seen at 224 x 224 is mostly triangles of one to three pixels, so one thread takes one triangle;
// what would keep a thread busy for long is handed to its warp, and what would keep a warp busy goes to a work list
// that a second launch spreads over the device. A last kernel writes index, barycentrics and depth of every pixel.
// Nothing waits for the device, so calls can be captured in CUDA graphs.
#include <algorithm>
#include <limits>
#include <tuple>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/cuda.h"
#include "geometry.h"

namespace fm {
namespace raster {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Packed = unsigned long long;

constexpr Packed kEmpty = ~0ull;
constexpr int kThreads = 256;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int64_t kThreadPixels = 48;     // boxes up to this are one thread's work
constexpr int64_t kWarpPixels = 8192;     // and up to this one warp's
constexpr int64_t kListCapacity = 65536;  // triangles; when the list is full, warps keep what they have
constexpr int kParts = 8;                 // a listed triangle's box is cut in kParts x kParts pieces

struct Scene {
  const float* vertices;
  Faces faces;
  int64_t num_faces, num_triangles;  // num_triangles = batch * num_faces
  int32_t width, height;
  bool cull;
  Packed* pixels;
};

struct WorkList {
  unsigned long long* count;
  int64_t* triangles;
};

__device__ bool load_triangle(const Scene& scene, int64_t image, int64_t face, Triangle& t) {
  int64_t corners[3];
  if (!scene.faces.load(face, corners)) return false;
  const float* base = scene.vertices + image * scene.faces.num_vertices * 3;
  return setup_triangle(t, snap_vertex(base + 3 * corners[0]), snap_vertex(base + 3 * corners[1]),
                        snap_vertex(base + 3 * corners[2]), scene.width, scene.height, scene.cull);
}

// Visits the pixels (x0 + i * stride_x, y0 + j * stride_y) of a box (ends inclusive) that lies in the triangle's.
template <bool kPerspective, typename Int>
__device__ void scan_box(const Triangle& t, unsigned face, const Scene& scene, Packed* pixels, int32_t x0, int32_t y0,
                         int32_t x_end, int32_t y_end, int32_t stride_x, int32_t stride_y) {
  if (x0 > x_end || y0 > y_end) return;
  const Edges<Int> edges(t);
  const DepthFunction<kPerspective> depth(t);
  Int row0 = edge_value<Int>(t, 0, x0, y0), row1 = edge_value<Int>(t, 1, x0, y0), row2 = edge_value<Int>(t, 2, x0, y0);
  for (int32_t y = y0; y <= y_end; y += stride_y) {
    Int w0 = row0, w1 = row1, w2 = row2;
    for (int32_t x = x0; x <= x_end; x += stride_x) {
      if (((w0 + edges.bias[0]) | (w1 + edges.bias[1]) | (w2 + edges.bias[2])) >= 0) {
        const float z = depth.at(static_cast<float>(w0), static_cast<float>(w1), static_cast<float>(w2));
        const Packed packed = static_cast<Packed>(__float_as_uint(z)) << 32 | face;
        Packed* pixel = pixels + static_cast<int64_t>(y) * scene.width + x;
        // A stale value can only be larger than the present one, so a lost fragment is lost for certain.
        if (packed < *pixel) atomicMin(pixel, packed);
      }
      w0 += stride_x * edges.step_x[0];
      w1 += stride_x * edges.step_x[1];
      w2 += stride_x * edges.step_x[2];
    }
    row0 += stride_y * edges.step_y[0];
    row1 += stride_y * edges.step_y[1];
    row2 += stride_y * edges.step_y[2];
  }
}

// The lanes of a warp as a tile of 8 x 4 pixels that moves over the box.
template <bool kPerspective>
__device__ void scan_box_by_warp(const Triangle& t, unsigned face, const Scene& scene, Packed* pixels, int32_t x0,
                                 int32_t y0, int32_t x_end, int32_t y_end) {
  const int lane = threadIdx.x % 32;
  const int32_t x = x0 + lane % 8, y = y0 + lane / 8;
  if (t.narrow) {
    scan_box<kPerspective, int32_t>(t, face, scene, pixels, x, y, x_end, y_end, 8, 4);
  } else {
    scan_box<kPerspective, int64_t>(t, face, scene, pixels, x, y, x_end, y_end, 8, 4);
  }
}

template <bool kPerspective>
__global__ void __launch_bounds__(kThreads) triangle_kernel(Scene scene, WorkList list) {
  const int64_t triangle = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t image = triangle / scene.num_faces, face = triangle % scene.num_faces;
  const int64_t image_pixels = static_cast<int64_t>(scene.width) * scene.height;
  bool for_warp = false;
  Triangle t;
  if (triangle < scene.num_triangles && load_triangle(scene, image, face, t)) {
    const int64_t box = static_cast<int64_t>(t.x_max - t.x_min + 1) * (t.y_max - t.y_min + 1);
    for_warp = box > kThreadPixels;
    if (box > kWarpPixels) {
      const unsigned long long slot = atomicAdd(list.count, 1ull);
      if (slot < kListCapacity) {
        list.triangles[slot] = triangle;
        for_warp = false;
      }
    }
    if (box <= kThreadPixels) {
      Packed* pixels = scene.pixels + image * image_pixels;
      const unsigned id = static_cast<unsigned>(face);
      if (t.narrow) {
        scan_box<kPerspective, int32_t>(t, id, scene, pixels, t.x_min, t.y_min, t.x_max, t.y_max, 1, 1);
      } else {
        scan_box<kPerspective, int64_t>(t, id, scene, pixels, t.x_min, t.y_min, t.x_max, t.y_max, 1, 1);
      }
    }
  }
  unsigned waiting = __ballot_sync(kWholeWarp, for_warp);
  while (waiting != 0) {
    const int64_t shared_triangle = __shfl_sync(kWholeWarp, triangle, __ffs(waiting) - 1);
    waiting &= waiting - 1;
    const int64_t shared_image = shared_triangle / scene.num_faces, shared_face = shared_triangle % scene.num_faces;
    load_triangle(scene, shared_image, shared_face, t);
    scan_box_by_warp<kPerspective>(t, static_cast<unsigned>(shared_face), scene,
                                   scene.pixels + shared_image * image_pixels, t.x_min, t.y_min, t.x_max, t.y_max);
  }
}

// The work list: warps take pieces of the listed triangles' boxes in turn and skip those that lie outside an edge.
template <bool kPerspective>
__global__ void __launch_bounds__(kThreads) large_triangle_kernel(Scene scene, WorkList list) {
  const int64_t listed = static_cast<int64_t>(smaller<unsigned long long>(*list.count, kListCapacity));
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  const int64_t image_pixels = static_cast<int64_t>(scene.width) * scene.height;
  int64_t piece = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  for (; piece < listed * kParts * kParts; piece += warps) {
    const int64_t triangle = list.triangles[piece / (kParts * kParts)];
    const int64_t image = triangle / scene.num_faces, face = triangle % scene.num_faces;
    Triangle t;
    load_triangle(scene, image, face, t);
    const int32_t part_x = piece % kParts, part_y = piece / kParts % kParts;
    const int32_t box_width = t.x_max - t.x_min + 1, box_height = t.y_max - t.y_min + 1;
    const int32_t x0 = t.x_min + box_width * part_x / kParts, x_end = t.x_min + box_width * (part_x + 1) / kParts - 1;
    const int32_t y0 = t.y_min + box_height * part_y / kParts, y_end = t.y_min + box_height * (part_y + 1) / kParts - 1;
    if (x0 > x_end || y0 > y_end) continue;
    const Edges<int64_t> edges(t);
    bool outside = false;
    for (int i = 0; i < 3; ++i) {
      // The largest value of the edge function over the piece is at one of its corners.
      const int32_t x = edges.step_x[i] > 0 ? x_end : x0, y = edges.step_y[i] > 0 ? y_end : y0;
      outside = outside || edge_value<int64_t>(t, i, x, y) + edges.bias[i] < 0;
    }
    if (outside) continue;
    scan_box_by_warp<kPerspective>(t, static_cast<unsigned>(face), scene, scene.pixels + image * image_pixels, x0, y0,
                                   x_end, y_end);
  }
}

template <bool kPerspective>
__global__ void __launch_bounds__(kThreads)
    resolve_kernel(Scene scene, int64_t num_pixels, int32_t* face_index, float* barycentrics, float* depth) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= num_pixels) return;
  const Packed packed = scene.pixels[pixel];
  Barycentrics weights{{0.0f, 0.0f, 0.0f}};
  int32_t face = -1;
  float z = __uint_as_float(0x7f800000u);
  if (packed != kEmpty) {
    const int64_t image_pixels = static_cast<int64_t>(scene.width) * scene.height;
    const int64_t image = pixel / image_pixels;
    const int32_t within = static_cast<int32_t>(pixel - image * image_pixels);
    face = static_cast<int32_t>(packed & 0xffffffffu);
    z = __uint_as_float(static_cast<unsigned>(packed >> 32));
    Triangle t;
    load_triangle(scene, image, face, t);
    weights = barycentrics_at<kPerspective>(t, within % scene.width, within / scene.width);
  }
  face_index[pixel] = face;
  depth[pixel] = z;
  for (int i = 0; i < 3; ++i) barycentrics[3 * pixel + i] = weights.w[i];
}

unsigned blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "rasterize_native: the batch is too large");
  return static_cast<unsigned>(blocks);
}

template <bool kPerspective>
void launch(const Scene& scene, int64_t num_pixels, const WorkList& list, int32_t* face_index, float* barycentrics,
            float* depth, int device, cudaStream_t stream) {
  STD_CUDA_CHECK(cudaMemsetAsync(scene.pixels, 0xff, num_pixels * sizeof(Packed), stream));
  if (scene.num_triangles > 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(list.count, 0, sizeof(*list.count), stream));
    triangle_kernel<kPerspective><<<blocks_for(scene.num_triangles), kThreads, 0, stream>>>(scene, list);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (static_cast<int64_t>(scene.width) * scene.height > kWarpPixels) {
      int processors = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
      large_triangle_kernel<kPerspective><<<2 * processors, kThreads, 0, stream>>>(scene, list);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  resolve_kernel<kPerspective>
      <<<blocks_for(num_pixels), kThreads, 0, stream>>>(scene, num_pixels, face_index, barycentrics, depth);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> rasterize_cuda(const Tensor& vertices, const Tensor& faces, int64_t height,
                                                  int64_t width, bool cull, bool perspective_correct) {
  STD_TORCH_CHECK(vertices.dim() == 3 && vertices.size(2) == 3 && vertices.is_contiguous() &&
                      vertices.scalar_type() == ScalarType::Float,
                  "rasterize_native: vertices must be contiguous float32 [B, V, 3]");
  STD_TORCH_CHECK(faces.dim() == 2 && faces.size(1) == 3 && faces.is_contiguous() && faces.is_cuda() &&
                      faces.get_device_index() == vertices.get_device_index() &&
                      (faces.scalar_type() == ScalarType::Int || faces.scalar_type() == ScalarType::Long),
                  "rasterize_native: faces must be contiguous int32 or int64 [F, 3] on the device of vertices");
  STD_TORCH_CHECK(height >= 1 && height <= kMaxImageSize && width >= 1 && width <= kMaxImageSize,
                  "rasterize_native: height and width must be in 1..", kMaxImageSize);
  STD_TORCH_CHECK(faces.size(0) < std::numeric_limits<int32_t>::max(), "rasterize_native: too many faces");

  const torch::stable::accelerator::DeviceGuard guard(vertices.get_device_index());
  const int64_t batch = vertices.size(0), num_faces = faces.size(0), num_pixels = batch * height * width;
  Tensor face_index = torch::stable::new_empty(vertices, {batch, height, width}, ScalarType::Int);
  Tensor barycentrics = torch::stable::new_empty(vertices, {batch, height, width, 3});
  Tensor depth = torch::stable::new_empty(vertices, {batch, height, width});
  if (num_pixels == 0) return {face_index, barycentrics, depth};

  const int64_t capacity = std::min(kListCapacity, batch * num_faces);
  Tensor pixels = torch::stable::new_empty(vertices, {num_pixels}, ScalarType::Long);
  Tensor work = torch::stable::new_empty(vertices, {1 + capacity}, ScalarType::Long);
  int64_t* work_data = work.mutable_data_ptr<int64_t>();
  const WorkList list{reinterpret_cast<unsigned long long*>(work_data), work_data + 1};
  const Scene scene{vertices.const_data_ptr<float>(),
                    Faces{faces.data_ptr(), faces.scalar_type() == ScalarType::Long, vertices.size(1)},
                    num_faces,
                    batch * num_faces,
                    static_cast<int32_t>(width),
                    static_cast<int32_t>(height),
                    cull,
                    reinterpret_cast<Packed*>(pixels.mutable_data_ptr<int64_t>())};
  const auto run = perspective_correct ? launch<true> : launch<false>;
  run(scene, num_pixels, list, face_index.mutable_data_ptr<int32_t>(), barycentrics.mutable_data_ptr<float>(),
      depth.mutable_data_ptr<float>(), vertices.get_device_index(), current_stream(vertices));
  return {face_index, barycentrics, depth};
}

}  // namespace
}  // namespace raster
}  // namespace fm

STABLE_TORCH_LIBRARY_IMPL(fastmetro_kernels, CUDA, m) {
  m.impl("rasterize_native", TORCH_BOX(&fm::raster::rasterize_cuda));
}
