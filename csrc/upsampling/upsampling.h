// The CPU product  out[b, m, c] = sum_e values[e] * x[b, columns[e], c]  as the dispatching file hands it to the
// SIMD files. Plain pointers only: the SIMD files are compiled for several instruction sets and must not share inline
// functions with the rest of the program.
#pragma once

#include <cstdint>

namespace fm_upsampling {

enum class Element : int { float32, float64, float16, bfloat16 };

struct Problem {
  Element element;
  const void* x;  // [batch, *, channels], strides in elements, of any sign and size
  int64_t batch_stride, token_stride, channel_stride;
  void* out;  // [batch, rows, channels], contiguous
  int64_t batch, rows, channels;
  // CSR, or the padded table (ELL) when ell_columns is not null: [rows, width], column -1 marks an empty slot.
  const int32_t* row_offsets;
  const int32_t* columns;
  const void* values;  // float, or double for Element::float64
  const int32_t* ell_columns;
  const float* ell_values;
  int64_t width;
};

constexpr int64_t kBatchTile = 8;  // batch elements that share one reading of a row's indices and values

}  // namespace fm_upsampling

// Computes the units begin <= t * rows + m < end: row m of the batch elements t * kBatchTile to (t + 1) * kBatchTile - 1.
// Rows are independent, so any split gives the same bits.
#define FM_DECLARE_UPSAMPLE_ROWS(NS) \
  namespace NS {                     \
  void upsample_rows(const fm_upsampling::Problem& problem, int64_t begin, int64_t end); \
  }
FM_DECLARE_UPSAMPLE_ROWS(isa_baseline)
#ifdef FM_HAVE_X86
FM_DECLARE_UPSAMPLE_ROWS(isa_avx2)
FM_DECLARE_UPSAMPLE_ROWS(isa_avx512)
#endif
#undef FM_DECLARE_UPSAMPLE_ROWS
