// Rows of matrices, of any dtype and strides: asked for, read, written, and finished from their sums.
#pragma once

#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace routed_peft::cpu {

// Bytes of a matrix that a cache hardly has before it is read or written.
constexpr int64_t kFar = 1 << 21;

// rows × cols from (i, j) on are about to be read or written: their way into the cache overlaps with what is computed.
// Inlined, since gcc drops calls of a function that only asks for memory.
[[gnu::always_inline]] inline void expect(const Matrix& m, int64_t i, int64_t j, int64_t rows, int64_t cols) {
  const char* at = static_cast<const char*>(m.at(i, j));
  const int64_t size = element_size(m.dtype), line = m.row_stride * size, bytes = cols * size;
  for (int64_t row = 0; row < rows; ++row, at += line) {
    for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(at + byte);
  }
}

// out [m, n] = rows of bias (zero where absent), plus residual.
template <class Acc>
void fill_rows(const Host& host, const Matrix& out, const Matrix& bias, const Matrix& residual);

// out [1, n] (+)= column sums of the valid rows of a.
template <class Acc>
void column_sums(const Host& host, const Matrix& out, const Matrix& a, bool accumulate, const bool* valid = nullptr);

// A row of a matrix, or a part of it, as Acc, dropped and scaled; and back. Any column stride.
template <class Acc>
void load_row(const Matrix& m, int64_t row, int64_t column, int64_t n, Acc* to, const Dropout& dropout = {});
template <class Acc>
void store_row(const Acc* from, const Matrix& m, int64_t row, int64_t column, int64_t n);

// Rows [i0, i0 + rows) of columns [j0, j0 + cols) of out, from their sums [rows, ld], which are overwritten.
template <class Acc>
void finish(const Matrix& out, int64_t i0, int64_t j0, int64_t rows, int64_t cols, Acc* sums, int64_t ld,
            const Epilogue& epilogue);

}  // namespace routed_peft::cpu
