// C (+)= A B for the small matrices of dense hub rows and columns: 14 hubs, 16 rows of a block, one head.
// One register-blocked kernel serves scores, weighted sums and transposed weighted sums: A is read element by element
// with any two strides, B and C by vectors along their rows.
#pragma once

#include "attention/vector_math.h"

namespace FM_SIMD_NS::attention {

template <class A>
struct Operands {
  const A* a;
  int64_t a_row, a_col;  // A[m][k] = a[m * a_row + k * a_col]
  const A* b;
  int64_t b_row;  // B[k][n] = b[k * b_row + n]
  A* c;
  int64_t c_row;  // C[m][n] = c[m * c_row + n]
  int depth;      // number of k
  bool accumulate;
};

template <int ROWS, int VECTORS, class A>
inline __attribute__((always_inline)) void gemm_tile(const Operands<A>& op, int64_t m, int64_t n) {
  constexpr int lanes = kLanes<A>;
  Vec<A> sum[ROWS][VECTORS];
  const A* a = op.a + m * op.a_row;
  const A* b = op.b + n;
  A* c = op.c + m * op.c_row + n;
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < VECTORS; ++j) {
      sum[i][j] = op.accumulate ? load(c + i * op.c_row + j * lanes) : Vec<A>{};
    }
  }
  for (int k = 0; k < op.depth; ++k, a += op.a_col, b += op.b_row) {
    Vec<A> row[VECTORS];
    for (int j = 0; j < VECTORS; ++j) row[j] = load(b + j * lanes);
    for (int i = 0; i < ROWS; ++i) {
      const A x = a[i * op.a_row];
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < VECTORS; ++j) store(c + i * op.c_row + j * lanes, sum[i][j]);
  }
}

template <int VECTORS, class A>
inline void gemm_panel(const Operands<A>& op, int rows, int64_t n) {
  // As many independent sums as hide the latency of a multiply-add, without running out of registers.
  constexpr int block = VECTORS == 1 ? 8 : (kVectorBytes == 64 && VECTORS == 2) ? 8 : 4;
  int m = 0;
  for (; m + block <= rows; m += block) gemm_tile<block, VECTORS>(op, m, n);
  if constexpr (block == 8) {
    for (; m + 4 <= rows; m += 4) gemm_tile<4, VECTORS>(op, m, n);
  }
  for (; m + 2 <= rows; m += 2) gemm_tile<2, VECTORS>(op, m, n);
  for (; m < rows; ++m) gemm_tile<1, VECTORS>(op, m, n);
}

// C has `rows` rows and `width` columns; width is a multiple of the vector length.
template <class A>
inline void small_gemm(const Operands<A>& op, int rows, int width) {
  constexpr int lanes = kLanes<A>;
  int n = 0;
  if constexpr (kVectorBytes == 64) {
    for (; n + 4 * lanes <= width; n += 4 * lanes) gemm_panel<4>(op, rows, n);
  }
  for (; n + 2 * lanes <= width; n += 2 * lanes) gemm_panel<2>(op, rows, n);
  for (; n < width; n += lanes) gemm_panel<1>(op, rows, n);
}

}  // namespace FM_SIMD_NS::attention
