// Rows of the CPU product, compiled once per instruction set (see csrc/common/simd.h). Sums run in the order of the
// entries and in float32 (float64 for float64), whatever the number of threads. No torch or standard templates here:
// their inline functions would be compiled for one instruction set and might be linked into code for another.
#include "upsampling.h"

#include "common/half.h"

#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace FM_SIMD_NS {
namespace {

using fm_upsampling::Element;
using fm_upsampling::Problem;

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const bfloat16_t* p) { return from_bfloat16(p->bits); }
inline float load(const half_t* p) { return from_float16(p->bits); }

inline void store(float* p, float value) { *p = value; }
inline void store(double* p, double value) { *p = value; }
inline void store(bfloat16_t* p, float value) { p->bits = to_bfloat16(value); }
inline void store(half_t* p, float value) { p->bits = to_float16(value); }

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// The entries of one row, from either layout.
template <typename A>
struct Entries {
  const int32_t* columns;
  const A* values;
  int64_t count;
};

template <typename A>
inline Entries<A> entries_of_row(const Problem& p, int64_t row) {
  if (p.ell_columns != nullptr) {
    const int64_t first = row * p.width;
    return {p.ell_columns + first, reinterpret_cast<const A*>(p.ell_values) + first, p.width};
  }
  const int64_t first = p.row_offsets[row];
  return {p.columns + first, static_cast<const A*>(p.values) + first, p.row_offsets[row + 1] - first};
}

// One row with exactly C channels, which stay in registers.
template <typename T, int C>
inline void narrow_row(const Problem& p, const T* x, const Entries<typename Accumulator<T>::type>& entries, T* out) {
  using A = typename Accumulator<T>::type;
  A sums[C] = {};
  for (int64_t e = 0; e < entries.count; ++e) {
    const int64_t column = entries.columns[e];
    if (column < 0) continue;
    const A value = entries.values[e];
    const T* source = x + column * p.token_stride;
    for (int c = 0; c < C; ++c) sums[c] += value * load(source + c * p.channel_stride);
  }
  for (int c = 0; c < C; ++c) store(out + c, sums[c]);
}

constexpr int64_t kTile = 64;  // channels that are summed at a time by wide_row

template <typename T, typename A>
inline void add_scaled(A* sums, const T* source, int64_t stride, A value, int64_t count) {
  if (stride != 1) {
    for (int64_t c = 0; c < count; ++c) sums[c] += value * load(source + c * stride);
    return;
  }
  for (int64_t c = 0; c < count; ++c) sums[c] += value * load(source + c);
}

template <typename T, typename A>
inline void store_all(T* out, const A* sums, int64_t count) {
  for (int64_t c = 0; c < count; ++c) store(out + c, sums[c]);
}

#if defined(__F16C__)
// The compiler does not vectorise the conversion intrinsics, so float16 gets its own eight-wide loops.
inline void add_scaled(float* sums, const half_t* source, int64_t stride, float value, int64_t count) {
  int64_t c = 0;
  if (stride == 1) {
    const __m256 factor = _mm256_set1_ps(value);
    for (; c + 8 <= count; c += 8) {
      const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + c)));
      _mm256_storeu_ps(sums + c, _mm256_fmadd_ps(factor, wide, _mm256_loadu_ps(sums + c)));
    }
  }
  for (; c < count; ++c) sums[c] += value * load(source + c * stride);
}

inline void store_all(half_t* out, const float* sums, int64_t count) {
  int64_t c = 0;
  for (; c + 8 <= count; c += 8) {
    const __m128i narrow = _mm256_cvtps_ph(_mm256_loadu_ps(sums + c), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), narrow);
  }
  for (; c < count; ++c) store(out + c, sums[c]);
}
#endif

// One row with any number of channels, a tile at a time.
template <typename T>
inline void wide_row(const Problem& p, const T* x, const Entries<typename Accumulator<T>::type>& entries, T* out) {
  using A = typename Accumulator<T>::type;
  for (int64_t first = 0; first < p.channels; first += kTile) {
    const int64_t count = p.channels - first < kTile ? p.channels - first : kTile;
    A sums[kTile] = {};
    for (int64_t e = 0; e < entries.count; ++e) {
      const int64_t column = entries.columns[e];
      if (column < 0) continue;
      const T* source = x + column * p.token_stride + first * p.channel_stride;
      add_scaled(sums, source, p.channel_stride, entries.values[e], count);
    }
    store_all(out + first, sums, count);
  }
}

// One row of one batch element.
template <typename T>
inline void any_row(const Problem& p, const T* x, const Entries<typename Accumulator<T>::type>& entries, T* out) {
  switch (p.channels) {
    case 1: return narrow_row<T, 1>(p, x, entries, out);
    case 2: return narrow_row<T, 2>(p, x, entries, out);
    case 3: return narrow_row<T, 3>(p, x, entries, out);
    case 4: return narrow_row<T, 4>(p, x, entries, out);
    default: wide_row<T>(p, x, entries, out);
  }
}

#if defined(__AVX2__)
// Positions in space are the common case: three neighbouring channels are one vector, read without touching a fourth.
inline __m128 load_point(const float* p) { return _mm_maskload_ps(p, _mm_setr_epi32(-1, -1, -1, 0)); }

inline __m128i load_three_words(const void* p) {
  uint32_t low;
  uint16_t high;
  memcpy(&low, p, sizeof low);
  memcpy(&high, static_cast<const char*>(p) + sizeof low, sizeof high);
  return _mm_cvtsi64_si128(static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low));
}

inline __m128 load_point(const half_t* p) { return _mm_cvtph_ps(load_three_words(p)); }

inline __m128 load_point(const bfloat16_t* p) {
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), load_three_words(p)));
}

template <typename T>
inline void store_point(T* out, __m128 point) {
  alignas(16) float values[4];
  _mm_store_ps(values, point);
  for (int c = 0; c < 3; ++c) store(out + c, values[c]);
}

template <typename T, int COUNT>
inline void row_of_points(const Problem& p, const T* x, const Entries<float>& entries, T* out) {
  __m128 sums[COUNT];
  for (int i = 0; i < COUNT; ++i) sums[i] = _mm_setzero_ps();
  for (int64_t e = 0; e < entries.count; ++e) {
    const int64_t column = entries.columns[e];
    if (column < 0) continue;
    const __m128 value = _mm_set1_ps(entries.values[e]);
    const T* source = x + column * p.token_stride;
    for (int i = 0; i < COUNT; ++i) sums[i] = _mm_fmadd_ps(value, load_point(source + i * p.batch_stride), sums[i]);
  }
  for (int i = 0; i < COUNT; ++i) store_point(out + i * p.rows * 3, sums[i]);
}
#endif

// One row of several batch elements.
template <typename T>
inline void row_of_batch(const Problem& p, const T* x, int64_t count,
                         const Entries<typename Accumulator<T>::type>& entries, T* out) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) < sizeof(double)) {
    if (p.channels == 3 && p.channel_stride == 1) {
      constexpr int tile = fm_upsampling::kBatchTile;
      if (count == tile) return row_of_points<T, tile>(p, x, entries, out);
      for (int64_t i = 0; i < count; ++i) {
        row_of_points<T, 1>(p, x + i * p.batch_stride, entries, out + i * p.rows * 3);
      }
      return;
    }
  }
#endif
  for (int64_t i = 0; i < count; ++i) any_row(p, x + i * p.batch_stride, entries, out + i * p.rows * p.channels);
}

template <typename T>
void rows_of_type(const Problem& p, int64_t begin, int64_t end) {
  constexpr int64_t tile = fm_upsampling::kBatchTile;
  for (int64_t unit = begin; unit < end;) {
    const int64_t first = unit / p.rows * tile;  // batch element
    const int64_t count = p.batch - first < tile ? p.batch - first : tile;
    const T* x = static_cast<const T*>(p.x) + first * p.batch_stride;
    T* out = static_cast<T*>(p.out) + first * p.rows * p.channels;
    int64_t row = unit % p.rows;
    const int64_t last = end - unit < p.rows - row ? row + end - unit : p.rows;
    unit += last - row;
    for (; row < last; ++row) {
      row_of_batch(p, x, count, entries_of_row<typename Accumulator<T>::type>(p, row), out + row * p.channels);
    }
  }
}

}  // namespace

void upsample_rows(const Problem& problem, int64_t begin, int64_t end) {
  switch (problem.element) {
    case Element::float32: return rows_of_type<float>(problem, begin, end);
    case Element::float64: return rows_of_type<double>(problem, begin, end);
    case Element::float16: return rows_of_type<half_t>(problem, begin, end);
    case Element::bfloat16: return rows_of_type<bfloat16_t>(problem, begin, end);
  }
}

}  // namespace FM_SIMD_NS
