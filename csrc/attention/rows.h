// Reading and writing tensor rows of every storage type, and the passes over lists of neighbours.
#pragma once

#include "attention/problem.h"
#include "attention/vector_math.h"
#include "common/half.h"

namespace FM_SIMD_NS::attention {

using namespace fm::attention;

template <class A>
inline const A* row_of(const Rows<A>& rows, int64_t batch, int64_t token, int64_t head) {
  return rows.data + batch * rows.batch + token * rows.token + head * rows.head;
}

// `dim` elements of a row, then zeros up to padded_dim.
template <class A>
inline void read_row(const void* data, Storage storage, int64_t offset, int64_t stride, int dim, int padded_dim,
                     A* target) {
  switch (storage) {
    case Storage::f32: {
      const float* source = static_cast<const float*>(data) + offset;
      for (int d = 0; d < dim; ++d) target[d] = static_cast<A>(source[d * stride]);
      break;
    }
    case Storage::f64: {
      const double* source = static_cast<const double*>(data) + offset;
      for (int d = 0; d < dim; ++d) target[d] = static_cast<A>(source[d * stride]);
      break;
    }
    case Storage::f16: {
      const uint16_t* source = static_cast<const uint16_t*>(data) + offset;
      int d = 0;
#if defined(__F16C__)
      if constexpr (sizeof(A) == 4) {
        for (; stride == 1 && d + 8 <= dim; d += 8) {
          _mm256_storeu_ps(target + d, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(source + d))));
        }
      }
#endif
      for (; d < dim; ++d) target[d] = from_float16(source[d * stride]);
      break;
    }
    case Storage::bf16: {
      const uint16_t* source = static_cast<const uint16_t*>(data) + offset;
      if (stride == 1) {
        for (int d = 0; d < dim; ++d) target[d] = from_bfloat16(source[d]);
      } else {
        for (int d = 0; d < dim; ++d) target[d] = from_bfloat16(source[d * stride]);
      }
      break;
    }
  }
  for (int d = dim; d < padded_dim; ++d) target[d] = A(0);
}

template <class A>
inline void write_row(void* data, Storage storage, int64_t offset, const A* row, int dim) {
  switch (storage) {
    case Storage::f32:
      for (int d = 0; d < dim; ++d) static_cast<float*>(data)[offset + d] = static_cast<float>(row[d]);
      break;
    case Storage::f64:
      for (int d = 0; d < dim; ++d) static_cast<double*>(data)[offset + d] = static_cast<double>(row[d]);
      break;
    case Storage::f16: {
      uint16_t* target = static_cast<uint16_t*>(data) + offset;
      int d = 0;
#if defined(__F16C__)
      if constexpr (sizeof(A) == 4) {
        for (; d + 8 <= dim; d += 8) {
          _mm_storeu_si128((__m128i*)(target + d), _mm256_cvtps_ph(_mm256_loadu_ps(row + d), 0));
        }
      }
#endif
      for (; d < dim; ++d) target[d] = to_float16(static_cast<float>(row[d]));
      break;
    }
    case Storage::bf16:
      for (int d = 0; d < dim; ++d) {
        static_cast<uint16_t*>(data)[offset + d] = to_bfloat16(static_cast<float>(row[d]));
      }
      break;
  }
}

template <class A>
void pack_rows(const Source& source, int64_t batch, int64_t head, int64_t first, int64_t tokens, int dim,
               int padded_dim, A* target) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t offset = batch * source.batch + (first + t) * source.token + head * source.head;
    read_row(source.data, source.storage, offset, source.dim, dim, padded_dim, target + t * padded_dim);
  }
}

// The neighbours of one vertex: rows base + vertex[j] * stride, j < count.
template <class A>
struct Neighbors {
  const A* base;
  int64_t stride;
};

// Asks for the rows of a vertex that comes next: lists of neighbours jump about in memory, and a row takes less time
// than a trip to it.
template <class A>
inline void prefetch_neighbors(Neighbors<A> rows, const int32_t* vertex, int64_t count, int width) {
  constexpr int line = 64 / static_cast<int>(sizeof(A));
  for (int64_t j = 0; j < count; ++j) {
    const A* row = rows.base + vertex[j] * rows.stride;
    for (int d = 0; d < width; d += line) __builtin_prefetch(row + d);
  }
}

// score[j] = x . row(j); writes up to the next multiple of 4.
template <class A>
inline void neighbor_dots(A* score, const A* x, Neighbors<A> rows, const int32_t* vertex, int64_t count, int width) {
  for (int64_t j = 0; j < count; j += 4) {
    const int64_t last = count - 1;
    const A* r0 = rows.base + vertex[j] * rows.stride;
    const A* r1 = rows.base + vertex[j + 1 < last ? j + 1 : last] * rows.stride;
    const A* r2 = rows.base + vertex[j + 2 < last ? j + 2 : last] * rows.stride;
    const A* r3 = rows.base + vertex[j + 3 < last ? j + 3 : last] * rows.stride;
    Vec<A> sum[4] = {};
    for (int d = 0; d < width; d += kLanes<A>) {
      const Vec<A> xd = load(x + d);
      sum[0] += xd * load(r0 + d);
      sum[1] += xd * load(r1 + d);
      sum[2] += xd * load(r2 + d);
      sum[3] += xd * load(r3 + d);
    }
    sum_lanes_of_four(sum, score + j);
  }
}

template <int VECTORS, class A>
inline void add_neighbor_columns(A* total, const A* weight, const A* base, int64_t stride, const int32_t* vertex,
                                 int64_t count) {
  Vec<A> sum[VECTORS];
  for (int i = 0; i < VECTORS; ++i) sum[i] = load(total + i * kLanes<A>);
  for (int64_t j = 0; j < count; ++j) {
    const A* row = base + vertex[j] * stride;
    const A w = weight[j];
    for (int i = 0; i < VECTORS; ++i) sum[i] += w * load(row + i * kLanes<A>);
  }
  for (int i = 0; i < VECTORS; ++i) store(total + i * kLanes<A>, sum[i]);
}

// total += sum over j of weight[j] * row(j).
template <class A>
inline void add_neighbors(A* total, const A* weight, Neighbors<A> rows, const int32_t* vertex, int64_t count,
                          int width) {
  constexpr int lanes = kLanes<A>;
  int d = 0;
  for (; d + 4 * lanes <= width; d += 4 * lanes) {
    add_neighbor_columns<4>(total + d, weight, rows.base + d, rows.stride, vertex, count);
  }
  for (; d < width; d += lanes) {
    add_neighbor_columns<1>(total + d, weight, rows.base + d, rows.stride, vertex, count);
  }
}

}  // namespace FM_SIMD_NS::attention
